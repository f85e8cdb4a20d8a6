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
from llava.reducer import Reducer, Reductions
from llava.reduction import Reduction, Step
from llava.sample import Sample
from llava.sequence import Row, Sequence, assemble
from llava.signals import signal_flops
from llava.states import DecoderState, EncoderState, PromptState
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
    """What happened to the samples of one batch on their way to the first token.

    Attributes:
        inputs: visual tokens of each sample before any reduction, all images together.
        merged: visual tokens made of several, by image, after the last reduction that merged.
    """

    steps: list[list[Step]]
    inputs: list[int]
    images: list[int]
    merged: list[dict[int, int]]
    flops: int = 0
    cost: dict[str, int] = field(default_factory=dict)

    def spend(self, part: str, amount: int) -> None:
        self.cost[part] = self.cost.get(part, 0) + amount
        self.flops += amount

    def applied(self, image: Row, place: str, reduction: Reduction, row: int) -> None:
        sample, number = image
        one = reduction.row(row)
        self.steps[sample].append(Step(place if number == 0 else f"{place} #{number + 1}", one))
        self.merged[sample][number] = int(one.merged_count()[0])


class Pipeline:
    """One batch through one model under one method; holds no state between batches."""

    def __init__(self, model, reducer: Reducer):
        self.model = model
        self.reducer = reducer
        self.tower, self.projector = model.tower, model.projector
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
        record = Record([[] for _ in samples], [0] * len(samples), counts, [{} for _ in samples])
        seen = self._see(samples, record, clock)
        sequence = self._assemble(prompts, seen)
        clock.lap("prefill")
        if seen is not None and self.reducer.acts("prompt"):
            sequence = self._reduce_prompt(samples, sequence, seen, record)
            clock.lap("selection")
        start = sequence

        def reduce_at(current: Sequence, layer: int, entered: Sequence, keys: Tensor) -> Sequence:
            clock.lap("prefill")
            current = self._reduce_decoder(samples, current, layer, entered, keys, start, record)
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
            )
            for i in range(len(record.steps))
        ]

    # -- images ---------------------------------------------------------------------------------------------------

    def _see(self, samples: Samples[Sample], record: Record, clock: Clock) -> "Seen | None":
        """All images of the batch through tower, encoder stage and projector; None without any."""
        rows = [(i, number) for i, sample in enumerate(samples) for number in range(len(sample.images))]
        if not rows:
            return None
        # Questions about the same picture share one pass of the tower.
        numbers: dict[object, int] = {}
        pictures, owner = [], []
        for i, number in rows:
            key = (samples[i].image_id, number) if samples[i].image_id else ("sample", i, number)
            if key not in numbers:
                numbers[key] = len(numbers)
                pictures.append(samples[i].images[number])
            owner.append(numbers[key])
        grid = self.reducer.input_grid(self.model.layout)
        encoded = self.model.encode_images(pictures, list(numbers), self.reducer, grid)
        patches = encoded.grid[0] * encoded.grid[1]
        record.spend("vision", len(pictures) * flops.tower_flops(self.tower, patches, encoded.tokens))
        record.spend("selection", len(pictures) * encoded.spent)
        for signal in self.reducer.signals():
            block = self.tower.encoder.layers[signal.index(len(self.tower.encoder.layers))]
            record.spend("selection", len(pictures) * signal_flops(signal, block, patches))
        layout = Layout(*encoded.grid, has_cls=self.reducer.keep_cls)
        clock.lap("vision")
        for row, image in enumerate(rows):
            record.inputs[image[0]] += self.model.layout.tokens + self.reducer.keep_cls
            if grid is not None:
                record.applied(image, "input", coarse(self.model.layout, grid), 0)
            if encoded.merged is not None:
                record.applied(image, "tower", encoded.merged, owner[row])
        seen = Seen(encoded, layout, dict(zip(rows, owner, strict=True)))
        if self.reducer.acts("encoder"):
            self._reduce_encoder(samples, seen, record, clock)
        else:
            projected = self.projector(encoded.features)
            record.spend("vision", flops.projector_flops(self.projector, projected.shape[0] * projected.shape[1]))
            for image in rows:
                seen.tokens[image] = projected[seen.owner[image]]
                if encoded.merged is not None:
                    seen.places[image] = encoded.merged.anchor[seen.owner[image]]
        clock.lap("vision")
        return seen

    def _reduce_encoder(self, samples: Samples[Sample], seen: "Seen", record: Record, clock: Clock) -> None:
        """Stage 1: reduce features, then project only what is left."""
        rows = list(seen.owner)
        encoded = seen.of(rows, self.model.device)
        state = EncoderState(features=encoded.features, signals=encoded.signals, **self._known(samples, rows, seen))
        state.merged = encoded.merged
        found = _by_row(self.reducer.encoder(state), len(rows))
        record.spend("selection", state.flops)
        if found is None:
            kept = list(encoded.features)
        elif found[0][0] is found[-1][0]:
            kept = found[0][0].apply(encoded.features)
        else:
            kept = [reduction.apply(encoded.features[row : row + 1])[0] for row, (reduction, _) in enumerate(found)]
        clock.lap("selection")
        if isinstance(kept, Tensor):
            projected = self.projector(kept)
        else:
            projected = self.projector(torch.cat(kept)[None])[0].split([len(part) for part in kept])
        total = sum(len(part) for part in projected)
        record.spend("vision", flops.projector_flops(self.projector, total))
        for row, image in enumerate(rows):
            seen.tokens[image] = projected[row]
            place = None if encoded.merged is None else encoded.merged.anchor[row]
            if found is not None:
                reduction, index = found[row]
                record.spend("selection", reduction.apply_flops(encoded.features.shape[-1]))
                place = reduction.anchor[index] if place is None else place[reduction.anchor[index]]
                record.applied(image, "encoder", reduction, index)
            seen.places[image] = place

    def _known(self, samples: Samples[Sample], rows: list[Row], seen: "Seen") -> dict:
        """What the states of stages 1 and 2 have in common."""
        return {
            "ids": _ids(samples, rows),
            "facts": self.facts,
            "layout": seen.layout,
            "questions": tuple(samples[i].question for i, _ in rows),
            "messages": tuple(samples[i].message for i, _ in rows),
            "clip": self.model.clip if self.reducer.needs_text_tower else None,
        }

    # -- text -----------------------------------------------------------------------------------------------------

    def _assemble(self, prompts: list[Prompt], seen: "Seen | None") -> Sequence:
        embed = self.llm.embed_tokens
        texts, slots, tokens, places = [], [], [], []
        for sample, prompt in enumerate(prompts):
            found = [place for place, token in enumerate(prompt.ids) if token == IMAGE_TOKEN_INDEX]
            ids = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            texts.append(embed(torch.tensor(ids, device=self.model.device)))
            slots.append([place - earlier for earlier, place in enumerate(found)])
            tokens.append([seen.tokens[sample, number] for number in range(len(found))])
            places.append([seen.places.get((sample, number)) for number in range(len(found))])
        # Text behind a picture is numbered after all tokens the tower gave, also those an encoder stage dropped.
        before = 0 if seen is None else seen.layout.tokens
        questions, instructions = [prompt.question for prompt in prompts], [prompt.instruction for prompt in prompts]
        sequence = assemble(texts, slots, tokens, places, before, questions, instructions)
        reduced = seen is not None and any(place is not None for place in seen.places.values())
        return sequence.renumbered() if reduced and self.reducer.positions == "renumber" else sequence

    # -- stages 2 and 3 -------------------------------------------------------------------------------------------

    def _reduce_prompt(self, samples, sequence: Sequence, seen: "Seen", record: Record) -> Sequence:
        """Stage 2: before decoder layer 0, in groups of equally many visual tokens."""
        reductions, merged = {}, {}
        for rows in sequence.by_visual_count().values():
            part = sequence.rows(rows)
            encoded = seen.of(rows, self.model.device)
            state = PromptState(
                features=encoded.features,
                signals=encoded.signals,
                **self._known(samples, rows, seen),
                tokens=part.take(part.hidden, part.images),
                sequence=part,
                llm=self.llm,
                run_layers=self._run_layers,
            )
            found = _by_row(self.reducer.prompt(state), len(rows))
            record.spend("selection", state.flops)
            self._collect(rows, found, state, "prompt", reductions, merged, record)
        return sequence.reduce(reductions, merged, self.reducer.positions == "renumber")

    def _reduce_decoder(
        self, samples, sequence: Sequence, layer: int, entered: Sequence, keys: Tensor, start: Sequence, record: Record
    ) -> Sequence:
        """Stage 3: in front of a decoder layer."""
        reductions, merged = {}, {}
        for rows in sequence.by_visual_count().values():
            part = sequence.rows(rows)
            state = DecoderState(
                ids=_ids(samples, rows),
                facts=self.facts,
                tokens=part.take(part.hidden, part.images),
                sequence=part,
                llm=self.llm,
                layer=layer,
                entered=entered.rows(rows),
                keys=keys[[sample for sample, _ in rows]][:, :, -part.hidden.shape[1] :],
                start=start.rows(rows),
            )
            found = _by_row(self.reducer.decoder(state), len(rows))
            record.spend("selection", state.flops)
            self._collect(rows, found, state, f"layer {layer}", reductions, merged, record)
        if not reductions:
            return sequence
        return sequence.reduce(reductions, merged, self.reducer.positions == "renumber")

    def _collect(
        self, rows: list[Row], found, state, place: str, reductions: dict, merged: dict, record: Record
    ) -> None:
        """Book one group's reductions, and compute the values of merged tokens."""
        if found is None:
            return
        shared = found[0][0] is found[-1][0]
        values = self._values(found[0][0], state, slice(None), record) if shared else None
        for row, (image, (reduction, index)) in enumerate(zip(rows, found, strict=True)):
            own = values if shared else self._values(reduction, state, slice(row, row + 1), record)
            reductions[image] = (reduction, index)
            record.applied(image, place, reduction, index)
            if own is not None:
                merged[image] = own[index].to(state.tokens.dtype)

    def _values(self, reduction: Reduction, state, rows: slice, record: Record) -> Tensor | None:
        """Output tokens of a merging reduction; None where they are just the anchors' values."""
        if reduction.encoder_space:
            # Merge tower features and project them again: what a merge before the projector means.
            values = self.projector(reduction.apply(state.features[rows]))
            record.spend("selection", flops.projector_flops(self.projector, values.shape[0] * values.shape[1]))
            record.spend("selection", len(values) * reduction.apply_flops(state.features.shape[-1]))
            return values
        if not reduction.merges:
            return None
        values = reduction.apply(state.tokens[rows])
        record.spend("selection", len(values) * reduction.apply_flops(state.tokens.shape[-1]))
        return values

    def _run_layers(self, sequence: Sequence, count: int) -> Tensor:
        return decoder.run_layers(self.llm, sequence, count)


