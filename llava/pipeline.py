"""The way a batch of questions goes: images to tower to projector to prompt to prefill, reducing on the way.

`prepare` does everything up to the first token's hidden state and records what was really computed;
`llava/generate.py` continues from there.
"""

import time
from collections.abc import Sequence as Samples
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava import decoder, flops
from llava.audit import Audit
from llava.layout import Layout
from llava.prompt import IMAGE_TOKEN_INDEX, Prompt
from llava.reducer import DecoderState, EncoderState, PromptState, Reducer
from llava.reduction import Reduction, Step
from llava.sample import Sample
from llava.sequence import Sequence, assemble
from llava.signals import signal_flops
from llava.vision import Encoded


class Clock:
    """Adds up seconds by name, with the device synchronised at both ends of every interval."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass
class Record:
    """What happened to the samples of one batch on their way to the first token."""

    steps: list[list[Step]]
    inputs: list[int]
    merged: list[int]
    flops: int = 0
    cost: dict[str, int] = field(default_factory=dict)

    def spend(self, part: str, amount: int) -> None:
        self.cost[part] = self.cost.get(part, 0) + amount
        self.flops += amount

    def applied(self, sample: int, place: str, reduction: Reduction, row: int) -> None:
        one = reduction.row(row)
        self.steps[sample].append(Step(place, one))
        self.merged[sample] = int(one.merged_count()[0])


class Pipeline:
    """One batch through one model under one method; holds no state between batches."""

    def __init__(self, model, reducer: Reducer):
        self.model = model
        self.reducer = reducer
        self.tower, self.projector = model.tower, model.projector
        self.llm = model.llm

    @torch.inference_mode()
    def prepare(self, samples: Samples[Sample], clock: Clock) -> tuple[decoder.Prefilled, Record]:
        """Everything up to the hidden state that predicts the first token.

        Time is booked as "vision" (tower and projector), "selection" (the method's own functions, and applying
        what they return) and "prefill" (embedding, assembling and running the decoder).
        """
        prompts = [self.model.prompt(sample) for sample in samples]
        record = Record([[] for _ in samples], [0] * len(samples), [0] * len(samples))
        tokens, places, images = self._visual_tokens(samples, record, clock)
        sequence = self._assemble(prompts, tokens, places, images, record)
        clock.lap("prefill")
        if images is not None:
            sequence = self._reduce_prompt(samples, sequence, images, record)
            clock.lap("selection")

        def reduce_at(current: Sequence, layer: int) -> Sequence:
            clock.lap("prefill")
            current = self._reduce_decoder(samples, current, layer, record)
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
                tuple(layer[i] for layer in prefilled.visual), record.inputs[i], record.merged[i], prefilled.kv_bytes(i)
            )
            for i in range(len(record.steps))
        ]

    # -- images ---------------------------------------------------------------------------------------------------

    def _visual_tokens(self, samples, record: Record, clock: Clock):
        """Projected tokens [N, H] per sample, their input positions, and the encoded images (None without any)."""
        with_image = [i for i, sample in enumerate(samples) if sample.image is not None]
        nothing: list = [None] * len(samples)
        if not with_image:
            return nothing, nothing, None
        # Questions about the same picture share one pass of the tower.
        numbers: dict[object, int] = {}
        owner = {}
        pictures = []
        for i in with_image:
            key = samples[i].image_id or ("sample", i)
            if key not in numbers:
                numbers[key] = len(numbers)
                pictures.append(samples[i].image)
            owner[i] = numbers[key]
        grid = self.reducer.input_grid(self.model.layout)
        encoded = self.model.encode_images(pictures, list(numbers), self.reducer, grid)
        blocks = self.model.tower_blocks(self.reducer.signals())
        patches = encoded.grid[0] * encoded.grid[1]
        record.spend("vision", len(pictures) * flops.tower_flops(self.tower, patches, blocks))
        for signal in self.reducer.signals():
            block = self.tower.encoder.layers[signal.block]
            record.spend("selection", len(pictures) * signal_flops(signal, block, patches))
        layout = Layout(*encoded.grid, has_cls=self.reducer.keep_cls)
        index = torch.tensor([owner[i] for i in with_image], device=self.model.device)
        clock.lap("vision")
        tokens, places = nothing[:], nothing[:]
        images = Images(encoded, layout, {i: owner[i] for i in with_image}, tuple(with_image))
        for i in with_image:
            record.inputs[i] = self.model.layout.tokens + self.reducer.keep_cls
            if grid is not None:
                record.applied(i, "input", coarse(self.model.layout, grid), 0)
        if self.reducer.acts("encoder"):
            tokens, places = self._reduce_encoder(
                samples, images.encoded.rows(index), layout, with_image, record, clock
            )
        else:
            projected = self.projector(encoded.features)
            record.spend("vision", flops.projector_flops(self.projector, projected.shape[0] * projected.shape[1]))
            for i in with_image:
                tokens[i] = projected[owner[i]]
        clock.lap("vision")
        return tokens, places, images

    def _reduce_encoder(self, samples, encoded: Encoded, layout: Layout, with_image, record: Record, clock: Clock):
        """Stage 1: reduce features, then project only what is left."""
        tokens, places = [None] * len(samples), [None] * len(samples)
        ids = tuple(samples[i].id for i in with_image)
        state = EncoderState(encoded.features, encoded.signals, layout, ids)
        reduction = self.reducer.encoder(state)
        features = encoded.features if reduction is None else reduction.apply(encoded.features)
        record.spend("selection", state.flops)
        clock.lap("selection")
        projected = self.projector(features)
        record.spend("vision", flops.projector_flops(self.projector, projected.shape[0] * projected.shape[1]))
        for row, i in enumerate(with_image):
            tokens[i] = projected[row]
            if reduction is not None:
                places[i] = reduction.anchor[row]
                record.applied(i, "encoder", reduction, row)
        return tokens, places

    # -- text -----------------------------------------------------------------------------------------------------

    def _assemble(self, prompts: list[Prompt], tokens, places, images, record: Record) -> Sequence:
        embed = self.llm.embed_tokens
        texts, slots = [], []
        for prompt in prompts:
            slot = prompt.ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in prompt.ids else None
            ids = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            texts.append(embed(torch.tensor(ids, device=self.model.device)))
            slots.append(slot)
        # Text behind the picture is numbered after all tokens the tower gave, also those an encoder stage dropped.
        before = 0 if images is None else images.layout.tokens
        questions, instructions = [prompt.question for prompt in prompts], [prompt.instruction for prompt in prompts]
        sequence = assemble(texts, slots, tokens, places, before, questions, instructions)
        reduced = images is not None and self.reducer.acts("encoder")
        return sequence.renumbered() if reduced and self.reducer.positions == "renumber" else sequence

    # -- stages 2 and 3 -------------------------------------------------------------------------------------------

    def _reduce_prompt(self, samples, sequence: Sequence, images: "Images", record: Record) -> Sequence:
        """Stage 2: before decoder layer 0, in groups of equally many visual tokens."""
        if not self.reducer.acts("prompt"):
            return sequence
        reductions, merged = {}, {}
        for _, group in sequence.by_visual_count().items():
            part = sequence.select(group)
            encoded = images.of(group, self.model.device)
            state = PromptState(
                encoded.features,
                encoded.signals,
                images.layout,
                tuple(samples[i].id for i in group),
                tokens=part.take(part.hidden, list(range(len(group))), list(part.visual)),
                sequence=part,
                llm=self.llm,
                run_layers=self._run_layers,
            )
            reduction = self.reducer.prompt(state)
            record.spend("selection", state.flops)
            self._collect(group, reduction, state, "prompt", reductions, merged, record)
        return sequence.reduce(reductions, merged, self.reducer.positions == "renumber")

    def _reduce_decoder(self, samples, sequence: Sequence, layer: int, record: Record) -> Sequence:
        """Stage 3: in front of a decoder layer."""
        reductions, merged = {}, {}
        for _, group in sequence.by_visual_count().items():
            part = sequence.select(group)
            tokens = part.take(part.hidden, list(range(len(group))), list(part.visual))
            state = DecoderState(tokens, part, self.llm, layer, tuple(samples[i].id for i in group))
            reduction = self.reducer.decoder(state)
            record.spend("selection", state.flops)
            self._collect(group, reduction, state, f"layer {layer}", reductions, merged, record)
        return sequence.reduce(reductions, merged, self.reducer.positions == "renumber")

    def _collect(
        self, group, reduction: Reduction | None, state, place: str, reductions, merged, record: Record
    ) -> None:
        """Book one group's reduction, and compute the values of merged tokens."""
        if reduction is None:
            return
        values = None
        if reduction.encoder_space:
            # Merge tower features and project them again: what a merge before the projector means.
            values = self.projector(reduction.apply(state.features))
            record.spend("selection", flops.projector_flops(self.projector, values.shape[0] * values.shape[1]))
        elif reduction.merges:
            values = reduction.apply(state.tokens)
        for row, sample in enumerate(group):
            reductions[sample] = (reduction, row)
            record.applied(sample, place, reduction, row)
            if values is not None:
                merged[sample] = values[row].to(state.tokens.dtype)

    def _run_layers(self, sequence: Sequence, count: int) -> Tensor:
        return decoder.run_layers(self.llm, sequence, count)


@dataclass(frozen=True)
class Images:
    """Encoded pictures of a batch, and which sample shows which."""

    encoded: Encoded
    layout: Layout
    owner: dict[int, int]
    samples: tuple[int, ...]

    def of(self, group: list[int], device: torch.device) -> Encoded:
        return self.encoded.rows(torch.tensor([self.owner[i] for i in group], device=device))


def coarse(layout: Layout, grid: tuple[int, int]) -> Reduction:
    """The record of a smaller image: every original patch is averaged into the coarse patch that covers it."""
    rows, columns = grid
    row = torch.arange(layout.rows) * rows // layout.rows
    column = torch.arange(layout.columns) * columns // layout.columns
    owner = (row[:, None] * columns + column).flatten()
    centre_row = ((torch.arange(rows) * 2 + 1) * layout.rows) // (2 * rows)
    centre_column = ((torch.arange(columns) * 2 + 1) * layout.columns) // (2 * columns)
    anchor = (centre_row[:, None] * layout.columns + centre_column).flatten()
    share = 1.0 / torch.bincount(owner, minlength=rows * columns).float()
    return Reduction(anchor[None], layout.tokens, owner[None], share[owner][None])
