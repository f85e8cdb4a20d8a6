"""Stage 1: images through the vision tower, reduced before the projector, and projected."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Samples
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.model.encoded_image import EncodedImage
from llava.pipeline import tile_stages
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.sequence import Row
from llava.processing.sample import Sample
from llava.reduction.crop_budget import planned, untouched
from llava.reduction.flops import projector_flops
from llava.reduction.model_spec import ModelSpec, spec_of
from llava.reduction.reducer import Reducer, by_images
from llava.reduction.reduction import stack
from llava.reduction.states import EncoderState

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava


def encode_images(
    model: "Llava", reducer: Reducer, samples: Samples[Sample], record: Record, timer: Timer
) -> ImageBatch | None:
    """Encode, reduce and project all images of a batch; None if there are no images."""
    rows = [(i, number) for i, sample in enumerate(samples) for number in range(len(sample.images))]
    if not rows:
        return None
    # Questions about the same image share one pass of the tower.
    numbers: dict[object, int] = {}
    pictures, owner = [], {}
    for i, number in rows:
        key: object = samples[i].image_ids[number] if samples[i].image_ids else object()
        if key not in numbers:
            numbers[key] = len(numbers)
            pictures.append(samples[i].images[number])
        owner[i, number] = numbers[key]
    images = ImageBatch(model.encode_images(pictures, list(numbers), reducer, timer), owner)
    users = Counter(owner.values())
    for number, picture in enumerate(images.pictures):
        model.count_tower(record.operations, picture, users[number])
    timer.mark("vision")
    for image in rows:
        _enter(model.spec, reducer, image, images, record)
    features: dict[Row, tile_stages.Features] = {}
    if "encoder" in reducer.acts_in:
        features = _reduce(model, reducer, samples, images, record)
        timer.mark("selection")
    _project(model, reducer, images, features, record)
    timer.mark("vision")
    return images


def _enter(spec: ModelSpec, reducer: Reducer, image: Row, images: ImageBatch, record: Record) -> None:
    """Record an image before the stages: its tokens, the planned tokens per layer, the reduction inside the tower."""
    picture = images.pictures[images.owner[image]]
    own = spec_of(spec, picture.full)
    images.inputs[image], images.kept[image] = picture.inputs, None
    if own.crops or own.newlines:
        plan = planned(reducer, own)
        if untouched(reducer, own):
            images.inputs[image] = picture.full.tokens
    else:
        method = reducer.for_picture(own)
        plan = method.sized(min(method.budget, own.visual_tokens)).tokens_per_layer(own)
    record.image(image[0], picture.full, images.inputs[image], plan)
    if picture.step is not None:
        place, reduction = picture.step
        record.applied(image, place, reduction)
        images.kept[image] = reduction.kept[0]


def _reduce(
    model: "Llava", reducer: Reducer, samples: Samples[Sample], images: ImageBatch, record: Record
) -> dict[Row, tile_stages.Features]:
    """Features of every image that the method reduces, after the reduction."""
    found: dict[Row, tile_stages.Features] = {}
    tiled = [image for image, number in images.owner.items() if not images.pictures[number].whole]
    for method, spec, rows in whole_groups(model.spec, reducer, images):
        features = features_of(images, rows)
        if method.keeps_all(features.shape[1]):
            continue
        state = EncoderState(features=features, **state_fields(model, method, samples, images, rows, spec))
        parts = by_images(method, "encoder", method.encoder(state), state.ids, features.shape[1])
        if state.flops:
            record.operations.add("selection", int, state.flops)
        for reduction, own in parts:
            values = reduction.apply(of_images(features, own)).unbind()
            for row, (image, value) in enumerate(zip(rows[own.start : own.stop], values, strict=True)):
                if reduction.merge_matrix is not None:
                    record.operations.add("selection", int, reduction.apply_flops(features.shape[-1]))
                found[image] = tile_stages.Features(value)
                before, kept = images.kept[image], reduction.kept[row]
                images.kept[image] = kept if before is None else before[kept]
                record.applied(image, "encoder", reduction, row)
    if tiled:
        found |= tile_stages.reduce_features(model, reducer, samples, images, tiled, record)
    # In the order of the images, because they are projected in this order.
    return {image: found[image] for image in images.owner if image in found}


def whole_groups(
    spec: ModelSpec, reducer: Reducer, images: ImageBatch
) -> Iterable[tuple[Reducer, ModelSpec, list[Row]]]:
    """Images of one tile, grouped to dense tensors: the method at their budget, their model spec, and their rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for image, number in images.owner.items():
        picture = images.pictures[number]
        if picture.whole:
            own = spec_of(spec, picture.full)
            shape = picture.arrangement.layout, picture.arrangement.tokens
            groups.setdefault((reducer.for_picture(own), own, shape), []).append(image)
    return [(method, own, rows) for (method, own, _), rows in groups.items()]