def _ids(samples: Samples[Sample], rows: list[Row]) -> tuple[str, ...]:
    """One name per image: the sample's own, numbered from the second image on."""
    return tuple(samples[i].id if number == 0 else f"{samples[i].id}#{number + 1}" for i, number in rows)


def _by_row(reductions: Reductions, count: int) -> list[tuple[Reduction, int]] | None:
    """(reduction, row in it) of every image, whether they share one reduction or have one each."""
    if reductions is None:
        return None
    if isinstance(reductions, Reduction):
        return [(reductions, row) for row in range(count)]
    if len(reductions) != count:
        raise ValueError(f"{count} images need as many reductions, got {len(reductions)}")
    return [(reduction, 0) for reduction in reductions]


@dataclass
class Seen:
    """The images of a batch behind the tower.

    Attributes:
        encoded: distinct pictures.
        owner: image -> its picture.
        tokens: image -> [N, H] projected tokens.
        places: image -> input positions [N] of its tokens, where an earlier stage has reduced them.
    """

    encoded: Encoded
    layout: Layout
    owner: dict[Row, int]
    tokens: dict[Row, Tensor] = field(default_factory=dict)
    places: dict[Row, Tensor | None] = field(default_factory=dict)

    def of(self, rows: list[Row], device: torch.device) -> Encoded:
        return self.encoded.rows(torch.tensor([self.owner[row] for row in rows], device=device))


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
