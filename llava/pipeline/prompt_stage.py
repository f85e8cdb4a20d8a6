"""Stage 2: visual tokens reduced before decoder layer 0, with the text available."""

from collections.abc import Sequence as Samples
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llava.pipeline import decoder, tile_stages
from llava.pipeline.accounting import Record
from llava.pipeline.encoder_stage import features_of, of_images, state_fields, whole_groups
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.sequence import Reduced, Row, Sequence
from llava.processing.sample import Sample
from llava.reduction.flops import layer_flops, projector_flops
from llava.reduction.reducer import Reducer, by_images
from llava.reduction.reduction import Reduction
from llava.reduction.states import DecoderState, PromptState, at_images

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
    reduced: list[Reduced] = []

    def state_of(
        rows: list[Row], features: Tensor, fields: dict[str, Any], members: Tensor | None = None
    ) -> PromptState:
        return PromptState(
            features=features,
            **fields,
            tokens=at_images(sequence.hidden, sequence, rows, members),
            sequence=sequence,
            rows=tuple(rows),
            llm=model.llm,
            run_layers=probe.run,
            members=members,
        )

    def merged_values(reduction: Reduction, state: PromptState, rows: range) -> Tensor | None:
        return values_of(reduction, state, rows, record, model.projector)

    for method, spec, rows in whole_groups(model.spec, reducer, images):
        state = state_of(rows, features_of(images, rows), state_fields(model, method, samples, images, rows, spec))
        if method.keeps_all(state.tokens.shape[1]):
            continue
        parts = by_images(method, "prompt", method.prompt(state), state.ids, state.tokens.shape[1])
        record.operations.add("selection", int, state.flops)
        for reduction, own in parts:
            part = Reduced(rows[own.start : own.stop], reduction, merged_values(reduction, state, own))
            reduced.append(part)
            for row, image in enumerate(part.images):
                record.applied(image, "prompt", reduction, row)
    tiled = [image for image, number in images.owner.items() if not images.pictures[number].whole]
    if tiled:
        joined = tile_stages.reduce_prompts(
            model, reducer, samples, sequence, images, tiled, record, state_of, merged_values
        )
        for part in joined:
            reduced.append(part)
            record.applied(part.images[0], "prompt", part.reduction)
    return sequence.reduce(reduced, reducer.positions == "renumber") if reduced else sequence


@dataclass
class Probe:
    """Hidden states after the first decoder layers, computed once for all images of a batch."""

    llm: nn.Module
    sequence: Sequence
    record: Record
    _known: dict[int, Tensor] = field(default_factory=dict)

    def run(self, count: int) -> Tensor:
        """[B, L, D] after `count` layers."""
        if count not in self._known:
            self._known[count] = decoder.run_layers(self.llm, self.sequence, count)
            for length in self.sequence.lengths:
                for layer in self.llm.layers[:count]:
                    self.record.operations.add("selection", layer_flops, layer, length, length)
        return self._known[count]


def values_of(
    reduction: Reduction,
    state: PromptState | DecoderState,
    rows: range,
    record: Record,
    projector: nn.Module | None = None,
) -> Tensor | None:
    """Output tokens [B, K, H] of a merging reduction; None where they are the kept tokens, unchanged."""
    if reduction.encoder_space:
        # A merge before the projector: merge tower features and project them again.
        merged = reduction.apply(of_images(state.features, rows))
        values = projector(merged)
        record.operations.add("selection", projector_flops, projector, values.shape[0] * values.shape[1])
    elif reduction.merges:
        merged = values = reduction.apply(of_images(state.tokens, rows))
    else:
        return None
    if reduction.merge_matrix is not None:
        record.operations.add("selection", int, len(merged) * reduction.apply_flops(merged.shape[-1]))
    return values
