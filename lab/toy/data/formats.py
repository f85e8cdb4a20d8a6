"""The answer formats of the benchmarks, as question-answer pairs about one scene, and the words that they add.

Every format is a function `(things, rng, family="") -> Pair` on top of the question families of
`lab.toy.data.questions`; without `family` it draws one of those that fit. It raises `Retry` where the draw is
ambiguous; `compose` draws again.
Messages are those of LLaVA's evaluation scripts and of lmms-eval: `question`, a line break, `suffix`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.benchmarks.llava_files import LETTER, LETTER_CN, SHORT, VIZ
from lab.toy.data.questions import (
    CHINESE_PARTICLES,
    CHINESE_WORDS,
    FAMILIES,
    Question,
    Retry,
    attempt,
    in_chinese,
    phrasings,
    pick,
    translate,
)
from lab.toy.data.scenes import Thing
from lab.toy.data.vocabulary import (
    COLOR_NAMES,
    DIGITS,
    SHAPES,
    SHORT_ANSWER,
    SIZES,
    TOY_WORDS,
    WORDS,
    Vocabulary,
    grown,
)

SINGLE_WORD = "Answer the question with a single word."
CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Describe this image in detail."
ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
ONLY_WORD = "Please answer directly with a single word or number."
# lmms-eval's own words for MM-Vet and MMBench-CN.
STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the following question:"
)
LETTER_CN_LMMS = "请直接使用所提供的选项字母作为答案回答。"
SEVERAL = "There are several options:"
MARK = "<image 1>"
OCR_TOKENS = "Reference OCR token:"
UNANSWERABLE = "unanswerable"
LETTERS = "ABCDE"
APART = 5  # pixels between centres before one thing is named before another


@dataclass(frozen=True)
class Pair:
    """A question in the words of a benchmark.

    Attributes:
        question: without the answer-format instruction; options and reference tokens belong to it.
        answer: what the model is to say.
        family: of the question it was made from (`lab.toy.data.questions`), or the format's own name.
        options: their texts in order, where the answer is a letter.
    """

    question: str
    suffix: str
    answer: str
    family: str
    options: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """The user turn."""
        return f"{self.question}\n{self.suffix}" if self.suffix else self.question


Things = tuple[Thing, ...]
Rng = np.random.Generator
Format = Callable[[Things, Rng, str], Pair]


def compose(things: Things, name: str, rng: Rng, tries: int = 40, family: str = "") -> Pair | None:
    """One pair of a format of TRAINED; None if `tries` draws found no unambiguous one."""
    return attempt(lambda: TRAINED[name](things, rng, family), tries)


def draw(things: Things, rng: Rng, family: str = "", among: Sequence[str] = tuple(FAMILIES)) -> Question:
    """A question of the family, or of one of `among`."""
    return FAMILIES[family or pick(among, rng)](things, rng)


# Answers in a word or phrase.


def in_words(suffix: str) -> Format:
    """The question as it is, with an instruction or none."""

    def form(things: Things, rng: Rng, family: str = "") -> Pair:
        question = draw(things, rng, family)
        return Pair(question.text, suffix, question.answer, question.family)

    return form


def yes_no(things: Things, rng: Rng, family: str = "") -> Pair:
    """POPE, MME. Families: exist (POPE's wording), verify, and claims about color, count, side and digit."""
    family = family or pick(("exist", "exist", "verify", "verify", "color", "count", "side", "digit"), rng)
    question = draw(things, rng, family)
    if family == "exist":
        name = dict(question.program)["select"]
        return Pair(f"Is there a {name} in the image?", SHORT, question.answer, family)
    if family == "verify":
        return Pair(question.text, SHORT, question.answer, family)
    true = rng.random() < 0.5
    said = question.answer if true else pick(distractors(question), rng)
    return Pair(claim(question, said), SHORT, "yes" if true else "no", family)


def claim(question: Question, said: str) -> str:
    """A question of the families color, count, side or digit as a claim that `said` is its answer."""
    name = dict(question.program)["select"]
    return {
        "color": f"Is the {name} {said}?",
        "count": f"Are there {said} {name} in the image?",
        "side": f"Is the {name} on the {said} side?",
        "digit": f"Is the number in the {name} {said}?",
    }[question.family]


def ocr(things: Things, rng: Rng, family: str = "") -> Pair:
    """TextVQA: the digits of the scene as reference tokens in any order; sometimes one is wrong, or there are none."""
    question = draw(things, rng, family or "digit")
    tokens = [str(thing.digit) for thing in things if thing.kind == "frame"]
    rng.shuffle(tokens)
    kind = rng.random()
    if kind < 0.1:
        tokens = []
    elif kind < 0.3 and tokens:
        tokens[int(rng.integers(len(tokens)))] = pick(DIGITS, rng)
    text = f"{question.text}\n{OCR_TOKENS} {', '.join(tokens)}"
    return Pair(text, SHORT, question.answer, question.family)


VIZ_FAMILIES = ("color", "shape", "digit", "side")


def viz(things: Things, rng: Rng, family: str = "") -> Pair:
    """VizWiz: in half of them what is asked about is not in the scene."""
    family = family or pick(VIZ_FAMILIES, rng)
    if rng.random() < 0.5:
        question = draw(things, rng, family)
        return Pair(question.text, VIZ, question.answer, family)
    return Pair(absent(things, rng, family), VIZ, UNANSWERABLE, family)


def absent(things: Things, rng: Rng, family: str) -> str:
    """A question about a thing that is not there; half of the time it is made of attributes that are."""
    shapes = [thing for thing in things if thing.kind == "shape"]
    seen = rng.random() < 0.5
    shape = pick(shapes, rng).shape if seen else int(rng.integers(len(SHAPES)))
    color = pick(shapes, rng).color if seen else int(rng.integers(len(COLOR_NAMES)))
    big = int(rng.integers(2)) if rng.random() < 0.5 and family in ("color", "shape") else None
    size = "" if big is None else f"{SIZES[big]} "
    sized = [thing for thing in shapes if big is None or thing.big == big]
    frames = [thing for thing in things if thing.kind == "frame"]
    there, name = {
        "color": (any(thing.shape == shape for thing in sized), f"{size}{SHAPES[shape]}"),
        "shape": (any(thing.color == color for thing in sized), f"{size}{COLOR_NAMES[color]} object"),
        "digit": (any(frame.color == color for frame in frames), f"{COLOR_NAMES[color]} frame"),
        "side": (
            any(thing.color == color and thing.shape == shape for thing in sized),
            f"{COLOR_NAMES[color]} {SHAPES[shape]}",
        ),
    }[family]
    if there:
        raise Retry
    if family == "side":
        return pick([f"Is the {name} on the {pair} side?" for pair in ("left or right", "top or bottom")], rng)
    return pick(phrasings(family, name), rng)


# Answers that are a letter.

NUMBERS = {"count": DIGITS[:6], "digit": DIGITS}


def distractors(question: Question) -> list[str]:
    """Wrong answers of the right kind."""
    kinds = {"color": COLOR_NAMES, "relate": COLOR_NAMES, "shape": SHAPES, **NUMBERS}
    pairs = (("yes", "no"), ("left", "right"), ("above", "below"), ("top", "bottom"))
    kind = kinds.get(question.family) or next(pair for pair in pairs if question.answer in pair)
    return [word for word in kind if word != question.answer]


# Mostly questions that have four options.
LETTERED = (*FAMILIES, *["color", "shape", "relate", "count", "digit"] * 2)


def options_of(question: Question, rng: Rng, most: int = 4) -> tuple[tuple[str, ...], str]:
    """Two to `most` options, often `most`, with the answer at any place, and its letter."""
    wrong = distractors(question)
    count = min(pick((*range(2, most), most, most), rng), 1 + len(wrong))
    options = [wrong[k] for k in rng.permutation(len(wrong))[: count - 1]]
    place = int(rng.integers(count))
    options.insert(place, question.answer)
    return tuple(options), LETTERS[place]


def listed(options: Sequence[str], before: str = "", after: str = ". ") -> list[str]:
    """ "A. red", "B. blue", ..."""
    return [f"{before}{letter}{after}{option}" for letter, option in zip(LETTERS, options, strict=False)]


def lettered(
    layout: Callable[[str, Sequence[str]], str],
    suffix: str = LETTER,
    opened: Callable[[str], tuple[str, str]] | None = None,
) -> Format:
    """Options with letters.

    Args:
        layout: text of a question and options -> what is asked.
        opened: text -> text and instruction of the quarter of the questions that has no options; None for no such part.
    """

    def form(things: Things, rng: Rng, family: str = "") -> Pair:
        question = draw(things, rng, family, LETTERED)
        if opened is not None and rng.random() < 0.25:
            return Pair(*opened(question.text), question.answer, question.family)
        options, letter = options_of(question, rng)
        return Pair(layout(question.text, options), suffix, letter, question.family, options)

    return form


def letters_cn(things: Things, rng: Rng, family: str = "") -> Pair:
    """MMBench-CN."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng)
    text, translated = in_chinese(question, options)
    return Pair("\n".join([text, *listed(translated)]), LETTER_CN, letter, question.family, translated)


def context(things: Things, rng: Rng, family: str = "") -> Pair:
    """ScienceQA with a picture; the context, if there is one, is true and about something else, or says little."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng, most=5)
    kind, lines = rng.random(), []
    if kind < 0.3:
        lines = ["Context: Look at the image."]
    elif kind < 0.7:
        lines = [f"Context: {fact(draw(things, rng, among=TOLD))}"]
    return Pair("\n".join([*lines, question.text, *listed(options)]), LETTER, letter, question.family, options)


TOLD = ("color", "shape", "digit")


def context_text(things: Things, rng: Rng, family: str = "") -> Pair:
    """ScienceQA without a picture: the context alone says it, among one to three facts. `things` need not be shown."""
    asked = draw(things, rng, family, TOLD)
    told = {dict(asked.program)["select"]: fact(asked)}
    for _ in range(int(rng.integers(3))):
        other = draw(things, rng, among=TOLD)
        told.setdefault(dict(other.program)["select"], fact(other))
    sentences = list(told.values())
    rng.shuffle(sentences)
    options, letter = options_of(asked, rng, most=5)
    lines = [f"Context: {' '.join(sentences)}", asked.text, *listed(options)]
    return Pair("\n".join(lines), LETTER, letter, asked.family, options)


def fact(question: Question) -> str:
    """A question of the families color, shape or digit and its answer as a sentence."""
    verb = {"color": "is", "shape": "is a", "digit": "says"}[question.family]
    return f"The {dict(question.program)['select']} {verb} {question.answer}."


# Answers that are sentences.


def caption(things: Things, rng: Rng, family: str = "") -> Pair:
    """Flickr30k, NoCaps: the things of `captioned`."""
    return Pair(CAPTION, "", " and ".join(map(named, captioned(things))), "caption")


def describe(things: Things, rng: Rng, family: str = "") -> Pair:
    """Detailed descriptions of LLaVA-Bench: the things of `captioned`, then the first two frames from the left."""
    frames = from_the_left([thing for thing in things if thing.kind == "frame"])[:2]
    names = [*map(named, captioned(things)), *map(framed, frames)]
    return Pair(DESCRIBE, "", " and ".join(names), "describe")


def caption_references(things: Things) -> tuple[str, ...]:
    """Five captions as people might write them, the model's own first; raises Retry as `caption` does."""
    shapes = captioned(things)
    names = list(map(named, shapes))
    plain = [f"a {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}" for thing in shapes]
    return (
        " and ".join(names),
        f"an image of {' and '.join(names)}",
        " and ".join(plain),
        f"there is {' and '.join(reversed(names))}",
        f"{names[0]} next to {' and '.join(names[1:])}" if len(names) > 1 else f"{names[0]} in a grey picture",
    )


def named(thing: Thing) -> str:
    """ "a big red star"."""
    return f"a {SIZES[thing.big]} {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}"


def framed(thing: Thing) -> str:
    """ "an orange frame with the number 7"."""
    color = COLOR_NAMES[thing.color]
    return f"{'an' if color == 'orange' else 'a'} {color} frame with the number {thing.digit}"


def captioned(things: Things) -> list[Thing]:
    """The big shapes from left to right, three at most; one big shape is followed by the leftmost small one."""
    shapes = [thing for thing in things if thing.kind == "shape"]
    big = from_the_left([thing for thing in shapes if thing.big])[:3]
    if len(big) > 1:
        return big
    return [*big, *from_the_left([thing for thing in shapes if not thing.big], 1)[:1]]


def from_the_left(things: list[Thing], count: int = 3) -> list[Thing]:
    """By their centres, which must differ enough for the first `count` to be seen in order; there must be one."""
    placed = sorted(things, key=lambda thing: thing.x)
    if not placed or any(b.x - a.x < APART for a, b in itertools.pairwise(placed[: count + 1])):
        raise Retry
    return placed


FORMATS: dict[str, Format] = {
    # GQA, VQAv2, DocVQA, InfoVQA, open questions of MMMU.
    "short": in_words(SHORT),
    "yes_no": yes_no,
    # ChartQA.
    "single_word": in_words(SINGLE_WORD),
    # No instruction: OCRBench, videos, MM-Vet, conversations of LLaVA-Bench.
    "bare": in_words(""),
    "ocr": ocr,
    "viz": viz,
    # MMBench, SEED-Bench, AI2D, lmms-eval's MMMU and ScienceQA without context.
    "letters": lettered(lambda text, options: "\n".join([text, *listed(options)])),
    # lmms-eval's MMBench, which announces the options.
    "several": lettered(lambda text, options: "\n".join([f"{text} {SEVERAL}", *listed(options), ""])),
    "letters_cn": letters_cn,
    # MMMU: the picture's place is marked, a blank line follows the options.
    "parens": lettered(
        lambda text, options: "\n".join([f"{MARK} {text}", *listed(options, "(", ") "), ""]),
        opened=lambda text: (f"{MARK} {text}", SHORT),
    ),
    # MMStar: options on one line.
    "mmstar": lettered(lambda text, options: f"{text}\nOptions: {', '.join(listed(options, after=': '))}"),
    # RealWorldQA, whose questions hold their instruction: a letter or a word.
    "realworld": lettered(
        lambda text, options: "\n".join([text, *listed(options), ONLY_LETTER]),
        suffix="",
        opened=lambda text: (f"{text}\n{ONLY_WORD}", ""),
    ),
    "context": context,
    "context_text": context_text,
    "caption": caption,
    "describe": describe,
}


def lmms_wording(name: str, pair: Pair) -> Pair:
    """The pair as lmms-eval words it where that differs: MM-Vet (`bare`) and MMBench-CN (`letters_cn`)."""
    if name == "bare":
        return replace(pair, question=f"{STEP_BY_STEP} \n\n{pair.question}")
    return replace(pair, suffix=LETTER_CN_LMMS) if name == "letters_cn" else pair


# Auxiliary tasks of the instruct stage: what an option letter stands for, in text alone. Without them a model of this
# size guesses letters for many hundred steps: it has to learn at once what a picture shows and which letter stands
# beside that word.


def match(things: Things, rng: Rng, family: str = "") -> Pair:
    """The answer itself, then options: say its letter."""
    options, letter, lines, suffix, kind = optioned(things, rng, family)
    said = options[LETTERS.index(letter)]
    return Pair("\n".join([f"Context: {said}", *lines]), suffix, letter, kind, options)


def recite(things: Things, rng: Rng, family: str = "") -> Pair:
    """Every option with its letter, in the order of the context: many letters for one line of training."""
    options, _, lines, suffix, _ = optioned(things, rng, family)
    order = rng.permutation(len(options))
    said = [f"{options[k]} {LETTERS[k]}" for k in order]
    text = "\n".join([f"Context: {' '.join(options[k] for k in order)}", *lines])
    return Pair(text, suffix, " ".join(said), "recite", options)


def optioned(things: Things, rng: Rng, family: str) -> tuple[tuple[str, ...], str, list[str], str, str]:
    """Options in English or Chinese, the right letter, their lines in any style, an instruction, the family."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng, most=5)
    style = rng.random()
    if style < 0.25:
        options = tuple(map(translate, options))
    lines = listed(options)
    if style > 0.75:
        lines = listed(options, "(", ") ")
    elif style > 0.5:
        lines = [f"Options: {', '.join(listed(options, after=': '))}"]
    suffix = pick((LETTER, LETTER_CN, "") if style > 0.5 else (LETTER, LETTER_CN), rng)
    return options, letter, lines, suffix, question.family


AUXILIARY: dict[str, Format] = {"match": match, "recite": recite}
TRAINED = {**FORMATS, **AUXILIARY}
BLIND = ("context_text", *AUXILIARY)  # what is asked without an image


# The words of the model of all formats: those of the toy model, and what the formats add. Instructions are single
# tokens, as the toy model's one is. Option letters are cased tokens of their own: "A" is an option, "a" an article.

# Instruction -> the old token that its embedding starts from.
INSTRUCTIONS = {
    VIZ.splitlines()[0]: SHORT_ANSWER,
    SINGLE_WORD: SHORT_ANSWER,
    ONLY_WORD: SHORT_ANSWER,
    LETTER: SHORT_ANSWER,
    LETTER_CN_LMMS: SHORT_ANSWER,
    LETTER_CN: SHORT_ANSWER,
    ONLY_LETTER: SHORT_ANSWER,
    SEVERAL: "which",
    CAPTION: "image",
    DESCRIBE: "image",
    STEP_BY_STEP: "what",
}
_CHINESE = tuple(dict.fromkeys([*CHINESE_WORDS.values(), *CHINESE_PARTICLES]))


INSTRUCT_WORDS = Vocabulary(
    grown(
        TOY_WORDS.words, (*INSTRUCTIONS, *LETTERS, *WORDS["punctuation"].split(), *WORDS["formats"].split(), *_CHINESE)
    ),
    phrases=(*INSTRUCTIONS, *_CHINESE),
    letters=LETTERS,
)
