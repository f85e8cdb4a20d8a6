"""Stage 1: pictures through the tower, and reduced before the projector."""

from collections.abc import Sequence as Samples
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.pipeline.accounting import Clock, Record
from llava.pipeline.encoded_images import Picture, Seen, grouped
from llava.pipeline.sequence import Row
from llava.pipeline.views import facts_of, parts_of, rest_of, shared_fields
from llava.processing.sample import Sample
from llava.reduction import flops
from llava.reduction.crop_budget import planned, untouched
from llava.reduction.joining import Piece, join
from llava.reduction.reducer import Reducer, by_row
from llava.reduction.reduction import Reduction
from llava.reduction.states import EncoderState


def see(model, reducer: Reducer, samples: Samples[Sample], record: Record, clock: Clock) -> Seen | None:
    """All images of the batch through tower, encoder stage and projector; None without any.

    Args:
        model: a llava.model.llava_arch.Llava.
    """
    rows = [(i, number) for i, sample in enumerate(samples) for number in range(len(sample.images))]
    if not rows:
        return None
    # Questions about the same picture share one pass of the tower.
    numbers: dict[object, int] = {}
    pictures, owner = [], {}
    for i, number in rows:
        key = (samples[i].image_id, number) if samples[i].image_id else ("sample", i, number)
        if key not in numbers:
            numbers[key] = len(numbers)
            pictures.append(samples[i].images[number])
        owner[i, number] = numbers[key]
    seen = Seen(model.encode_images(pictures, list(numbers), reducer), owner)
    for picture in seen.pictures:
        tower, signals = model.tower_flops(picture, reducer.tower_signals(picture.full.tiles is not None))
        record.spend("vision", tower)
        record.spend("selection", signals)
    clock.lap("vision")
    for image in rows:
        picture = seen.of(image)
        facts = facts_of(model.facts(), picture.full)
        seen.inputs[image] = picture.full.tokens if untouched(reducer, facts) else picture.inputs
        record.inputs[image[0]] += seen.inputs[image]
        record.plan(image[0], planned(reducer, facts))
        record.runs[image[0]].append(picture.full)
        seen.places[image] = None
        if picture.step is not None:
            place, reduction = picture.step
            record.applied(image, place, reduction)
            seen.places[image] = reduction.anchor[0]
    runs: dict[Row, Run] = {}
    if reducer.acts("encoder"):
        runs = _reduce(model, reducer, samples, seen, record)
        clock.lap("selection")
    _project(model, reducer, seen, runs, record)
    clock.lap("vision")
    return seen


@dataclass(frozen=True)
class Run:
    """What is left of a run of visual tokens.

    Attributes:
        features: [k, D] of the patches and class tokens.
        order: [N] which of these, and of the newline tokens behind them, each token of the run is; None for all k as
            they are.
    """

    features: Tensor
    order: Tensor | None = None


def _reduce(model, reducer: Reducer, samples: Samples[Sample], seen: Seen, record: Record) -> dict[Row, Run]:
    """Ask the method about every part, and put the parts of each image together."""
    facts = model.facts()
    open_ = [image for image in seen.owner if not untouched(reducer, facts_of(facts, seen.of(image).full))]
    found: dict[Row, list[tuple[Piece, Tensor]]] = {image: [] for image in open_}
    for group in grouped([part for image in open_ for part in parts_of(model, reducer, image, seen.of(image))]):
        features = torch.stack([part.features for part in group])
        state = EncoderState(features=features, **shared_fields(model, samples, group))
        reductions = by_row(group[0].reducer.encoder(state), len(group))
        record.spend("selection", state.flops)
        if reductions is None and group[0].picture.whole:
            continue  # nothing happened to these images
        if reductions is None:
            everything = torch.arange(features.shape[1], device=model.device).expand(len(group), -1)
            reductions = by_row(Reduction(everything, features.shape[1]), len(group))
        shared = reductions[0][0] is reductions[-1][0]
        values = reductions[0][0].apply(features) if shared else None
        for row, (part, (reduction, index)) in enumerate(zip(group, reductions, strict=True)):
            record.spend("selection", reduction.apply_flops(features.shape[-1]))
            value = values[row] if shared else reduction.apply(features[row : row + 1])[0]
            piece = Piece(part.places.to(model.device), reduction.only(index), part.block)
            found[part.image].append((piece, value))
    runs = {}
    for image, pieces in found.items():
        if not pieces:
            continue
        picture, order = seen.of(image), None
        reduction = pieces[0][0].reduction
        if not picture.whole:
            every = [piece for piece, _ in pieces] + rest_of(reducer, picture, model.device)
            reduction, order = join(every, picture.arrangement.tokens)
        runs[image] = Run(torch.cat([value for _, value in pieces]), order)
        before = seen.places[image]
        seen.places[image] = reduction.anchor[0] if before is None else before[reduction.anchor[0]]
        record.applied(image, "encoder", reduction)
    return runs


def _everything(picture: Picture, plain: bool) -> Run:
    """The run as the tower gave it.

    Args:
        plain: leave out class tokens that only the method wanted.
    """
    if picture.whole:
        return Run(picture.encoded.features[0])
    arrangement, plain = picture.arrangement, plain and picture.extra_cls
    features = [picture.crop_features(number, not plain) for number in range(len(arrangement.crops))]
    places = [crop.places if plain else crop.all_places for crop in arrangement.crops]
    order = torch.cat([*places, arrangement.newlines]).argsort()
    return Run(torch.cat(features), order.to(features[0].device))


def _project(model, reducer: Reducer, seen: Seen, runs: dict[Row, Run], record: Record) -> None:
    """Project what is left, all images at once, and put newline tokens where they belong."""
    # What nothing happened to is projected once for all images that share the picture.
    slots: dict[object, Run] = dict(runs)
    slot_of: dict[Row, object] = {}
    for image, number in seen.owner.items():
        slot_of[image] = image if image in runs else number
        if slot_of[image] not in slots:
            picture = seen.pictures[number]
            slots[number] = _everything(picture, untouched(reducer, facts_of(model.facts(), picture.full)))
    lengths = [len(run.features) for run in slots.values()]
    for length in lengths:
        record.spend("vision", flops.projector_flops(model.projector, length))
    projected = model.projector(torch.cat([run.features for run in slots.values()])[None])[0].split(lengths)
    for (slot, run), tokens in zip(list(slots.items()), projected, strict=True):
        if run.order is not None:
            extra = len(run.order) - len(tokens)
            newlines = [model.newline.to(tokens.dtype).expand(extra, -1)] if extra else []
            tokens = torch.cat([tokens, *newlines])[run.order]
        slots[slot] = tokens
    for image, slot in slot_of.items():
        seen.tokens[image] = slots[slot]
