"""`reduce` for every family of transformers that takes visual tokens made elsewhere: one declared row each.

The stock model makes the visual tokens (`get_image_features`, `get_video_features`) while a probe records the attention
of the tower blocks that the method reads. The method's stages before the decoder run on these tokens as on LLaVA's
(llava/pipeline/prefill.py). The stock forward then gets what is left: shorter `input_ids`, the position ids of the kept
tokens, and the kept or merged tokens as `mm_encoder_outputs`. Masks, scales and kernels are the model's own, so that
keeping all tokens gives its logits bit for bit. Stages between decoder layers are hooks in front of these layers.

Tokens are reduced behind the projector: it makes one token of several patches in most families, so there is nothing to
project again. A method's "features" are projected tokens here.

An image is what stands in one piece in the prompt: frames of a video or tiles with nothing between them are one image,
tiles that a family separates by text are one image each.

Read: transformers 5.23.0, modeling of the families in FAMILIES, generation/utils.py, masking_utils.py
"""

import copy
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.errors import UserError
from llava.hf.models import (
    COPIES,
    ONE_CALL,
    HFWrapper,
    StockSample,
    inner_of,
    samples,
)
from llava.hf.patch import Override, Reduced, ReducedCache
from llava.model.llava_arch import EncodedImage
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.pipeline import positions
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.decoder import Prefilled, Segment, causal_mask, rotary_angles
from llava.pipeline.prefill import Stages, embed
from llava.pipeline.sequence import Sequence as Prompts
from llava.processing.prompt import IMAGE_TOKEN_INDEX
from llava.reduction.ranking import in_float32
from llava.reduction.reducer import Reducer
from llava.reduction.scores import WITHOUT_CLS, TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, Tile, TokenLayout, single

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Family:
    """What cannot be found in a model of the family.

    Attributes:
        title: its name for people.
        tower: path from the inner model to the blocks of its vision tower.
        runs: the patches of a token follow one another; otherwise they are a square of the grid.
        cls: place of the tower's class token, which the model drops, 0 or -1; None for no class token.
        axes: position ids have three axes, made by the model's `get_rope_index`.
        types: the argument that is 1 at image tokens; "" for none.
        videos: videos are taken, too; frames are told apart by text or follow one another.
        tiles: the tiles of an image follow one another without text.
        breaks: there is a text token behind every row of an image's tokens but the last.
        packed: the model puts tiles together by its `pack_image_features`, with unpadding and newline tokens.
        first: position of the first token.
        output: what `get_image_features` gives to the model: its tokens, or what the projector makes tokens of.
    """

    title: str
    tower: str
    runs: bool = False
    cls: int | None = None
    axes: bool = False
    types: str = ""
    videos: bool = False
    tiles: bool = False
    breaks: bool = False
    packed: bool = False
    first: int = 0
    output: str = "pooler_output"


_QWEN = partial(Family, tower="visual.blocks", runs=True, axes=True, types="mm_token_type_ids")
FAMILIES: dict[str, Family] = {
    "Qwen3VLForConditionalGeneration": _QWEN("Qwen3-VL", videos=True),
    "Qwen3VLMoeForConditionalGeneration": _QWEN("Qwen3-VL MoE", videos=True),
    "Qwen3_5ForConditionalGeneration": _QWEN("Qwen3.5", videos=True),
    "Glm4vForConditionalGeneration": _QWEN("GLM-4V"),
    "InternVLForConditionalGeneration": Family("InternVL3", "vision_tower.encoder.layer", cls=0, tiles=True),
    "LlavaOnevisionForConditionalGeneration": Family("LLaVA-OneVision", "vision_tower.encoder.layers", packed=True),
    "LlavaNextVideoForConditionalGeneration": Family(
        "LLaVA-NeXT-Video", "vision_tower.encoder.layers", cls=0, packed=True
    ),
    "Gemma3ForConditionalGeneration": Family("Gemma 3", "vision_tower.encoder.layers", types="token_type_ids"),
    "PaliGemmaForConditionalGeneration": Family(
        "PaliGemma", "vision_tower.encoder.layers", types="token_type_ids", first=1
    ),
    "SmolVLMForConditionalGeneration": Family("SmolVLM2", "vision_model.encoder.layers"),
    "Idefics3ForConditionalGeneration": Family("Idefics3", "vision_model.encoder.layers"),
    "Mistral3ForConditionalGeneration": Family("Mistral3", "vision_tower.transformer.layers", breaks=True),
    "Ovis2ForConditionalGeneration": Family("Ovis2", "vision_tower.transformer.encoder.layers"),
    "Lfm2VlForConditionalGeneration": Family("LFM2-VL", "vision_tower.encoder.layers"),
    "AyaVisionForConditionalGeneration": Family("Aya Vision", "vision_tower.encoder.layers"),
    "Llama4ForConditionalGeneration": Family(
        "Llama 4", "vision_model.model.layers", cls=-1, output="last_hidden_state"
    ),
}


