"""Entries of a leaderboard: finished runs and foreign answers, each checked against the run of `full` on its board.

An entry is *native* (a run of a method of this repository, whose code is that of a commit), *replayed* (a run of the
tokens that a kept-index file names), or *reported* (answers and token counts from elsewhere, which the house can score
and add up but not repeat). `check_entry` finds everything that is wrong with one, not only the first fault.
"""

import math
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.answers.jsonl import is_file, read_json
from eval.answers.kept_indices import ROUNDING, Header, KeptFile, Replayed, kept_faults
from eval.answers.reading import read_answers, read_rows
from eval.answers.reuse import RESULT, images_of, joint_differences, own_lines, read_result, results_folder
from eval.answers.source_hash import combined, listed, read_source
from eval.answers.store import ANSWERS
from eval.benchmarks.base import Dataset
from eval.benchmarks.records import Number, check
from eval.config import changed_options
from eval.judging.choice import score_answers
from eval.metrics import Score, SufficientStatistics, first_names
from eval.results.cost import summarise_accounting
from eval.results.report import scored
from eval.results.statistics import terms_of
from eval.statistics.command import Run
from llava.budget import RETENTION_RATIO, budget_text
from llava.errors import UserError
from llava.places import PACKAGES

REPORTED = "reported.json"
NATIVE, UNCOMMITTED = "native", "uncommitted"
# Sums of the same numbers, added in another order.
CLOSE = 1e-9
# A claimed score may be rounded to one decimal.
CLAIMED = 0.05 + CLOSE


class ReportedHeader(Header):
    """The file reported.json beside the answers of a reported entry; `score` is the claimed main score."""

    score: Number


@dataclass(frozen=True)
class Entry:
    """One checked entry.

    Attributes:
        badge: "native", "uncommitted" (a native run whose code is that of no commit), "replayed" or "reported".
        about: method, author, licence, link and commit of a foreign entry; {} for a method of this repository.
        options: those that differ from the method's defaults.
        budget: the visual tokens that the entry says to keep, and `size` as the user gave it ("64", "1/9").
        accounting: of the answers' own lines, as eval.results.cost.summarise_accounting adds them up.
        result: content of result.json; {} for a reported entry.
        code_faults: why a native run's code is not that of a commit.
    """

    folder: Path
    badge: str
    method: str
    options: str
    budget: float
    size: str
    positions: str
    score: Score
    terms: SufficientStatistics
    accounting: Mapping[str, Any]
    about: Mapping[str, str]
    result: Mapping[str, Any]
    code_faults: tuple[str, ...] = ()

    @property
    def tokens(self) -> float:
        """Visual tokens that enter a decoder layer, mean over layers and questions, added up again."""
        return float(self.accounting["mean_tokens_per_layer"])

    @property
    def over_budget(self) -> bool:
        """Whether more tokens enter than the entry says."""
        return self.tokens > float(self.accounting["asked_tokens_per_layer"]) + ROUNDING


def check_entry(folder: Path, full: Run, data: Dataset, judge: str = "auto") -> tuple[Entry | None, list[str]]:
    """Read an entry and check it against the board.

    Args:
        folder: of a run (result.json) or of a reported entry (reported.json).
        full: the board's run of `full`, scored again with the house's labels.

    Returns:
        The entry, and one sentence for everything that is wrong with it; None where it cannot be read at all.
    """
    try:
        return (reported if is_file(folder / REPORTED) else finished)(folder, full, data, judge)
    except UserError as error:
        return None, [str(error).rstrip(".")]


# -- native and replayed entries --------------------------------------------------------------------------------------


