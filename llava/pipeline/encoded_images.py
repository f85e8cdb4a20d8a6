"""The pictures of a batch behind the tower, and the parts of them that a method is handed one by one."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.pipeline.sequence import Row
from llava.reduction.joining import Piece, join
from llava.reduction.patch_grid import Layout
from llava.reduction.reducer import ModelFacts, Reducer
from llava.reduction.reduction import Reduction
from llava.reduction.scores import Signal
from llava.reduction.token_layout import Arrangement, single


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture or video behind the tower.

    Attributes:
        encoded: of its crops: features [C, n, D], signals [C, P, ...].
        arrangement: of what the tower gave, class tokens among it where the method keeps them.
        full: of what the model takes without any reduction.
        inputs: tokens that the method starts from, those that it reduces inside the tower among them.
        step: where and how tokens were reduced up to here, if they were.
    """

    encoded: Encoded
    arrangement: Arrangement
    full: Arrangement
    inputs: int
    step: tuple[str, Reduction] | None = None

    @cached_property
    def whole(self) -> bool:
        """One crop whose tokens are the run as they are."""
        return len(self.arrangement.crops) == 1 and not len(self.arrangement.newlines)

    @property
    def extra_cls(self) -> bool:
        """The class tokens are there for the method alone; the model itself drops them."""
        return self.arrangement.crops[0].cls is not None and self.full.crops[0].cls is None

    def crop_features(self, number: int, with_cls: bool) -> Tensor:
        """[n, D] features of a crop's patches, behind its class token if that is wanted."""
        crop, features = self.arrangement.crops[number], self.encoded.features[number]
        cls = int(crop.cls is not None)
        patches = features[cls:]
        if len(patches) != len(crop.patches):
            patches = patches[crop.patches.to(features.device)]
        return torch.cat([features[:cls], patches]) if with_cls and cls else patches

    def crop_signal(self, signal: Signal, number: int) -> Tensor:
        """[n, ...] values of a signal at a crop's patches."""
        values, patches = self.encoded.signals[signal][number], self.arrangement.crops[number].patches
        return values if len(values) == len(patches) else values[patches.to(values.device)]


@dataclass(frozen=True, eq=False)
class Part:
    """What a method sees as one picture: a crop, or all crops together.

    Attributes:
        image: whose part it is.
        picture: the picture behind the tower.
        numbers: the crops.
        reducer: the method at the part's budget.
        facts: the model as if the part were the whole picture.
    """

    image: Row
    picture: Picture
    numbers: tuple[int, ...]
    reducer: Reducer
    facts: ModelFacts

    @cached_property
    def layout(self) -> Layout:
        layout = self.picture.arrangement.layout
        if len(self.numbers) == 1:
            layout = self.picture.arrangement.crops[self.numbers[0]].layout
        return replace(layout, has_cls=layout.has_cls and self.with_cls)

    @property
    def with_cls(self) -> bool:
        """The method wants class tokens; otherwise those that the model takes are not among its tokens."""
        return self.reducer.keep_cls

    @cached_property
    def places(self) -> Tensor:
        """[n] places of its tokens in the run."""
        crops = self.picture.arrangement.crops
        return _joined([crops[n].all_places if self.with_cls else crops[n].places for n in self.numbers])

    @property
    def block(self) -> int:
        """Order of parts in the run: the small copy of a tiled picture in front of its tiles, frames by time."""
        if len(self.numbers) > 1:
            return 0
        number = self.numbers[0]
        return number if self.picture.arrangement.temporal else min(number, 1)

    @cached_property
    def features(self) -> Tensor:
        """[n, D]"""
        return _joined([self.picture.crop_features(number, self.with_cls) for number in self.numbers])

    def signals(self) -> dict[Signal, Tensor]:
        """[patches, ...] of every signal."""
        return {
            signal: _joined([self.picture.crop_signal(signal, number) for number in self.numbers])
            for signal in self.picture.encoded.signals
        }

    @property
    def group(self) -> tuple:
        """Parts of one group have tokens of the same shape and are handed to the method together."""
        return self.reducer, self.facts, self.layout, self.picture.whole, len(self.places)


@dataclass
class Seen:
    """The images of a batch behind the tower, and what is left of each run so far.

    Attributes:
        pictures: distinct pictures.
        owner: image -> its picture.
        tokens: image -> [N, H] projected tokens of the run.
        places: image -> [N] places in the unreduced run, where an earlier stage has reduced it; else None.
        inputs: image -> tokens of the unreduced run.
    """

    pictures: list[Picture]
    owner: dict[Row, int]
    tokens: dict[Row, Tensor] = field(default_factory=dict)
    places: dict[Row, Tensor | None] = field(default_factory=dict)
    inputs: dict[Row, int] = field(default_factory=dict)

    def of(self, image: Row) -> Picture:
        return self.pictures[self.owner[image]]


def grouped(parts: list[Part]) -> list[list[Part]]:
    """Parts in groups of the same shape."""
    groups: dict[tuple, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    return list(groups.values())


def picture_of(encoded: Encoded, full: Arrangement, keep_cls: bool, grid: tuple[int, int] | None = None) -> Picture:
    """What the tower gave for the crops of one picture, as a run.

    Args:
        full: the run that the model takes without any reduction.
        keep_cls: the features have their class tokens in front.
        grid: the coarser patch grid that every crop was shrunk to.
    """
    start = full.with_cls() if keep_cls else full
    if grid is not None and grid != full.grid:
        pieces = [Piece(crop.places, coarse(crop.layout, grid)) for crop in full.crops]
        whole = len(pieces) == 1
        step = ("input", pieces[0].reduction if whole else join(pieces, full.tokens)[0])
        return Picture(encoded, full.shrunk(grid), full, start.tokens, step)
    merged = encoded.merged
    if merged is None:
        return Picture(encoded, start, full, start.tokens)
    if len(full.crops) == 1:
        left = single(1, merged.anchor.shape[1])
        return Picture(encoded, left, full, start.tokens, ("tower", merged))
    pieces = [
        Piece(crop.places.to(merged.anchor.device), merged.only(number)) for number, crop in enumerate(full.crops)
    ]
    reduction, order = join(pieces, full.tokens)
    return Picture(encoded, full.left(merged.anchor.shape[1], order.cpu()), full, start.tokens, ("tower", reduction))


def coarse(layout: Layout, grid: tuple[int, int]) -> Reduction:
    """The record of a smaller image: every original patch is averaged into the coarse patch that covers it."""
    rows, columns = grid
    row = torch.arange(layout.rows) * rows // layout.rows
    column = torch.arange(layout.columns) * columns // layout.columns
    owner = (row[:, None] * columns + column).flatten()
    centre_row = ((torch.arange(rows) * 2 + 1) * layout.rows) // (2 * rows)
    centre_column = ((torch.arange(columns) * 2 + 1) * layout.columns) // (2 * columns)
    anchor = (centre_row[:, None] * layout.columns + centre_column).flatten()
    share = 1.0 / torch.bincount(owner, minlength=rows * columns).float()
    return Reduction(anchor[None], layout.tokens, owner[None], share[owner][None])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
