"""The model families of transformers that `reduce` supports with one row of a table each (`FAMILIES`).

The model's own `get_image_features` and `get_video_features` make the visual tokens. Meanwhile, the tower blocks that a
method reads record what they pass to their attention kernel; tower scores are computed from that. The patches of one
visual token form a square of the grid. For packed tiles, the model's own packing says which patches form which token.

Tokens are reduced after the projector, because in most families it makes one token from several patches. A method's
"features" are projected tokens here.

An image is what is contiguous in the prompt. Frames of a video or tiles with nothing between them form one image; tiles
that a family separates by text are one image each. Where text stands between the frames of a video (the times in
Qwen3-VL), a method that acts before the decoder alone sees them as one video all the same, as if the text stood before
it; the decoder gets text and tokens in their own order. A method that acts between decoder layers takes each frame for
an image.

Read: transformers 5.23.0, modeling of the families in FAMILIES
"""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llava.errors import UserError
from llava.hf.models import ONE_CALL, ModelCalls, device_of, takes_mask
from llava.model.llava_arch import EncodedImage
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.model.multimodal_encoder.stock_tower import Call, StockTower
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, Tile, TokenLayout, frames, single
from llava.transformers_names import KERNEL
from llava.versions import advice

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Family:
    """What must be known about a family and cannot be found in its models.

    Attributes:
        title: name of the family as shown to users.
        tower: path from the inner model to the blocks of its vision tower.
        runs: True if the tower has the patches of a token in sequence; False if they are a square of the patch grid.
        cls: place of the tower's class token, 0 or -1; the model drops this token. None for no class token.
        axes: True if position ids have three axes; the model's `get_rope_index` makes them.
        types: name of the argument that is 1 at image tokens; "" if there is none.
        videos: True if videos are supported too. Their frames are separated by text, or follow one another.
        tiles: True if the tiles of an image follow one another without text.
        breaks: True if a text token follows every row of an image's tokens except the last row.
        packed: True if the model joins tiles with its `pack_image_features`, with unpadding and newline tokens.
        first: position of the first token.
        layers: kinds of decoder layers in the family's models, if the default configuration has others.
        output: the field of the encoder's output that the model uses: "pooler_output" holds visual tokens,
            "last_hidden_state" holds what the projector makes visual tokens of.
        block: the block that is read when a method asks for the last but one; None for the block that is projected.
        needs: a method that the inner model must have. Without it, forward accepts no reduced number of visual tokens.
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
    layers: tuple[str, ...] = ()
    output: str = "pooler_output"
    block: int | None = None
    needs: str = ""


_QWEN = partial(Family, tower="visual.blocks", runs=True, axes=True, types="mm_token_type_ids")
FAMILIES: dict[str, Family] = {
    # These two read scores from the same block as the pipeline, see `llava.model.qwen_vl.QwenVL`.
    "Qwen2VLForConditionalGeneration": _QWEN("Qwen2-VL", videos=True, block=-2),
    "Qwen2_5_VLForConditionalGeneration": _QWEN("Qwen2.5-VL", videos=True, block=-2),
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
    "SmolVLMForConditionalGeneration": Family("SmolVLM2", "vision_model.encoder.layers", needs="get_placeholder_mask"),
    "Idefics3ForConditionalGeneration": Family("Idefics3", "vision_model.encoder.layers"),
    "Mistral3ForConditionalGeneration": Family("Mistral3", "vision_tower.transformer.layers", breaks=True),
    "Ovis2ForConditionalGeneration": Family("Ovis2", "vision_tower.transformer.encoder.layers"),
    "Lfm2VlForConditionalGeneration": Family(
        "LFM2-VL", "vision_tower.encoder.layers", layers=("conv", "full_attention")
    ),
    "AyaVisionForConditionalGeneration": Family("Aya Vision", "vision_tower.encoder.layers"),
    "Llama4ForConditionalGeneration": Family(
        "Llama 4", "vision_model.model.layers", cls=-1, output="last_hidden_state"
    ),
}


def declared(model: Any) -> Family | None:
    """The row of a model's family in FAMILIES; None if its class has none."""
    return next((FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), None)


