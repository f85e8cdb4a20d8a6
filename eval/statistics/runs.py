"""Finished runs of one benchmark, read from their folders and scored anew, so that they can be compared by question."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers.files import ANSWERS
from eval.answers.jsonl import is_file, read_json
from eval.answers.reading import read_answers
from eval.benchmarks.base import Dataset
from eval.config import FULL
from eval.judging.choice import check_judge, score_answers
from eval.metrics import Score, SufficientStatistics
from eval.results.baseline import task
from eval.results.statistics import terms_of
from llava.errors import UserError

RESULT = "result.json"
DOWNSAMPLE = "downsample"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        budget: visual tokens per image; for a retention ratio the rounded mean over layers and questions.
        options: of the method, without the budget.
        texts: question id -> answer, of the questions that were asked.
        sample_scores: question id -> score in [0, 1]; None for benchmarks without a score of one answer.
        result: content of result.json.
    """

    folder: Path
    method: str
    budget: int
    options: Mapping[str, Any]
    score: Score
    terms: SufficientStatistics
    texts: Mapping[str, str]
    sample_scores: Mapping[str, float] | None
    result: Mapping[str, Any]


def results_folder(folder: Path) -> Path:
    """The folder with the result: the run's own, or its only limitN/ for a run of the first N questions."""
    if is_file(folder / RESULT):
        return folder
    parts = sorted(path.parent for path in folder.glob(f"limit*/{RESULT}"))
    if len(parts) == 1:
        return parts[0]
    if parts:
        raise UserError(f"{folder} has several partial results; name one: {', '.join(map(str, parts))}.")
    raise UserError(f"{folder} has no {RESULT}; give the output folder of a finished run.")


def read_run(folder: Path, data: Dataset, judge: str = "auto") -> Run:
    """The run, its stored answers scored anew.

    Raises:
        UserError: it is not finished, has failed questions, or was asked other questions than those of `data`.
    """
    found = results_folder(folder)
    result = read_json(found / RESULT)
    answers = found / ANSWERS if is_file(found / ANSWERS) else found.parent / ANSWERS
    if result.get("failed"):
        raise UserError(
            f"{len(result['failed']):,} questions have no answer in {folder}; ask them again with --retry-failed."
        )
    if result["settings"]["data"] != data.fingerprint:
        raise UserError(f"{folder} was asked other questions than the data folder holds; check --data and --source.")
    asked = [question.id for question in data.questions[: result["limit"]]]
    stored = read_answers(answers, data, partial=result["partial"]).texts
    if missing := [name for name in asked if name not in stored]:
        raise UserError(f"{answers} lacks {len(missing):,} of {len(asked):,} answers, the first to {missing[0]}.")
    texts = {name: stored[name] for name in asked}
    check_judge(data, judge)
    score = score_answers(data, judge, asked, texts, answers)[0]
    if score.values.get(score.main) is None:
        raise UserError(f"{data.title} has no score for {folder}: {'; '.join(score.notes)}.")
    images = {question.id: question.image for question in data.questions}
    return Run(
        folder,
        result["method"],
        budget_of(result),
        {key: value for key, value in result["settings"]["config"].items() if key != "budget"},
        score,
        terms_of(score, images),
        texts,
        sample_scores(score, texts, data),
        result,
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


def check_comparable(full: Run, run: Run) -> None:
    """Raise unless both answered the same questions under the same settings."""
    a, b = task(full.result), task(run.result)
    settings = a.pop("settings"), b.pop("settings")
    names = [key for key in a if a[key] != b[key]]
    names += [key for key in settings[0].keys() | settings[1].keys() if settings[0].get(key) != settings[1].get(key)]
    if names:
        raise UserError(f"{run.folder} and {full.folder} differ in {', '.join(sorted(names))}; compare equal runs.")


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
