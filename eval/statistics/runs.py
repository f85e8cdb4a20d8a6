"""Finished runs of one benchmark, read from their folders and scored anew, so that they can be compared by question."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers.reuse import Stored, read_stored
from eval.benchmarks.base import Dataset
from eval.config import FULL
from eval.judging.choice import check_judge, score_answers
from eval.metrics import Score, SufficientStatistics
from eval.results.statistics import terms_of
from llava.errors import UserError

DOWNSAMPLE = "downsample"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        budget: visual tokens per image; for a retention ratio the rounded mean over layers and questions.
        options: of the method, without the budget.
        sample_scores: question id -> score in [0, 1]; None for benchmarks without a score of one answer.
    """

    stored: Stored
    method: str
    budget: int
    options: Mapping[str, Any]
    score: Score
    terms: SufficientStatistics
    sample_scores: Mapping[str, float] | None

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def texts(self) -> Mapping[str, str]:
        """Question id -> answer, of the questions that were asked."""
        return self.stored.texts


def read_run(folder: Path, data: Dataset, judge: str = "auto") -> Run:
    """The run, its stored answers scored anew.

    Raises:
        UserError: see eval.answers.reuse.read_stored; or it has no score.
    """
    stored = read_stored(folder, data)
    check_judge(data, judge)
    score, judge_facts = score_answers(data, judge, list(stored.texts), stored.texts, stored.answers)
    if score.values.get(score.main) is None:
        raise UserError(f"{data.title} has no score for {folder}: {'; '.join(score.notes)}.")
    images = {question.id: question.image for question in data.questions}
    return Run(
        stored.judged(judge_facts),
        stored.result["method"],
        budget_of(stored.result),
        {key: value for key, value in stored.result["settings"]["config"].items() if key != "budget"},
        score,
        terms_of(score, images),
        sample_scores(score, stored.texts, data),
    )


def budget_of(result: Mapping[str, Any]) -> int:
    """The budget in visual tokens."""
    ratio = result.get("config", {}).get("retention_ratio")
    return round(result["audit"]["mean_tokens_per_layer"]) if ratio else int(result["budget"])


def sample_scores(score: Score, texts: Mapping[str, str], data: Dataset) -> Mapping[str, float] | None:
    """The scores of single answers: by the benchmark's rule, or a judge's."""
    if data.sample_score is not None:
        questions = {question.id: question for question in data.questions}
        return {name: data.sample_score(questions[name], text) for name, text in texts.items()}
    return score.correct if score.correct.keys() == texts.keys() else None


def by_method(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """Label -> budget -> run. The label is the method, with the options in which its runs differ."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        same = [other.options for other in runs if other.method == run.method]
        differing = {key: value for key, value in run.options.items() if any(o.get(key) != value for o in same)}
        label = " ".join([run.method, *(f"{key}={value}" for key, value in differing.items())])
        budgets = found.setdefault(label, {})
        if run.budget in budgets:
            raise UserError(f"{budgets[run.budget].folder} and {run.folder} are both {label} at {run.budget}.")
        budgets[run.budget] = run
    return found


def check_full(run: Run) -> None:
    """Raise unless the run is one without reduction."""
    if run.method != FULL:
        raise UserError(f"The first folder should be a run of {FULL}, got one of {run.method}: {run.folder}.")
