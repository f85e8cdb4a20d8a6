"""The runs of a table: every method at every budget on every benchmark, why some cannot be, and how they are made.

Runs that have no result yet are made in one process or spread over the ranks of a node. Times to the first token are
measured in turns in one process, on the first question of the first benchmark.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval import benchmarks
from eval.answers.source_hash import answer_sources, check_sources, combined
from eval.config import FULL, RunConfig, budget_of, plain
from eval.efficiency.measure import Measurements, measure
from eval.feature_cache import CachingLlava, without_memory
from eval.papers.spec import Budget, Column, Place, Row, Table
from eval.parallel.placement import Placement
from eval.results.report import hardware
from eval.sweep import Setting, UnansweredQuestions, dataset, fill, fill_on_ranks, folder_of, is_finished, reducer_of
from llava.budget import count_or_ratio
from llava.errors import UserError
from llava.model.builder import device_of, load, parse
from llava.model.llava_arch import Llava
from llava.places import WORK
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.reducer import options_of

SWEEPS = WORK / "results" / "sweep"
# Where a budget is out of reach as a mean over layers, the row counts kept tokens as papers do, and says so.
BY_KEPT = {"schedule": "kept"}


@dataclass(frozen=True)
class RunTarget:
    """The model and data that this run of a table uses.

    Attributes:
        place: from the spec, with the user's changes.
        is_toy: the bundled toy model; published values are left out then.
        data: data folder.
        limit: questions of each benchmark; None for all.
        wandb: W&B mode of the cells' own runs; the table's run is another one.
        table: the group of these runs.
    """

    place: Place
    is_toy: bool
    data: Path
    limit: int | None = None
    device: str = "auto"
    judge: str = "auto"
    wandb: str = "disabled"
    table: str | None = None


@dataclass(frozen=True)
class RowAtBudget:
    """A row of the table at one budget.

    Attributes:
        row: None for the unreduced model.
        budget: as the spec has it; None for the unreduced model.
        by_kept: the budget counts tokens kept after the pruning layer, not the mean over layers.
        reason: why the method cannot run so; "" if it can.
    """

    row: Row | None
    budget: Budget | None
    setting: Setting | None
    by_kept: bool = False
    reason: str = ""

    @property
    def method(self) -> str:
        return FULL if self.row is None else self.row.method

    @property
    def title(self) -> str:
        return FULL if self.row is None else self.row.title


def columns_of(table: Table, where: RunTarget) -> list[Column]:
    """The columns that this model and data can fill."""
    wanted = where.place.benchmarks
    return [column for column in table.columns if not wanted or column.benchmark in wanted]


def lines_of(table: Table, where: RunTarget, model: Llava) -> list[RowAtBudget]:
    """The unreduced model, then every row at every budget."""
    rows = [line_of(row, budget, model) for budget in table.budgets for row in table.rows]
    return [RowAtBudget(None, None, Setting(FULL, None)), *rows]


def line_of(row: Row, budget: Budget, model: Llava) -> RowAtBudget:
    """A row at a budget: by the mean over layers, else by kept tokens, else with the reason why it cannot run."""
    tokens, extra = budget_of(count_or_ratio(str(budget)))
    can_count_kept = "schedule" in options_of(registry.method(row.method)) and "schedule" not in row.options
    own = changed(dict(row.options), row.method)
    reason = ""
    for by_kept in (False, True) if can_count_kept else (False,):
        options = {**own, **extra, **(BY_KEPT if by_kept else {})}
        try:
            require(registry.build(row.method, tokens, options, model.visual_tokens), model.spec)
            return RowAtBudget(row, budget, Setting(row.method, tokens, options), by_kept)
        except UserError as error:
            reason = reason or str(error)
    return RowAtBudget(row, budget, None, reason=reason)


def config_of(line: RowAtBudget, column: Column, where: RunTarget, model: Llava) -> RunConfig:
    """The run of one cell, in the folder that all tables and sweeps share."""
    assert line.setting is not None
    split = split_of(column, where)
    is_judged = dataset(column.benchmark, where.data, split).judging is not None
    return RunConfig(
        line.setting.method,
        line.setting.budget,
        column.benchmark,
        split=split,
        model=where.place.model,
        data=where.data,
        output=folder_of(SWEEPS, model, column.benchmark, split, line.setting, where.data),
        batch_size=where.place.batch_size,
        limit=where.limit,
        options=line.setting.options,
        dtype=where.place.dtype,
        device=where.device,
        image_options=dict(where.place.image_options),
        judge=where.judge if is_judged else "auto",
        failed="again",
        wandb=where.wandb,
        table=where.table,
    )


def split_of(column: Column, where: RunTarget) -> str:
    """The column's split, or the first one of the benchmark whose questions are in the data folder."""
    return benchmarks.check_split(benchmarks.get(column.benchmark), column.split or None, where.data)


