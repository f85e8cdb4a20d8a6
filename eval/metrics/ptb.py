"""The tokenizer of the COCO caption scores: Penn Treebank tokens in lower case without punctuation.

The official scores (pycocoevalcap) run the Java class edu.stanford.nlp.process.PTBTokenizer of CoreNLP 3.4.1 with
-preserveLines -lowerCase and then drop a list of punctuation marks. This file gives the same strings without Java for
text as it occurs in captions; it was written from that program's output, not from its source. It is used where Java is
not installed. What captions do not contain (phone numbers in brackets, mark-up with blanks inside, most emoticons) is
not reproduced.

Kept as they are, because the scores depend on them:
  - brackets become words ("-lrb-"): the official list of marks to drop has them in capitals only;
  - "!?" and the like are one mark that is on no list, so they stay;
  - a full stop after a word stays with it before "," ";" or ":" ("dog., man" -> "dog. man").
"""

import re
from functools import lru_cache

# Marks that pycocoevalcap drops after tokenizing.
DROPPED = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Marks that are written in another way.
QUOTES = {"‘": "`", "’": "'", "“": "``", "”": "''", '"': "''", "«": "``", "»": "''", "…": "...", "–": "--", "—": "--"}
SIGNS = {"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
REWRITTEN = BRACKETS | QUOTES | SIGNS
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'"}
# Where words that are two tokens are cut, by the name of their pattern.
CUTS = {"three": 3, "itis": 2, "more": 4, "you": 2}

# Abbreviations that keep their full stop. Single letters and initials ("u.s.", "p.m.") do so too.
SHORTENED = """
    al|cf|co|ct|dr|ft|ga|jr|ky|lt|md|mo|mr|ms|mt|ph|rd|rt|sq|sr|st|va|vs|vt|wm|adj|adm|adv|ala|apr|aug|ave|bhd|cie|col
    |cos|cpl|dak|dec|det|drs|ens|esq|est|etc|ext|feb|fla|fri|gen|gov|hon|inc|ind|jan|jos|jul|jun|kan|ltd|maj|mar|mfg
    |mme|mon|mrs|mtg|neb|nev|nov|oct|pfc|plc|pte|pty|pvt|rep|rev|sen|sep|seq|sfc|sgt|spc|ste|sys|tel|thu|tue|wed|wis
    |wyo|alex|ariz|assn|asst|atty|bldg|blvd|brig|bros|capt|cmdr|colo|conn|corp|dept|elec|govs|insp|intl|invt|kans|mich
    |minn|mlle|mont|msgr|natl|okla|penn|ppte|ppty|pres|prof|ptes|ptys|reps|sens|sept|supt|tenn|tues|univ|wisc|assoc
    |attys|bancorp|calif|comdr|messrs|lieut|profs|supts|thurs|treas
"""
# These only with a capital letter, as without it they are words.
STATES = ("Ark", "Az", "Del", "Ill", "La", "Mass", "Miss", "Ore", "Pa", "Tex", "Wash")
# These only before a number.
NUMBERED = ("ca", "no", "nos", "op", "pp", "art", "fig", "figs", "prop")

# Letters and digits of words; fractions and raised digits stand alone although Unicode counts them as word characters.
ODD = "_½¼¾⅓⅔⅛⅜⅝⅞¹²³"
LETTER = rf"[^\W\d{ODD}]"
CHARACTER = rf"(?:[^\W{ODD}]|[\u0300-\u036f])"
MARK = "['’`]"
APOSTROPHE = "['’]"
END = rf"(?!{CHARACTER})"
ABBREVIATION = rf"(?:{SHORTENED}|[a-z](?:\.[a-z])*|(?:ph|ed)\.d)\."
STATE = rf"(?-i:{'|'.join(state[0] + ''.join(f'[{c}{c.upper()}]' for c in state[1:]) for state in STATES)})\."

# In the order in which they are tried.
TOKEN = re.compile(
    rf"""
      (?P<entity> &(?:amp|lt|gt|quot|apos); )
    | (?P<lost> &nbsp; | [\U00010000-\U0010ffff\ufe0f\ufeff\u200b-\u200f‐-―‛‹›] )
    | (?P<tag> </?[a-z][^<>\s]*> )
    | (?P<address>
        (?:https?://|www\.)[^\s"<>|()]+[^\s"<>|().,!?;:-] | [\w.%+-]+@[\w-]+(?:\.[\w-]+)+ | @[a-z_]\w* | \#{LETTER}+
      )
    | (?P<smile> [:;=]-?[()] | [:;]-?\] | [:;=]-?D{END} | :P{END} )
    | (?P<three> (?:cannot|gonna|gotta|lemme|gimme|wanna)(?!\w|['’-]\w) )
    | (?P<itis> 't(?:is|was){END} ) | (?P<more> more'n{END} ) | (?P<you> y{APOSTROPHE}all{END} )
    | (?P<keep>
        {APOSTROPHE}n{APOSTROPHE} | {APOSTROPHE}\d\d(?:s{END}|(?=\s|$)) | {APOSTROPHE}(?:em|n|cause|til+){END}
        | (?:o{APOSTROPHE}clock|ma{APOSTROPHE}am|n?e{APOSTROPHE}er){END}
        | (?:s{APOSTROPHE}mores|c{APOSTROPHE}mon|li{APOSTROPHE}l){END}
        | (?:[dolj]|qu){APOSTROPHE}{LETTER}{CHARACTER}* | ol{APOSTROPHE}{END}
        | (?-i:[A-Z]+&[A-Z]+) | c\+\+ | [cf]\#{END} | (?-i:US|HK|NZ|[ACS])\$ | &\#\d+;
      )
    | (?P<negated> {LETTER}+?(?=n{MARK}t{END}) )
    | (?P<clitic> n{MARK}t{END} | '(?:s|d|m|re|ve|ll)(?!{LETTER}) | ’(?:s|d|m|re|ve|ll) )
    | (?P<slashed> [a-z0-9]+(?:-[a-z]+){{0,2}}(?:/[a-z0-9]+(?:-[a-z]+){{0,2}}){{1,2}}{END} )
    | (?P<hyphened>
        [a-z0-9][a-z0-9.,]*(?:-(?:[a-z](?:\.[a-z])+\.|[a-z0-9]+{END}))+ | {LETTER}{CHARACTER}*(?:[-‐‑]{CHARACTER}+)+
      )
    | (?P<mixed> \d+\ \d+/\d+ )
    | (?P<number> [+-]?\d*(?:[.:,]\d+)+ | [+-]\d+ | \d+{END} )
    | (?P<short> (?:{ABBREVIATION}|{STATE})(?!{LETTER}) )
    | (?P<numbered> (?:{"|".join(NUMBERED)})\.(?=\s*\d) )
    | (?P<stopped> {LETTER}{CHARACTER}*\.(?=[,;:]) )
    | (?P<word> {CHARACTER}+(?:_{CHARACTER}+)+ | {LETTER}{CHARACTER}*(?:[.!?]{LETTER}{CHARACTER}*)* | {CHARACTER}+ )
    | (?P<run> \.\.\.|\.\ \.\ \.|[!?]{{2,}}|-{{2,}}|\'\'|``|\*{{2,}}|\#{{2,}}|@{{2,}}|<<|>>|_+ )
    | (?P<mark> \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> str:
    """A caption's tokens with a blank between them, as pycocoevalcap's tokenizer gives them."""
    return " ".join(token for token in treebank(caption) if token not in DROPPED)


@lru_cache(maxsize=1 << 16)
def treebank(caption: str) -> tuple[str, ...]:
    """All tokens in lower case, punctuation included; quotes may stand as "''" where the official ones are "``"."""
    tokens: list[str] = []
    for found in TOKEN.finditer(caption.replace("\N{SOFT HYPHEN}", "")):
        kind, text = found.lastgroup, found.group().lower()
        if kind == "lost":
            continue
        if kind in CUTS:
            tokens.append(text[: CUTS[kind]])
            text = text[CUTS[kind] :]
        elif kind == "entity":
            text = ENTITIES[text]
        elif kind == "clitic":
            text = text.replace("’", "'")
        elif kind == "mixed":
            text = text.replace(" ", "\N{NO-BREAK SPACE}")
        elif kind == "smile":
            text = text.replace("(", BRACKETS["("]).replace(")", BRACKETS[")"])
        elif kind == "run" and text[0] == "-":
            text = "--"
        elif kind == "mark":
            text = REWRITTEN.get(text, text)
        tokens.append(text)
    return tuple(tokens)