def why_not(family: Family, config: PretrainedConfig, reducer: Reducer) -> str:
    """Why the method cannot run on the family, in one sentence; "" if it can.

    Args:
        config: configuration of a model of the family.
    """
    name, acts = reducer.name, reducer.acts_in
    if not acts.isdisjoint(("tower", "input_grid")):
        return f"{name} acts on pixels or inside a CLIP tower; {family.title} has a tower of another kind."
    if reducer.needs_text_tower:
        return f"{name} needs a CLIP vision tower and its text half; the tower of {family.title} is no CLIP."
    kinds = kinds_of(config)
    probed = getattr(reducer, "probe_layer", None)
    probed = "full_attention" if probed is None else kinds[min(probed, len(kinds) - 1)]
    if probed not in ("full_attention", "sliding_attention"):
        return f"{name} probes the attention of a decoder layer that has {readable(probed)} in {family.title}."
    attention = getattr(config.get_text_config(), KERNEL) or "sdpa"
    if "decoder" in acts and not takes_mask(attention):
        return f"{name} reduces between decoder layers, which needs attn_implementation='sdpa', not {attention!r}."
    if "decoder" in acts:
        other = [readable(kind) for kind in sorted({*kinds} - {"full_attention"})]
        if other:
            return f"{name} reduces between decoder layers, of which some have {' and '.join(other)} in {family.title}."
        if family.types == "token_type_ids":
            return f"{name} reads causal attention; prompts of {family.title} are attended in both directions."
    return ""


def kinds_of(config: PretrainedConfig) -> list[str]:
    """The kind of each decoder layer of a model, with the names that transformers uses in `layer_types`."""
    text = config.get_text_config()
    alike = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    return getattr(text, "layer_types", None) or [alike] * text.num_hidden_layers


def readable(kind: str) -> str:
    """An entry of `layer_types` in words."""
    return {"conv": "a convolution"}.get(kind, kind.replace("_", " "))


# The tower


Calls = Mapping[TowerScore, Sequence[Call]]  # for each score, what its block passed to the attention kernel
Owned = tuple[EncodedImage, int]  # a tile, a frame or a packed image, and the number of its image or video


