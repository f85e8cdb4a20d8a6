"""Prefill: from prompts and images to the decoder's state after the last prompt token.

stage 0  tower    merge inside blocks of the vision tower (llava/model/multimodal_encoder/clip_encoder.py)
stage 1  encoder  reduce features before the projector
stage 2  prompt   reduce before decoder layer 0, with the text available
stage 3  decoder  reduce between two decoder layers

A method receives images whose tokens have one shape together. An image in one tile takes this file; one in several
tiles or frames is divided into views before stages 1 and 2, and their reductions are joined (llava/pipeline/views.py).
"""

from collections import Counter
from collections.abc import Sequence as Samples
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava.model.llava_arch import Llava
from llava.pipeline import decoder, views
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.embed import ImageBatch, embed
from llava.pipeline.sequence import Reduced, Row, Sequence
from llava.pipeline.views import Features, Group
from llava.processing.prompt import Sample
from llava.reduction.budget import fits_budget, planned
from llava.reduction.decoder_attention import whole_heads
from llava.reduction.merging import Reduction, ViewReduction, stack
from llava.reduction.modules import layer_flops, prefill_flops, projector_flops
from llava.reduction.reducer import Reducer, by_images
from llava.reduction.states import DecoderState, EncoderState, PromptState, at_images
from llava.reduction.token_layout import ModelSpec, spec_of


@torch.inference_mode()
def prefill(
    model: Llava, samples: Samples[Sample], reducer: Reducer, timer: Timer | None = None
) -> tuple[decoder.Prefilled, Record]:
    """Run a batch up to the hidden state that predicts the first token.

    Args:
        timer: marked after "preprocess" (tokenizing prompts, resizing images on the CPU), "vision" (tower and
            projector), "selection" (the method's own functions, and applying what they return) and "prefill"
            (embedding and assembling prompts, running the decoder).
    """
    timer, depth = timer or Timer(model.device), len(model.llm.layers)
    record = Record(len(samples), depth)
    prompts = [model.prompt(sample) for sample in samples]
    timer.mark("preprocess")
    stages = Stages(model, reducer, samples, record, timer)
    images, layers = None, tuple[int, ...]()
    if any(sample.images for sample in samples):
        images, layers = stages.encode_images(), reducer.decoder_layers(depth)
    sequence = embed(model, reducer, prompts, images)
    timer.mark("prefill")
    if images is not None and "prompt" in reducer.acts_in:
        sequence = stages.reduce_prompt(sequence)
        timer.mark("selection")
    stages.start = sequence
    run = model.compiled.layers if model.compiled else decoder.run_segment
    prefilled = decoder.prefill(model.llm, sequence, layers, stages.reduce_between_layers, run)
    timer.mark("prefill")
    for lengths in zip(*prefilled.lengths, strict=True):  # of one sample, layer by layer
        record.operations.add("prefill", prefill_flops, model.llm.layers, lengths, model.head)
    return prefilled, record


