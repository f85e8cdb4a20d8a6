"""Views: the parts of an image with tiles that a method receives, either one tile each or all tiles together."""

from collections.abc import Sequence as Samples
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.encoded_image import EncodedImage
from llava.pipeline.sequence import Row
from llava.processing.sample import Sample
from llava.reduction.crop_budget import divided, over_crops, shares
from llava.reduction.model_spec import ModelSpec, spec_of
from llava.reduction.reducer import Reducer
from llava.reduction.reduction import Reduction, ViewReduction, stack
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import PatchGrid

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava


@dataclass(frozen=True, eq=False)
class View:
    """One tile of an image, or all its tiles together.

    Attributes:
        image: sample and number of the image.
        picture: the encoded image.
        numbers: the tiles.
        reducer: the method at the view's budget.
        spec: the model as if the view were the whole image.
    """

    image: Row
    picture: EncodedImage
    numbers: tuple[int, ...]
    reducer: Reducer
    spec: ModelSpec

    @cached_property
    def layout(self) -> PatchGrid:
        layout = self.picture.arrangement.layout
        if len(self.numbers) == 1:
            layout = self.picture.arrangement.crops[self.numbers[0]].layout
        return replace(layout, has_cls=layout.has_cls and self.with_cls)

    @property
    def tiles(self) -> tuple[PatchGrid, ...]:
        """Patch grids of the tiles, where the view is several of them."""
        if len(self.numbers) == 1:
            return ()
        tiles = self.picture.arrangement.crops
        return tuple(replace(tiles[n].layout, has_cls=tiles[n].cls is not None and self.with_cls) for n in self.numbers)

    @property
    def with_cls(self) -> bool:
        """Whether class tokens are among the view's tokens: only if the method uses them."""
        return self.reducer.keep_cls

    @cached_property
    def indices(self) -> Tensor:
        """[n] indices of its tokens among the image's visual tokens."""
        crops = self.picture.arrangement.crops
        return _joined([crops[n].all_indices if self.with_cls else crops[n].indices for n in self.numbers])

    @property
    def block(self) -> int:
        """Order of the view in the image: the base image before tiles, frames by time."""
        if len(self.numbers) > 1:
            return 0
        number = self.numbers[0]
        return number if self.picture.arrangement.temporal else min(number, 1)

    @cached_property
    def features(self) -> Tensor:
        """[n, D] tower features."""
        return _joined([self.picture.crop_features(number, self.with_cls) for number in self.numbers])

    def scores(self) -> dict[TowerScore, Tensor]:
        """[patches, ...] of every tower score."""
        return {
            score: _joined([self.picture.tile_score(score, number) for number in self.numbers])
            for score in self.picture.encoded.scores
        }

    @property
    def group(self) -> tuple:
        """Views of one group have tokens of the same shape and are passed to the method together."""
        return self.reducer, self.spec, self.layout, self.picture.whole, len(self.indices)


def grouped(parts: list[View]) -> list[list[View]]:
    """Views in groups of the same shape."""
    groups: dict[tuple, list[View]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    return list(groups.values())


def parts_of(model: "Llava", reducer: Reducer, image: Row, picture: EncodedImage) -> list[View]:
    """The views of one image; tiles with a budget of 0 are left out."""
    spec, count = spec_of(model.spec, picture.full), len(picture.arrangement.crops)
    reducer = reducer.for_picture(spec)
    if divided(reducer, count):
        given = shares(reducer, picture.full, picture.encoded.scores)
        return [
            View(image, picture, (number,), reducer.sized(share), spec.crop(number))
            for number, share in enumerate(given)
            if share
        ]
    ((sized, spec),) = over_crops(reducer, spec)
    return [View(image, picture, tuple(range(count)), sized, spec)]


def rest_of(reducer: Reducer, picture: EncodedImage, device: torch.device) -> list[ViewReduction]:
    """The newline tokens of an image as a view that keeps all, if the method keeps them."""
    places = picture.arrangement.newlines.to(device)
    if reducer.newlines == "drop" or not len(places):
        return []
    last = len(picture.arrangement.crops) if picture.arrangement.temporal else 1
    return [ViewReduction(places, Reduction(torch.arange(len(places), device=device)[None], len(places)), last)]


def names_of(samples: Samples[Sample], parts: Samples[View]) -> tuple[str, ...]:
    """One name per view: the sample's id, with a number from the second image on, and the tile."""
    names = []
    for part in parts:
        sample, number = part.image
        name = samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"
        crops = len(part.picture.arrangement.crops)
        names.append(f"{name}/{part.numbers[0]}" if len(part.numbers) < crops else name)
    return tuple(names)


def shared_fields(model: "Llava", samples: Samples[Sample], parts: list[View]) -> dict[str, Any]:
    """Fields that the states of stages 1 and 2 share; all views are of one group."""
    first = parts[0]
    scores = [part.scores() for part in parts]
    merged = [part.picture.encoded.merged for part in parts]
    return {
        "ids": names_of(samples, parts),
        "spec": first.spec,
        "layout": first.layout,
        "tiles": first.tiles,
        "scores": {score: torch.stack([row[score] for row in scores]) for score in scores[0]},
        "merged": None
        if merged[0] is None
        else stack([one.only(part.numbers[0]) for one, part in zip(merged, parts, strict=True)]),
        "questions": tuple(samples[part.image[0]].question for part in parts),
        "messages": tuple(samples[part.image[0]].message for part in parts),
        "clip": model.clip if first.reducer.needs_text_tower else None,
        "thumbnail": lambda score: torch.stack([_overviews(part, score) for part in parts]),
    }


def _overviews(part: View, score: TowerScore) -> Tensor:
    return torch.cat([overview(part.picture, number, score) for number in part.numbers])


def overview(picture: EncodedImage, number: int, score: TowerScore) -> Tensor:
    """[n] values of the base image's score at the patches of tile `number`, by bilinear interpolation.

    The base image and the stitched, unpadded tiles show the same image, each stretched over its own grid. For the base
    image itself, and without tiles, the tile's own values.
    """
    arrangement = picture.arrangement
    if number == 0 or arrangement.tiles is None:
        return picture.tile_score(score, number)
    tiles, (heights, widths) = arrangement.crops[1:], arrangement.tile_sides()
    table = picture.encoded.scores[score][0].unflatten(0, arrangement.grid)
    size = (sum(heights), sum(widths))
    whole = F.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    row, column = divmod(number - 1, len(widths))
    top, left = sum(heights[:row]), sum(widths[:column])
    return whole[top : top + tiles[number - 1].rows, left : left + tiles[number - 1].columns].flatten()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
