"""Prefill: from prompts and images to the decoder's state after the last prompt token.

stage 0  tower    merge inside blocks of the vision tower (llava/model/multimodal_encoder/clip_encoder.py)
stage 1  encoder  reduce features before the projector
stage 2  prompt   reduce before decoder layer 0, with the text available
stage 3  decoder  reduce between two decoder layers

`embed` puts visual tokens where "<image>" stands in a prompt (LLaVA's prepare_inputs_labels_for_multimodal).

A method receives images whose tokens have one shape together. An image in one tile takes this file; one in several
tiles or frames is divided into views before stages 1 and 2, and their reductions are joined (llava/pipeline/views.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_arch import EncodedImage, Llava
from llava.pipeline import decoder, views
from llava.pipeline.accounting import Applied, Record, SeenImage, Timer
from llava.pipeline.positions import Piece
from llava.pipeline.sequence import ImageReduction, PromptBatch, Row, assemble
from llava.pipeline.views import Features, Group
from llava.processing.prompt import Prompt, Sample
from llava.reduction.budget import ImagePlan, plan_image
from llava.reduction.merging import Reduction, ViewReduction, stack
from llava.reduction.modules import layer_flops, prefill_flops, projector_flops
from llava.reduction.reducer import Reducer, check_reductions
from llava.reduction.states import DecoderState, EncoderState, PromptState, at_images
from llava.reduction.token_layout import ModelSpec


@torch.inference_mode()
def prefill(
    model: Llava, samples: Sequence[Sample], reducer: Reducer, timer: Timer | None = None
) -> tuple[decoder.Prefilled, Record]:
    """Run a batch up to the hidden state that predicts the first token.

    Args:
        timer: marked after "preprocess" (tokenizing prompts, resizing images on the CPU), "vision" (tower and
            projector), "selection" (the method's own functions, and applying what they return) and "prefill"
            (embedding and assembling prompts, running the decoder).
    """
    timer, record = timer or Timer(model.device), Record([[] for _ in samples], [[] for _ in samples])
    prompts = [model.prompt(sample) for sample in samples]
    stages, layers = Stages(model, reducer, samples, record, timer), tuple[int, ...]()
    if any(sample.images for sample in samples):
        stages.encode_images()
        if "decoder" in reducer.acts_in:
            layers = reducer.decoder_layers(len(model.llm.layers))
    else:
        timer.mark("preprocess")
    sequence = embed(model, reducer, prompts, stages.images)
    if stages.images and "prompt" in reducer.acts_in:
        timer.mark("prefill")
        sequence = stages.reduce_prompt(sequence)
        timer.mark("selection")
    stages.start = sequence
    prefilled = decoder.prefill(model.llm, sequence, layers, stages.reduce_between_layers)
    timer.mark("prefill")
    for sample in range(len(samples)):
        lengths = tuple(segment.lengths[sample] for segment in prefilled.segments for _ in segment.layers)
        record.operations.add("prefill", prefill_flops, model.llm.layers, lengths, model.head)
    return prefilled, record


@dataclass
class BatchImage:
    """An image of a batch up to decoder layer 0.

    Attributes:
        name: the sample's id, with a number from its second image on; a seed of methods that draw.
        encoded: what the tower gave; questions about the same image share one object.
        plan: what the method does with images of this size.
        method: this batch's method at the budget of the image.
        inputs: visual tokens before any reduction.
        kept: [N] indices of its tokens among the unreduced ones; None if it is not reduced.
        tokens: [N, H] projected visual tokens.
    """

    name: str
    encoded: EncodedImage
    plan: ImagePlan
    method: Reducer
    inputs: int
    kept: Tensor | None = None
    tokens: Tensor = field(init=False)


def embed(model: Llava, reducer: Reducer, prompts: list[Prompt], images: dict[Row, BatchImage]) -> PromptBatch:
    """Embed the text of every prompt and put visual tokens where "<image>" stands."""
    # Of each prompt the ids before, between and after its images.
    texts: list[list[list[int]]] = []
    for prompt in prompts:
        texts.append([[]])
        for token in prompt.ids:
            if token == IMAGE_TOKEN_INDEX:
                texts[-1].append([])
            else:
                texts[-1][-1].append(token)
    # All texts at once: one copy to the device and one lookup.
    ids = torch.tensor([token for runs in texts for run in runs for token in run], dtype=torch.long)
    line = ids.to(model.device, non_blocking=True)
    embedded = iter(model.llm.embed_tokens(line).split([len(run) for runs in texts for run in runs]))
    # Numbered anew, text and visual tokens follow one another without gaps. Otherwise text after an image keeps the
    # position ids that it would have with every visual token present.
    gaps = model.axes or reducer.positions == "original"
    batch: list[list[Piece]] = []
    for sample, runs in enumerate(texts):
        pieces = []
        for number, run in enumerate(runs):
            if number:
                image = images[sample, number - 1]
                groups = model.groups(image.encoded) if model.axes else None
                inputs, kept = (image.inputs, image.kept) if gaps else (len(image.tokens), None)
                pieces.append(Piece(image.tokens, inputs, kept, image=True, groups=groups))
            pieces.append(Piece(next(embedded), len(run)))
        batch.append(pieces)
    sequence = assemble(batch, [one.question for one in prompts], [one.instruction for one in prompts], model.axes)
    reduced = any(image.kept is not None for image in images.values())
    return sequence.renumbered() if gaps and reduced and reducer.positions == "renumber" else sequence


@dataclass
class Stages:
    """The stages of one batch in which a method may act.

    Attributes:
        images: those of the batch by sample and number, from `encode_images` on.
        run_layers: (llm, prompts, count) -> hidden states after the first decoder layers.
        start: the prompts as they entered decoder layer 0.
    """

    model: Llava
    reducer: Reducer
    samples: Sequence[Sample]
    record: Record
    timer: Timer
    images: dict[Row, BatchImage] = field(default_factory=dict)
    run_layers: Callable[[Any, PromptBatch, int], Tensor] = decoder.run_layers
    start: PromptBatch = field(init=False)

    # -- stage 1: before the projector

    def encode_images(self) -> None:
        """Send all images through the tower, let the method reduce their features, and project these."""
        model, record = self.model, self.record
        sources: dict[object, Any] = {}  # questions about the same image share one pass of the tower
        keys: dict[Row, object] = {}
        for sample, asked in enumerate(self.samples):
            for number, source in enumerate(asked.images):
                key = keys[sample, number] = asked.image_ids[number] if asked.image_ids else object()
                sources.setdefault(key, source)
        encoded = model.encode_images(list(sources.values()), list(sources), self.reducer, self.timer)
        by_key = dict(zip(sources, encoded, strict=True))
        users = Counter(keys.values())
        for key, one in by_key.items():
            model.count_tower(record.operations, one, users[key])
        for (sample, number), key in keys.items():
            one, row, name = by_key[key], (sample, number), self.samples[sample].id
            canvas = model.canvas(sources[key])
            plan = plan_image(self.reducer, model.spec, one.full)
            inputs = one.full.tokens if plan.fits else one.inputs
            name = name if number == 0 else f"{name}#{number + 1}"
            method = self.reducer.for_image(plan.spec) if self.reducer.retention_ratio else self.reducer
            image = self.images[row] = BatchImage(name, one, plan, method, inputs)
            record.images[sample].append(SeenImage(one.full, inputs, plan.tokens, plan.asked, canvas))
            if one.step is not None:
                self._apply(row, image, *one.step)
        reduced: dict[Row, Features] = {}
        if "encoder" in self.reducer.acts_in:
            self.timer.mark("vision")
            reduced = self._reduce_features()
            self.timer.mark("selection")
        self._project(reduced)
        self.timer.mark("vision")

    def _reduce_features(self) -> dict[Row, Features]:
        """Features of every image that the method reduces, after the reduction."""
        reduced: dict[Row, Features] = {}
        tiles: dict[Row, list[tuple[ViewReduction, Tensor]]] = {}
        for group in self._groups():
            features = group.fields["features"]
            for reduction, rows in self.call_method(group, "encoder", EncoderState(**group.fields), features.shape[1]):
                if reduction.merge_matrix is not None:
                    cost = len(rows) * reduction.apply_flops(features.shape[-1])
                    self.record.operations.add("selection", int, cost)
                own = features if len(rows) == len(features) else features[rows.start : rows.stop]
                values = reduction.apply(own).unbind()
                for row, (image, value) in enumerate(zip(group.images[rows.start : rows.stop], values, strict=True)):
                    if group.views:
                        piece = group.views[rows[row]].reduced(reduction.only(row), self.model.device)
                        tiles.setdefault(image, []).append((piece, value))
                    else:
                        reduced[image] = Features(value)
                        self._apply(image, self.images[image], "encoder", reduction, row)
        for image, pieces in tiles.items():
            parts, values = zip(*pieces, strict=True)
            reduction, order = views.join_views(self.reducer, self.images[image].encoded, list(parts))
            reduced[image] = Features(torch.cat(values), order)
            self._apply(image, self.images[image], "encoder", reduction)
        # In the order of the images, because they are projected in this order.
        return {image: reduced[image] for image in self.images if image in reduced}

    def _apply(self, row: Row, image: BatchImage, place: str, reduction: Reduction, index: int = 0) -> None:
        """Record a reduction up to stage 1, and which of the image's tokens are left."""
        sample, number = row
        self.record.reductions[sample].append(Applied(place, number, reduction, index))
        kept = reduction.kept[index]
        image.kept = kept if image.kept is None else image.kept[kept]

    def _project(self, reduced: dict[Row, Features]) -> None:
        """Project the remaining features of all images at once; an image that is not reduced is projected only once."""
        model = self.model
        slots: dict[Row | int, Features] = dict(reduced.items())
        slot_of: dict[Row, Row | int] = {}
        for row, image in self.images.items():
            slot_of[row] = slot = row if row in reduced else id(image.encoded)
            if slot not in slots:
                if image.encoded.layout.is_one_tile:
                    slots[slot] = Features(image.encoded.encoded.features[0])
                else:
                    slots[slot] = views.everything(image.encoded, image.plan.fits)
        users, values = Counter(slot_of.values()), [features.values for features in slots.values()]
        lengths = [len(own) for own in values]
        for slot, length in zip(slots, lengths, strict=True):
            self.record.operations.add("projector", projector_flops, model.projector, length, images=users[slot])
        projected = model.projector((values[0] if len(values) == 1 else torch.cat(values))[None])[0].split(lengths)
        tokens: dict[Row | int, Tensor] = {}
        for (slot, features), own in zip(slots.items(), projected, strict=True):
            tokens[slot] = own if features.order is None else views.with_newlines(own, features.order, model.newline)
        for row, image in self.images.items():
            image.tokens = tokens[slot_of[row]]

    # -- stage 2: before decoder layer 0

    def reduce_prompt(self, sequence: PromptBatch) -> PromptBatch:
        """Let the method reduce every image with the text available, and shorten the prompts."""
        model, reduced = self.model, []
        tiles: dict[Row, list[tuple[ViewReduction, Tensor | None]]] = {}
        after_layers: dict[int, Tensor] = {}

        def run_layers(count: int) -> Tensor:
            """[B, L, D] after the first `count` decoder layers, computed once for all images of the batch."""
            if count not in after_layers:
                after_layers[count] = self.run_layers(model.llm, sequence, count)
                for length in sequence.lengths:
                    for layer in model.llm.layers[:count]:
                        self.record.operations.add("selection", layer_flops, layer, length, length)
            return after_layers[count]

        # Every prompt has one image, and these are in the order of the prompts.
        alone = all(len(spans) == 1 for spans in sequence.visual)
        for group in self._groups():
            members = None
            if group.views:
                indices = torch.stack([view.indices for view in group.views])
                members = indices.to(model.device, non_blocking=True)
            plain = alone and members is None and len(group.images) == len(sequence.lengths)
            rows = () if plain else tuple(group.images)
            state = PromptState(
                **group.fields,
                tokens=at_images(sequence.hidden, sequence, rows, members),
                sequence=sequence,
                rows=rows,
                llm=model.llm,
                run_layers=run_layers,
                members=members,
            )
            for reduction, own in self.call_method(group, "prompt", state, state.tokens.shape[1]):
                values = self._merged_values(reduction, state, own)
                if not group.views:
                    reduced.append(ImageReduction(group.images[own.start : own.stop], reduction, values))
                    continue
                for row, view in enumerate(group.views[own.start : own.stop]):
                    value = None if values is None else values[row].to(state.tokens.dtype)
                    piece = view.reduced(reduction.only(row), model.device)
                    tiles.setdefault(view.row, []).append((piece, value))
        for image, pieces in tiles.items():
            reduced.append(views.join_prompt(self.reducer, sequence, image, self.images[image].encoded, pieces))
        return self._shorten(sequence, reduced, "prompt", self.reducer)

    # -- stage 3: between decoder layers

    def reduce_between_layers(
        self, sequence: PromptBatch, layer: int, entered: PromptBatch, keys: Tensor
    ) -> PromptBatch:
        """The prompts before decoder layer `layer`, which the method names, reduced.

        Args:
            sequence: the prompts as they are now.
            entered: the prompts as they entered the layer before.
            keys: [B, Hkv, L, d] rotated keys of that layer; of this rank's heads where it is split.
        """
        self.timer.mark("prefill")
        gather = getattr(self.model.llm.layers[layer - 1].self_attn, "gather", None)
        keys = keys if gather is None else gather(keys, 1)
        groups: dict[tuple[int, ModelSpec], list[Row]] = {}  # as many visual tokens, now and at the start
        for sample, spans in enumerate(sequence.visual):
            for number, (start, stop) in enumerate(spans):
                spec = self.images[sample, number].plan.spec
                groups.setdefault((stop - start, spec), []).append((sample, number))
        alone = len(groups) == 1 and all(len(spans) == 1 for spans in sequence.visual)
        reduced: list[ImageReduction] = []
        for (count, _), rows in groups.items():
            image, prompts = self.images[rows[0]], [sequence, entered, self.start]
            if not alone:  # else every prompt has one image of the group
                prompts = [one.rows(rows) for one in prompts]
            now = prompts[0]
            state = DecoderState(
                ids=tuple(self.images[row].name for row in rows),
                spec=image.plan.spec,
                tokens=now.take(now.hidden, [span for (span,) in now.visual]),
                sequence=now,
                llm=self.model.llm,
                layer=layer,
                entered=prompts[1],
                keys=keys if alone else sequence.keys_of(keys, rows),
                start=prompts[2],
            )
            returned = image.method.decoder(state)
            parts = check_reductions(image.method, f"decoder before layer {layer}", returned, state.ids, count)
            self.record.operations.add("selection", int, state.flops + sum(part.flops for part, _ in parts))
            for reduction, own in parts:
                values = self._merged_values(reduction, state, own)
                reduced.append(ImageReduction(rows[own.start : own.stop], reduction, values))
        sequence = self._shorten(sequence, reduced, f"layer {layer}", self.reducer.second or self.reducer)
        self.timer.mark("selection")
        return sequence

    # -- what stages share

    def _groups(self) -> list[Group]:
        """All images, and the views of those with several tiles, as they are given to the method in stages 1 and 2."""
        whole: dict[tuple[Any, ...], list[Row]] = {}
        tiled: list[Row] = []
        for row, image in self.images.items():
            layout = image.encoded.layout
            if layout.is_one_tile:
                shape = layout.patch_grid, layout.tokens
                whole.setdefault((image.method, image.plan.spec, shape), []).append(row)
            elif not image.plan.fits:
                tiled.append(row)
        groups = []
        for rows in whole.values():
            images = [self.images[row] for row in rows]
            method, encoded = images[0].method, [image.encoded.encoded for image in images]
            features, scores, merged = encoded[0].features, encoded[0].scores, encoded[0].merged
            if len(rows) > 1:
                features = torch.cat([one.features for one in encoded])
                scores = {score: torch.cat([one.scores[score] for one in encoded]) for score in scores}
                merged = stack([one.merged for one in encoded if one.merged is not None]) if merged else None
            fields = {
                "ids": tuple(image.name for image in images),
                "spec": images[0].plan.spec,
                "features": features,
                "layout": images[0].encoded.layout.patch_grid,
                "scores": scores,
                "merged": merged,
                "questions": tuple(self.samples[sample].question for sample, _ in rows),
                "messages": tuple(self.samples[sample].message for sample, _ in rows),
                "clip": self.model.clip if method.needs_text_tower else None,
                "thumbnail": scores.__getitem__,
            }
            groups.append(Group(method, rows, fields))
        if tiled:
            several = {row: self.images[row].encoded for row in tiled}
            groups += views.groups_of(self.model, self.reducer, self.samples, several)
        return groups

    def call_method(self, group: Group, stage: str, state: EncoderState, tokens: int) -> list[tuple[Reduction, range]]:
        """The method's reductions of a group, and the rows that each is of; for views that it keeps, one of all."""
        method = group.reducer
        returned = None if method.keeps_all(tokens) else getattr(method, stage)(state)
        if returned is None and group.views:
            returned = Reduction(
                torch.arange(tokens, device=state.features.device).expand(len(group.views), -1), tokens
            )
        parts = check_reductions(method, stage, returned, state.ids, tokens)
        self.record.operations.add("selection", int, state.flops + sum(part.flops for part, _ in parts))
        return parts

    def _merged_values(self, reduction: Reduction, state: PromptState | DecoderState, rows: range) -> Tensor | None:
        """Output tokens [B, K, H] of a merging reduction; None where they are the kept tokens, unchanged."""
        operations, tokens, project = self.record.operations, state.tokens, False
        if reduction.encoder_space and isinstance(state, PromptState):
            tokens, project = state.features, True
        elif reduction.assignment is None and reduction.merge_matrix is None:
            return None
        merged = values = reduction.apply(tokens if len(rows) == len(tokens) else tokens[rows.start : rows.stop])
        if project:
            # A merge before the projector: merge tower features and project them again.
            values = self.model.projector(merged)
            projected = values.shape[0] * values.shape[1]
            operations.add("selection", projector_flops, self.model.projector, projected)
        if reduction.merge_matrix is not None:
            operations.add("selection", int, len(merged) * reduction.apply_flops(merged.shape[-1]))
        return values

    def _shorten(
        self, sequence: PromptBatch, reduced: list[ImageReduction], place: str, method: Reducer
    ) -> PromptBatch:
        """Record reductions and apply them to the prompts; `method` says which position ids these then have."""
        for part in reduced:
            for row, (sample, number) in enumerate(part.images):
                self.record.reductions[sample].append(Applied(place, number, part.reduction, row))
        return sequence.reduce(reduced, method.positions == "renumber") if reduced else sequence
