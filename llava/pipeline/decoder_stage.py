"""Stage 3: visual tokens reduced between two decoder layers."""

from collections.abc import Sequence as Samples
from typing import TYPE_CHECKING

from torch import Tensor

from llava.pipeline.accounting import Record, Timer
from llava.pipeline.encoder_stage import name_of
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.prompt_stage import values_of
from llava.pipeline.sequence import Reduced, Row, Sequence
from llava.processing.sample import Sample
from llava.reduction.decoder_attention import whole_heads
from llava.reduction.model_spec import ModelSpec, spec_of
from llava.reduction.reducer import Reducer, by_images
from llava.reduction.states import DecoderState

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava


class DecoderStage:
    """Called before the decoder layers that a method names.

    Args:
        start: the prompts as they entered layer 0.
    """

    def __init__(
        self,
        model: "Llava",
        reducer: Reducer,
        samples: Samples[Sample],
        start: Sequence,
        images: ImageBatch,
        record: Record,
        timer: Timer,
    ):
        self.model, self.reducer, self.samples, self.start = model, reducer, samples, start
        self.images, self.record, self.timer = images, record, timer

    def __call__(self, sequence: Sequence, layer: int, entered: Sequence, keys: Tensor) -> Sequence:
        """The prompts before decoder layer `layer`, reduced.

        Args:
            sequence: the prompts as they are now.
            entered: the prompts as they entered the layer before.
            keys: [B, Hkv, L, d] rotated keys of that layer; of this rank's heads where it is split.
        """
        self.timer.mark("prefill")
        keys = whole_heads(self.model.llm.layers[layer - 1], keys, 1)
        reduced: list[Reduced] = []
        for spec, rows in self._groups(sequence):
            part = sequence.rows(rows)
            state = DecoderState(
                ids=tuple(name_of(self.samples, row) for row in rows),
                spec=spec,
                tokens=part.take(part.hidden, part.images),
                sequence=part,
                llm=self.model.llm,
                layer=layer,
                entered=entered.rows(rows),
                keys=sequence.keys_of(keys, rows),
                start=self.start.rows(rows),
            )
            method = self.reducer.for_picture(spec)
            parts = by_images(
                method, f"decoder before layer {layer}", method.decoder(state), state.ids, state.tokens.shape[1]
            )
            self.record.operations.add("selection", int, state.flops)
            for reduction, own in parts:
                values = values_of(reduction, state, own, self.record)
                reduced.append(Reduced(rows[own.start : own.stop], reduction, values))
                for row, image in enumerate(reduced[-1].images):
                    self.record.applied(image, f"layer {layer}", reduction, row)
        if reduced:
            sequence = sequence.reduce(reduced, self.reducer.positions == "renumber")
        self.timer.mark("selection")
        return sequence

    def _groups(self, sequence: Sequence) -> list[tuple[ModelSpec, list[Row]]]:
        """Images with equally many visual tokens, now and at the start."""
        groups: dict[tuple[int, ModelSpec], list[Row]] = {}
        for sample, spans in enumerate(sequence.visual):
            for number, (start, stop) in enumerate(spans):
                own = spec_of(self.model.spec, self.images.pictures[self.images.owner[sample, number]].full)
                groups.setdefault((stop - start, own), []).append((sample, number))
        return [(own, rows) for (_, own), rows in groups.items()]