def features_of(images: ImageBatch, rows: list[Row]) -> Tensor:
    """[B, N, D] tower features of images of one tile."""
    return joined([images.pictures[images.owner[row]].encoded.features for row in rows])


def joined(parts: list[Tensor]) -> Tensor:
    """The images of all parts in one tensor; nothing is copied where it is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def of_images(tensor: Tensor, images: range) -> Tensor:
    """The rows of some images of a batch; the tensor itself where these are all."""
    return tensor if len(images) == len(tensor) else tensor[images.start : images.stop]


def state_fields(
    model: "Llava",
    method: Reducer,
    samples: Samples[Sample],
    images: ImageBatch,
    rows: list[Row],
    spec: ModelSpec,
) -> dict[str, Any]:
    """Fields that the states of stages 1 and 2 share, for images of one tile."""
    pictures = [images.pictures[images.owner[row]] for row in rows]
    encoded = [picture.encoded for picture in pictures]
    scores = {score: joined([one.scores[score] for one in encoded]) for score in encoded[0].scores}
    layout = pictures[0].arrangement.layout
    return {
        "ids": tuple(name_of(samples, row) for row in rows),
        "spec": spec,
        "layout": layout,
        "scores": scores,
        "merged": None if encoded[0].merged is None else stack([one.merged for one in encoded]),
        "questions": tuple(samples[sample].question for sample, _ in rows),
        "messages": tuple(samples[sample].message for sample, _ in rows),
        "clip": model.clip if method.needs_text_tower else None,
        "thumbnail": scores.__getitem__,
    }


def name_of(samples: Samples[Sample], image: Row) -> str:
    """The sample's id, with a number from its second image on; methods that draw random numbers use it as seed."""
    sample, number = image
    return samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"


def _project(
    model: "Llava", reducer: Reducer, images: ImageBatch, reduced: dict[Row, tile_stages.Features], record: Record
) -> None:
    """Project the remaining features of all images at once; an image that is not reduced is projected only once."""
    slots: dict[object, tile_stages.Features] = dict(reduced)
    slot_of: dict[Row, object] = {}
    for image, number in images.owner.items():
        slot_of[image] = image if image in reduced else number
        if slot_of[image] not in slots:
            slots[number] = _everything(model.spec, reducer, images.pictures[number])
    users = Counter(slot_of.values())
    lengths = [len(features.values) for features in slots.values()]
    for slot, length in zip(slots, lengths, strict=True):
        record.operations.add("projector", projector_flops, model.projector, length, images=users[slot])
    projected = model.projector(joined([features.values for features in slots.values()])[None])[0].split(lengths)
    tokens: dict[object, Tensor] = {}
    for (slot, features), values in zip(slots.items(), projected, strict=True):
        in_place = features.order is None
        tokens[slot] = values if in_place else tile_stages.with_newlines(values, features.order, model.newline)
    images.tokens = {image: tokens[slot] for image, slot in slot_of.items()}


def _everything(spec: ModelSpec, reducer: Reducer, picture: EncodedImage) -> tile_stages.Features:
    """All features of an image that is not reduced."""
    if picture.whole:
        return tile_stages.Features(picture.encoded.features[0])
    return tile_stages.everything(picture, untouched(reducer, spec_of(spec, picture.full)))
