"""Estimate what a table costs before anything is downloaded: downloads, disk, GPU memory and hours.

Sizes and lengths are in `downloads.yaml`. Hours are estimated, not measured: the operations and bytes of every cell
(eval/efficiency/estimate.py), divided by an assumed share of the rates in a GPU's data sheet.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import ceil
from pathlib import Path

import torch

from eval.config import FULL, RunConfig
from eval.efficiency.estimate import Estimate, Rates, Workload
from eval.efficiency.memory import GIB, QuestionShape, layout_of
from eval.efficiency.shapes import official
from eval.papers.runs import RowAtBudget, columns_of, lines_of
from eval.papers.spec import Table
from eval.yaml_files import Part, read_yaml
from lab.pages.memory import size_of
from llava.errors import unknown
from llava.model.llava_arch import Llava

FILE = Path(__file__).parent / "downloads.yaml"
# Shares of the data sheet's operations and bandwidth that are assumed to be reached, as in docs/cluster.md.
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6
LONGEST_PROMPT, LONGEST_ANSWER = 160, 128  # text tokens that the memory of a batch is estimated for
CUDA_CONTEXT = 1.5 * GIB  # assumed for the context, fragmentation and workspaces, which the estimate leaves out


@dataclass(frozen=True)
class Gpu:
    """A GPU as in its data sheet: dense bfloat16 operations per second, bytes per second, and bytes of memory."""

    name: str
    operations: float
    bandwidth: float
    memory: float

    @property
    def rates(self) -> Rates:
        """The rates that are assumed to be reached."""
        return Rates(self.name, OF_PEAK * self.operations, OF_BANDWIDTH * self.bandwidth, OF_BANDWIDTH * 64e9)


GPUS = (
    Gpu("RTX 4090, 24 GB", 165e12, 1.008e12, 24e9),
    Gpu("A100, 80 GB", 312e12, 2.039e12, 80e9),
    Gpu("H100 SXM, 80 GB", 989e12, 3.35e12, 80e9),
)


class Checkpoint(Part):
    """A repository of the hub.

    Attributes:
        gb: its size in decimal gigabytes.
        shapes: its name in eval/efficiency/shapes.py; "" if it is not there.
        basis: where `gb` comes from.
        also: further repositories that it needs.
    """

    gb: float
    shapes: str = ""
    basis: str
    also: tuple[str, ...] = ()


class Load(Part):
    """The size of a benchmark's data and of its questions. The comments of `downloads.yaml` explain the fields."""

    questions: int
    text: int
    steps: int
    gb: float | None
    basis: str
    mirror: float | None


class Downloads(Part):
    checkpoints: dict[str, Checkpoint]
    benchmarks: dict[str, Load]


@cache
def downloads() -> Downloads:
    """The file of sizes."""
    return Downloads.model_validate(read_yaml(FILE))


@dataclass(frozen=True)
class Expense:
    """The costs of a table on its paper's model.

    Attributes:
        model: the official model without weights.
        lines: rows of the table, the unreduced model first.
        loads: benchmark -> its size, in the order of the columns; None if it is not known.
    """

    table: Table
    model: Llava
    lines: tuple[RowAtBudget, ...]
    loads: Mapping[str, Load | None]

    @property
    def runnable(self) -> list[RowAtBudget]:
        """The rows that can run."""
        return [line for line in self.lines if line.reducer is not None]

    @property
    def cells(self) -> int:
        """Runs of the table."""
        return len(self.runnable) * len(self.loads)

    @cached_property
    def peak(self) -> float:
        """Bytes that a batch of the unreduced model needs on the GPU, CUDA_CONTEXT included."""
        return self.estimate(self.lines[0], LONGEST_PROMPT, 1, LONGEST_ANSWER).peak + CUDA_CONTEXT

    def gpu_hours(self, gpu: Gpu) -> float:
        """At least how many hours one GPU needs for the whole table, with each cell as a run of its own.

        Loading is not counted.
        """
        batches: Counter[tuple[int, int]] = Counter()  # lengths of prompt and answer -> number of batches
        for load in filter(None, self.loads.values()):
            batches[load.text, load.steps] += ceil(load.questions / self.table.real.batch_size)
        seconds = sum(
            count * replace(self.estimate(line, text, steps), rates=gpu.rates).seconds["batch"]
            for line in self.runnable
            for (text, steps), count in batches.items()
        )
        return seconds / 3600

    def estimate(self, line: RowAtBudget, text: int, steps: int, new_tokens: int = 1) -> Estimate:
        """The estimate, as by `--dry-run`, of one batch of a row that can run, about the largest image or a video."""
        assert line.reducer is not None
        name, count = checkpoint_of(self.table).shapes, self.table.real.batch_size
        image = layout_of(self.model, size_of(name), video="Video" in name)
        work = Workload((QuestionShape(text, (image,)),), steps, count, count)
        return Estimate(self.model, line.reducer, work, count, new_tokens, torch.bfloat16, device="cuda")


def expense(table: Table) -> Expense:
    """The costs of a table with its paper's model and data."""
    known = downloads().benchmarks
    loads = {column.benchmark: known.get(column.benchmark) for column in columns_of(table, table.real)}
    model = official(checkpoint_of(table).shapes)
    return Expense(table, model, tuple(lines_of(table, RunConfig(FULL), model)), loads)


def checkpoint_of(table: Table) -> Checkpoint:
    """The size of the paper's checkpoint.

    Raises:
        UserError: `downloads.yaml` does not have it.
    """
    known = downloads().checkpoints
    if table.real.model not in known:
        raise unknown("checkpoint in lab/pages/downloads.yaml", table.real.model, known)
    return known[table.real.model]