@dataclass
class Stages:
    """The stages of one batch in which a method may act.

    Attributes:
        images: those of the batch, from `encode_images` on.
        start: the prompts as they entered decoder layer 0.
    """

    model: Llava
    reducer: Reducer
    samples: Samples[Sample]
    record: Record
    timer: Timer
    images: ImageBatch = field(init=False)
    start: Sequence = field(init=False)

    # -- stage 1: before the projector

    def encode_images(self) -> ImageBatch:
        """Send all images through the tower, let the method reduce their features, and project these."""
        model, record = self.model, self.record
        pictures: dict[object, Any] = {}  # questions about the same image share one pass of the tower
        keys: dict[Row, object] = {}
        for i, sample in enumerate(self.samples):
            for number, picture in enumerate(sample.images):
                key = keys[i, number] = sample.image_ids[number] if sample.image_ids else object()
                pictures.setdefault(key, picture)
        encoded = model.encode_images(list(pictures.values()), list(pictures), self.reducer, self.timer)
        by_key = dict(zip(pictures, encoded, strict=True))
        self.images = images = ImageBatch({image: by_key[key] for image, key in keys.items()})
        users = Counter(keys.values())
        for key, one in by_key.items():
            model.count_tower(record.operations, one, users[key])
        self.timer.mark("vision")
        for image, one in images.encoded.items():
            spec = images.specs[image] = spec_of(model.spec, one.full)
            images.inputs[image] = one.full.tokens if fits_budget(self.reducer, spec) else one.inputs
            images.kept[image] = None
            record.image(image[0], one.full, images.inputs[image], planned(self.reducer, spec))
            if one.step is not None:
                self._applied(image, *one.step)
        reduced: dict[Row, Features] = {}
        if "encoder" in self.reducer.acts_in:
            reduced = self._reduce_features()
            self.timer.mark("selection")
        self._project(reduced)
        self.timer.mark("vision")
        return images

    def _reduce_features(self) -> dict[Row, Features]:
        """Features of every image that the method reduces, after the reduction."""
        reduced: dict[Row, Features] = {}
        tiles: dict[Row, list[tuple[ViewReduction, Tensor]]] = {}
        for group in self._groups():
            features = group.fields["features"]
            for reduction, rows in self._ask(group, "encoder", EncoderState(**group.fields), features.shape[1]):
                if reduction.merge_matrix is not None:
                    cost = len(rows) * reduction.apply_flops(features.shape[-1])
                    self.record.operations.add("selection", int, cost)
                values = reduction.apply(part_of(features, rows)).unbind()
                for row, (image, value) in enumerate(zip(group.images[rows.start : rows.stop], values, strict=True)):
                    if group.views:
                        piece = group.views[rows[row]].reduced(reduction.only(row), self.model.device)
                        tiles.setdefault(image, []).append((piece, value))
                    else:
                        reduced[image] = Features(value)
                        self._applied(image, "encoder", reduction, row)
        for image, pieces in tiles.items():
            own, values = zip(*pieces, strict=True)
            reduction, order = views.join_views(self.reducer, self.images.encoded[image], list(own))
            reduced[image] = Features(torch.cat(values), order)
            self._applied(image, "encoder", reduction)
        # In the order of the images, because they are projected in this order.
        return {image: reduced[image] for image in self.images.encoded if image in reduced}

    def _project(self, reduced: dict[Row, Features]) -> None:
        """Project the remaining features of all images at once; an image that is not reduced is projected only once."""
        model, images = self.model, self.images
        slots: dict[Row | int, Features] = dict(reduced.items())
        slot_of: dict[Row, Row | int] = {}
        for image, picture in images.encoded.items():
            slot_of[image] = slot = image if image in reduced else id(picture)
            if slot not in slots:
                if picture.whole:
                    slots[slot] = Features(picture.encoded.features[0])
                else:
                    slots[slot] = views.everything(picture, fits_budget(self.reducer, images.specs[image]))
        users = Counter(slot_of.values())
        lengths = [len(features.values) for features in slots.values()]
        for slot, length in zip(slots, lengths, strict=True):
            self.record.operations.add("projector", projector_flops, model.projector, length, images=users[slot])
        projected = model.projector(joined([one.values for one in slots.values()])[None])[0].split(lengths)
        tokens: dict[Row | int, Tensor] = {}
        for (slot, features), values in zip(slots.items(), projected, strict=True):
            tokens[slot] = values
            if features.order is not None:
                tokens[slot] = views.with_newlines(values, features.order, model.newline)
        images.tokens = {image: tokens[slot] for image, slot in slot_of.items()}

    # -- stage 2: before decoder layer 0

    def reduce_prompt(self, sequence: Sequence) -> Sequence:
        """Let the method reduce every image with the text available, and shorten the prompts."""
        model, reduced = self.model, []
        tiles: dict[Row, list[tuple[ViewReduction, Tensor | None]]] = {}
        after_layers: dict[int, Tensor] = {}

        def run_layers(count: int) -> Tensor:
            """[B, L, D] after the first `count` decoder layers, computed once for all images of the batch."""
            if count not in after_layers:
                after_layers[count] = decoder.run_layers(model.llm, sequence, count)
                for length in sequence.lengths:
                    for layer in model.llm.layers[:count]:
                        self.record.operations.add("selection", layer_flops, layer, length, length)
            return after_layers[count]

        for group in self._groups():
            members = torch.stack([view.indices for view in group.views]).to(model.device) if group.views else None
            state = PromptState(
                **group.fields,
                tokens=at_images(sequence.hidden, sequence, group.images, members),
                sequence=sequence,
                rows=tuple(group.images),
                llm=model.llm,
                run_layers=run_layers,
                members=members,
            )
            for reduction, rows in self._ask(group, "prompt", state, state.tokens.shape[1]):
                values = self._merged_values(reduction, state, rows)
                if not group.views:
                    reduced.append(Reduced(group.images[rows.start : rows.stop], reduction, values))
                    continue
                for row, view in enumerate(group.views[rows.start : rows.stop]):
                    value = None if values is None else values[row].to(state.tokens.dtype)
                    piece = view.reduced(reduction.only(row), model.device)
                    tiles.setdefault(view.image, []).append((piece, value))
        for image, pieces in tiles.items():
            reduced.append(views.join_prompt(self.reducer, sequence, image, self.images.encoded[image], pieces))
        return self._shorten(sequence, reduced, "prompt")

    # -- stage 3: between decoder layers

    def reduce_between_layers(self, sequence: Sequence, layer: int, entered: Sequence, keys: Tensor) -> Sequence:
        """The prompts before decoder layer `layer`, which the method names, reduced.

        Args:
            sequence: the prompts as they are now.
            entered: the prompts as they entered the layer before.
            keys: [B, Hkv, L, d] rotated keys of that layer; of this rank's heads where it is split.
        """
        self.timer.mark("prefill")
        keys = whole_heads(self.model.llm.layers[layer - 1], keys, 1)
        groups: dict[tuple[int, ModelSpec], list[Row]] = {}  # as many visual tokens, now and at the start
        for sample, spans in enumerate(sequence.visual):
            for number, (start, stop) in enumerate(spans):
                spec = self.images.specs[sample, number]
                groups.setdefault((stop - start, spec), []).append((sample, number))
        reduced: list[Reduced] = []
        for (count, spec), rows in groups.items():
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
            parts = by_images(method, f"decoder before layer {layer}", method.decoder(state), state.ids, count)
            self.record.operations.add("selection", int, state.flops)
            for reduction, own in parts:
                values = self._merged_values(reduction, state, own)
                reduced.append(Reduced(rows[own.start : own.stop], reduction, values))
        sequence = self._shorten(sequence, reduced, f"layer {layer}")
        self.timer.mark("selection")
        return sequence

    # -- what stages share

    def _groups(self) -> list[Group]:
        """All images, and the views of those with several tiles, as they are given to the method in stages 1 and 2."""
        whole: dict[tuple[Any, ...], list[Row]] = {}
        tiled: list[Row] = []
        for image, picture in self.images.encoded.items():
            spec = self.images.specs[image]
            if picture.whole:
                shape = picture.arrangement.layout, picture.arrangement.tokens
                whole.setdefault((self.reducer.for_picture(spec), spec, shape), []).append(image)
            elif not fits_budget(self.reducer, spec):
                tiled.append(image)
        groups = [
            Group(method, rows, state_fields(self.model, method, self.samples, self.images, rows, spec))
            for (method, spec, _), rows in whole.items()
        ]
        return groups + (views.groups_of(self.model, self.reducer, self.samples, self.images, tiled) if tiled else [])

    def _ask(self, group: Group, stage: str, state: EncoderState, tokens: int) -> list[tuple[Reduction, range]]:
        """The method's reductions of a group, and the rows that each is of; for views that it keeps, one of all."""
        method = group.reducer
        returned = None if method.keeps_all(tokens) else getattr(method, stage)(state)
        if returned is None and group.views:
            returned = Reduction(
                torch.arange(tokens, device=state.features.device).expand(len(group.views), -1), tokens
            )
        parts = by_images(method, stage, returned, state.ids, tokens)
        self.record.operations.add("selection", int, state.flops)
        return parts

    def _merged_values(self, reduction: Reduction, state: PromptState | DecoderState, rows: range) -> Tensor | None:
        """Output tokens [B, K, H] of a merging reduction; None where they are the kept tokens, unchanged."""
        operations = self.record.operations
        if reduction.encoder_space and isinstance(state, PromptState):
            # A merge before the projector: merge tower features and project them again.
            merged = reduction.apply(part_of(state.features, rows))
            values = self.model.projector(merged)
            projected = values.shape[0] * values.shape[1]
            operations.add("selection", projector_flops, self.model.projector, projected)
        elif reduction.merges:
            merged = values = reduction.apply(part_of(state.tokens, rows))
        else:
            return None
        if reduction.merge_matrix is not None:
            operations.add("selection", int, len(merged) * reduction.apply_flops(merged.shape[-1]))
        return values

    def _shorten(self, sequence: Sequence, reduced: list[Reduced], place: str) -> Sequence:
        """Record reductions and apply them to the prompts."""
        for part in reduced:
            for row, image in enumerate(part.images):
                self.record.applied(image, place, part.reduction, row)
        return sequence.reduce(reduced, self.reducer.positions == "renumber") if reduced else sequence

    def _applied(self, image: Row, place: str, reduction: Reduction, row: int = 0) -> None:
        """Record a reduction up to stage 1, and which of the image's tokens are left."""
        self.record.applied(image, place, reduction, row)
        before, kept = self.images.kept[image], reduction.kept[row]
        self.images.kept[image] = kept if before is None else before[kept]


