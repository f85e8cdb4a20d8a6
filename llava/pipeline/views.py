"""Views: the parts of a tiled image or video that a method receives.

A view is one tile or frame, reduced like an image with its own share of the budget, or it is all tiles together,
reduced like one image. The reductions of the views are joined into one reduction of the image's visual tokens. The word
"tile" in this file includes LLaVA-NeXT's base image and the frames of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.llava_arch import EncodedImage
from llava.pipeline.sequence import ImageKey, ImageReduction, PromptBatch
from llava.processing.prompt import Sample
from llava.reduction.budget import divided, over_crops, shares
from llava.reduction.merging import Reduction, ViewReduction, join, stack
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, spec_of


@dataclass(frozen=True)
class Features:
    """Features of an image that go through the projector.

    Attributes:
        values: [k, D] features of patches and class tokens.
        order: [N] for each visual token, its index in the list of the k projected tokens followed by the newline
            tokens. None if the visual tokens are the k projected tokens in order.
    """

    values: Tensor
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class View:
    """One tile of an image, or all its tiles together.

    Attributes:
        row: sample and number of the image.
        image: the image after the tower.
        numbers: numbers of the tiles that are in the view.
        reducer: the method at the budget of the view.
        spec: the model, as if the view were the whole image.
    """

    row: ImageKey
    image: EncodedImage
    numbers: tuple[int, ...]
    reducer: Reducer
    spec: ModelSpec

    @property
    def with_cls(self) -> bool:
        """Whether class tokens are among the view's tokens: only if the method uses them."""
        return self.reducer.keep_cls

    @cached_property
    def layout(self) -> PatchGrid:
        layout = self.image.layout.patch_grid
        if len(self.numbers) == 1:
            layout = self.image.layout.crops[self.numbers[0]].patch_grid
        return replace(layout, has_cls=layout.has_cls and self.with_cls)

    @property
    def tiles(self) -> tuple[PatchGrid, ...]:
        """Patch grid of each tile if the view has several tiles, otherwise ()."""
        if len(self.numbers) == 1:
            return ()
        tiles = self.image.layout.crops
        return tuple(
            replace(tiles[n].patch_grid, has_cls=tiles[n].cls is not None and self.with_cls) for n in self.numbers
        )

    @cached_property
    def indices(self) -> Tensor:
        """[n] indices of the view's tokens among the image's visual tokens."""
        crops = self.image.layout.crops
        return _side_by_side([crops[n].all_indices if self.with_cls else crops[n].indices for n in self.numbers])

    @cached_property
    def features(self) -> Tensor:
        """[n, D] tower features."""
        return _side_by_side([self.image.crop_features(number, self.with_cls) for number in self.numbers])

    def score(self, score: TowerScore) -> Tensor:
        """[patches, ...] values of a tower score."""
        return _side_by_side([self.image.tile_score(score, number) for number in self.numbers])

    def name(self, samples: Sequence[Sample]) -> str:
        """The id of the sample, a number from its second image on, and the tile if the view is one of several."""
        sample, number = self.row
        name = samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"
        return f"{name}/{self.numbers[0]}" if len(self.numbers) < len(self.image.layout.crops) else name

    def reduced(self, reduction: Reduction, device: torch.device) -> ViewReduction:
        """A reduction of this view, placed among the image's visual tokens, to be joined with the other views."""
        number = self.numbers[0] if len(self.numbers) == 1 else 0
        # Output is joined block by block: the frames of a video, or the base image before all other tiles.
        block = number if self.image.layout.temporal else min(number, 1)
        return ViewReduction(self.indices.to(device, non_blocking=True), reduction, block)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Group:
    """Images or views whose tokens have the same shape, so that a method receives them together, one per row.

    Attributes:
        reducer: the method at their budget.
        images: the image of each row.
        fields: the fields that the states of stages 1 and 2 share, among them "features".
        views: the view of each row; () if the rows are images of one tile.
    """

    reducer: Reducer
    images: list[ImageKey]
    fields: dict[str, Any]
    views: tuple[View, ...] = ()


def groups_of(
    spec: ModelSpec, clip: Any, reducer: Reducer, samples: Sequence[Sample], images: dict[ImageKey, EncodedImage]
) -> list[Group]:
    """The views of images with several tiles, in groups of the same shape.

    Args:
        spec: the model.
        clip: the CLIP text tower if the method reads it; otherwise None.
    """
    groups: dict[tuple[Any, ...], list[View]] = {}
    for row, image in images.items():
        for view in parts_of(spec, reducer, row, image):
            shape = view.reducer, view.spec, view.layout, len(view.indices)
            groups.setdefault(shape, []).append(view)
    return [
        Group(views[0].reducer, [view.row for view in views], shared_fields(clip, samples, views), tuple(views))
        for views in groups.values()
    ]


def parts_of(model: ModelSpec, reducer: Reducer, row: ImageKey, image: EncodedImage) -> list[View]:
    """The views of one image, without tiles that get no part of the budget."""
    spec, count = spec_of(model, image.full), len(image.layout.crops)
    reducer = reducer.for_image(spec).before_decoder(spec)
    if divided(reducer, count):
        given = shares(reducer, image.full, image.encoded.scores)
        return [
            View(row, image, (number,), reducer.with_budget(share), spec.crop(number))
            for number, share in enumerate(given)
            if share
        ]
    ((resized, spec),) = over_crops(reducer, spec)
    return [View(row, image, tuple(range(count)), resized, spec)]


