"""Caption scores against several references: CIDEr, BLEU-1 to -4, ROUGE-L, and METEOR where Java is installed.

Official scorer: pycocoevalcap 1.2 (the COCO caption evaluation), which lmms-eval uses as well. The numbers here come
from this package, which is imported only when it is needed. Its CIDEr, BLEU and ROUGE-L are Python. Its tokenizer and
METEOR are Java programs: without Java, `tokenize_ptb` gives the same tokens and METEOR is not computed.

All numbers are in points, times 100, as papers print them. Differs from the official scorer:
  - line breaks inside a caption become blanks: the package passes all captions to its tokenizer as lines of one file,
    so that a carriage return would shift the captions of all later images;
  - SPICE is not computed; lmms-eval leaves it out too.

The tokenizer: the official scorer runs the Java class edu.stanford.nlp.process.PTBTokenizer (Penn Treebank tokens) of
CoreNLP 3.4.1 with -preserveLines -lowerCase and then drops a list of punctuation marks. `tokenize_ptb` gives the same
strings without Java for text that occurs in captions. It was written from that program's output, not from its source,
and does not reproduce what captions do not contain: phone numbers in brackets, mark-up with blanks inside, most
emoticons. These oddities are kept, because the scores depend on them:
  - brackets become words ("-lrb-"), because the official list of marks to drop has them in capitals only;
  - "!?" and similar runs are one mark that is on no list, so they stay;
  - a full stop stays with its word before "," ";" or ":" ("dog., man" -> "dog. man").
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import version

from eval.metrics import WORDS, Score, first_names, ratio_terms
from eval.metrics.accuracy import grouped
from llava.errors import UserError, optional_imports

LINE_BREAKS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Image id -> captions; a scored caption is a list of one.
Captions = Mapping[str, Sequence[str]]

# With fewer images CIDEr cannot tell rare words from common ones; this is the size of the papers' test set.
FEW_IMAGES = 1000


def captions_score(
    references: Mapping[str, Sequence[str]],
    captions: Mapping[str, str],
    domains: Mapping[str, str] | None = None,
    java: bool | None = None,
) -> Score:
    """Score captions against their references.

    Args:
        references: image id -> raw reference captions. Only images in `captions` count, also for CIDEr's word weights.
        captions: image id -> raw caption.
        domains: image id -> part of the set. The CIDEr of a part is the mean over its images, with the word weights of
            all images.
        java: whether to run the official tokenizer and METEOR, which are Java programs; None decides by whether Java is
            installed.
    """
    check_installed()
    if lost := [name for name in captions if not references.get(name)]:
        raise UserError(f"{len(lost):,} captions are of images without references: {first_names(lost)}.")
    java = has_java() if java is None else java
    one_line = partial(LINE_BREAKS.sub, " ")
    known = tokenize({name: list(map(one_line, references[name])) for name in captions}, java)
    said = tokenize({name: [one_line(text)] for name, text in captions.items()}, java)
    terms = ratio_terms(cider(known, said), unit="image")
    values: dict[str, float | None] = {"cider": float(terms.value(terms.sums.sum(0)))}
    values |= {f"bleu_{n}": 100 * value for n, value in enumerate(bleu(known, said), start=1)}
    values["meteor"] = 100 * meteor(known, said) if java else None
    values["rouge_l"] = 100 * rouge_l(known, said)
    notes = [] if java else ["METEOR is not computed: it needs Java"]
    if len(captions) < FEW_IMAGES:
        notes.append(
            f"CIDEr weighs words by how many of the {len(captions):,} scored images have them: "
            "it is not comparable with that of the whole set"
        )
    by_image = dict(zip(terms.names, map(float, terms.sums[:, 0]), strict=True))
    groups = {"domain": grouped(by_image, {name: domains[name] for name in by_image})} if domains else {}
    return Score(values, groups, {}, tuple(notes), "cider", frozenset({*values, *groups}), terms)


def has_java() -> bool:
    """Whether Java is installed, so that the official tokenizer and METEOR can run."""
    return shutil.which("java") is not None


def described() -> str:
    """Name and version of the scorer and its tokenizer, for results."""
    check_installed()
    tokenizer = "its own tokenizer" if has_java() else "this repository's tokenizer, no METEOR: Java is not installed"
    return f"pycocoevalcap {version('pycocoevalcap')} with {tokenizer}"


def check_installed() -> None:
    with optional_imports():
        import pycocoevalcap  # noqa: F401


def tokenize(captions: Captions, java: bool) -> dict[str, list[str]]:
    """Image id -> captions as tokens separated by blanks.

    Args:
        captions: without line breaks.
        java: run the official tokenizer.
    """
    if not java:
        return {name: [tokenize_ptb(text) for text in texts] for name, texts in captions.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        tokens: dict[str, list[str]] = PTBTokenizer().tokenize(
            {name: [{"caption": text} for text in texts] for name, texts in captions.items()}
        )
    except OSError as error:
        raise UserError(f"pycocoevalcap's tokenizer failed ({error}); its folder must be writable.") from error
    if {name: len(texts) for name, texts in tokens.items()} != {name: len(texts) for name, texts in captions.items()}:
        raise UserError("pycocoevalcap's tokenizer did not answer for every caption; check that Java starts.")
    return tokens


def cider(references: Captions, captions: Captions) -> dict[str, float]:
    """CIDEr-D of every image, 0 to 10, from tokenized captions."""
    from pycocoevalcap.cider.cider import Cider

    if not any(text.split() for texts in references.values() for text in texts):
        # The package raises an error where no reference has a word.
        return dict.fromkeys(references, 0.0)
    _, values = Cider().compute_score(references, captions)
    return dict(zip(references, map(float, values), strict=True))


def bleu(references: Captions, captions: Captions) -> list[float]:
    """BLEU-1 to -4 over all images, 0 to 1, from tokenized captions."""
    from pycocoevalcap.bleu.bleu import Bleu

    values, _ = Bleu(4).compute_score(references, captions, verbose=0)
    return list(map(float, values))


def rouge_l(references: Captions, captions: Captions) -> float:
    """ROUGE-L over all images, 0 to 1, from tokenized captions."""
    from pycocoevalcap.rouge.rouge import Rouge

    if not captions:
        return 0.0
    return float(Rouge().compute_score(references, captions)[0])


def meteor(references: Captions, captions: Captions) -> float:
    """METEOR over all images, 0 to 1, from tokenized captions. Needs Java."""
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        return float(Meteor().compute_score(references, captions)[0])
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR failed ({error}); check that Java starts and has 2 GB of memory.") from error


# Marks that pycocoevalcap drops after tokenizing.
DROPPED = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Marks that the tokenizer rewrites.
QUOTES = {"‘": "`", "’": "'", "“": "``", "”": "''", '"': "''", "«": "``", "»": "''", "…": "...", "–": "--", "—": "--"}
SIGNS = {"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
REWRITTEN = BRACKETS | QUOTES | SIGNS
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'"}
# Words that are cut into two tokens: name of the pattern in TOKEN -> length of the first token.
CUTS = {"three": 3, "itis": 2, "more": 4, "you": 2}

SHORTENED, STATES, NUMBERED = (WORDS[kind].split() for kind in ("abbreviations", "states", "numbered"))

# Letters and digits of words. Fractions and raised digits stand alone, although Unicode counts them as word characters.
ODD = "_½¼¾⅓⅔⅛⅜⅝⅞¹²³"
LETTER = rf"[^\W\d{ODD}]"
CHARACTER = rf"(?:[^\W{ODD}]|[\u0300-\u036f])"
MARK = "['’`]"
APOSTROPHE = "['’]"
END = rf"(?!{CHARACTER})"
ABBREVIATION = rf"(?:{'|'.join(SHORTENED)}|[a-z](?:\.[a-z])*|(?:ph|ed)\.d)\."
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


def tokenize_ptb(caption: str) -> str:
    """A caption's tokens separated by blanks, as pycocoevalcap's tokenizer gives them."""
    return " ".join(token for token in treebank(caption) if token not in DROPPED)


@lru_cache(maxsize=1 << 16)
def treebank(caption: str) -> tuple[str, ...]:
    """All tokens in lower case, punctuation included; opening quotes may be "''" where the official ones are "``"."""
    tokens: list[str] = []
    for match in TOKEN.finditer(caption.replace("\N{SOFT HYPHEN}", "")):
        kind, text = match.lastgroup, match.group().lower()
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