class FamilyWrapper(ModelCalls):
    """A stock model: its visual tokens, their scores and their places in prompts. The model is not changed."""

    axes = False  # positions of prompts come from the model's own `get_rope_index`
    clip = None

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None):
        container: Any = model
        inner = getattr(container, "model", container)
        self.hf_model, self.device, self.tokenizer = container, device_of(container), tokenizer
        self.name, self.text_tower = type(container).__name__, None
        self.family = declared(container) or FAMILIES[self.name]
        takes_tokens = "mm_encoder_outputs" in inspect.signature(container.forward).parameters
        if not takes_tokens or not hasattr(inner, self.family.needs or "forward"):
            raise UserError(
                f"{self.family.title} cannot be reduced with transformers {transformers.__version__}, whose forward "
                f"takes all visual tokens of an image; {advice('transformers')}."
            )
        llm = inner.text_model if hasattr(inner, "text_model") else inner.language_model
        self.llm = getattr(llm, "model", llm)
        self.head = container.get_output_embeddings()
        self.projector = inner.multi_modal_projector if self.family.output == "last_hidden_state" else nn.Identity()
        vision, layer = container.config.vision_config, getattr(container.config, "vision_feature_layer", -1)
        last = self.family.block or (layer if isinstance(layer, int) and layer < 0 else -1)
        blocks: Any = inner.get_submodule(self.family.tower)
        self.stock_tower = StockTower(blocks, vision, self.family.cls, self.family.runs, last)
        self.inner, self.newline = inner, None
        with align_module_device(inner):  # weights that accelerate has offloaded
            if getattr(inner, "image_newline", None) is not None:
                self.newline = inner.image_newline.to(self.device)
        self.packed_layout = lru_cache(maxsize=1024)(partial(packed_layout, inner))
        self.encoders = {name: getattr(inner, f"get_{name}_features", None) for name in MODALITIES}
        taken = [inspect.signature(encoder).parameters for encoder in self.encoders.values() if encoder is not None]
        self.per_image = self.per_image.union(*taken) - {"kwargs"}
        self.used = self.used | self.per_image | {self.family.types}

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as methods see it. As only a processor knows the largest image, it fills the longest prompt."""
        most = self.hf_model.config.get_text_config().max_position_embeddings
        has_cls = self.family.cls is not None
        return ModelSpec(most, len(self.llm.layers), PatchGrid(1, most), len(self.stock_tower.blocks), has_cls)

    @property
    def visual_tokens(self) -> int:
        return self.spec.visual_tokens

    def token(self, name: str) -> int:
        """The token id that stands for a visual token in prompts; -1 if there is none.

        Args:
            name: "image" or "video".
        """
        config = self.hf_model.config
        token = getattr(config, f"{name}_token_id", getattr(config, f"{name}_token_index", None))
        return -1 if token is None else int(token)

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        return [replace(self.spec, visual_tokens=reducer.budget, layout=PatchGrid(1, reducer.budget)), self.spec]

    def views_of(self, name: str, given: Mapping[str, Any], reducer: Reducer) -> tuple[list[Owned], Any]:
        """Encode all images or all videos of a call.

        Args:
            name: "image" or "video".
            given: arguments of the model's forward.

        Returns:
            Their tiles, frames or packed images with visual tokens and scores, and the output of the model's encoder.
        """
        family, encoder = self.family, self.encoders[name]
        if encoder is None or (name == "video" and not family.videos):
            raise UserError(f"reduce() takes no videos of {family.title}; give the frames as images.")
        names = inspect.signature(encoder).parameters
        with self.stock_tower.recording(reducer.tower_scores(family.packed)) as calls, align_module_device(self.inner):
            out = encoder(**{key: given[key] for key in names if given.get(key) is not None}, return_dict=True)
        if family.packed:
            return self._packed(given, out.pooler_output, calls), out
        tokens, pieces = flat(getattr(out, family.output)), self._frames(name, given, out)
        patches = [rows * columns for _, rows, columns in pieces]
        unit = sum(patches) // len(tokens)  # patches that become one token, a square of them
        side = math.isqrt(unit)
        if sum(patches) != unit * len(tokens) or side * side != unit:
            raise UserError(f"{sum(patches)} patches do not become {len(tokens)} visual tokens; {ONE_CALL}")
        grids = [(rows, columns) for _, rows, columns in pieces]
        scores = self.stock_tower.scores_of_tokens(calls, grids, side, self.device)
        views = []
        for i, (owner, rows, columns) in enumerate(pieces):
            grid = rows // side, columns // side
            layout = layout_of(1, *grid, name == "video", family.breaks)
            part, tokens = tokens.tensor_split([patches[i] // unit])
            spent = self.stock_tower.score_flops(calls, patches[i])
            own = Encoded(part[None], {score: values[i][None] for score, values in scores.items()}, grid, spent=spent)
            views.append((EncodedImage(own, layout, layout, layout.tokens), 0 if family.tiles else owner))
        return views, out

    def _frames(self, name: str, given: Mapping[str, Any], out: Any) -> list[tuple[int, int, int]]:
        """For each tile or frame, the number of its image or video, and its rows and columns of patches."""
        if given.get(f"{name}_grid_thw") is not None:
            grids = torch.as_tensor(given[f"{name}_grid_thw"]).tolist()
            return [(owner, rows, columns) for owner, (count, rows, columns) in enumerate(grids) for _ in range(count)]
        patch = self.hf_model.config.vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        if given.get("spatial_shapes") is not None:
            sides = torch.as_tensor(given["spatial_shapes"])
        elif self.family.breaks:
            sides = torch.as_tensor(given["image_sizes"]) // patch
        else:
            sides = torch.tensor(given["pixel_values"].shape[-2:]).expand(len(out.last_hidden_state), 2) // patch
        return [(owner, rows, columns) for owner, (rows, columns) in enumerate(sides.tolist())]

    def _packed(self, given: Mapping[str, Any], tokens: Sequence[Tensor], calls: Calls) -> list[Owned]:
        """The images of a family that packs them itself, each with all its tiles."""
        vision = self.hf_model.config.vision_config
        side = vision.image_size // vision.patch_size
        counts = given.get("batch_num_images", ())
        alone = [int(n) > 1 for n in counts for _ in range(int(n))]  # several images of one prompt have no tiles
        sizes = [(int(height), int(width)) for height, width in torch.as_tensor(given["image_sizes"]).tolist()]
        layouts = [self.packed_layout(size, side, alone[i] if alone else False) for i, size in enumerate(sizes)]
        tiles = [len(layout.crops) for layout in layouts]
        scores = self.stock_tower.scores_of_tokens(calls, [(side, side)] * sum(tiles), 1, self.device)
        stacked = {score: torch.stack(own).split(tiles) for score, own in scores.items()}
        spent = self.stock_tower.score_flops(calls, side * side)
        views = []
        for i, (part, layout) in enumerate(zip(tokens, layouts, strict=True)):
            features: Any = [part[crop.indices.to(part.device)] for crop in layout.crops]
            own = Encoded(features, {score: values[i] for score, values in stacked.items()}, (side, side), spent=spent)
            views.append((EncodedImage(own, layout, layout, layout.tokens), i))
        return views

    def together(self, views: Sequence[Owned], ids: Tensor, token: int) -> Tensor | None:
        """The order of columns, [B, L], in which text between the frames of a video comes before its first frame.

        None if the frames of every video follow one another already. For the arguments, see `images`.
        """
        places, order, done = (ids == token).nonzero().tolist(), torch.arange(ids.shape[1]).repeat(len(ids), 1), 0
        counts: dict[int, int] = {}  # of each video in order
        for view, owner in views:
            counts[owner] = counts.get(owner, 0) + view.full.tokens
        if len(places) != sum(counts.values()):
            return None  # `images` says what is wrong
        for count in counts.values():
            (row, first), (last_row, last) = places[done], places[done + count - 1]
            done += count
            if row == last_row and last + 1 - first > count:
                own = ids[row, first : last + 1].cpu() == token
                order[row, first : last + 1] = first + own.long().argsort(stable=True)
        moved = not torch.equal(order, torch.arange(ids.shape[1]).expand_as(order))
        return order.to(ids.device) if moved else None

    def images(self, name: str, views: Sequence[Owned], ids: Tensor, token: int) -> tuple[list[EncodedImage], Tensor]:
        """Find the encoded images of a call in its prompts, and join tiles and frames that follow one another.

        Args:
            ids: [B, L] token ids of the prompts.
            token: the id that stands for a visual token.

        Returns:
            The images in the order of the prompts, and `ids` with `token` in place of the row breaks inside images.
        """
        places, filled, done = (ids == token).nonzero().tolist(), ids.clone(), 0
        counts = [view.full.tokens - self.family.breaks * len(view.full.newlines) for view, _ in views]
        if len(places) != sum(counts):
            raise UserError(
                f"The {name}s have {sum(counts)} visual tokens, the prompts {len(places)} {name} tokens; {ONE_CALL}"
            )
        runs: list[list[EncodedImage]] = []
        before: tuple[int, int, int] | None = None  # prompt and place where the previous view ends, and its image
        for (view, owner), count in zip(views, counts, strict=True):
            (row, first), (last_row, last) = places[done], places[done + count - 1]
            done += count
            if row != last_row or last + 1 - first != view.full.tokens:
                raise UserError(f"The {count} tokens of an image do not stand in one piece in its prompt; {ONE_CALL}")
            filled[row, first : last + 1] = token
            if self.family.breaks:
                self.newline = self.llm.embed_tokens(ids[row, first + view.encoded.grid[1]])
            if before == (row, first, owner):
                runs[-1].append(view)
            else:
                runs.append([view])
            before = row, last + 1, owner
        return [joined(run) for run in runs], filled


def joined(views: list[EncodedImage]) -> EncodedImage:
    """One image, made of equal tiles or frames that follow one another."""
    first, parts = views[0], [view.encoded for view in views]
    if len(views) == 1:
        return first
    layout = layout_of(len(views), *parts[0].grid, first.full.temporal, False)
    scores = {score: torch.cat([part.scores[score] for part in parts]) for score in parts[0].scores}
    encoded = Encoded(torch.cat([part.features for part in parts]), scores, parts[0].grid, spent=parts[0].spent)
    return EncodedImage(encoded, layout, layout, layout.tokens)


def flat(output: Any) -> Tensor:
    """A tensor [..., D], or several of them one after another, as one tensor [n, D]."""
    parts = [output] if isinstance(output, Tensor) else output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@lru_cache(maxsize=256)
def layout_of(count: int, rows: int, columns: int, temporal: bool, breaks: bool) -> TokenLayout:
    """The layout of `count` tiles or frames of rows x columns tokens, one after another."""
    if count == 1 and not breaks:
        return frames(1, rows, columns) if temporal else single(rows, columns)
    width, patches = columns + breaks, torch.arange(rows * columns)
    places = patches // columns * width + patches % columns
    crops = tuple(Tile(rows, columns, patches, places + number * rows * width) for number in range(count))
    ends = torch.arange(1, rows) * width - 1 if breaks else patches[:0]
    return TokenLayout(crops, ends, (rows, columns), temporal=temporal)


def packed_layout(inner: Any, size: tuple[int, int], side: int, alone: bool = False) -> TokenLayout:
    """The layout of a packed image, found by letting the model pack patches that hold their own coordinates.

    Args:
        size: height and width of the image.
        side: patches along the edge of a tile.
        alone: True if there is only the base image, without tiles.
    """
    config, down, across = inner.config, 0, 0
    if not alone:
        tiles = sys.modules[type(inner).__module__].get_anyres_image_grid_shape
        down, across = map(int, tiles(size, config.image_grid_pinpoints, config.vision_config.image_size))
    # Each patch holds its row and column in the stitched tiles. The base image, always first, needs no coordinates.
    places = torch.cartesian_prod(torch.arange(down * side), torch.arange(across * side)).float()
    stitched = places.view(down, side, across, side, 2).transpose(1, 2).reshape(down * across, side * side, 2)
    options = {key: getattr(config, key, None) for key in inspect.signature(inner.pack_image_features).parameters}
    options["image_features"] = [torch.cat([torch.zeros(1, side * side, 2), stitched])]
    options |= {"image_sizes": torch.tensor([size]), "image_newline": torch.full((2,), -1.0)}
    row, column = inner.pack_image_features(**options)[0][0].round().long().T
    patches = torch.arange(side * side)
    behind, crops = torch.arange(len(row)) >= len(patches), [Tile(side, side, patches, patches)]
    for number in range(down * across):
        own = behind & (row >= 0) & (row // side == number // across) & (column // side == number % across)
        index = own.nonzero().flatten()
        inside = row[index] % side * side + column[index] % side
        crops.append(Tile(len(row[index].unique()), len(column[index].unique()), inside, index))
    newlines = (behind & (row < 0)).nonzero().flatten()
    return TokenLayout(tuple(crops), newlines, (side, side), (down, across) if down else None)
