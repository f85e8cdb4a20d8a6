"""The runs of a table: every method at every budget on every benchmark.

A row at a budget is called a line. Each cell of a line is a run, prepared once as a `Job`. Runs that have no result yet
are made in one process or spread over the ranks of a node. Times to the first token are measured in one process, in
turns, on the first question of the first benchmark.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval import benchmarks
from eval.answers.source_hash import answer_sources, check_sources, combined
from eval.ask import Job
from eval.config import FULL, RunConfig, budget_of, build_reducer, plain
from eval.feature_cache import CachingLlava, without_memory
from eval.judging.choice import check_judge
from eval.papers.spec import Budget, Column, Place, Table, TableRow
from eval.parallel.placement import Placement
from eval.results.report import hardware
from eval.run import prepare
from eval.sweep import UnansweredQuestions, dataset, fill, fill_on_ranks, folder_of, is_complete
from llava.budget import BLIND, count_or_ratio
from llava.errors import UserError
from llava.model.builder import device_of, load, parse
from llava.model.llava_arch import Llava
from llava.places import WORK
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer, options_of

SWEEPS = WORK / "results" / "sweep"
# Where a budget is out of reach as a mean over layers, the row counts kept tokens as papers do, and says so.
BY_KEPT = {"schedule": "kept"}
KEPT, IMAGE = "‡", "§"  # marks of rows whose budget counts kept tokens, or whose mean over images misses it


@dataclass(frozen=True)
class RunTarget:
    """The model and data that this run of a table uses.

    Attributes:
        place: from the spec: which columns it can fill, and how the paper counts its tokens.
        is_toy: whether it is a bundled toy model; published values are left out then.
        run: the run of the unreduced model. A cell's run is this one with its own method, budget and benchmark.
    """

    place: Place
    is_toy: bool
    run: RunConfig


@dataclass(frozen=True)
class RowAtBudget:
    """A row of the table at one budget: a line.

    Attributes:
        budget: as the spec has it; None for the unreduced model and for the control none.
        run: with the method, budget and options of this line; None if the method cannot run at this budget.
        by_kept: whether the budget counts tokens kept after the pruning layer, not the mean over layers.
        off: whether the image decides how many tokens are kept, and a mean over images misses the budget. Known after
            the run (eval.papers.cells.read_cells).
        reason: why the method cannot run; "" if it can.
        reducer: the built method; None if it cannot run.
    """

    row: TableRow
    budget: Budget | None
    run: RunConfig | None
    by_kept: bool = False
    off: bool = False
    reason: str = ""
    reducer: Reducer | None = None

    @property
    def title(self) -> str:
        """The name of the row in every table and page."""
        return self.row.title

    @property
    def size(self) -> str:
        """The budget in words; "all" for the unreduced model and "0" for none."""
        return "0" if self.row.method == BLIND else str(self.budget or "all")

    @property
    def mark(self) -> str:
        """The sign of a row that has other tokens than its budget, and so is compared with no other; else ""."""
        return KEPT if self.by_kept else IMAGE if self.off else ""


# (number of the row at a budget, benchmark) -> the run of a cell, with everything that it reads.
Jobs = Mapping[tuple[int, str], Job]


def columns_of(table: Table, place: Place) -> list[Column]:
    """The columns that a model and its data can fill."""
    return [column for column in table.columns if not place.benchmarks or column.benchmark in place.benchmarks]


def lines_of(table: Table, run: RunConfig, model: Llava) -> list[RowAtBudget]:
    """The unreduced model, the control none if it has a row, then every other row at every budget.

    Args:
        run: of the unreduced model.
    """
    full = RowAtBudget(TableRow(method=FULL), None, run, reducer=build_reducer(run, model.visual_tokens))
    blind = [row for row in table.rows if row.method == BLIND]
    own = dataclasses.replace(run, method=BLIND)
    controls = [RowAtBudget(row, None, own, reducer=build_reducer(own, model.visual_tokens)) for row in blind]
    rows = [row for row in table.rows if row not in blind]
    return [full, *controls, *(line_of(row, budget, run, model) for budget in table.budgets for row in rows)]


def line_of(row: TableRow, budget: Budget, run: RunConfig, model: Llava) -> RowAtBudget:
    """A row at a budget.

    The budget is the mean over layers if the method can reach it, or else the number of kept tokens. A method that can
    do neither gets a line with the reason.
    """
    tokens, ratio = budget_of(count_or_ratio(str(budget)))
    own = changed(row.options, row.method) | ratio
    can_count_kept = "schedule" in options_of(registry.method(row.method)) and "schedule" not in row.options
    choices = [own, own | BY_KEPT] if can_count_kept else [own]
    reason = ""
    for by_kept, options in enumerate(choices):
        try:
            reducer = registry.build(row.method, tokens, options, model.visual_tokens)
            require(reducer, model.spec)
        except UserError as error:
            reason = reason or str(error)
            continue
        run = dataclasses.replace(run, method=row.method, budget=tokens, options=options)
        return RowAtBudget(row, budget, run, bool(by_kept), reducer=reducer)
    return RowAtBudget(row, budget, None, reason=reason)


def changed(options: Mapping[str, str], method: str) -> dict[str, str]:
    """The options that differ from the method's defaults, so that equal settings share one run."""

    def says(text: str, default: object) -> bool:
        """Whether a text, as it is typed after `--set`, says the default."""
        usual = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        try:
            return float(text) == float(usual)
        except ValueError:
            return text == usual

    cls = registry.method(method)
    usual = {key: options_of(cls)[registry.option_key(cls, key)].default for key in options}
    return {key: text for key, text in options.items() if not says(text, usual[key])}


