"""Views: what a method is given of an image that the tower sees in several tiles, one tile or all of them together."""

from collections.abc import Sequence as Samples
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.encoded_image import Picture
from llava.pipeline.sequence import Row
from llava.processing.sample import Sample
from llava.reduction.crop_budget import divided, over_crops, shares
from llava.reduction.joining import Piece, stack
from llava.reduction.model_spec import ModelFacts, facts_of
from llava.reduction.patch_grid import Layout
from llava.reduction.reducer import Reducer
from llava.reduction.reduction import Reduction
from llava.reduction.scores import Signal

if TYPE_CHECKING:
    pass


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


def grouped(parts: list[Part]) -> list[list[Part]]:
    """Parts in groups of the same shape."""
    groups: dict[tuple, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    return list(groups.values())


def parts_of(model, reducer: Reducer, image: Row, picture: Picture) -> list[Part]:
    """What a method sees of one image; crops that may keep nothing are left out."""
    facts, count = facts_of(model.facts, picture.full), len(picture.arrangement.crops)
    reducer = reducer.for_picture(facts)
    if divided(reducer, count):
        given = shares(reducer, picture.full, picture.encoded.signals)
        return [
            Part(image, picture, (number,), reducer.sized(share), facts.crop(number))
            for number, share in enumerate(given)
            if share
        ]
    ((sized, facts),) = over_crops(reducer, facts)
    return [Part(image, picture, tuple(range(count)), sized, facts)]


def rest_of(reducer: Reducer, picture: Picture, device: torch.device) -> list[Piece]:
    """The newline tokens of a picture, where the method keeps them."""
    places = picture.arrangement.newlines.to(device)
    if reducer.newlines == "drop" or not len(places):
        return []
    last = len(picture.arrangement.crops) if picture.arrangement.temporal else 1
    return [Piece(places, Reduction(torch.arange(len(places), device=device)[None], len(places)), last)]


def names_of(samples: Samples[Sample], parts: Samples[Part]) -> tuple[str, ...]:
    """One name per part: the sample's own, numbered from the second image on, and by crop."""
    names = []
    for part in parts:
        sample, number = part.image
        name = samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"
        crops = len(part.picture.arrangement.crops)
        names.append(f"{name}/{part.numbers[0]}" if len(part.numbers) < crops else name)
    return tuple(names)


def shared_fields(model, samples: Samples[Sample], parts: list[Part]) -> dict:
    """What the states of stages 1 and 2 have in common; all parts are of one group."""
    first = parts[0]
    signals = [part.signals() for part in parts]
    merged = [part.picture.encoded.merged for part in parts]
    return {
        "ids": names_of(samples, parts),
        "facts": first.facts,
        "layout": first.layout,
        "signals": {signal: torch.stack([row[signal] for row in signals]) for signal in signals[0]},
        "merged": None
        if merged[0] is None
        else stack([one.only(part.numbers[0]) for one, part in zip(merged, parts, strict=True)]),
        "questions": tuple(samples[part.image[0]].question for part in parts),
        "messages": tuple(samples[part.image[0]].message for part in parts),
        "clip": model.clip if first.reducer.needs_text_tower else None,
        "thumbnail": lambda signal: torch.stack([_overviews(part, signal) for part in parts]),
    }


def _overviews(part: Part, signal: Signal) -> Tensor:
    return torch.cat([overview(part.picture, number, signal) for number in part.numbers])


def overview(picture: Picture, number: int, signal: Signal) -> Tensor:
    """[n] values that the first crop's signal [P] has at the patches of crop `number`, between its patches bilinear.

    The first crop is the whole picture, stretched over its grid; the stitched tiles without their padding are the same.
    Without tiles, and for the first crop itself, the crop's own values.
    """
    arrangement = picture.arrangement
    if number == 0 or arrangement.tiles is None:
        return picture.crop_signal(signal, number)
    tiles, (heights, widths) = arrangement.crops[1:], arrangement.tile_sides()
    table = picture.encoded.signals[signal][0].unflatten(0, arrangement.grid)
    size = (sum(heights), sum(widths))
    whole = F.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    row, column = divmod(number - 1, len(widths))
    top, left = sum(heights[:row]), sum(widths[:column])
    return whole[top : top + tiles[number - 1].rows, left : left + tiles[number - 1].columns].flatten()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
