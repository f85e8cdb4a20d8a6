"""Kept indices of a method that is not in this repository, and the reducer that replays them.

A kept-index file lets a method be measured here without a line of its code. The author runs the selection wherever it
lives and writes down, for every question, the indices of the visual tokens that it keeps. The house then runs the model
with exactly these tokens. docs/evaluation.md describes the file; `vtr submit check` reads it, `vtr submit replay` runs
it.

The indices count the visual tokens that enter the decoder without reduction, 0 to N - 1 in raster order. The file says
what is kept before decoder layer 0; a method that drops tokens between decoder layers cannot be written down like this.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch

from eval.answers.jsonl import parse_line, read_bytes
from eval.benchmarks.records import Filled, NotRequired, Number, TypedDict, check
from eval.metrics import first_names
from llava.errors import UserError
from llava.reduction.merging import Reduction
from llava.reduction.reducer import MethodMetadata, Reducer, option
from llava.reduction.states import PromptState
from llava.reduction.token_layout import ModelSpec

# A mean over questions may exceed the stated budget by this much, as everywhere in this project (Reducer.rounding).
ROUNDING = 0.5


class Header(TypedDict):
    """What every foreign entry says of itself; the fields from `benchmark` on must be those of the board's `full`."""

    method: Filled
    author: Filled
    licence: Filled
    link: Filled
    commit: Filled
    budget: int
    positions: Literal["renumber", "original"]
    benchmark: Filled
    split: Filled
    profile: Filled
    source: Filled
    questions: Filled
    model_files: Filled
    dtype: Filled
    image_options: NotRequired[dict[str, Any]]


class KeptHeader(Header):
    """The first line of a kept-index file.

    Attributes:
        tokens: N, the visual tokens of an image before any reduction.
        order: "raster" if all kept indices ascend, "given" if tokens enter the decoder in the order of the line.
        weights: "none" for plain pruning; "features" or "tokens" if lines say how dropped tokens are merged into kept
            ones, and whether tower features or projected tokens are averaged.
        preprocessing: hash of the pixels of the first question's image, see `pixel_hash`.
    """

    tokens: int
    order: Literal["raster", "given"]
    weights: Literal["none", "features", "tokens"]
    preprocessing: Filled


class KeptLine(TypedDict):
    """One question: `into` and `weights` have N entries, as Reduction.assignment and Reduction.merge_weight."""

    question_id: Filled
    kept: list[int]
    into: NotRequired[list[int]]
    weights: NotRequired[list[Number]]


@dataclass(frozen=True)
class KeptFile:
    """A kept-index file as read; `kept_faults` says whether it may be replayed.

    Attributes:
        digest: SHA-256 of the file, 16 hexadecimal digits.
        repeated: ids of questions with several lines, of which `lines` holds the first.
    """

    path: Path
    digest: str
    header: Mapping[str, Any]
    lines: Mapping[str, Mapping[str, Any]]
    repeated: tuple[str, ...] = ()


def read_kept(path: Path) -> KeptFile:
    """Read a kept-index file.

    Raises:
        UserError: it is no JSON-lines file, or a line lacks a field or has one of a wrong type.
    """
    content = read_bytes(path)
    rows = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty; its first line should be the header of a kept-index file.")
    first, *others = (check_line(path, number, line, number == rows[0][0]) for number, line in rows)
    lines: dict[str, Any] = {}
    repeated = [one["question_id"] for one in others if lines.setdefault(one["question_id"], one) is not one]
    digest = hashlib.sha256(content).hexdigest()[:16]
    return KeptFile(path, digest, first, lines, tuple(repeated))


def check_line(path: Path, number: int, line: bytes, is_header: bool) -> Mapping[str, Any]:
    """One line of a kept-index file, checked."""
    where, record = f"{path} line {number}", parse_line(path, number, line)
    return check(KeptHeader, record, f"{where}, the header,") if is_header else check(KeptLine, record, where)


