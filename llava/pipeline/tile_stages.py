"""Stages 1 and 2 for images that the tower sees in several tiles: LLaVA-NeXT's tiles and the frames of a video.

A method reduces every tile as an image with its own part of the budget, or all tiles together as one image. The
reductions of the tiles are joined into one reduction of the image's visual tokens. Images of one tile skip this module.
"""

from collections.abc import Callable
from collections.abc import Sequence as Samples
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.model.encoded_image import EncodedImage
from llava.pipeline.accounting import Record
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.sequence import Reduced, Row, Sequence
from llava.pipeline.views import View, grouped, parts_of, rest_of, shared_fields
from llava.processing.sample import Sample
from llava.reduction.crop_budget import untouched
from llava.reduction.model_spec import spec_of
from llava.reduction.reducer import Reducer, by_images
from llava.reduction.reduction import Reduction, ViewReduction, join
from llava.reduction.states import EncoderState, PromptState

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava

# From a group of views to their state, and from a reduction to the values of merged tokens (None without any).
MakeState = Callable[[list[View]], PromptState]
MergedValues = Callable[[Reduction, PromptState, range], Tensor | None]


@dataclass(frozen=True)
class Features:
    """The features of an image that are projected.

    Attributes:
        values: [k, D] of patches and class tokens.
        order: [N] index of each visual token among the k projected tokens followed by the newline tokens; None for all
            k in order.
    """

    values: Tensor
    order: Tensor | None = None


def everything(picture: EncodedImage, plain: bool) -> Features:
    """All features of an image that is not reduced.

    Args:
        plain: leave out class tokens that only the method uses.
    """
    arrangement, plain = picture.arrangement, plain and picture.extra_cls
    features = [picture.crop_features(number, not plain) for number in range(len(arrangement.crops))]
    places = [crop.indices if plain else crop.all_indices for crop in arrangement.crops]
    order = torch.cat([*places, arrangement.newlines]).argsort()
    return Features(torch.cat(features), order.to(features[0].device))


def with_newlines(values: Tensor, order: Tensor, newline: Tensor | None) -> Tensor:
    """Projected tokens [k, H] and newline tokens, in order."""
    extra = len(order) - len(values)
    newlines = [] if newline is None or not extra else [newline.to(values.dtype).expand(extra, -1)]
    return torch.cat([values, *newlines])[order]


def reduce_features(
    model: "Llava", reducer: Reducer, samples: Samples[Sample], images: ImageBatch, rows: list[Row], record: Record
) -> dict[Row, Features]:
    """Reduce every view before the projector, and join the views of each image."""
    open_ = [image for image in rows if not untouched(reducer, spec_of(model.spec, images.of(image).full))]
    found: dict[Row, list[tuple[ViewReduction, Tensor]]] = {image: [] for image in open_}
    for group in grouped([part for image in open_ for part in parts_of(model, reducer, image, images.of(image))]):
        features = torch.stack([part.features for part in group])
        state = EncoderState(features=features, **shared_fields(model, samples, group))
        parts = _asked(group, "encoder", state, features.shape[1])
        record.operations.add("selection", int, state.flops)
        for reduction, own in parts:
            values = reduction.apply(features[own.start : own.stop])
            for row, part in enumerate(group[own.start : own.stop]):
                if reduction.merge_matrix is not None:
                    record.operations.add("selection", int, reduction.apply_flops(features.shape[-1]))
                piece = ViewReduction(part.indices.to(model.device), reduction.only(row), part.block)
                found[part.image].append((piece, values[row]))
    left = {}
    for image, pieces in found.items():
        if not pieces:
            continue
        picture = images.of(image)
        every = [piece for piece, _ in pieces] + rest_of(reducer, picture, model.device)
        reduction, order = join(every, picture.arrangement.tokens)
        left[image] = Features(torch.cat([value for _, value in pieces]), order)
        before = images.kept[image]
        images.kept[image] = reduction.kept[0] if before is None else before[reduction.kept[0]]
        record.applied(image, "encoder", reduction)
    return left


def _asked(group: list[View], stage: str, state: EncoderState, tokens: int) -> list[tuple[Reduction, range]]:
    """The method's reductions of a group of views; one that keeps everything if the method does not reduce them."""
    method = group[0].reducer
    returned = None if method.keeps_all(tokens) else getattr(method, stage)(state)
    if returned is None:
        returned = Reduction(torch.arange(tokens, device=state.features.device).expand(len(group), -1), tokens)
    return by_images(method, stage, returned, state.ids, tokens)


def reduce_prompts(
    model: "Llava",
    reducer: Reducer,
    samples: Samples[Sample],
    sequence: Sequence,
    images: ImageBatch,
    rows: list[Row],
    record: Record,
    state_of: Callable[..., PromptState],
    merged_values: MergedValues,
) -> list[Reduced]:
    """Reduce every view before decoder layer 0, and join the views of each image.

    Args:
        state_of: (method, rows, fields of the state, indices of the views' tokens) -> state.

    Returns:
        the images that are reduced, one by one.
    """
    open_ = [image for image in rows if not untouched(reducer, spec_of(model.spec, images.of(image).full))]
    found: dict[Row, list[tuple[ViewReduction, Tensor | None]]] = {image: [] for image in open_}
    for group in grouped([part for image in open_ for part in parts_of(model, reducer, image, images.of(image))]):
        members = torch.stack([part.indices for part in group]).to(model.device)
        fields = shared_fields(model, samples, group)
        features = torch.stack([part.features for part in group])
        state = state_of([part.image for part in group], features, fields, members)
        parts = _asked(group, "prompt", state, members.shape[1])
        record.operations.add("selection", int, state.flops)
        for reduction, own in parts:
            values = merged_values(reduction, state, own)
            for row, part in enumerate(group[own.start : own.stop]):
                piece = ViewReduction(part.indices.to(model.device), reduction.only(row), part.block)
                found[part.image].append((piece, None if values is None else values[row].to(state.tokens.dtype)))
    reduced = []
    for image, pieces in found.items():
        if not pieces:
            continue
        picture = images.of(image)
        every = [piece for piece, _ in pieces] + rest_of(reducer, picture, pieces[0][0].indices.device)
        reduction, order = join(every, picture.arrangement.tokens)
        merged = None
        if any(value is not None for _, value in pieces):
            merged = _values(sequence, image, picture, every, [value for _, value in pieces])[order][None]
        reduced.append(Reduced([image], reduction, merged))
    return reduced


def _values(
    sequence: Sequence, image: Row, picture: EncodedImage, pieces: list[ViewReduction], merged: list[Tensor | None]
) -> Tensor:
    """[K, H] values of the output tokens of all views, one view after another, newline tokens last."""
    sample, number = image
    start = sequence.padding(sample) + sequence.visual[sample][number][0]
    run = sequence.hidden[sample, start : start + picture.arrangement.tokens]
    known = merged + [None] * (len(pieces) - len(merged))
    return torch.cat(
        [
            run[piece.indices[piece.reduction.kept[0]]] if value is None else value
            for piece, value in zip(pieces, known, strict=True)
        ]
    )
