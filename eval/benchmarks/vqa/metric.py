"""Accuracy against ten people's answers: VQAv2, TextVQA and VizWiz.

A prediction is held against every nine of the ten and gets min(1, matches / 3) each time; the sample score is the mean,
so 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches among ten. The official scripts agree on this and
differ in what they compare:

    function   what is compared                                           source
    vqa_eval   both sides normalised, only if the people disagree         VQAEval (GT-Vision-Lab/VQA @ a013f04)
    m4c        both sides through the EvalAI answer processor             M4C evaluator (LLaVA @ c121f04)
    vizwiz     the prediction normalised, the answers as they stand       VizWiz's evaluation code
    lmms_vqa   both sides normalised, always                              vqav2 task of lmms-eval @ 75571cf

Where all ten agree on "yes", "Yes" gets nothing from vqa_eval and everything from m4c. Sample scores are exact
fractions here; official sums of floats can differ from them by 1e-16.
"""

from collections.abc import Callable, Mapping, Sequence

from eval.benchmarks.vqa.evalai import normalise, one_line, process
from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, grouped, percent

# (prediction, the people's answers) -> sample score in [0, 1].
SampleScore = Callable[[str, Sequence[str]], float]

# Matches among the other people that make an answer fully right.
ENOUGH = 3


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the people of min(1, how many of the others said the same / 3), in exact arithmetic."""
    if not answers:
        return 0.0
    people, same = len(answers), sum(answer == prediction for answer in answers)
    # Those who gave this answer see one match less among the others.
    thirds = same * min(ENOUGH, same - 1) + (people - same) * min(ENOUGH, same)
    return thirds / (ENOUGH * people)


def vqa_eval(prediction: str, answers: Sequence[str]) -> float:
    """The VQA toolkit's rule: nothing but white space is normalised where all people agree."""
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    return leave_one_out(prediction, answers)


def m4c(prediction: str, answers: Sequence[str]) -> float:
    """M4C's rule for TextVQA; lmms-eval has the same for TextVQA and VizWiz."""
    return leave_one_out(process(prediction), [process(answer) for answer in answers])


def vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's rule: its answers are published in normal form."""
    return leave_one_out(normalise(one_line(prediction)), answers)


def lmms_vqa(prediction: str, answers: Sequence[str]) -> float:
    """lmms-eval's rule for VQAv2: as the toolkit's, but "Yes" is right also where all people said "yes"."""
    return leave_one_out(normalise(one_line(prediction)), [normalise(one_line(answer)) for answer in answers])


def after_processor(sample_score: SampleScore) -> SampleScore:
    """`sample score` of a text as LLaVA uploads it: through the EvalAI answer processor."""
    return lambda prediction, answers: sample_score(process(prediction), answers)


def score(
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    sample_score: SampleScore,
    kinds: Mapping[str, Mapping[str, str]] | None = None,
) -> Score:
    """Percent of the sample score there is.

    Args:
        answers: question id -> the people's answers, of the questions that were asked.
        predictions: question id -> text; one for every question.
        kinds: breakdown name ("answer type") -> question id -> group.
    """
    check_coverage(answers, predictions, set(answers))
    correct = {name: sample_score(predictions[name], given) for name, given in answers.items()}
    groups = {
        name: grouped({question: value for question, value in correct.items() if question in kind}, kind)
        for name, kind in (kinds or {}).items()
    }
    return Score({"accuracy": percent(correct.values())}, groups, correct)


def unscored(note: str) -> Score:
    """What can be said of a split whose answers only a server has."""
    return Score({"accuracy": None}, {}, {}, (note,))
