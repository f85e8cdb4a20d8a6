"""The cells of a table, read from the results of finished runs."""

import dataclasses
import hashlib
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.answers.reuse import RESULT, Stored, check_images, check_joint, read_result, read_stored
from eval.ask import Job
from eval.benchmarks.media import digest_of
from eval.config import RunConfig
from eval.judging.choice import score_answers
from eval.metrics import SufficientStatistics
from eval.papers.runs import Jobs, RowAtBudget
from eval.papers.spec import Budget, Column, TableRow
from eval.results import report
from eval.results.statistics import terms_of
from eval.statistics.answers import Normalise, plain, sample_scores
from eval.tables import interval_text
from llava.errors import UserError
from llava.places import CHECKOUT, WORK


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one benchmark.

    Attributes:
        value: the column's metric, in percent or points.
        low, high: 95 % interval of `value`; None where there is none.
        column: the paper's column. If these data do not give its metric, the title names the metric that is shown.
        metric: name of the metric that `value` is: the column's, or else the benchmark's main one.
        whole: whether the score is printed as a whole number, as points are in a column with scores above 100 (MME).
        tokens: visual tokens that entered a decoder layer, mean over layers and samples.
        merged: how many of these tokens were merged from several.
        kv_bytes, flops: per question.
        terms: the sums by unit from which `value`, averages and tests are computed.
        normalise: text -> the benchmark's own form of an answer, for loyalty.
        texts, sample_scores: question id -> answer, sample score (empty if single answers have none).
        clusters: question id -> image, of the questions that have one.
        other_judge: which model judged the answers, if it is not the judge of the published scores; else "".
        stored: the run; None for a cell that was not read from one.
        no_interval: why there is no interval.
        no_flops: for how many questions operations were counted, if not for all; `flops` is withheld then.
        spread: mean, asked, fewest and most tokens of an image in words, where the image decides the number; else "".
        ends: the fewest and the most tokens of an image.
        padding: visual tokens per question whose patch lies on the square's padding; None in results without it.
        command: the command that runs this cell alone.
    """

    line: RowAtBudget
    column: Column
    value: float
    low: float | None
    high: float | None
    metric: str
    whole: bool
    questions: int
    available: int
    tokens: float
    merged: float
    kv_bytes: float
    flops: float | None
    folder: Path
    command: str
    commit: str
    finished: str
    terms: SufficientStatistics = field(repr=False, compare=False)
    normalise: Normalise = field(repr=False, compare=False)
    texts: Mapping[str, str] = field(repr=False, compare=False)
    sample_scores: Mapping[str, float] = field(repr=False, compare=False)
    clusters: Mapping[str, str] = field(repr=False, compare=False)
    other_judge: str = ""
    stored: Stored | None = field(default=None, repr=False, compare=False)
    no_interval: str = field(default="", compare=False)
    no_flops: str = field(default="", compare=False)
    spread: str = ""
    ends: tuple[float, float] | None = None
    padding: float | None = None

    @property
    def run(self) -> str:
        """Folder of the run, relative to the repository's root if it is inside."""
        return relative(self.folder)

    @property
    def answers_sha256(self) -> str:
        """Hash of the answers to the questions that were asked, sorted by question."""
        lines = (f"{name}\t{self.texts[name]}\n" for name in sorted(self.texts))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def interval(self) -> str:
        """The interval as text: "[75.2, 78.6]"; "" where there is none."""
        return "" if self.low is None else interval_text(self.low, self.high)


