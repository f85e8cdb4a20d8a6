"""The stages at which a method may reduce the visual tokens of a batch.

stage 0  tower    merge tokens inside blocks of the vision tower (llava/model/multimodal_encoder/clip_encoder.py)
stage 1  encoder  reduce the tower's features before the projector
stage 2  prompt   reduce visual tokens before decoder layer 0, with the text available
stage 3  decoder  reduce visual tokens between two decoder layers

`embed`, between stages 1 and 2, puts the visual tokens where "<image>" stands in a prompt (LLaVA's
prepare_inputs_labels_for_multimodal).

At each stage, images whose tokens have the same shape are given to the method together. This file handles images that
are one tile. An image of several tiles or frames is divided into views before stages 1 and 2, and the reductions of its
views are joined into one (llava/pipeline/views.py).

LLaVA's own models go through all stages in llava/pipeline/generate.py. Families that run their own forward
(llava/hf/reduce.py) and serving engines (llava/serving/engine_method.py) start with images that are already encoded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_arch import EncodedImage
from llava.pipeline import decoder, views
from llava.pipeline.accounting import Applied, Record, SeenImage, Timer
from llava.pipeline.decoder import Segment
from llava.pipeline.positions import Piece
from llava.pipeline.sequence import ImageKey, ImageReduction, PromptBatch, assemble
from llava.pipeline.views import Features, Group
from llava.processing.prompt import Prompt, Sample
from llava.reduction.budget import ImagePlan, plan_image
from llava.reduction.merging import Reduction, ViewReduction, stack
from llava.reduction.modules import layer_flops, projector_flops
from llava.reduction.ranking import gather_tokens
from llava.reduction.reducer import Reducer, check_reductions
from llava.reduction.scores import TowerScore
from llava.reduction.states import DecoderState, EncoderState, PromptState, at_images
from llava.reduction.token_layout import Canvas, ModelSpec, TokenLayout


class StagedModel(Protocol):
    """What the stages need of a model.

    Attributes:
        device: where prompts are assembled.
        spec: what methods may know about the model.
        llm: the decoder, with `embed_tokens` and `layers`.
        projector: makes visual tokens from features; an identity if the features are already visual tokens.
        newline: the learned vector after every row of stitched tiles; None without one.
        axes: True if positions have three axes (frame, row and column).
        clip: the CLIP text tower, for methods that compare questions with images in CLIP's space.
        tokenizer: for methods that read questions as text; None without one.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def llm(self) -> Any: ...
    @property
    def projector(self) -> Any: ...
    @property
    def newline(self) -> Tensor | None: ...
    @property
    def axes(self) -> bool: ...
    @property
    def clip(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...


@dataclass
class BatchImage:
    """An image of a batch up to decoder layer 0.

    Attributes:
        name: the sample's id, followed by a number from the sample's second image on. It seeds random methods.
        encoded: the image after the tower; questions about the same image share one object.
        plan: what the method does with images of this size.
        method: the method of the batch, at the budget of this image.
        inputs: number of visual tokens before any reduction.
        kept: [N] indices of the remaining tokens among the unreduced ones; None if the image is not reduced.
        canvas: tells padding from image; None if that is not known.
        tokens: [N, H] projected visual tokens.
    """

    name: str
    encoded: EncodedImage
    plan: ImagePlan
    method: Reducer
    inputs: int
    kept: Tensor | None = None
    canvas: Canvas | None = None
    tokens: Tensor = field(init=False)


def embed(
    model: StagedModel, reducer: Reducer, prompts: list[Prompt], images: dict[ImageKey, BatchImage]
) -> PromptBatch:
    """Embed the text of every prompt and put visual tokens where "<image>" stands."""
    # For each prompt, the text ids before, between and after its images.
    texts: list[list[list[int]]] = []
    for prompt in prompts:
        texts.append([[]])
        for token in prompt.ids:
            if token == IMAGE_TOKEN_INDEX:
                texts[-1].append([])
            else:
                texts[-1][-1].append(token)
    # All texts of the batch are embedded together, with one copy to the device and one lookup.
    ids = torch.tensor([token for runs in texts for run in runs for token in run], dtype=torch.long)
    line = ids.to(model.device, non_blocking=True)
    embedded = iter(model.llm.embed_tokens(line).split([len(run) for runs in texts for run in runs]))
    # By the rule "original", text after an image keeps the position ids that it has with every visual token present, so
    # the ids have gaps. With three axes, prompts are numbered by that rule first, and renumbered below if asked for.
    gaps = model.axes or reducer.positions == "original"
    batch: list[list[Piece]] = []
    for sample, runs in enumerate(texts):
        pieces = []
        for number, run in enumerate(runs):
            if number:
                image = images[sample, number - 1]
                groups = (1, *image.encoded.encoded.grid) if model.axes else None
                inputs, kept = (image.inputs, image.kept) if gaps else (len(image.tokens), None)
                pieces.append(Piece(image.tokens, inputs, kept, image=True, groups=groups))
            pieces.append(Piece(next(embedded), len(run)))
        batch.append(pieces)
    sequence = assemble(batch, [one.question for one in prompts], [one.instruction for one in prompts], model.axes)
    reduced = any(image.kept is not None for image in images.values())
    return sequence.renumbered() if gaps and reduced and reducer.positions == "renumber" else sequence


@dataclass
class Stages:
    """The stages of one batch at which a method may act.

    Attributes:
        images: the images of the batch by sample and number, once `take_images` has been called.
        run_layers: (llm, prompts, count) -> hidden states after the first `count` decoder layers.
        start: the prompts as they enter decoder layer 0; the caller sets it.
        memories: what the method wrote down about an image between decoder layers.
    """

    model: StagedModel
    reducer: Reducer
    samples: Sequence[Sample]
    record: Record
    timer: Timer
    images: dict[ImageKey, BatchImage] = field(default_factory=dict)
    run_layers: Callable[[Any, PromptBatch, int], Tensor] = decoder.run_layers
    start: PromptBatch = field(init=False)
    memories: dict[ImageKey, dict[str, Any]] = field(default_factory=dict)

    # -- stage 1: before the projector

    def take_images(
        self, encoded: Mapping[ImageKey, EncodedImage], canvases: Mapping[ImageKey, Canvas | None] | None = None
    ) -> None:
        """Plan the reduction of every image, let the method reduce its features, and project what is left.

        Args:
            encoded: the images of the batch after the tower, in the order of the prompts. Questions about the same
                image share one object.
            canvases: tells padding from image, for each image; None if that is not known.
        """
        for key, one in encoded.items():
            (sample, number), name = key, self.samples[key[0]].id
            name = name if number == 0 else f"{name}#{number + 1}"
            plan = plan_image(self.reducer, self.model.spec, one.full)
            inputs = one.full.tokens if plan.fits else one.inputs
            method = self.reducer.for_image(plan.spec) if self.reducer.retention_ratio else self.reducer
            canvas = canvases[key] if canvases else None
            image = self.images[key] = BatchImage(name, one, plan, method, inputs, canvas=canvas)
            self.record.images[sample].append(SeenImage(one.full, inputs, plan.tokens, plan.asked, canvas))
            if one.step is not None:
                self._apply(key, image, *one.step)
        reduced: dict[ImageKey, Features] = {}
        if "encoder" in self.reducer.acts_in:
            self.timer.mark("vision")
            reduced = self._reduce_features()
            self.timer.mark("selection")
        self._project(reduced)
        self.timer.mark("vision")

    def leave_out(self, images: Mapping[ImageKey, tuple[TokenLayout, Canvas | None]]) -> None:
        """Record images that the model does not see: no token of theirs is kept, and nothing is computed.

        Args:
            images: the layout and the canvas of each, in the order of the prompts.
        """
        for (sample, number), (layout, canvas) in images.items():
            plan = plan_image(self.reducer, self.model.spec, layout)
            seen = SeenImage(layout, layout.tokens, plan.tokens, plan.asked, canvas)
            self.record.images[sample].append(seen)
            nothing = Reduction(torch.zeros(1, 0, dtype=torch.int64), layout.tokens)
            self.record.reductions[sample].append(Applied("input", number, nothing, 0))

    def _reduce_features(self) -> dict[ImageKey, Features]:
        """Call the method on all images, and return the features of those that it reduces, after the reduction."""
        reduced: dict[ImageKey, Features] = {}
        tiles: dict[ImageKey, list[tuple[ViewReduction, Tensor]]] = {}
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
        # Images are projected in the order of the batch.
        return {image: reduced[image] for image in self.images if image in reduced}

    def _apply(self, row: ImageKey, image: BatchImage, place: str, reduction: Reduction, index: int = 0) -> None:
        """Record a reduction made before the projector, and update which of the image's tokens are left."""
        sample, number = row
        self.record.reductions[sample].append(Applied(place, number, reduction, index))
        kept = reduction.kept[index]
        image.kept = kept if image.kept is None else image.kept[kept]

    def _project(self, reduced: dict[ImageKey, Features]) -> None:
        """Project the remaining features of all images in one call, and set the images' `tokens`."""
        model = self.model
        # A slot is projected once. A reduced image has its own; questions about the same unreduced image share one.
        slots: dict[ImageKey | int, Features] = dict(reduced.items())
        slot_of: dict[ImageKey, ImageKey | int] = {}
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
        tokens: dict[ImageKey | int, Tensor] = {}
        for (slot, features), own in zip(slots.items(), projected, strict=True):
            tokens[slot] = own if features.order is None else views.with_newlines(own, features.order, model.newline)
        for row, image in self.images.items():
            image.tokens = tokens[slot_of[row]]

    # -- stage 2: before decoder layer 0

    def reduce_prompt(self, sequence: PromptBatch) -> PromptBatch:
        """Let the method reduce every image with the text available, and shorten the prompts."""
        model, reduced = self.model, []
        tiles: dict[ImageKey, list[tuple[ViewReduction, Tensor | None]]] = {}
        after_layers: dict[int, Tensor] = {}

        def run_layers(count: int) -> Tensor:
            """[B, L, D] after the first `count` decoder layers, computed once for all images of the batch."""
            if count not in after_layers:
                after_layers[count] = self.run_layers(model.llm, sequence, count)
                for sample, (length, spans) in enumerate(zip(sequence.lengths, sequence.visual, strict=True)):
                    self.record.ahead[sample] += count * sum(stop - start for start, stop in spans)
                    for layer in model.llm.layers[:count]:
                        self.record.operations.add("selection", layer_flops, layer, length, length)
            return after_layers[count]

        # If every prompt has exactly one image, and all images are in one group, row b of the group is in prompt b.
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
                embed_words=self._embed_words,
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
        self, sequence: PromptBatch, layer: int, entered: PromptBatch, cache: Sequence[Any], segments: list[Segment]
    ) -> PromptBatch:
        """Let the method reduce every image before decoder layer `layer`, and shorten the prompts.

        Args:
            layer: one of the layers that the method names.
            sequence: the prompts as they are now.
            entered: the prompts as they entered layer `layer - 1`.
            cache: the layers so far, with `keys` and `values` [B, Hkv, L, d]; only this rank's heads if ranks split
                them.
            segments: the layers so far, which change if the method removes tokens from their cache, too.
        """
        self.timer.mark("prefill")
        gather = getattr(self.model.llm.layers[layer - 1].self_attn, "gather", None)

        def cached(part: str, rows: list[ImageKey] | None) -> Tensor:
            """Keys or values of the layer before, for all prompts or for the prompts of some images."""
            held = getattr(cache[layer - 1], part).to(sequence.hidden.device)
            held = held if gather is None else gather(held, 1)
            return held if rows is None else sequence.keys_of(held, rows)

        # Images of a group have the same number of visual tokens, now and before any reduction.
        groups: dict[tuple[int, ModelSpec], list[ImageKey]] = {}
        for sample, spans in enumerate(sequence.visual):
            for number, (start, stop) in enumerate(spans):
                spec = self.images[sample, number].plan.spec
                groups.setdefault((stop - start, spec), []).append((sample, number))
        alone = len(groups) == 1 and all(len(spans) == 1 for spans in sequence.visual)
        reduced: list[ImageReduction] = []
        for (count, _), rows in groups.items():
            image, prompts = self.images[rows[0]], [sequence, entered, self.start]
            if not alone:  # one row per image of the group, instead of one per prompt
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
                keys=cached("keys", None if alone else rows),
                start=prompts[2],
                values=partial(cached, "values", None if alone else rows),
                members=partial(self._members, rows),
                layouts=tuple(map(self._layout, rows)),
                tower=partial(self._tower_score, rows),
                memory=tuple(self.memories.setdefault(row, {}) for row in rows),
            )
            returned = image.method.decoder(state)
            parts = check_reductions(image.method, f"decoder before layer {layer}", returned, state.ids, count)
            self.record.operations.add("selection", int, state.flops + sum(part.flops for part, _ in parts))
            for reduction, own in parts:
                values = self._merged_values(reduction, state, own)
                reduced.append(ImageReduction(rows[own.start : own.stop], reduction, values))
        shorter = self._shorten(sequence, reduced, f"layer {layer}", self.reducer.second or self.reducer)
        if reduced and (layers := self.reducer.cut_caches(layer)):
            decoder.cut_caches(cache, segments, layers, shorter, sequence.columns(reduced))
        self.timer.mark("selection")
        return shorter

    def _layout(self, row: ImageKey) -> TokenLayout:
        """Where an image's unreduced tokens come from; with class tokens if the method took these from the tower."""
        encoded, (sample, number) = self.images[row].encoded, row
        first = next((one for one in self.record.reductions[sample] if one.number == number), None)
        taken = encoded.full.tokens if first is None else first.reduction.inputs
        return encoded.full if taken == encoded.full.tokens else encoded.full.with_cls

    def _members(self, rows: list[ImageKey]) -> Tensor:
        """[B, N] int64: for the tokens that images have left, their indices among the image's unreduced tokens."""
        found = []
        for sample, number in rows:
            applied = [one for one in self.record.reductions[sample] if one.number == number]
            count = applied[0].reduction.inputs if applied else self.images[sample, number].inputs
            left = torch.arange(count, device=self.model.device)
            for one in applied:
                left = left[one.reduction.kept[one.row]]
            found.append(left)
        return torch.stack(found)

    def _tower_score(self, rows: list[ImageKey], score: TowerScore) -> Tensor:
        """[B, N, ...] a tower score at the patches of the tokens that images have left; 0 at other tokens."""
        found = []
        for row in rows:
            layout, own = self._layout(row), self.images[row].encoded.encoded.scores[score]
            whole = own.new_zeros(layout.tokens, *own.shape[2:])
            for tile, values in zip(layout.crops, own, strict=True):
                places, patches = (one.to(own.device, non_blocking=True) for one in (tile.indices, tile.patches))
                whole.index_copy_(0, places, values[patches])
            found.append(whole)
        return gather_tokens(torch.stack(found), self._members(rows))

    def _embed_words(self, words: Sequence[str]) -> Tensor:
        """See `PromptState.embed_words`. Every word is tokenized on its own, as at the start of a text."""
        each = self.model.tokenizer(list(words), add_special_tokens=False).input_ids
        ids = torch.tensor([token for own in each for token in own], dtype=torch.long)
        embedded: Tensor = self.model.llm.embed_tokens(ids.to(self.model.device, non_blocking=True))
        return embedded

    # -- what stages share

    def _groups(self) -> list[Group]:
        """All images of one tile and the views of all others, in groups that the method receives together."""
        whole: dict[tuple[Any, ...], list[ImageKey]] = {}
        tiled: list[ImageKey] = []
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
                "canvases": tuple(image.canvas for image in images),
            }
            groups.append(Group(method, rows, fields))
        if tiled:
            several = {row: self.images[row].encoded for row in tiled}
            clip = self.model.clip if self.reducer.needs_text_tower else None
            groups += views.groups_of(self.model.spec, clip, self.reducer, self.samples, several)
        return groups

    def call_method(self, group: Group, stage: str, state: EncoderState, tokens: int) -> list[tuple[Reduction, range]]:
        """Call the method on a group, and return its reductions, each with the rows of the group that it reduces.

        The views of an image are joined afterwards, so a view that the method leaves as it is gets a reduction that
        keeps all tokens.
        """
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
        """Output tokens [B, K, H] of a reduction that merges; None if the output is the kept tokens, unchanged."""
        operations, tokens, project = self.record.operations, state.tokens, False
        if reduction.encoder_space and isinstance(state, PromptState):
            tokens, project = state.features, True
        elif reduction.assignment is None and reduction.merge_matrix is None:
            return None
        merged = values = reduction.apply(tokens if len(rows) == len(tokens) else tokens[rows.start : rows.stop])
        if project:
            # The method merges in the space of the tower: merge its features, then project the result.
            values = self.model.projector(merged)
            projected = values.shape[0] * values.shape[1]
            operations.add("selection", projector_flops, self.model.projector, projected)
        if reduction.merge_matrix is not None:
            operations.add("selection", int, len(merged) * reduction.apply_flops(merged.shape[-1]))
        return values

    def _shorten(
        self, sequence: PromptBatch, reduced: list[ImageReduction], place: str, method: Reducer
    ) -> PromptBatch:
        """Record reductions and apply them to the prompts; `method.positions` is the rule for their position ids."""
        for part in reduced:
            for row, (sample, number) in enumerate(part.images):
                self.record.reductions[sample].append(Applied(place, number, part.reduction, row))
        return sequence.reduce(reduced, method.positions == "renumber") if reduced else sequence
