"""Accuracy against ten people's answers: VQAv2, TextVQA and VizWiz.

A prediction is compared with every nine of the ten and gets min(1, matches / 3) each time. The sample score is the
mean: 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches among ten. The official scripts agree on this and differ in
what they compare:

    function   what is compared                                           source
    vqa_eval   both sides normalised, only if the people disagree         VQAEval (GT-Vision-Lab/VQA @ a013f04)
    m4c        both sides through the EvalAI answer processor             M4C evaluator (LLaVA @ c121f04)
    vizwiz     the prediction normalised, the answers as they stand       VizWiz's evaluation code
    lmms_vqa   both sides normalised, always                              vqav2 task of lmms-eval @ 75571cf

If all ten say "yes", the prediction "Yes" gets 0 from vqa_eval and 1 from m4c. Sample scores are exact fractions here;
the official sums of floats can differ from them by 1e-16.

`process` is the answer processor of the EvalAI servers, which LLaVA runs on a short answer before it is uploaded or
scored: EvalAIAnswerProcessor (m4c_evaluator.py of LLaVA @ c121f04, from MMF). It gives the same results on the strings
in tests/data/vqa, oddities included: "what's" becomes "what 's", "a/b" becomes "b", "None." becomes "0", and at most
32 full stops are deleted. The words and marks that it rewrites come from the VQA evaluation toolkit
(https://github.com/GT-Vision-Lab/VQA, BSD-2-Clause), which MMF and LLaVA ship too.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from eval.metrics import WORDS

# (prediction, the people's answers) -> sample score in [0, 1].
SampleScore = Callable[[str, Sequence[str]], float]

# This many matches among the other people make an answer fully right.
ENOUGH = 3


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the people of min(1, matches among the others / 3), in exact arithmetic."""
    if not answers:
        return 0.0
    people, same = len(answers), sum(answer == prediction for answer in answers)
    # Leaving out a person who gave this answer leaves one match less.
    thirds = same * min(ENOUGH, same - 1) + (people - same) * min(ENOUGH, same)
    return thirds / (ENOUGH * people)


def vqa_eval(prediction: str, answers: Sequence[str]) -> float:
    """The VQA toolkit's rule: if all people agree, only white space is normalised."""
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    return leave_one_out(prediction, answers)


def m4c(prediction: str, answers: Sequence[str]) -> float:
    """M4C's rule for TextVQA, which lmms-eval uses for TextVQA and VizWiz."""
    return leave_one_out(process(prediction), [process(answer) for answer in answers])


def vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's rule: only the prediction is normalised, because the answers are published in normal form."""
    return leave_one_out(normalise(one_line(prediction)), answers)


def lmms_vqa(prediction: str, answers: Sequence[str]) -> float:
    """lmms-eval's rule for VQAv2: like the toolkit's, except that "Yes" is right even if all people said "yes"."""
    return leave_one_out(normalise(one_line(prediction)), [normalise(one_line(answer)) for answer in answers])


def after_processor(sample_score: SampleScore) -> SampleScore:
    """The same rule on a prediction as LLaVA uploads it, after the EvalAI answer processor."""
    return lambda prediction, answers: sample_score(process(prediction), answers)


# Marks that are deleted or replaced by a space, in this order; apostrophe, colon, full stop and % $ # & * are not.
PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
ARTICLES = frozenset({"a", "an", "the"})

# Misspelt contraction -> how references spell it.
CONTRACTIONS = {
    wrong: right
    for right, _, forms in (entry.partition("=") for entry in WORDS["contractions"].split())
    for wrong in forms.split("|")
}

DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# Not a decimal point. The official pattern also means to look behind, but is written so that it never does.
FULL_STOP = re.compile(r"\.(?!\d)")
# The official code passes a regular-expression flag, whose value is 32, as the number of replacements.
FULL_STOPS = 32


# Data sets ask for the same few words thousands of times.
@lru_cache(maxsize=1 << 16)
def process(text: str) -> str:
    """An answer as the EvalAI answer processor returns it, to be compared or uploaded."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(one_line(text))


def one_line(text: str) -> str:
    """The text with newlines and tabs as spaces, and without surrounding white space."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """The VQA toolkit's normal form of an answer.

    A mark of PUNCTUATION is deleted if it stands next to a space anywhere in the text, else replaced by a space. If the
    text has a comma between digits, all these marks are deleted. Full stops are deleted, except decimal points. Then
    the text is put in lower case, number words up to ten become digits, articles are dropped, and contractions get
    their apostrophes.
    """
    numeric = DIGITS_WITH_COMMA.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        delete = numeric or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if delete else " ")
    cleaned = FULL_STOP.sub("", cleaned, count=FULL_STOPS)
    words = (NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