def declared(model: Any) -> Family | None:
    """The row of a model's family; None for a class without one."""
    return next((FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), None)


def why_not(family: Family, config: PretrainedConfig, reducer: Reducer) -> str:
    """Why the method cannot run on the family, in one sentence; "" where it can.

    Args:
        config: of a model of the family.
    """
    name, acts = reducer.name, reducer.acts_in
    if not acts.isdisjoint(("tower", "input_grid")):
        return f"{name} acts on pixels or inside a CLIP tower; {family.title} has a tower of another kind."
    if reducer.needs_text_tower:
        return f"{name} needs a CLIP vision tower and its text half; the tower of {family.title} is no CLIP."
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
    probed = getattr(reducer, "probe_layer", None)
    probed = "full_attention" if probed is None else kinds[min(probed, len(kinds) - 1)]
    if probed not in ("full_attention", "sliding_attention"):
        return f"{name} probes the attention of a decoder layer that has {said(probed)} in {family.title}."
    if "decoder" in acts:
        other = [said(kind) for kind in sorted({*kinds} - {"full_attention"})]
        if other:
            return f"{name} reduces between decoder layers, of which some have {' and '.join(other)} in {family.title}."
        if family.types == "token_type_ids":
            return f"{name} reads causal attention; prompts of {family.title} are attended in both directions."
    return ""


def said(kind: str) -> str:
    """An entry of `layer_types` in words."""
    return {"conv": "a convolution"}.get(kind, kind.replace("_", " "))


# The tower


@dataclass(frozen=True, eq=False)
class View:
    """A tile, a frame or a whole packed image, as the model's tower and projector gave it.

    Attributes:
        tokens: [n, D] of it.
        layout: of these n tokens; None for rows times columns of `grid`.
        scores: [tiles, P, ...] of each score; P is n without a `layout`.
        owner: views with the same owner are one image if nothing stands between them in the prompt; -1 for none.
        temporal: it is a frame.
    """

    tokens: Tensor
    grid: tuple[int, int]
    scores: dict[TowerScore, Tensor]
    layout: TokenLayout | None = None
    owner: int = -1
    temporal: bool = False