def jobs_of(lines: Sequence[RowAtBudget], columns: Sequence[Column], run: RunConfig, model: Llava) -> Jobs:
    """The runs of all cells, in the folders that all tables share.

    They are in the order in which they are asked: benchmark by benchmark, so that few images have to be remembered at
    once.

    Args:
        run: of the unreduced model.
    """
    jobs = {}
    for column in columns:
        split = benchmarks.check_split(benchmarks.get(column.benchmark), column.split or None, run.data)
        data = dataset(column.benchmark, run.data, split)
        judge = run.judge if data.judging is not None else "auto"
        check_judge(data, judge)
        data.check_images(data.questions[: run.limit])
        for index, line in enumerate(lines):
            if line.run is not None and line.reducer is not None:
                own = dataclasses.replace(line.run, benchmark=column.benchmark, split=split, judge=judge)
                own = dataclasses.replace(own, output=folder_of(SWEEPS, own, data, model, line.reducer))
                jobs[index, column.benchmark] = prepare(own, model, line.reducer, data)
    return jobs


def described(lines: Sequence[RowAtBudget]) -> list[str]:
    """Methods that cannot run, one sentence each."""
    return [f"{line.title} at {line.budget}: {line.reason}" for line in lines if line.run is None]


# -- making the runs --------------------------------------------------------------------------------------------------


def open_model(run: RunConfig, place: Placement | None) -> CachingLlava:
    """The model. If ranks do the work, this process holds it on the CPU and leaves them the memory of the GPUs."""
    device = "cpu" if place is not None else run.device
    options = {key: parse(key, value) for key, value in run.image_options.items()}
    return CachingLlava(load(run.model, run.dtype, device, **options))


def fill_cells(jobs: Jobs, model: CachingLlava, place: Placement | None, what: str) -> None:
    """Run what is missing.

    A cell with questions that failed has no score; the others go on, and the next call asks these questions again.

    Raises:
        SystemExit: a rank did not finish.
    """
    device = next(iter(jobs.values())).config.device
    kind = device_of(device).type
    missing = [job for job in tqdm(jobs.values(), desc="look", leave=False) if not is_complete(job, kind)]
    reducers = list(dict.fromkeys(job.reducer for job in jobs.values()))
    if place is not None and missing:  # one cell too: this process holds its model on the CPU
        configs = [job.config for job in missing]
        fill_on_ranks(configs, {**model.loaded_with, "device": device}, SWEEPS, place, go_on=True)
        check_sources(model, *reducers)  # ranks import the code later than this process does
        return
    model.expect(reducers)
    for job in tqdm(missing, desc=what, unit="cell", disable=not missing):
        with contextlib.suppress(UnansweredQuestions):  # the cell is n/a, with the reason
            fill(job)


@dataclass(frozen=True)
class Time:
    """Seconds to the first token of one question: vision, selection and prefill, without preprocessing.

    Attributes:
        about: what was measured, in a sentence.
    """

    ttft: float
    about: str


def times_of(jobs: Jobs, model: Llava, repeats: int, path: Path) -> dict[int, Time]:
    """Index of a line -> its time to the first token; empty without repeats.

    Args:
        path: where measurements are kept, so that an interrupted table goes on.
    """
    if not repeats:
        return {}
    from eval.efficiency.measure import Measurements, measure

    first = next(iter(jobs.values()))
    data, dtype, device = first.data, first.config.dtype, str(model.device)
    sample = data.sample(data.questions[0])
    reducers = {str(index): job.reducer for (index, name), job in jobs.items() if name == data.benchmark}
    settings = {
        "model": model.name,
        "model_files": model.fingerprint,
        "image_options": model.conventions,
        "question": sample.message,
        "images": list(sample.image_ids),
        "benchmark": data.benchmark,
        "device": device,
        "hardware": hardware(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "code": combined(answer_sources(model, *reducers.values())),
        "methods": {name: plain(reducer) for name, reducer in reducers.items()},
    }
    try:
        usable = json.loads(path.read_text().partition("\n")[0]) == settings
    except (FileNotFoundError, ValueError):  # ValueError: its writer was killed in the first line
        usable = False
    if not usable:  # of another model, machine or code
        path.unlink(missing_ok=True)
    found = measure(without_memory(model), reducers, lambda turn: [sample], repeats, Measurements(path, settings))
    check_sources(model, *reducers.values())
    about = (
        f"TTFT: median of {repeats} prefills of one question after a warm-up, methods in turns in one process, "
        f"on {device} ({hardware(device)}), {dtype}."
    )
    return {int(name): Time(one.ttft, about) for name, one in found.items() if one is not None}