def read_cell(line: RowAtBudget, column: Column, job: Job) -> Cell | str:
    """The cell of a finished run, or a sentence if some of its questions failed or it is off its budget.

    Where the image decides the number of tokens, their mean may miss the budget; the line then says so.

    Raises:
        UserError: there is no result of these questions.
    """
    data, questions = job.data, job.planned
    asked = [question.id for question in questions]
    if not (job.results / RESULT).is_file():
        raise UserError(
            f"{job.output} holds no result of {len(asked):,} questions; run the table without --render first."
        )
    result = read_result(job.results)
    if failed := result.get("failed"):
        return (
            f"{line.title} at {line.budget} on {column.title}: {len(failed):,} of {len(asked):,} questions failed, the "
            f"first ({failed[0]['question_id']}) with: {failed[0]['reason']}"
        )
    accounting, off = result["accounting"], result.get("off_budget")
    adaptive = accounting.get("adaptive", False)
    if off and not adaptive:
        return f"{line.title} at {line.budget} on {column.title}: {off['remark']}"
    stored = read_stored(job.results, data, expected=job.settings)
    now = {question.id: digest_of(data.images, question.images) for question in questions}
    check_images(stored.images, now, f"The answers in {job.output} and the questions in {job.config.data}")
    texts = stored.texts
    score, judge_facts = score_answers(data, job.config.judge, asked, texts, stored.answers)
    # As it is scored now: verdicts may have come, or gone, since the result was written.
    labels = data.labels(stored.images)
    result |= report.scored(score, questions, labels)
    metric, value = metric_of(column, result, {result["main"], *score.other_terms})
    found = result["confidence"].get(metric, {"low": None, "high": None, "method": f"{metric} has none"})
    flops = report.operations_of(result)
    counted_for = f"{result['timing']['questions']:,} of {len(asked):,} questions"
    return Cell(
        line=dataclasses.replace(line, off=True) if off else line,
        column=shown(column, metric),
        value=value,
        low=found["low"],
        high=found["high"],
        metric=metric,
        whole=metric in result["points"],
        questions=len(asked),
        available=len(data.questions),
        tokens=accounting["mean_tokens_per_layer"],
        merged=accounting["merged_tokens"],
        kv_bytes=accounting["kv_bytes_per_sample"],
        flops=flops,
        folder=job.output,
        command=command_of(line, column, job.config),
        commit=result["commit"] or "",
        finished=result["finished"],
        terms=terms_of(score, labels, metric),
        normalise=data.normalise or plain,
        texts=texts,
        sample_scores=sample_scores(score, texts, data) or {},
        clusters={question.id: labels[question.id] for question in questions if question.images},
        other_judge=other_judge({**result["facts"], **judge_facts}.get("judge", {})),
        stored=stored.judged(judge_facts),
        no_interval=found["method"].removeprefix("n/a: ") if found["low"] is None else "",
        no_flops=counted_for if flops != result["flops"]["per_question"] else "",
        spread=report.tokens_text(accounting) if adaptive else "",
        ends=(accounting["least_tokens_per_layer"], accounting["most_tokens_per_layer"]) if adaptive else None,
        padding=accounting.get("mean_tokens_on_padding"),
    )


def other_judge(facts: Mapping[str, str]) -> str:
    """ "" if the official judge graded the answers, in any dated version; else who did.

    Args:
        facts: names of the judge and of the official judge; empty if there is no judge or only words were matched.
    """
    name, official = facts.get("name", ""), facts.get("official", "")
    family = re.sub(r"-\d{4}$", "", official)
    return "" if not official or re.sub(r"-\d{4}$", "", name) == family else f"judged by {name}, published: {official}"


def metric_of(column: Column, result: Mapping[str, Any], known: Collection[str]) -> tuple[str, float]:
    """Name and value of the column's metric, or of the benchmark's main one if these data do not give the column's.

    Args:
        known: metrics for which intervals, averages and tests can be computed.
    """
    metrics = result["metrics"]
    if column.metric and column.metric not in known and metrics.get(column.metric, "no such metric") is not None:
        names = ", ".join(sorted(known))
        raise UserError(f"{column.benchmark} has no metric {column.metric!r} that a table can show; it has: {names}.")
    name = column.metric if column.metric and metrics[column.metric] is not None else result["main"]
    if metrics[name] is None:
        raise UserError(f"{column.benchmark} gives no score here: {'; '.join(result['notes'])}.")
    return name, float(metrics[name])


def shown(column: Column, metric: str) -> Column:
    """The column under the name of the metric that it shows: "MME total" becomes "MME perception"."""
    if not column.metric or metric == column.metric:
        return column
    named = column.metric in column.title
    title = column.title.replace(column.metric, metric) if named else f"{column.title} ({metric})"
    return column.model_copy(update={"title": title})