class FamilyWrapper(HFWrapper):
    """A stock model: its visual tokens, their scores and their places in prompts. It changes nothing of the model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None):
        container: Any = model
        inner = inner_of(container)
        self.hf_model, self.device, self.tokenizer = container, container.device, tokenizer
        self.name, self.text_tower = type(container).__name__, None
        self.family: Any = declared(container)
        self.axes = self.family.axes
        llm = inner.text_model if hasattr(inner, "text_model") else inner.language_model
        self.llm = getattr(llm, "model", llm)
        self.head = container.get_output_embeddings()
        self.projector = inner.multi_modal_projector if self.family.output == "last_hidden_state" else nn.Identity()
        self.blocks: Any = inner.get_submodule(self.family.tower)
        self.newline = getattr(inner, "image_newline", None)
        self.encoders = {name: getattr(inner, f"get_{name}_features", None) for name in MODALITIES}
        taken = [inspect.signature(encoder).parameters for encoder in self.encoders.values() if encoder is not None]
        self.per_image = self.per_image.union(*taken) - {"kwargs"}
        self.used = self.used | self.per_image | {self.family.types}

    @cached_property
    def spec(self) -> ModelSpec:
        """Only the processor knows how large images are: the longest prompt stands for the largest."""
        most = self.hf_model.config.get_text_config().max_position_embeddings
        has_cls = self.family.cls is not None
        return ModelSpec(most, len(self.llm.layers), PatchGrid(1, most), len(self.blocks), has_cls)

    @property
    def visual_tokens(self) -> int:
        return self.spec.visual_tokens

    def token(self, name: str) -> int:
        """The id that stands for a visual token of an image or video in prompts; -1 for none."""
        config = self.hf_model.config
        token = getattr(config, f"{name}_token_id", getattr(config, f"{name}_token_index", None))
        return -1 if token is None else int(token)

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        return [replace(self.spec, visual_tokens=reducer.budget, layout=PatchGrid(1, reducer.budget))]

    def encode_images(self, pictures: Any, keys: Any, reducer: Reducer, timer: Timer) -> list[EncodedImage]:
        """The images, encoded already: their sizes were needed to find them in the prompts."""
        return list(pictures)

    def count_tower(self, operations: Any, picture: EncodedImage, images: int) -> None:
        pass  # operations of these towers are not counted

    def groups(self, picture: EncodedImage) -> tuple[int, int, int]:
        """Any: positions are those of the model's `get_rope_index`, which replace these."""
        return 1, 1, picture.full.tokens

    def views_of(self, name: str, given: Mapping[str, Any], reducer: Reducer) -> tuple[list[View], Any]:
        """What the tower and the projector make of all images or all videos of a call, and the model's own output."""
        family, encoder = self.family, self.encoders[name]
        if encoder is None or (name == "video" and not family.videos):
            raise UserError(f"reduce() takes no videos of {family.title}; give the frames as images.")
        wanted = {score: attention_of(self.blocks[self._block(score)]) for score in reducer.tower_scores(family.packed)}
        names = inspect.signature(encoder).parameters
        with recording(wanted.values()) as seen:
            out = encoder(**{key: given[key] for key in names if given.get(key) is not None}, return_dict=True)
        tokens = flat(getattr(out, family.output))
        if family.packed:
            return self._packed_views(given, tokens.split([len(part) for part in out.pooler_output]), wanted, seen), out
        frames = self._frames(name, given, out)
        patches = [rows * columns for _, (rows, columns) in frames]
        unit = sum(patches) // len(tokens)  # patches that become one token, a square of them
        side = math.isqrt(unit)
        if sum(patches) != unit * len(tokens) or side * side != unit:
            raise UserError(f"{sum(patches)} patches do not become {len(tokens)} visual tokens; {ONE_CALL}")
        scores = self._scores(wanted, seen, [grid for _, grid in frames], side)
        parts = tokens.split([count // unit for count in patches])
        return [
            View(
                part,
                (rows // side, columns // side),
                {score: own[i][None] for score, own in scores.items()},
                None,
                0 if family.tiles else owner,
                name == "video",
            )
            for i, (part, (owner, (rows, columns))) in enumerate(zip(parts, frames, strict=True))
        ], out

    def _scores(
        self, wanted: Mapping[TowerScore, Any], seen: Mapping[Any, Any], grids: Sequence[tuple[int, int]], side: int
    ) -> dict[TowerScore, list[Tensor]]:
        """Of each score what each view's tokens have, [n] or [n, d]; a token of several patches has their mean."""
        scores = {}
        for score, module in wanted.items():
            kind, stand_in = score.kind, None
            if self.family.cls is None and kind in WITHOUT_CLS:
                kind, stand_in = "received_attention", WITHOUT_CLS[kind]
            values = scores_of(kind, seen[module], self.family.cls, [rows * columns for rows, columns in grids])
            own = [grouped(part, grid, side, self.family.runs) for part, grid in zip(values, grids, strict=True)]
            scores[score] = own if stand_in is None else [stand_in(part) for part in own]
        return scores

    def _block(self, score: TowerScore) -> int:
        """The tower block a score is read from; the last but one stands for the one whose output is projected."""
        index, layer = score.index(len(self.blocks)), getattr(self.hf_model.config, "vision_feature_layer", -1)
        layer = layer if isinstance(layer, int) and layer < 0 else -1
        return index if index >= 0 else min(index + layer + 2, -1)

    def _frames(self, name: str, given: Mapping[str, Any], out: Any) -> list[tuple[int, tuple[int, int]]]:
        """Of each tile or frame the number of its image or video, and rows and columns of its patches."""
        grids = given.get(f"{name}_grid_thw")
        if grids is not None:
            sizes = [(int(t), (int(h), int(w))) for t, h, w in torch.as_tensor(grids).tolist()]
            return [(owner, size) for owner, (count, size) in enumerate(sizes) for _ in range(count)]
        patch = self.hf_model.config.vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        if given.get("spatial_shapes") is not None:
            sides = torch.as_tensor(given["spatial_shapes"])
        elif self.family.breaks:
            sides = torch.as_tensor(given["image_sizes"]) // patch
        else:
            height, width = given["pixel_values"].shape[-2:]
            sides = torch.tensor([[height // patch, width // patch]] * len(out.last_hidden_state))
        return [(owner, (rows, columns)) for owner, (rows, columns) in enumerate(sides.tolist())]

    def _packed_views(
        self, given: Mapping[str, Any], tokens: Sequence[Tensor], wanted: Mapping[TowerScore, Any], seen: Any
    ) -> list[View]:
        inner, config = inner_of(self.hf_model), self.hf_model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        single_tile = iter([int(n) > 1 for n in given.get("batch_num_images") or () for _ in range(int(n))])
        layouts = []
        for height, width in torch.as_tensor(given["image_sizes"]).tolist():
            shape = (1, 0) if next(single_tile, False) else tiles_of(inner, (height, width))
            layouts.append(packed_layout(inner, (height, width), shape, side))
        tiles = [len(layout.crops) for layout in layouts]
        scores = self._scores(wanted, seen, [(side, side)] * sum(tiles), 1)
        stacked = {score: torch.stack(own).split(tiles) for score, own in scores.items()}
        return [
            View(part, (side, side), {score: own[i] for score, own in stacked.items()}, layout)
            for i, (part, layout) in enumerate(zip(tokens, layouts, strict=True))
        ]

    def pictures(self, name: str, views: Sequence[View], ids: Tensor, token: int) -> tuple[list[EncodedImage], Tensor]:
        """The images of a call, and `ids` [B, L] with image tokens also where a row break stands inside an image."""
        places, filled, done = (ids == token).nonzero().tolist(), ids.clone(), 0
        count = sum(len(view.tokens) for view in views)
        if len(places) != count:
            raise UserError(
                f"The {name}s have {count} visual tokens, the prompts {len(places)} {name} tokens; {ONE_CALL}"
            )
        images: list[list[View]] = []
        end = (-1, -1)  # where the view before ends
        for view in views:
            own = places[done : done + len(view.tokens)]
            done += len(own)
            (row, first), (last_row, last) = own[0], own[-1]
            breaks = view.grid[0] - 1 if self.family.breaks else 0
            if row != last_row or last + 1 - first != len(own) + breaks:
                raise UserError(
                    f"The {len(own)} tokens of an image do not stand in one piece in its prompt; {ONE_CALL}"
                )
            filled[row, first : last + 1] = token
            if breaks:
                self.newline = self.llm.embed_tokens(ids[row, first + view.grid[1]])
            if images and end == (row, first) and view.owner >= 0 and view.owner == images[-1][-1].owner:
                images[-1].append(view)
            else:
                images.append([view])
            end = (row, last + 1)
        return [self._encoded(run) for run in images], filled

    def _encoded(self, views: Sequence[View]) -> EncodedImage:
        """One image of views that stand side by side."""
        first = views[0]
        layout = first.layout or layout_of(len(views), *first.grid, first.temporal, self.family.breaks)
        tokens = torch.cat([view.tokens for view in views])
        features: Any = (
            [tokens[crop.indices.to(tokens.device)] for crop in layout.crops]
            if first.layout
            else (tokens.unflatten(0, (len(views), -1)))
        )
        scores = {score: torch.cat([view.scores[score] for view in views]) for score in first.scores}
        return EncodedImage(Encoded(features, scores, first.grid), layout, layout, layout.tokens)


def flat(output: Any) -> Tensor:
    """[n, D] of a tensor [..., D] or of several."""
    parts = [output] if isinstance(output, Tensor) else output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def grouped(values: Tensor, grid: tuple[int, int], side: int, runs: bool) -> Tensor:
    """[P, ...] of patches -> [n, ...], the mean over the patches of each token."""
    if side == 1:
        return values
    if runs:
        return values.unflatten(0, (-1, side * side)).mean(1)
    rows, columns = grid
    squares = values.view(rows // side, side, columns // side, side, *values.shape[1:])
    return squares.mean((1, 3)).flatten(0, 1)


@lru_cache(maxsize=256)
def layout_of(count: int, rows: int, columns: int, temporal: bool, breaks: bool) -> TokenLayout:
    """`count` tiles or frames of rows times columns tokens, one after another."""
    if count == 1 and not breaks:
        return single(rows, columns)
    width, patches = columns + breaks, torch.arange(rows * columns)
    places = patches // columns * width + patches % columns
    crops = tuple(Tile(rows, columns, patches, places + number * rows * width) for number in range(count))
    ends = torch.arange(1, rows) * width - 1 if breaks else patches[:0]
    return TokenLayout(crops, ends, (rows, columns), temporal=temporal)


def tiles_of(inner: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles of an image of (height, width), by the family's own rule."""
    rule = sys.modules[type(inner).__module__].get_anyres_image_grid_shape
    down, across = rule(size, inner.config.image_grid_pinpoints, inner.config.vision_config.image_size)
    return int(down), int(across)


def packed_layout(inner: Any, size: tuple[int, int], tiles: tuple[int, int], side: int) -> TokenLayout:
    """Where the tokens of a packed image come from: what the model's own packing makes of numbered patches.

    Args:
        size: height and width of the image.
        tiles: rows and columns of tiles behind the base image; (1, 0) for the base image alone.
        side: patches along the edge of a tile.
    """
    down, across = tiles
    row, column = torch.arange(down * side), torch.arange(across * side)
    places = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).float()  # of the stitched tiles
    stitched = places.view(down, side, across, side, 2).transpose(1, 2).reshape(down * across, side * side, 2)
    numbered = torch.cat([torch.zeros(1, side * side, 2), stitched])
    options = {
        "vision_feature_select_strategy": inner.config.vision_feature_select_strategy,
        "vision_aspect_ratio": getattr(inner.config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(inner.pack_image_features).parameters
    packed, _ = inner.pack_image_features(
        [numbered],
        torch.tensor([size]),
        image_newline=torch.full((2,), -1.0),
        **{key: value for key, value in options.items() if key in known and value is not None},
    )
    return _from_places(packed[0].round().long(), tiles, side)


def _from_places(places: Tensor, tiles: tuple[int, int], side: int) -> TokenLayout:
    """A layout from the row and column [N, 2] of each token in the stitched tiles, -1 for newline tokens."""
    base, across = side * side, tiles[1]
    crops, patches = [], torch.arange(base)
    crops.append(Tile(side, side, patches, patches))
    row, column = places.T
    behind = torch.arange(len(places)) >= base
    for number in range(tiles[0] * across):
        own = behind & (row >= 0) & (row // side == number // across) & (column // side == number % across)
        index = own.nonzero().flatten()
        inside = row[index] % side * side + column[index] % side
        crops.append(Tile(len(row[index].unique()), len(column[index].unique()), inside, index))
    return TokenLayout(tuple(crops), (behind & (row < 0)).nonzero().flatten(), (side, side), tiles if across else None)


# Attention of the tower. Its queries and keys are those that a block hands to its attention kernel, after all norms and
# rotations; the model's own kernel runs on them.

QUERY_ROWS = 256  # whose attention is held at once
RECORDING = "recorded_attention"  # of ALL_ATTENTION_FUNCTIONS
Seen = tuple[Tensor, Tensor, Tensor | None, float]  # queries and keys [B, H, P, d], mask, scale


def attention_of(block: nn.Module) -> nn.Module:
    """The attention of a tower block."""
    names = ("attn", "self_attn", "attention")
    return next(module for name, module in block.named_modules() if name.rpartition(".")[2] in names)


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    config = module.config
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    config.seen.append((query, key, attention_mask, scale))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(config.kernel, eager)
    return kernel(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(RECORDING, _record)


@contextmanager
def recording(modules: Iterable[Any]) -> Iterator[dict[Any, list[Seen]]]:
    """Attention modules write down what they hand to their kernel; several times where a call has several."""
    seen: dict[Any, list[Seen]] = {module: [] for module in modules}
    configs = {module: module.config for module in seen}
    try:
        for module, config in configs.items():
            module.config = copy.copy(config)
            module.config.seen, module.config.kernel = seen[module], config._attn_implementation
            module.config._attn_implementation = RECORDING
        yield seen
    finally:
        for module, config in configs.items():
            module.config = config


def scores_of(kind: str, seen: Sequence[Seen], cls: int | None, patches: Sequence[int]) -> list[Tensor]:
    """A tower score of every view, [P] or [P, d] float32.

    Args:
        kind: a key of TOWER_SCORES; one of the class token only where there is one.
        cls: place of the class token among the tokens of each call, 0 or -1; None for no class token.
        patches: of each view, in order.
    """
    parts, skip = [], int(cls is not None)
    for query, key, mask, scale in seen:
        query, key = in_float32(query), in_float32(key)
        if cls == -1:
            query, key = query.roll(1, 2), key.roll(1, 2)
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        allowed = None
        if mask is not None:  # of padding, or of images side by side
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            allowed = allowed.expand(len(query), 1, *mask.shape[2:])
        if kind == "keys":
            values = key.mean(1)
        elif kind == "whole_keys":
            values = key.transpose(1, 2).flatten(2)
        elif kind == "received_attention":
            values = received(query[:, :, skip:], key, None if allowed is None else allowed[:, :, skip:], scale)
        elif kind == "fused_cls_attention":
            query, key = (part.transpose(1, 2).flatten(2)[:, None] for part in (query, key))
            values = (query[:, :, :1] @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean((1, 2))
        else:
            products = query[:, :, :1] @ key.mT * scale
            values = (products if kind == "cls_logits" else products.softmax(-1)).mean((1, 2))
        values = values[:, skip:]
        real = None if allowed is None else allowed.diagonal(dim1=2, dim2=3)[:, 0, skip:]
        parts.append(values.flatten(0, 1) if real is None else values[real])
    return list(torch.cat(parts).split(list(patches)))


def received(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """[B, P] the attention that each key gets, mean over heads and over the rows that see it; rows in slices."""
    total, rows = key.new_zeros(len(key), key.shape[2]), query.shape[2]
    for start in range(0, rows, QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        weights = query[:, :, part] @ key.mT * scale
        if allowed is None:
            total += weights.softmax(-1).sum((1, 2))
        else:
            weights = weights.masked_fill(~allowed[:, :, part], torch.finfo(weights.dtype).min).softmax(-1)
            total += (weights * allowed[:, :, part]).sum((1, 2))
    seeing = rows if allowed is None else allowed.sum(2).clamp(min=1)[:, 0]
    return total / (seeing * query.shape[1])


# The context


@dataclass
class Running:
    """A prefill.

    Attributes:
        rows: token ids of each prompt without padding, with an image token for every visual token.
        types: of each, the mask of its image tokens that the family's forward takes; None where it takes none.
        places: of each, of each image, its first token among these.
        outputs: of each modality, what the model's own encoder gave.
        sequence: the prompts as they entered the last layer.
        entered: the same one layer before.
        segments: the layers so far, see `Prefilled`.
    """

    stages: Stages
    rows: list[Tensor]
    types: list[Tensor] | None
    places: list[list[int]]
    outputs: dict[str, Any]
    sequence: Prompts
    segments: list[Segment] = field(default_factory=list)


class FamilyReduced(Reduced):
    """`Reduced` for the families of FAMILIES: the model's own forward runs, on shorter prompts."""

    _runtime: FamilyWrapper

    def __enter__(self) -> "FamilyReduced":
        super().__enter__()
        self._running: Running | None = None
        self._continued: list[Segment] = []
        llm = self._runtime.llm
        self._stops = self.reducer.decoder_layers(len(llm.layers)) if "decoder" in self.reducer.acts_in else ()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(llm.layers if self._stops else ())
        ]
        if self._stops and hasattr(llm, "_deepstack_process"):
            self._overrides.append(Override(llm, "_deepstack_process", self._deepstack))
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _prefill(self, given: Mapping[str, Any], cache: Any) -> CausalLMOutputWithPast:
        self._check_prefill(given, cache, list(self._model.modules()))
        copies = given.get(COPIES, 1)
        with torch.no_grad():
            running = self._begin(given, copies)
            running.segments.append(self._segment(running.sequence, 0))
            self._running = running
            try:
                arguments = self._arguments(running, running.sequence)
                output = self._model.forward.original(
                    **arguments, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
                )
            finally:
                self._running = None
        cache = output.past_key_values
        cache.__class__ = ReducedCache
        record, segments = running.stages.record, running.segments
        segments[-1].layers = range(segments[-1].layers.start, len(self._runtime.llm.layers))
        cache.segments = segments
        used = [0] * len(running.rows)
        for one in segments:
            for layer in (cache.layers[index] for index in one.layers):
                if getattr(layer, "keys", None) is not None:
                    token = (layer.keys.nbytes + layer.values.nbytes) // (len(used) * layer.keys.shape[-2])
                    kept = [min(length, layer.keys.shape[-2]) for length in one.lengths]
                    used = [total + length * token for total, length in zip(used, kept, strict=True)]
        self.accounting = record.accounting(Prefilled(output.logits, cache, segments, used, sum(used)))
        self.traces = record.steps
        if copies > 1:
            cache.reorder_cache(torch.arange(len(running.rows), device=self._runtime.device).repeat_interleave(copies))
        return CausalLMOutputWithPast(logits=output.logits.repeat_interleave(copies, 0), past_key_values=cache)

    def _begin(self, given: Mapping[str, Any], copies: int) -> Running:
        """Encode images, find them in the prompts, and run the method's stages before the decoder."""
        runtime, reducer, family = self._runtime, self.reducer, self._runtime.family
        ids, mask = given["input_ids"][::copies].to(runtime.device), given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[::copies].to(ids.device)
        tokens = {name: runtime.token(name) for name in MODALITIES}
        if family.axes:
            self._refuse_axes(given, ids, tokens, copies)
        ready, outputs, filled = {}, {}, ids
        for name, pixels in MODALITIES.items():
            if given.get(pixels) is not None:
                views, outputs[name] = runtime.views_of(name, given, reducer)
                ready[tokens[name]], filled = runtime.pictures(name, views, filled, tokens[name])
        batch: list[StockSample] = samples(filled, mask, ready, self.questions, runtime.tokenizer)
        types = given.get(family.types) if family.types else None
        rows = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
        stages = Stages(
            runtime,
            reducer,
            batch,
            Record([[] for _ in batch], [[] for _ in batch]),
            Timer(runtime.device),
        )
        stages.encode_images()
        prompts = [runtime.prompt(sample) for sample in batch]
        places = []
        for sample, prompt in zip(batch, prompts, strict=True):
            lengths, done, own = iter(picture.full.tokens for picture in sample.images), 0, []
            for token in prompt.ids:
                if token == IMAGE_TOKEN_INDEX:
                    own.append(done)
                done += next(lengths) if token == IMAGE_TOKEN_INDEX else 1
            places.append(own)
        sequence = embed(runtime, reducer, prompts, stages.images)
        typed = (
            None
            if types is None
            else [row[real] for row, real in zip(types[::copies].to(ids.device), mask.bool(), strict=True)]
        )
        running = Running(stages, rows, typed, places, outputs, sequence)
        if family.axes:
            position = self._positions(given, ids, mask, copies)
            own = [position[row][real.bool()] for row, real in enumerate(mask)]
            kept = [part[columns] for part, columns in zip(own, self._columns(running), strict=True)]
            sequence = replace(sequence, position=left_padded(kept), contiguous=False)
            reduced = any(image.kept is not None for image in stages.images.values())
            if reduced and reducer.positions == "renumber":
                sequence = sequence.renumbered()
        stages.run_layers = partial(self._run_layers, running)
        if "prompt" in reducer.acts_in:
            sequence = stages.reduce_prompt(sequence)
        stages.start = running.sequence = sequence
        return running

    def _refuse_axes(self, given: Mapping[str, Any], ids: Tensor, tokens: Mapping[str, int], copies: int) -> None:
        """Raise UserError without what three axes of positions follow from; the models then take those of text."""
        title, types = self._runtime.family.title, given.get("mm_token_type_ids")
        for name, pixels in MODALITIES.items():
            if given.get(pixels) is not None and given.get(f"{name}_grid_thw") is None:
                raise UserError(f"{title} needs {name}_grid_thw beside {pixels}; {ONE_CALL}")
        if types is None:
            raise UserError(f"{title} needs mm_token_type_ids, from which its positions follow; {ONE_CALL}")
        types = types[::copies].to(ids.device)
        if types.shape != ids.shape or any(
            not torch.equal(types == kind, ids == token) for kind, token in enumerate(tokens.values(), 1) if token >= 0
        ):
            raise UserError(
                f"mm_token_type_ids must be 1 at the image tokens of input_ids and 2 at video tokens, alone; {ONE_CALL}"
            )

    def _positions(self, given: Mapping[str, Any], ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """[B, L, 3] position ids of whole prompts, by the family's own rule."""
        rule = self._inner.get_rope_index
        own = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": given["mm_token_type_ids"][::copies]}
        known = inspect.signature(rule).parameters
        rest = {name: value for name, value in given.items() if name in known and name not in own}
        positions_of_all: Tensor = rule(**own, **rest)[0]
        return positions_of_all.permute(1, 2, 0).to(ids.device)

    def _kept(self, running: Running, sample: int, number: int) -> Tensor:
        """[K] the tokens of an image, of all that it had, at which those left before the decoder stand."""
        stages = running.stages
        kept = torch.arange(stages.images[sample, number].inputs, device=self._runtime.device)
        for one in stages.record.reductions[sample]:
            if one.number == number and not one.place.startswith("layer"):
                kept = kept[one.reduction.kept[one.row]]
        return kept

    def _columns(self, running: Running) -> list[Tensor]:
        """Of each prompt the columns, of all without padding, that are left before the decoder."""
        batch, device = [], self._runtime.device
        for sample, (row, places) in enumerate(zip(running.rows, running.places, strict=True)):
            pieces, done = [], 0
            for number, first in enumerate(places):
                pieces += [torch.arange(done, first, device=device), first + self._kept(running, sample, number)]
                done = first + running.stages.images[sample, number].inputs
            batch.append(torch.cat([*pieces, torch.arange(done, len(row), device=device)]))
        return batch

    def _arguments(self, running: Running, sequence: Prompts) -> dict[str, Any]:
        """Of the stock forward for prompts as they enter the decoder."""
        runtime, family, columns = self._runtime, self._runtime.family, self._columns(running)
        ids = left_padded([row[kept] for row, kept in zip(running.rows, columns, strict=True)])
        arguments = {"input_ids": ids, "attention_mask": sequence.valid().long(), "position_ids": self._place(sequence)}
        if running.types is not None:
            arguments[family.types] = left_padded([row[kept] for row, kept in zip(running.types, columns, strict=True)])
        encoded = {}
        for name, out in running.outputs.items():
            token, new = runtime.token(name), copy.copy(out)
            if family.output == "pooler_output":
                new.pooler_output = like(out.pooler_output, sequence.hidden[ids == token])
            else:
                setattr(
                    new,
                    family.output,
                    like(getattr(out, family.output), self._shortened(running, token, getattr(out, family.output))),
                )
            if getattr(out, "deepstack_features", None) is not None:
                new.deepstack_features = [
                    like(level, self._shortened(running, token, level)) for level in out.deepstack_features
                ]
            encoded[name] = new
        return arguments | {"mm_encoder_outputs": encoded}

    def _place(self, sequence: Prompts) -> Tensor:
        """Position ids as the model takes them."""
        position = sequence.position if not self._runtime.axes else sequence.position.permute(2, 0, 1)
        return position + self._runtime.family.first

    def _shortened(self, running: Running, token: int | None, output: Any) -> Tensor:
        """[K, D] of what the model has for every visual token: reduced as the tokens were.

        Args:
            token: of the images or videos that it is of; None for all tokens that entered the decoder, which the stages
                between its layers reduced.
        """
        values, done, parts = flat(output), 0, []
        for (sample, number), image in running.stages.images.items():
            if token is not None and int(running.rows[sample][running.places[sample][number]]) != token:
                continue
            steps = [one for one in running.stages.record.reductions[sample] if one.number == number]
            steps = [one for one in steps if one.place.startswith("layer") == (token is None)]
            count = image.inputs
            if token is None:
                start, stop = running.sequence.visual[sample][number]
                count = steps[0].reduction.inputs if steps else stop - start
            own = values[None, done : done + count]
            done += count
            for one in steps:
                own = one.reduction.only(one.row).apply(own)
            parts.append(own[0])
        return torch.cat(parts)

    # Between decoder layers

    def _segment(self, sequence: Prompts, first: int) -> Segment:
        counts = tuple(sum(stop - start for start, stop in spans) for spans in sequence.visual)
        valid = sequence.valid() if sequence.padded else None
        following = positions.next_position(sequence.position)
        return Segment(range(first, len(self._runtime.llm.layers)), sequence.lengths, counts, valid, following)

    def _before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A decoder layer's arguments: prompts reduced before it, or the mask and positions of its own keys."""
        llm, running = self._runtime.llm, self._running
        hidden = args[0] if args else options["hidden_states"]
        eager = llm.config._attn_implementation == "eager"
        if running is not None:
            entered, now = running.sequence, replace(running.sequence, hidden=hidden)
            if index in self._stops:
                keys = options["past_key_values"].layers[index - 1].keys
                before = replace(entered, hidden=self._entered)
                now = running.stages.reduce_between_layers(now, index, before, keys)
                running.segments[-1].layers = range(running.segments[-1].layers.start, index)
                running.segments.append(self._segment(now, index))
            running.sequence, self._entered = now, now.hidden
            if len(running.segments) == 1:
                return None
            mask = causal_mask(now.valid(), now.hidden.shape[1], hidden.dtype, eager) if now.padded or eager else None
            position = now.position
        else:
            segment = next((one for one in self._continued[1:] if index in one.layers), None)
            if segment is None:
                return None
            mask, position = None, segment.next_position
            if segment.valid is not None or eager:
                valid = torch.ones(
                    len(hidden), options["past_key_values"].layers[index].keys.shape[-2] + 1, dtype=torch.bool
                )
                valid = valid.to(hidden.device) if segment.valid is None else segment.valid
                mask = causal_mask(valid, 1, hidden.dtype, eager)
            now = None
        changed = {"attention_mask": mask, "position_embeddings": rotary_angles(llm, hidden, position)}
        if "position_ids" in options:
            changed["position_ids"] = None
        hidden = hidden if now is None else now.hidden
        if args:
            return (hidden, *args[1:]), {**options, **changed}
        return args, {**options, **changed, "hidden_states": hidden}

    def _deepstack(self, original: Any, hidden: Tensor, mask: Tensor, embeddings: Tensor) -> Any:
        """Add a level of the tower to visual tokens that are fewer than at the first layer."""
        running = self._running
        if running is not None and len(running.segments) > 1:
            sequence, embeddings = running.sequence, self._shortened(running, None, embeddings)
            mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for row, spans in enumerate(sequence.visual):
                for start, stop in sequence.padded_spans(spans, (row,) * len(spans)):
                    mask[row, start:stop] = True
        return original(hidden, mask, embeddings)

    # One more token

    def _continue(self, given: Mapping[str, Any], cache: ReducedCache) -> CausalLMOutputWithPast:
        """[B, 1, V] logits of one more token per prompt."""
        self._refuse_continuation(given, cache)
        for segment in cache.segments:
            if segment.valid is not None:
                segment.valid = F.pad(segment.valid, (0, 1), value=True)
        first, self._continued = cache.segments[0], cache.segments
        place = first.next_position if not self._runtime.axes else first.next_position.permute(2, 0, 1)
        cache.running = True
        try:
            output = self._model.forward.original(
                input_ids=given["input_ids"].to(self._runtime.device),
                attention_mask=None if first.valid is None else first.valid.long(),
                position_ids=place + self._runtime.family.first,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
        finally:
            cache.running, self._continued = False, []
        for segment in cache.segments:
            segment.next_position = segment.next_position + 1
        return CausalLMOutputWithPast(logits=output.logits, past_key_values=cache)

    def _run_layers(self, running: Running, llm: Any, sequence: Prompts, count: int) -> Tensor:
        """[B, L, D] after the first decoder layers, by the stock forward, which is left there."""

        def leave(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            raise _Left(args[0] if args else options["hidden_states"])

        hook = llm.layers[count].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self._model.forward.original(**self._arguments(running, sequence), use_cache=False)
        except _Left as left:
            hidden: Tensor = left.args[0]
            return hidden
        finally:
            hook.remove()
        raise AssertionError("the forward of this family does not call its decoder's layers")


class _Left(Exception):
    """The hidden states where a forward was left."""


def left_padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, L, ...] of rows [l, ...], zeros in front of shorter ones."""
    width = max(map(len, rows))
    return torch.stack([F.pad(row, (*[0, 0] * (row.dim() - 1), width - len(row), 0)) for row in rows])


def like(original: Any, values: Tensor) -> Any:
    """Values [K, D] in the form of a model's own output: a tensor of as many axes, or one part of several."""
    if isinstance(original, Tensor):
        return values if original.dim() == 2 else values[None]
    return (values,)
