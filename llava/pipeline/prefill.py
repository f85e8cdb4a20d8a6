"""The way a batch of questions goes: images to tower to projector to prompt to prefill, reducing on the way.

`prepare` does everything up to the first token's hidden state and records what was really computed;
`llava/pipeline/generate.py` continues from there.
"""

from collections.abc import Sequence as Samples

import torch
from torch import Tensor

from llava.pipeline import decoder, encoder_stage
from llava.pipeline.accounting import Clock, Record
from llava.pipeline.audit import Audit, mean_visual_tokens
from llava.pipeline.encoded_images import Seen
from llava.pipeline.prompt_stage import merged_values, reduce_prompt
from llava.pipeline.sequence import Row, Sequence, assemble
from llava.pipeline.views import facts_of
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Prompt
from llava.processing.sample import Sample
from llava.reduction import flops
from llava.reduction.reducer import Reducer, by_row
from llava.reduction.states import DecoderState

__all__ = ["Clock", "Pipeline", "Record"]


class Pipeline:
    """One batch through one model under one method; holds no state between batches."""

    def __init__(self, model, reducer: Reducer):
        self.model = model
        self.reducer = reducer
        self.llm = model.llm
        self.facts = model.facts()

    @torch.inference_mode()
    def prepare(self, samples: Samples[Sample], clock: Clock) -> tuple[decoder.Prefilled, Record]:
        """Everything up to the hidden state that predicts the first token.

        Time is booked as "vision" (tower and projector), "selection" (the method's own functions, and applying
        what they return) and "prefill" (embedding, assembling and running the decoder).
        """
        prompts = [self.model.prompt(sample) for sample in samples]
        counts = [len(sample.images) for sample in samples]
        nothing = (0,) * len(self.llm.layers)
        record = Record(
            [[] for _ in samples],
            [0] * len(samples),
            counts,
            [{} for _ in samples],
            [nothing] * len(samples),
            [[] for _ in samples],
        )
        seen = encoder_stage.see(self.model, self.reducer, samples, record, clock)
        sequence = self._assemble(prompts, seen)
        clock.lap("prefill")
        if seen is not None and self.reducer.acts("prompt"):
            sequence = self._reduce_prompt(samples, sequence, seen, record)
            clock.lap("selection")
        start = sequence

        def reduce_at(current: Sequence, layer: int, entered: Sequence, keys: Tensor) -> Sequence:
            clock.lap("prefill")
            current = self._reduce_decoder(samples, current, layer, entered, keys, start, seen, record)
            clock.lap("selection")
            return current

        stages = self.reducer.decoder_layers(len(self.llm.layers))
        prefilled = decoder.prefill(self.llm, sequence, stages, reduce_at)
        clock.lap("prefill")
        for sample in range(len(samples)):
            lengths = [layer[sample] for layer in prefilled.lengths]
            record.spend("prefill", flops.prefill_flops(self.llm.layers, lengths, self.model.head))
        return prefilled, record

    def audits(self, prefilled: decoder.Prefilled, record: Record) -> list[Audit]:
        """One account per sample."""
        return [
            Audit(
                tuple(layer[i] for layer in prefilled.visual),
                record.inputs[i],
                sum(record.merged[i].values()),
                prefilled.kv_bytes(i),
                max(1, record.images[i]),
                None if record.planned[i] is None else mean_visual_tokens(record.planned[i]) / max(1, record.images[i]),
            )
            for i in range(len(record.steps))
        ]

    def _assemble(self, prompts: list[Prompt], seen: Seen | None) -> Sequence:
        embed = self.llm.embed_tokens
        texts, slots, tokens, places, before = [], [], [], [], []
        for sample, prompt in enumerate(prompts):
            found = [place for place, token in enumerate(prompt.ids) if token == IMAGE_TOKEN_INDEX]
            ids = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            images = [(sample, number) for number in range(len(found))]
            texts.append(embed(torch.tensor(ids, device=self.model.device)))
            slots.append([place - earlier for earlier, place in enumerate(found)])
            tokens.append([seen.tokens[image] for image in images])
            places.append([seen.places[image] for image in images])
            # Text behind a picture is numbered after all tokens the tower gave, also those an encoder stage dropped.
            before.append([seen.inputs[image] for image in images])
        questions, instructions = [prompt.question for prompt in prompts], [prompt.instruction for prompt in prompts]
        groups = None
        if self.model.axes:
            groups = [[self.model.groups(seen.of((i, n))) for n in range(len(own))] for i, own in enumerate(tokens)]
        sequence = assemble(texts, slots, tokens, places, before, questions, instructions, groups)
        reduced = seen is not None and any(place is not None for place in seen.places.values())
        return sequence.renumbered() if reduced and self.reducer.positions == "renumber" else sequence

    def _reduce_prompt(self, samples, sequence: Sequence, seen: Seen, record: Record) -> Sequence:
        return reduce_prompt(self.model, self.reducer, samples, sequence, seen, record)

    def _reduce_decoder(
        self, samples, sequence: Sequence, layer: int, entered: Sequence, keys: Tensor, start: Sequence, seen, record
    ) -> Sequence:
        """Stage 3: in front of a decoder layer, in groups of equally many visual tokens, now and at the start."""
        reductions, merged = {}, {}
        groups: dict[tuple, list[Row]] = {}
        for count, rows in sequence.by_visual_count().items():
            for image in rows:
                groups.setdefault((count, facts_of(self.facts, seen.of(image).full)), []).append(image)
        for (_, facts), rows in groups.items():
            part = sequence.rows(rows)
            state = DecoderState(
                ids=tuple(samples[i].id if number == 0 else f"{samples[i].id}#{number + 1}" for i, number in rows),
                facts=facts,
                tokens=part.take(part.hidden, part.images),
                sequence=part,
                llm=self.llm,
                layer=layer,
                entered=entered.rows(rows),
                keys=keys[[sample for sample, _ in rows]][:, :, -part.hidden.shape[1] :],
                start=start.rows(rows),
            )
            found = by_row(self.reducer.for_picture(facts).decoder(state), len(rows))
            record.spend("selection", state.flops)
            if found is None:
                continue
            shared = found[0][0] is found[-1][0]
            together = merged_values(None, found[0][0], state, slice(None), record) if shared else None
            for row, (image, (reduction, index)) in enumerate(zip(rows, found, strict=True)):
                own = together if shared else merged_values(None, reduction, state, slice(row, row + 1), record)
                reductions[image] = (reduction, index)
                record.applied(image, f"layer {layer}", reduction, index)
                if own is not None:
                    merged[image] = own[index].to(state.tokens.dtype)
        if not reductions:
            return sequence
        return sequence.reduce(reductions, merged, self.reducer.positions == "renumber")
