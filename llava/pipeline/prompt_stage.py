"""Stage 2: visual tokens reduced before decoder layer 0, with the text available."""

from collections.abc import Sequence as Samples
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.pipeline import decoder, tile_stages
from llava.pipeline.accounting import Record
from llava.pipeline.encoder_stage import state_fields, whole_groups
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.sequence import Row, Sequence
from llava.processing.sample import Sample
from llava.reduction.flops import layer_flops, projector_flops
from llava.reduction.reducer import Reducer, by_row
from llava.reduction.reduction import Reduction
from llava.reduction.states import DecoderState, PromptState, at_members

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava


def reduce_prompt(
    model: "Llava",
    reducer: Reducer,
    samples: Samples[Sample],
    sequence: Sequence,
    images: ImageBatch,
    record: Record,
) -> Sequence:
    """Let the method reduce every image, and shorten the prompts."""
    probe = Probe(model.llm, sequence, record)
    applied: dict[Row, tuple[Reduction, int]] = {}
    values: dict[Row, Tensor] = {}

    def state_of(
        rows: list[Row], features: Tensor, fields: dict[str, Any], members: Tensor | None = None
    ) -> PromptState:
        prompts = sequence.rows(rows)
        if members is None:
            tokens = prompts.take(prompts.hidden, prompts.images)
        else:
            tokens = at_members(prompts.hidden, prompts, members)
        return PromptState(
            features=features,
            **fields,
            tokens=tokens,
            sequence=prompts,
            llm=model.llm,
            run_layers=lambda count: probe.run(count, rows, prompts.hidden.shape[1]),
            members=members,
        )

    def merged_values(reduction: Reduction, state: PromptState, rows: slice) -> Tensor | None:
        return values_of(reduction, state, rows, record, model.projector)

    for method, spec, rows in whole_groups(model.spec, reducer, images):
        features = torch.cat([images.pictures[images.owner[row]].encoded.features for row in rows])
        state = state_of(rows, features, state_fields(model, method, samples, images, rows, spec))
        if method.keeps_all(state.tokens.shape[1]):
            continue
        reductions = by_row(method.prompt(state), len(rows), state.tokens.shape[1])
        record.operations.add("selection", int, state.flops)
        if reductions is None:
            continue
        shared = reductions[0][0] is reductions[-1][0]
        together = merged_values(reductions[0][0], state, slice(None)) if shared else None
        for row, (image, (reduction, index)) in enumerate(zip(rows, reductions, strict=True)):
            own = together if shared else merged_values(reduction, state, slice(row, row + 1))
            applied[image] = reduction, index
            record.applied(image, "prompt", reduction, index)
            if own is not None:
                values[image] = own[index].to(state.tokens.dtype)
    tiled = [image for image, number in images.owner.items() if not images.pictures[number].whole]
    if tiled:
        joined, more = tile_stages.reduce_prompts(
            model, reducer, samples, sequence, images, tiled, record, state_of, merged_values
        )
        for image, reduction in joined.items():
            applied[image] = reduction, 0
            record.applied(image, "prompt", reduction)
        values |= more
    return sequence.reduce(applied, values, reducer.positions == "renumber") if applied else sequence


@dataclass
class Probe:
    """Hidden states after the first decoder layers, computed once for all images of a batch."""

    llm: nn.Module
    sequence: Sequence
    record: Record
    _known: dict[int, Tensor] = field(default_factory=dict)

    def run(self, count: int, rows: list[Row], width: int) -> Tensor:
        """[B, width, D] after `count` layers, one row per image."""
        if count not in self._known:
            self._known[count] = decoder.run_layers(self.llm, self.sequence, count)
            for length in self.sequence.lengths:
                for layer in self.llm.layers[:count]:
                    self.record.operations.add("selection", layer_flops, layer, length, length)
        return self._known[count][[sample for sample, _ in rows]][:, -width:]


def values_of(
    reduction: Reduction,
    state: PromptState | DecoderState,
    rows: slice,
    record: Record,
    projector: nn.Module | None = None,
) -> Tensor | None:
    """Output tokens [B, K, H] of a merging reduction; None where they are the kept tokens, unchanged."""
    if reduction.encoder_space:
        # A merge before the projector: merge tower features and project them again.
        merged = reduction.apply(state.features[rows])
        values = projector(merged)
        record.operations.add("selection", projector_flops, projector, values.shape[0] * values.shape[1])
    elif reduction.merges:
        merged = values = reduction.apply(state.tokens[rows])
    else:
        return None
    if reduction.merge_matrix is not None:
        record.operations.add("selection", int, len(merged) * reduction.apply_flops(merged.shape[-1]))
    return values
