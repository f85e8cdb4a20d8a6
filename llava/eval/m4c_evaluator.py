"""The answer processor and the accuracies of MMF's M4C evaluator, by the names that LLaVA's scripts import."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from eval.metrics import vqa
from eval.metrics.short_answers import edits
from llava.errors import UserError

Entry = Mapping[str, Any]  # pred_answer, a text, and gt_answers, a list of them


class EvalAIAnswerProcessor:
    """A text as the EvalAI servers compare it."""

    def __call__(self, item: str) -> str:
        return vqa.process(item)


class TextVQAAccuracyEvaluator:
    """Mean accuracy against ten people's answers, 0 to 1."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Entry]) -> float:
        if wrong := [len(one["gt_answers"]) for one in pred_list if len(one["gt_answers"]) != 10]:
            raise UserError(f"TextVQA's accuracy needs 10 answers to each question, got {wrong[0]}.")
        return mean_of(vqa.m4c(one["pred_answer"], one["gt_answers"]) for one in pred_list)


class STVQAAccuracyEvaluator:
    """Share of predictions that are one of the answers, 0 to 1."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Entry]) -> float:
        process = self.answer_processor
        return mean_of(process(one["pred_answer"]) in map(process, one["gt_answers"]) for one in pred_list)


class STVQAANLSEvaluator:
    """Mean similarity to the nearest answer, 0 to 1."""

    def get_anls(self, s1: str, s2: str) -> float:
        first, second = s1.lower().strip(), s2.lower().strip()
        longest = max(len(first), len(second))
        similar = 1 - edits(first, second) / longest if longest else 1.0
        return similar if similar >= 0.5 else 0.0

    def eval_pred_list(self, pred_list: Sequence[Entry]) -> float:
        return mean_of(
            max(self.get_anls(one["pred_answer"], truth) for truth in one["gt_answers"]) for one in pred_list
        )


def mean_of(scores: Any) -> float:
    values = list(map(float, scores))
    if not values:
        raise UserError("There is no prediction to score.")
    return fmean(values)