def kept_faults(kept: KeptFile, asked: Sequence[str]) -> list[str]:
    """What is wrong with the lines of a kept-index file, one sentence for each kind of fault.

    Args:
        asked: ids of the questions that the board asks.
    """
    header, lines = kept.header, kept.lines
    total, budget = header["tokens"], header["budget"]
    merges, known = header["weights"] != "none", frozenset(asked)
    kinds: dict[str, list[str]] = {
        "have no line": [name for name in asked if name not in lines],
        "are not among the board's questions": [name for name in lines if name not in known],
        "have more than one line": list(kept.repeated),
        "keep no token": [name for name, one in lines.items() if not one["kept"]],
        f"keep indices outside 0 to {total - 1}": [
            name for name, one in lines.items() if one["kept"] and not 0 <= min(one["kept"]) <= max(one["kept"]) < total
        ],
        "keep a token twice": [name for name, one in lines.items() if len(set(one["kept"])) < len(one["kept"])],
    }
    if header["order"] == "raster":
        kinds["keep indices that do not ascend, where the header says raster order"] = [
            name for name, one in lines.items() if sorted(one["kept"]) != one["kept"]
        ]
    if merges:
        kinds[f"lack `into` and `weights` with {total} entries each, or merge into tokens that are not kept"] = [
            name for name, one in lines.items() if not merges_well(one, total)
        ]
    else:
        kinds['have `into` or `weights`, where the header says weights "none"'] = [
            name for name, one in lines.items() if "into" in one or "weights" in one
        ]
    faults = [f"{len(names):,} questions {what} ({first_names(names)})" for what, names in kinds.items() if names]
    mean = fmean([len(lines[name]["kept"]) for name in asked if name in lines] or [0])
    if mean > budget + ROUNDING:
        faults.append(f"the header says a budget of {budget:g}, but the lines keep {mean:.1f} tokens on average")
    return faults


def merges_well(line: Mapping[str, Any], total: int) -> bool:
    """Whether a line says for each of N tokens the number of the kept token that it joins (-1: none) and its weight."""
    into, weights = line.get("into", ()), line.get("weights", ())
    return len(into) == len(weights) == total and all(-1 <= place < len(line["kept"]) for place in into)


def pixel_hash(model: Any, image: Any) -> str:
    """Hash of an image's pixels as the tower gets them, before normalisation: what any two programs can compare.

    Normalised values differ in their last bits between programs, so they are turned back into 8-bit pixels.
    """
    processor = model.image_processor
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (processor.mean, processor.std))
    pixels = ((model.views(image)[0].float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Replayed(Reducer):
    """Keeps what a kept-index file says. Its options are the file's header, so that every result names its origin.

    It is not registered: `Replayed.of` makes it from a file.
    """

    name: ClassVar[str] = "replayed"
    summary: ClassVar[str] = "the tokens that a kept-index file names"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before decoder layer 0", score="a file")
    known_deviations: ClassVar[dict[str, str]] = {"unsorted with order=given": "the file gives the order"}
    # Digest of a file -> its lines. They are no field: fields are settings, and hashed with every answer.
    files: ClassVar[dict[str, Mapping[str, Mapping[str, Any]]]] = {}

    method: str = option("", "name of the method")
    author: str = option("", "who made the file")
    licence: str = option("", "licence of the file")
    link: str = option("", "where the method is published")
    commit: str = option("", "commit of the method's own code")
    file: str = option("", "hash of the kept-index file")
    order: str = option("raster", "order of the kept tokens", ("raster", "given"))
    weights: str = option("none", "what merged tokens are averaged from", ("none", "features", "tokens"))

    @classmethod
    def of(cls, kept: KeptFile) -> "Replayed":
        """The reducer of a file that `kept_faults` finds nothing wrong with."""
        cls.files[kept.digest] = kept.lines
        own = {name: kept.header[name] for name in ("method", "author", "licence", "link", "commit", "positions")}
        more = {name: kept.header[name] for name in ("order", "weights")}
        return cls(budget=kept.header["budget"], file=kept.digest, **own, **more)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        counts = {len(line["kept"]) for line in self.files[self.file].values()}
        return (self.budget,) * spec.layers if counts == {self.budget} else None

    def keeps_all(self, tokens: int) -> bool:
        return False  # the file may merge or reorder where it keeps every token

    def prompt(self, state: PromptState) -> list[Reduction]:
        device, total = state.tokens.device, state.tokens.shape[1]
        found = []
        for name in state.ids:
            line = self.files[self.file].get(name)
            if line is None:
                raise UserError(
                    f"The kept-index file has no line for {name!r}; it needs one for every question, each about one "
                    "image that is not cut into tiles."
                )
            kept = torch.tensor([line["kept"]]).to(device, non_blocking=True)
            if self.weights == "none":
                found.append(Reduction(kept, total))
                continue
            into = torch.tensor([line["into"]]).to(device, non_blocking=True)
            weight = torch.tensor([line["weights"]], dtype=torch.float32).to(device, non_blocking=True)
            found.append(Reduction(kept, total, into, weight, encoder_space=self.weights == "features"))
        return found
