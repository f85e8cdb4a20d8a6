"""Stage 2: visual tokens reduced in front of decoder layer 0, the text in sight."""

from collections.abc import Sequence as Samples

import torch
from torch import Tensor

from llava.pipeline import decoder
from llava.pipeline.accounting import Record
from llava.pipeline.encoded_images import Part, Seen, grouped
from llava.pipeline.sequence import Row, Sequence
from llava.pipeline.views import facts_of, parts_of, rest_of, shared_fields
from llava.processing.sample import Sample
from llava.reduction import flops
from llava.reduction.crop_budget import untouched
from llava.reduction.joining import Piece, join
from llava.reduction.reducer import Reducer, by_row
from llava.reduction.reduction import Reduction
from llava.reduction.states import PromptState, at_members

Found = tuple[Piece, Tensor | None, Part]  # what a part keeps, and the values of its merged tokens


def reduce_prompt(
    model, reducer: Reducer, samples: Samples[Sample], sequence: Sequence, seen: Seen, record: Record
) -> Sequence:
    """Ask the method about every part of every image, and shorten the prompts.

    Args:
        model: a llava.model.llava_arch.Llava.
    """
    facts = model.facts()
    open_ = [image for image in seen.owner if not untouched(reducer, facts_of(facts, seen.of(image).full))]
    context = Context(model.llm, sequence, record)
    found: dict[Row, list[Found]] = {image: [] for image in open_}
    for group in grouped([part for image in open_ for part in parts_of(model, reducer, image, seen.of(image))]):
        state = _state(model, samples, sequence, group, context)
        reductions = by_row(group[0].reducer.prompt(state), len(group))
        record.spend("selection", state.flops)
        if reductions is None and group[0].picture.whole:
            continue  # nothing happens to these images
        if reductions is None:
            everything = torch.arange(state.tokens.shape[1], device=model.device).expand(len(group), -1)
            reductions = by_row(Reduction(everything, state.tokens.shape[1]), len(group))
        shared = reductions[0][0] is reductions[-1][0]
        together = merged_values(model.projector, reductions[0][0], state, slice(None), record) if shared else None
        for row, (part, (reduction, index)) in enumerate(zip(group, reductions, strict=True)):
            own = together
            if not shared:
                own = merged_values(model.projector, reduction, state, slice(row, row + 1), record)
            piece = Piece(part.places.to(model.device), reduction.only(index), part.block)
            found[part.image].append((piece, None if own is None else own[index].to(state.tokens.dtype), part))
    applied, values = {}, {}
    for image, pieces in found.items():
        if not pieces:
            continue
        reduction, merged = _whole(reducer, sequence, image, pieces, seen)
        record.applied(image, "prompt", reduction)
        applied[image] = (reduction, 0)
        if merged is not None:
            values[image] = merged
    if not applied:
        return sequence
    return sequence.reduce(applied, values, reducer.positions == "renumber")


class Context:
    """Hidden states behind the first decoder layers, computed once for all parts of a batch."""

    def __init__(self, llm, sequence: Sequence, record: Record):
        self.llm, self.sequence, self.record = llm, sequence, record
        self._known: dict[int, Tensor] = {}

    def of(self, count: int, rows: list[Row], width: int) -> Tensor:
        """[B, width, D] behind `count` layers, one row per part."""
        if count not in self._known:
            self._known[count] = decoder.run_layers(self.llm, self.sequence, count)
            for length in self.sequence.lengths:
                spent = sum(flops.layer_flops(layer, length, length) for layer in self.llm.layers[:count])
                self.record.spend("selection", spent)
        return self._known[count][[sample for sample, _ in rows]][:, -width:]


def _state(model, samples, sequence: Sequence, group: list[Part], context: Context) -> PromptState:
    rows = [part.image for part in group]
    prompts = sequence.rows(rows)
    members = None
    if not group[0].picture.whole:
        members = torch.stack([part.places for part in group]).to(model.device)
    tokens = at_members(prompts.hidden, prompts, members) if members is not None else None
    return PromptState(
        features=torch.stack([part.features for part in group]),
        **shared_fields(model, samples, group),
        tokens=prompts.take(prompts.hidden, prompts.images) if tokens is None else tokens,
        sequence=prompts,
        llm=model.llm,
        run_layers=lambda count: context.of(count, rows, prompts.hidden.shape[1]),
        members=members,
    )


def merged_values(projector, reduction: Reduction, state, rows: slice, record: Record) -> Tensor | None:
    """Output tokens of a merging reduction; None where they are just the anchors' values."""
    if reduction.encoder_space:
        # Merge tower features and project them again: what a merge before the projector means.
        values = projector(reduction.apply(state.features[rows]))
        record.spend("selection", flops.projector_flops(projector, values.shape[0] * values.shape[1]))
        record.spend("selection", len(values) * reduction.apply_flops(state.features.shape[-1]))
        return values
    if not reduction.merges:
        return None
    values = reduction.apply(state.tokens[rows])
    record.spend("selection", len(values) * reduction.apply_flops(state.tokens.shape[-1]))
    return values


def _whole(
    reducer: Reducer, sequence: Sequence, image: Row, pieces: list[Found], seen: Seen
) -> tuple[Reduction, Tensor | None]:
    """One image's parts as one reduction of its run, and the values of its tokens where they are merged."""
    picture = seen.of(image)
    if picture.whole:
        ((piece, values, _),) = pieces
        return piece.reduction, values
    device = pieces[0][0].places.device
    every = [piece for piece, _, _ in pieces] + rest_of(reducer, picture, device)
    reduction, order = join(every, picture.arrangement.tokens)
    if all(values is None for _, values, _ in pieces):
        return reduction, None
    sample, number = image
    start = sequence.padding(sample) + sequence.visual[sample][number][0]
    run = sequence.hidden[sample, start : start + picture.arrangement.tokens]
    known = [values for _, values, _ in pieces] + [None] * (len(every) - len(pieces))
    outputs = [
        run[piece.places[piece.reduction.anchor[0]]] if values is None else values
        for piece, values in zip(every, known, strict=True)
    ]
    return reduction, torch.cat(outputs)[order]
