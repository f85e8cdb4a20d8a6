"""The answer formats of the benchmarks, as question-answer pairs about one scene.

Every function is `(things, rng, family="") -> Pair` on top of the question families of `toy.data.questions`;
without `family` it draws one of those that fit. It raises `Retry` where the draw is ambiguous; `compose` draws again.
Messages are those of LLaVA's evaluation scripts and of lmms-eval: `question`, a line break, `suffix`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.benchmarks.prompts import LETTER, LETTER_CN, SHORT, VIZ
from toy.data.chinese import in_chinese
from toy.data.questions import FAMILIES, Question, Retry
from toy.data.scenes import Thing
from toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES, SIZES

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
        family: of the question it was made from (`toy.data.questions`), or the format's own name.
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


def compose(
    things: Things, name: str, rng: Rng, tries: int = 40, family: str = "", formats: Mapping[str, Format] | None = None
) -> Pair | None:
    """One pair of a format of `formats`, by default FORMATS; None if `tries` draws found no unambiguous one."""
    for _ in range(tries):
        try:
            return (formats or FORMATS)[name](things, rng, family)
        except Retry:
            continue
    return None


def pick(items: Sequence, rng: Rng):
    """One of the items, all alike."""
    if not len(items):
        raise Retry
    return items[int(rng.integers(len(items)))]


def draw(things: Things, rng: Rng, family: str = "", among: Sequence[str] = tuple(FAMILIES)) -> Question:
    """A question of the family, or of one of `among`."""
    return FAMILIES[family or pick(among, rng)](things, rng)


# Answers in a word or phrase.


def short(things: Things, rng: Rng, family: str = "") -> Pair:
    """GQA, VQAv2, DocVQA, InfoVQA, open questions of MMMU."""
    question = draw(things, rng, family)
    return Pair(question.text, SHORT, question.answer, question.family)


def single_word(things: Things, rng: Rng, family: str = "") -> Pair:
    """ChartQA."""
    question = draw(things, rng, family)
    return Pair(question.text, SINGLE_WORD, question.answer, question.family)


def bare(things: Things, rng: Rng, family: str = "") -> Pair:
    """No instruction: OCRBench, videos, MM-Vet, conversations of LLaVA-Bench."""
    question = draw(things, rng, family)
    return Pair(question.text, "", question.answer, question.family)


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
    if family == "color":
        there, name = any(thing.shape == shape for thing in sized), f"{size}{SHAPES[shape]}"
        texts = (f"What color is the {name}?", f"What is the color of the {name}?", f"The {name} has which color?")
    elif family == "shape":
        there, name = any(thing.color == color for thing in sized), f"{size}{COLOR_NAMES[color]} object"
        texts = (f"What shape is the {name}?", f"What is the shape of the {name}?", f"The {name} has which shape?")
    elif family == "digit":
        there = any(thing.kind == "frame" and thing.color == color for thing in things)
        name = f"{COLOR_NAMES[color]} frame"
        texts = (
            f"What number is in the {name}?",
            f"Which digit is written in the {name}?",
            f"What does the {name} say?",
        )
    else:
        there = any(thing.color == color and thing.shape == shape for thing in sized)
        name = f"{COLOR_NAMES[color]} {SHAPES[shape]}"
        texts = tuple(f"Is the {name} on the {pair} side?" for pair in ("left or right", "top or bottom"))
    if there:
        raise Retry
    return pick(texts, rng)


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


def letters(things: Things, rng: Rng, family: str = "") -> Pair:
    """MMBench, SEED-Bench, AI2D, lmms-eval's MMMU and ScienceQA without context."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng)
    return Pair("\n".join([question.text, *listed(options)]), LETTER, letter, question.family, options)


def several(things: Things, rng: Rng, family: str = "") -> Pair:
    """lmms-eval's MMBench, which announces the options."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng)
    lines = [f"{question.text} {SEVERAL}", *listed(options)]
    return Pair("\n".join(lines) + "\n", LETTER, letter, question.family, options)


def letters_cn(things: Things, rng: Rng, family: str = "") -> Pair:
    """MMBench-CN."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng)
    text, translated = in_chinese(question, options)
    return Pair("\n".join([text, *listed(translated)]), LETTER_CN, letter, question.family, translated)


def parens(things: Things, rng: Rng, family: str = "") -> Pair:
    """MMMU: the picture's place is marked, a blank line follows the options; a quarter are open questions."""
    question = draw(things, rng, family, LETTERED)
    text = f"{MARK} {question.text}"
    if rng.random() < 0.25:
        return Pair(text, SHORT, question.answer, question.family)
    options, letter = options_of(question, rng)
    return Pair("\n".join([text, *listed(options, "(", ") ")]) + "\n", LETTER, letter, question.family, options)


def mmstar(things: Things, rng: Rng, family: str = "") -> Pair:
    """MMStar: options on one line."""
    question = draw(things, rng, family, LETTERED)
    options, letter = options_of(question, rng)
    text = f"{question.text}\nOptions: {', '.join(listed(options, after=': '))}"
    return Pair(text, LETTER, letter, question.family, options)


def realworld(things: Things, rng: Rng, family: str = "") -> Pair:
    """RealWorldQA, whose questions hold their instruction: a letter, or in a quarter of them a word."""
    question = draw(things, rng, family, LETTERED)
    if rng.random() < 0.25:
        return Pair(f"{question.text}\n{ONLY_WORD}", "", question.answer, question.family)
    options, letter = options_of(question, rng)
    text = "\n".join([question.text, *listed(options), ONLY_LETTER])
    return Pair(text, "", letter, question.family, options)


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
    "short": short,
    "yes_no": yes_no,
    "single_word": single_word,
    "bare": bare,
    "ocr": ocr,
    "viz": viz,
    "letters": letters,
    "several": several,
    "letters_cn": letters_cn,
    "parens": parens,
    "mmstar": mmstar,
    "realworld": realworld,
    "context": context,
    "context_text": context_text,
    "caption": caption,
    "describe": describe,
}
WITHOUT_IMAGE = ("context_text",)


def lmms_wording(name: str, pair: Pair) -> Pair:
    """The pair as lmms-eval words it where that differs: MM-Vet (`bare`) and MMBench-CN (`letters_cn`)."""
    if name == "bare":
        return replace(pair, question=f"{STEP_BY_STEP} \n\n{pair.question}")
    return replace(pair, suffix=LETTER_CN_LMMS) if name == "letters_cn" else pair
