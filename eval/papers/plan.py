"""Which runs a table needs: every method at every budget on every benchmark, and why some cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import benchmarks
from eval.config import FULL, ROOT, RunConfig, budget_of
from eval.papers.spec import Budget, Column, Place, Row, Table
from eval.sweep import Setting, dataset, folder_of
from eval.tables.common import changed, defaults
from llava.budget import count_or_ratio
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry
from llava.reduction.budget import require

SWEEPS = ROOT / "results" / "sweep"
# Where a budget is out of reach as a mean over layers, the row counts kept tokens as papers do, and says so.
BY_KEPT = {"schedule": "kept"}


@dataclass(frozen=True)
class Where:
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
class Line:
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


def columns_of(table: Table, where: Where) -> list[Column]:
    """The columns that this model and data can fill."""
    wanted = where.place.benchmarks
    return [column for column in table.columns if not wanted or column.benchmark in wanted]


def lines_of(table: Table, where: Where, model: Llava) -> list[Line]:
    """The unreduced model, then every row at every budget."""
    rows = [line_of(row, budget, model) for budget in table.budgets for row in table.rows]
    return [Line(None, None, Setting(FULL, None)), *rows]


def line_of(row: Row, budget: Budget, model: Llava) -> Line:
    """A row at a budget: by the mean over layers, else by kept tokens, else with the reason why it cannot run."""
    tokens, extra = budget_of(count_or_ratio(str(budget)))
    can_count_kept = "schedule" in registry.options_of(registry.method(row.method)) and "schedule" not in row.options
    own = changed(dict(row.options), defaults(row.method))
    reason = ""
    for by_kept in (False, True) if can_count_kept else (False,):
        options = {**own, **extra, **(BY_KEPT if by_kept else {})}
        try:
            require(registry.build(row.method, tokens, options, model.visual_tokens), model.spec)
            return Line(row, budget, Setting(row.method, tokens, options), by_kept)
        except UserError as error:
            reason = reason or str(error)
    return Line(row, budget, None, reason=reason)


def config_of(line: Line, column: Column, where: Where, model: Llava) -> RunConfig:
    """The run of one cell, in the folder that all tables and sweeps share."""
    assert line.setting is not None
    split = split_of(column, where)
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
        picture=dict(where.place.picture),
        judge=where.judge if is_judged(column, split, where) else "auto",
        failed="again",
        wandb=where.wandb,
        table=where.table,
    )


def is_judged(column: Column, split: str, where: Where) -> bool:
    """Whether a language model scores the benchmark's answers."""
    return dataset(column.benchmark, where.data, split).judging is not None


def split_of(column: Column, where: Where) -> str:
    """The column's split, or the first one of the benchmark whose questions are in the data folder."""
    return benchmarks.check_split(benchmarks.get(column.benchmark), column.split or None, where.data)


def described(lines: Sequence[Line]) -> list[str]:
    """Methods that cannot run, one sentence each."""
    return [f"{line.title} at {line.budget}: {line.reason}" for line in lines if line.setting is None]