def finished(folder: Path, full: Run, data: Dataset, judge: str) -> tuple[Entry | None, list[str]]:
    """Check a finished run of this repository."""
    place = results_folder(folder)
    result = read_result(place)
    settings, config = result["settings"], result["settings"].get("config", {})
    faults = [f"differs from the board's full in {one}" for one in joint_differences(full.stored.result, result)]
    if failed := result.get("failed"):
        faults.append(f"{len(failed):,} questions failed; ask them again with --retry-failed")
    if result["budget"] != config.get("budget"):
        faults.append(
            f"result.json says a budget of {result['budget']}, the settings of the run {config.get('budget')}"
        )
    asked = [name for name in full.texts if name not in {line["question_id"] for line in failed or ()}]
    answers = place / ANSWERS if is_file(place / ANSWERS) else place.parent / ANSWERS
    lines, foreign = own_lines(answers, settings, asked)
    if missing := [name for name in asked if name not in lines]:
        faults.append(f"{len(missing):,} of {len(asked):,} questions have no answer ({first_names(missing)})")
    if foreign:
        faults.append(
            f"{len(foreign):,} answers are not of the settings in result.json ({first_names(foreign)}): answers or "
            "settings were changed"
        )
    questions = {question.id: question for question in data.questions}
    if unlike := [name for name in lines if images_of(lines[name]) != full.stored.images[name]]:
        faults.append(f"{len(unlike):,} answers are about other {data.images.noun} ({first_names(unlike)})")
    if not lines:
        return None, faults
    texts = {name: lines[name]["text"] for name in asked if name in lines}
    score, _ = score_answers(data, judge, list(texts), texts, answers)
    again = scored(score, [questions[name] for name in texts], data.labels(full.stored.images))
    faults += [
        f"scored again, {name} is {number_text(value)}; result.json says {number_text(result['metrics'].get(name))}"
        for name, value in again["metrics"].items()
        if not same(value, result["metrics"].get(name))
    ]
    accounts = {name: (lines[name].get("metadata") or {}).get("accounting") for name in texts}
    images = {name: max(1, len(questions[name].images)) for name in texts}
    accounting, wrong = audited(accounts, images, result["accounting"])
    if accounting is None:
        return None, faults + wrong
    replayed = settings["method"] == Replayed.name
    about = {name: str(config.get(name, "")) for name in ("method", "author", "licence", "link", "commit")}
    code = tuple(code_faults(result))
    entry = Entry(
        place,
        "replayed" if replayed else UNCOMMITTED if code else NATIVE,
        about["method"] if replayed else settings["method"],
        "" if replayed else ", ".join(changed_options(settings["method"], config)),
        float(result["budget"]),
        budget_text(result["budget"], config.get(RETENTION_RATIO)),
        config.get("positions", ""),
        score,
        terms_of(score, data.labels(full.stored.images)),
        accounting,
        about if replayed else {},
        result,
        code,
    )
    return entry, faults + wrong