def command_of(line: RowAtBudget, column: Column, run: RunConfig) -> str:
    """The command that asks the questions of a cell outside the table, with every flag that is not its default."""
    data = relative(run.data)
    options = dict(run.options)
    ratio = options.pop("retention_ratio", None)
    budgets = [str(one) for one in (run.budget, ratio and line.budget) if one is not None]
    if CHECKOUT:
        words = [f"MODEL={relative(run.model)}", *([] if data == "assets/eval" else [f"DATA={data}"])]
        words += [f"bash scripts/eval/{column.benchmark}.sh {run.method}", *budgets]
    else:
        words = [f"vtr eval --benchmark {column.benchmark} --method {run.method}", *(f"--budget {b}" for b in budgets)]
        words += [f"--model {shlex.quote(run.model)} --data {shlex.quote(data)}"]
    words += [f"--split {column.split}"] if column.split else []
    words += [f"--set {key}={value}" for key, value in options.items()]
    words += [f"--image-option {key}={value}" for key, value in run.image_options.items()]
    words += [f"--dtype {run.dtype}"] if run.dtype != "float32" else []
    words += [f"--batch-size {run.batch_size}"] if run.batch_size != RunConfig.batch_size else []
    words += [f"--judge {run.judge}"] if run.judge != RunConfig.judge else []
    words += [f"--limit {run.limit}"] if run.limit else []
    return " ".join(words)


def relative(path: str | os.PathLike[str]) -> str:
    """A path inside the repository, relative to its root; other paths are returned as they are."""
    found = Path(path)
    return str(found.relative_to(WORK)) if found.is_absolute() and found.is_relative_to(WORK) else str(path)


@dataclass(frozen=True)
class MeasuredTable:
    """All cells of a table that were run.

    Attributes:
        cells: (index of the line, benchmark) -> cell.
        failed: a sentence for each run without a cell, because some of its questions failed.
    """

    lines: Sequence[RowAtBudget]
    columns: Sequence[Column]
    cells: Mapping[tuple[int, str], Cell]
    failed: Sequence[str] = ()

    def row(self, index: int) -> dict[str, Cell]:
        """Benchmark -> cell of a line; empty where the method cannot run."""
        found = ((column.benchmark, self.cells.get((index, column.benchmark))) for column in self.columns)
        return {name: cell for name, cell in found if cell is not None}

    def first(self, index: int) -> Cell | None:
        """The cell of a line on the first benchmark."""
        return self.cells.get((index, self.columns[0].benchmark))

    def cell(self, row: TableRow | None, budget: Budget, benchmark: str) -> Cell | None:
        """The cell of a row at a budget; None where it cannot run, or there is no such row."""
        if row is None:
            return None
        index = next(i for i, line in enumerate(self.lines) if line.row is row and line.budget in (budget, None))
        return self.cells.get((index, benchmark))

    def of_full(self, index: int) -> float | None:
        """The average of the table: the mean over the benchmarks of the score in percent of the unreduced model's.

        None if a score is missing, or the unreduced model scores 0 on a benchmark.
        """
        row, full = self.row(index), self.row(0)
        if not row or len(row) < len(full) or any(full[name].value == 0 for name in row):
            return None
        return sum(100 * cell.value / full[name].value for name, cell in row.items()) / len(row)


def read_cells(lines: Sequence[RowAtBudget], columns: Sequence[Column], jobs: Jobs) -> MeasuredTable:
    """Every cell of the table."""
    cells: dict[tuple[int, str], Cell] = {}
    first_of_method: dict[tuple[str, str], int] = {}
    failed: list[str] = []
    for index, line in enumerate(lines):
        for column in columns if line.run is not None else ():
            found = read_cell(line, column, jobs[index, column.benchmark])
            if isinstance(found, str):
                failed.append(found)
            else:
                cells[index, column.benchmark] = found
                first = cells[first_of_method.setdefault((line.row.method, column.benchmark), index), column.benchmark]
                for other in (cells.get((0, column.benchmark)), first):
                    if other is not None and other.stored is not None and found.stored is not None:
                        check_joint(other.stored, found.stored)
    if lost := [column.title for column in columns if (0, column.benchmark) not in cells]:
        raise UserError(f"The unreduced model has no result on {', '.join(lost)}: {'; '.join(failed)}.")
    # A column is of whole numbers or of decimals: 150 does not stand above 50.0.
    large = {name for (_, name), cell in cells.items() if cell.whole and cell.value > 100}
    cells = {key: dataclasses.replace(cell, whole=key[1] in large) for key, cell in cells.items()}
    # A line that misses its budget on one benchmark is compared on none.
    off = {index for (index, _), cell in cells.items() if cell.line.off}
    lines = [dataclasses.replace(line, off=True) if index in off else line for index, line in enumerate(lines)]
    cells = {key: dataclasses.replace(cell, line=lines[key[0]]) for key, cell in cells.items()}
    return MeasuredTable(lines, [cells[0, column.benchmark].column for column in columns], cells, failed)