def shared_fields(clip: Any, samples: Sequence[Sample], parts: list[View]) -> dict[str, Any]:
    """The fields that the states of stages 1 and 2 share, for the views of one group."""
    first, encoded = parts[0], [part.image.encoded for part in parts]
    merged = [one.merged.only(part.numbers[0]) for one, part in zip(encoded, parts, strict=True) if one.merged]

    def thumbnail(score: TowerScore) -> Tensor:
        each = [[overview(part.image, number, score) for number in part.numbers] for part in parts]
        return torch.stack([torch.cat(tiles) for tiles in each])

    return {
        "ids": tuple(part.name(samples) for part in parts),
        "spec": first.spec,
        "features": torch.stack([part.features for part in parts]),
        "layout": first.layout,
        "tiles": first.tiles,
        "scores": {score: torch.stack([part.score(score) for part in parts]) for score in encoded[0].scores},
        "merged": stack(merged) if merged else None,
        "questions": tuple(samples[part.row[0]].question for part in parts),
        "messages": tuple(samples[part.row[0]].message for part in parts),
        "clip": clip,
        "thumbnail": thumbnail,
    }


def overview(image: EncodedImage, number: int, score: TowerScore) -> Tensor:
    """[n] values of the base image's score at the patches of tile `number`, by bilinear interpolation.

    The base image and the stitched, unpadded tiles show the same image, each stretched over its own grid. The base
    image itself, and a frame of a video, have their own values.
    """
    layout = image.layout
    if number == 0 or layout.tiles is None:
        return image.tile_score(score, number)
    tiles, (heights, widths) = layout.crops[1:], layout.tile_sides()
    table = image.encoded.scores[score][0].unflatten(0, layout.grid)
    size = (sum(heights), sum(widths))
    whole = F.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    row, column = divmod(number - 1, len(widths))
    top, left = sum(heights[:row]), sum(widths[:column])
    return whole[top : top + tiles[number - 1].rows, left : left + tiles[number - 1].columns].flatten()


def everything(image: EncodedImage, plain: bool) -> Features:
    """All features of an image that is not reduced before the projector.

    Args:
        plain: leave out class tokens that are there only for the method, because the model itself drops them.
    """
    layout = image.layout
    plain = plain and layout.crops[0].cls is not None and image.full.crops[0].cls is None
    features = [image.crop_features(number, not plain) for number in range(len(layout.crops))]
    places = [crop.indices if plain else crop.all_indices for crop in layout.crops]
    order = torch.cat([*places, layout.newlines]).argsort()
    return Features(torch.cat(features), order.to(features[0].device, non_blocking=True))


def with_newlines(values: Tensor, order: Tensor, newline: Tensor | None) -> Tensor:
    """[N, H]: projected tokens [k, H] and newline tokens in the order of `Features`."""
    extra = len(order) - len(values)
    newlines = [] if newline is None or not extra else [newline.to(values.dtype).expand(extra, -1)]
    return torch.cat([values, *newlines])[order]


def join_views(reducer: Reducer, image: EncodedImage, pieces: list[ViewReduction]) -> tuple[Reduction, Tensor]:
    """Join the reductions of an image's views, and the newline tokens if the method keeps them, into one reduction.

    Returns:
        The reduction, and [K] int64: for each of its output tokens, the index in the list of all views' output tokens
        followed by the newline tokens.
    """
    newlines = newline_view(reducer, image, pieces[0].indices.device)
    return join(pieces + newlines, image.layout.tokens)


def newline_view(reducer: Reducer, image: EncodedImage, device: torch.device) -> list[ViewReduction]:
    """The newline tokens of an image as one more view, of which all tokens are kept; [] if the method drops them."""
    places = image.layout.newlines.to(device, non_blocking=True)
    if reducer.newlines == "drop" or not len(places):
        return []
    last = len(image.layout.crops) if image.layout.temporal else 1
    return [ViewReduction(places, Reduction(torch.arange(len(places), device=device)[None], len(places)), last)]


def join_prompt(
    reducer: Reducer,
    sequence: PromptBatch,
    row: ImageKey,
    image: EncodedImage,
    pieces: list[tuple[ViewReduction, Tensor | None]],
) -> ImageReduction:
    """The reduction of an image before decoder layer 0, joined from the reductions of its views.

    Args:
        pieces: for each view, its reduction and the values [k, H] of its output tokens; None instead of values if the
            output is the kept tokens, unchanged.
    """
    views, values = [view for view, _ in pieces], [value for _, value in pieces]
    reduction, order = join_views(reducer, image, views)
    if all(value is None for value in values):
        return ImageReduction([row], reduction)
    sample, number = row
    start = sequence.hidden.shape[1] - sequence.lengths[sample] + sequence.visual[sample][number][0]
    tokens = sequence.hidden[sample, start : start + image.layout.tokens]
    newlines = newline_view(reducer, image, order.device)
    merged = [
        tokens[view.indices[view.reduction.kept[0]]] if value is None else value
        for view, value in zip([*views, *newlines], [*values, *[None] * len(newlines)], strict=True)
    ]
    return ImageReduction([row], reduction, torch.cat(merged)[order][None])