def described(lines: Sequence[RowAtBudget]) -> list[str]:
    """Methods that cannot run, one sentence each."""
    return [f"{line.title} at {line.budget}: {line.reason}" for line in lines if line.setting is None]


def changed(options: Mapping[str, str], method: str) -> dict[str, str]:
    """The options that differ from the method's defaults, so that equal settings share one run."""

    def same(text: str, default: object) -> bool:
        """Whether a text, as it is typed after `--set`, says the default."""
        usual = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        try:
            return float(text) == float(usual)
        except ValueError:
            return text == usual

    usual = options_of(registry.method(method))
    return {key: value for key, value in options.items() if not same(value, usual[key].default)}


# -- making the runs --------------------------------------------------------------------------------------------------


def open_model(where: RunTarget, place: Placement | None) -> CachingLlava:
    """The model; on the CPU where the ranks have their own, so that it takes no GPU's memory from them."""
    device = "cpu" if place is not None else where.device
    options = {key: parse(key, value) for key, value in where.place.image_options.items()}
    return CachingLlava(load(where.place.model, where.place.dtype, device, **options))


def fill_cells(
    lines: Sequence[RowAtBudget],
    columns: Sequence[Column],
    where: RunTarget,
    model: CachingLlava,
    place: Placement | None,
    what: str,
) -> None:
    """Run what is missing, one benchmark after the other, so that remembered features are of few images.

    A cell with questions that failed has no score; the others go on, and the next call asks these questions again.

    Raises:
        SystemExit: a rank did not finish.
    """
    runnable = [line for line in lines if line.setting is not None]
    configs = [config_of(line, column, where, model) for column in columns for line in runnable]
    kind = device_of(where.device).type
    missing = [config for config in tqdm(configs, desc="look", leave=False) if not is_finished(config, model, kind)]
    reducers = [reducer_of(line.setting, model.visual_tokens) for line in runnable if line.setting is not None]
    if place is not None and missing:  # one cell too: this process holds its model on the CPU
        fill_on_ranks(missing, {**model.loaded_with, "device": where.device}, SWEEPS, place, go_on=True)
        check_sources(model, *reducers)  # ranks import the code later than this process does
        return
    model.expect(reducers)
    for config in tqdm(missing, desc=what, unit="cell", disable=not missing):
        with contextlib.suppress(UnansweredQuestions):  # the cell is n/a, with the reason
            fill(config, model)


@dataclass(frozen=True)
class Time:
    """Seconds to the first token of one question: vision, selection and prefill, without preprocessing.

    Attributes:
        about: what was measured, in a sentence.
    """

    ttft: float
    about: str


def times_of(
    lines: Sequence[RowAtBudget], column: Column, where: RunTarget, model: Llava, repeats: int, path: Path
) -> dict[int, Time]:
    """Index of a line -> its time; nothing without repeats.

    Args:
        path: measurements are kept here, so that an interrupted table goes on.
    """
    if not repeats:
        return {}
    data = dataset(column.benchmark, where.data, split_of(column, where))
    sample = data.sample(data.questions[0])
    reducers = {
        str(index): reducer_of(line.setting, model.visual_tokens)
        for index, line in enumerate(lines)
        if line.setting is not None
    }
    device = str(model.device)
    settings = {
        "model": model.name,
        "model_files": model.fingerprint,
        "image_options": model.conventions,
        "question": sample.message,
        "images": list(sample.image_ids),
        "benchmark": column.benchmark,
        "device": device,
        "hardware": hardware(device),
        "dtype": where.place.dtype,
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
        f"on {device} ({hardware(device)}), {where.place.dtype}."
    )
    return {int(name): Time(one.ttft, about) for name, one in found.items() if one is not None}