def state_fields(
    model: Llava, method: Reducer, samples: Samples[Sample], images: ImageBatch, rows: list[Row], spec: ModelSpec
) -> dict[str, Any]:
    """Fields that the states of stages 1 and 2 share, for images of one tile."""
    pictures = [images.encoded[row] for row in rows]
    encoded = [picture.encoded for picture in pictures]
    scores = {score: joined([one.scores[score] for one in encoded]) for score in encoded[0].scores}
    merged = [one.merged for one in encoded if one.merged is not None]
    return {
        "ids": tuple(name_of(samples, row) for row in rows),
        "spec": spec,
        "features": joined([one.features for one in encoded]),
        "layout": pictures[0].arrangement.layout,
        "scores": scores,
        "merged": stack(merged) if merged else None,
        "questions": tuple(samples[sample].question for sample, _ in rows),
        "messages": tuple(samples[sample].message for sample, _ in rows),
        "clip": model.clip if method.needs_text_tower else None,
        "thumbnail": scores.__getitem__,
    }


def name_of(samples: Samples[Sample], image: Row) -> str:
    """The sample's id, with a number from its second image on; methods that draw random numbers use it as seed."""
    sample, number = image
    return samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"


def joined(parts: list[Tensor]) -> Tensor:
    """The images of all parts in one tensor; nothing is copied where it is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def part_of(tensor: Tensor, rows: range) -> Tensor:
    """Some rows of a tensor; the tensor itself where these are all."""
    return tensor if len(rows) == len(tensor) else tensor[rows.start : rows.stop]
