"""What a table costs: downloads, disk, GPU memory and hours, estimated before anything is downloaded.

Sizes and lengths are in `downloads.yaml`. Hours are estimated, not measured: operations and bytes of every cell
(eval/efficiency/estimate.py) over an assumed share of a GPU's data sheet.
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
# Shares of the data sheet that are assumed to be reached, as in docs/cluster.md.
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6
LONGEST_PROMPT, LONGEST_ANSWER = 160, 128  # text tokens, for the memory of a batch
CUDA_CONTEXT = 1.5 * GIB  # assumed: context, fragments and kernels' own memory, which the estimate leaves out


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense bfloat16 operations and bytes per second, bytes of memory."""

    name: str
    operations: float
    bandwidth: float
    memory: float

    @property
    def rates(self) -> Rates:
        """What is assumed to be reached."""
        return Rates(self.name, OF_PEAK * self.operations, OF_BANDWIDTH * self.bandwidth, OF_BANDWIDTH * 64e9)


GPUS = (
    Gpu("RTX 4090, 24 GB", 165e12, 1.008e12, 24e9),
    Gpu("A100, 80 GB", 312e12, 2.039e12, 80e9),
    Gpu("H100 SXM, 80 GB", 989e12, 3.35e12, 80e9),
)


class Checkpoint(Part):
    """A repository of the hub: decimal gigabytes, what says so, and further repositories that it needs.

    `shapes` is its name in eval/efficiency/shapes.py; "" for what is no LLaVA.
    """

    gb: float
    shapes: str = ""
    basis: str
    also: tuple[str, ...] = ()


class Load(Part):
    """A benchmark: size of its data and of its questions. See the comments of `downloads.yaml`."""

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
        loads: benchmark -> its size, in the order of the columns; None where it is not known.
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
        """Bytes on the GPU of a batch of the unreduced model, with what the estimate leaves out assumed."""
        return self.estimate(self.lines[0], LONGEST_PROMPT, 1, LONGEST_ANSWER).peak + CUDA_CONTEXT

    def gpu_hours(self, gpu: Gpu) -> float:
        """Hours of one GPU for the whole table, at least; each cell as a run of its own, without loading."""
        batches: Counter[tuple[int, int]] = Counter()  # of benchmarks with equal lengths together
        for load in filter(None, self.loads.values()):
            batches[load.text, load.steps] += ceil(load.questions / self.table.real.batch_size)
        seconds = sum(
            count * replace(self.estimate(line, text, steps), rates=gpu.rates).seconds["batch"]
            for line in self.runnable
            for (text, steps), count in batches.items()
        )
        return seconds / 3600

    def estimate(self, line: RowAtBudget, text: int, steps: int, new_tokens: int = 1) -> Estimate:
        """One batch of a row that can run, about the largest image or a video, as `--dry-run` estimates it."""
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
