"""Auxiliary tasks of the instruct stage: what an option letter stands for, in text alone.

Without it a model of this size guesses letters for many hundred steps: it has to learn at once what a picture shows and
which letter stands beside that word.
"""

from eval.benchmarks.prompts import LETTER, LETTER_CN
from toy.data.chinese import translate
from toy.data.formats import (
    FORMATS,
    LETTERED,
    LETTERS,
    WITHOUT_IMAGE,
    Format,
    Pair,
    Rng,
    Things,
    draw,
    listed,
    options_of,
    pick,
)


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
BLIND = (*WITHOUT_IMAGE, *AUXILIARY)