def audited(
    accounts: Mapping[str, Any], images: Mapping[str, int], stated: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Add up the token counts of the answers again; returns the sums, and faults.

    Args:
        accounts: question id -> accounting of its line.
        images: question id -> number of its images.
        stated: `accounting` of result.json.
    """
    absent = [name for name, one in accounts.items() if not (isinstance(one, dict) and one.get("entering"))]
    if absent:
        return None, [f"{len(absent):,} answers have no token counts ({first_names(absent)})"]
    faults = []
    wrong = [name for name, one in accounts.items() if not same(fmean(one["entering"]) / images[name], one["mean"])]
    if wrong:
        faults.append(f"the mean of tokens is not that of the layers in {len(wrong):,} answers ({first_names(wrong)})")
    true = {name: one | {"mean": fmean(one["entering"]) / images[name]} for name, one in accounts.items()}
    accounting = summarise_accounting(list(true.values()))
    if all("paid" in one for one in true.values()):
        accounting["paid_tokens_per_layer"] = fmean(one["paid"] for one in true.values())
    for name in ("mean_tokens_per_layer", "asked_tokens_per_layer"):
        if not same(accounting[name], stated.get(name)):
            said = number_text(stated.get(name))
            faults.append(f"added up again, {name} is {number_text(accounting[name])}; result.json says {said}")
    return accounting, faults


def same(a: float | None, b: Any) -> bool:
    """Whether two numbers are the same up to the order of their sums."""
    if a is None or not isinstance(b, int | float):
        return a is b
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


def number_text(value: Any) -> str:
    """A number for a sentence; "missing" for None."""
    return "missing" if value is None else f"{value:,.4g}" if isinstance(value, int | float) else repr(value)


def code_faults(result: Mapping[str, Any]) -> list[str]:
    """Why the code of a run is not that of a commit of this repository; [] if it is.

    Every source file that the answers depend on is read from the commit and hashed again.
    """
    commit, settings = str(result.get("commit")), result["settings"]
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return [f"its code is not that of one commit, but of {commit!r}"]
    hashes = {**settings.get("code", {}), **settings.get("method_code", {})}
    blobs = blobs_of(commit)
    if not blobs:
        return [f"its commit {commit[:12]} is not in this repository"]
    other = [name for name, digest in hashes.items() if name not in blobs or code_hash(blobs[name], name) != digest]
    return [f"its code is not that of commit {commit[:12]}: {listed(other)}"] if other else []


@cache
def blobs_of(commit: str) -> dict[str, str]:
    """File -> git's name of its content in a commit; {} if the commit is not known here."""
    lines = git("ls-tree", "-r", commit).decode().splitlines()
    return {path: about.split()[2] for about, _, path in (line.partition("\t") for line in lines)}


@cache
def code_hash(blob: str, name: str) -> str:
    """Hash of the code in a file of a commit, as settings hold it."""
    return read_source(PACKAGES / name, PACKAGES, git("cat-file", "blob", blob))[0]


def git(*arguments: str) -> bytes:
    """What git prints; nothing if it fails."""
    try:
        return subprocess.run(["git", "-C", str(PACKAGES), *arguments], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


# -- foreign entries --------------------------------------------------------------------------------------------------


def header_faults(header: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    """In what a foreign header differs from the board's `full`, one sentence for each field.

    Args:
        full: content of result.json.
    """
    wanted = expected_header(full)
    return [
        f"{name} is {header.get(name, {} if name == 'image_options' else None)!r:.80}, the board's full has {value!r}"
        for name, value in wanted.items()
        if header.get(name, {} if name == "image_options" else None) != value
    ]


def expected_header(full: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a foreign header that the board's `full` decides."""
    settings, facts = full["settings"], full["facts"]
    return {
        "benchmark": settings["benchmark"],
        "split": settings["split"],
        "profile": facts.get("profile"),
        "source": facts.get("source"),
        "questions": settings["questions"],
        "model_files": combined(settings["model_files"]),
        "dtype": settings["dtype"],
        "image_options": settings.get("image_options", {}),
    }


def kept_file_faults(kept: KeptFile, full: Run) -> list[str]:
    """Everything that is wrong with a kept-index file, except for `preprocessing`, which needs the model."""
    faults = header_faults(kept.header, full.stored.result)
    if kept.header["tokens"] != (total := full.stored.result["visual_tokens"]):
        faults.append(f"tokens is {kept.header['tokens']}, the model has {total} visual tokens")
    return faults + kept_faults(kept, list(full.texts))


def reported(folder: Path, full: Run, data: Dataset, judge: str) -> tuple[Entry | None, list[str]]:
    """Check answers from elsewhere with their token counts."""
    where = str(folder / REPORTED)
    header: dict[str, Any] = dict(check(ReportedHeader, read_json(folder / REPORTED), where))
    faults = header_faults(header, full.stored.result)
    asked = replace(data, questions=tuple(question for question in data.questions if question.id in full.texts))
    answers = folder / ANSWERS
    texts, score = {}, None
    try:
        texts = read_answers(answers, asked).texts
        score, _ = score_answers(asked, judge, list(full.texts), texts, answers)
        value = score.values[score.main]
        if value is None or abs(value - header["score"]) > CLAIMED:
            faults.append(f"the header claims a score of {header['score']:g}; the house scores {number_text(value)}")
    except UserError as error:
        faults.append(str(error).rstrip("."))
    total, layers = full.stored.result["visual_tokens"], len(full.stored.result["accounting"]["entering_per_layer"])
    counts, wrong = reported_tokens(read_rows(answers)[0], layers, total)
    if wrong:
        faults.append(
            f"{len(wrong):,} answers lack `tokens_per_layer`, {layers} numbers from 0 to {total} ({first_names(wrong)})"
        )
    mean = fmean(map(fmean, counts)) if counts else 0.0
    if mean > header["budget"] + ROUNDING:
        faults.append(
            f"the header says a budget of {header['budget']:g}, but {mean:.1f} tokens enter a layer on average"
        )
    if score is None or score.values.get(score.main) is None or not counts:
        return None, faults
    accounting = {
        "mean_tokens_per_layer": mean,
        "asked_tokens_per_layer": header["budget"],
        "least_tokens_per_layer": min(map(fmean, counts)),
        "most_tokens_per_layer": max(map(fmean, counts)),
    }
    about = {name: header[name] for name in ("method", "author", "licence", "link", "commit")}
    entry = Entry(
        folder,
        "reported",
        header["method"],
        "",
        float(header["budget"]),
        budget_text(header["budget"], None),
        header["positions"],
        score,
        terms_of(score, data.labels(full.stored.images)),
        accounting,
        about,
        {},
    )
    return entry, faults


def reported_tokens(rows: Iterable[Any], layers: int, total: int) -> tuple[list[Sequence[float]], list[str]]:
    """The tokens per layer of every answer, and the ids of answers that have none or impossible ones."""
    counts, wrong = [], []
    for row in rows:
        own = row.fields.get("tokens_per_layer")
        fits = isinstance(own, list) and len(own) == layers
        if fits and all(type(one) in (int, float) and 0 <= one <= total for one in own):
            counts.append(own)
        else:
            wrong.append(str(row.id))
    return counts, wrong


def entry_folders(folder: Path) -> list[Path]:
    """All folders below one that hold a result.json or a reported.json."""
    return sorted({path.parent for name in (RESULT, REPORTED) for path in folder.rglob(name)})
