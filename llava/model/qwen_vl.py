"""Qwen2.5-VL and Qwen2-VL at run time: images keep their shape, tokens stand at rows and columns.

The tower has no class token: received attention takes the place of its attention. An image's tokens are merge groups of
2 x 2 patches; the merger is the projector.

The vision transformer runs block by block: features of merge groups, and only the scores that were asked for. A merge
group is a square of 2 x 2 patches that becomes one visual token, so everything is kept and reduced by groups: G groups
of all images, n of one image, U = 4 patches in a group, D channels, H heads of d channels. Most blocks attend within
windows of 8 x 8 patches, every eighth within whole images (Qwen2-VL: all). Windows of equal size go through one kernel
call together, whichever image they are from.

Paper: https://arxiv.org/abs/2502.13923, https://arxiv.org/abs/2409.12191
Official code read: transformers 5.23.0, models/qwen2_5_vl and models/qwen2_vl
Differs from it: the same prompts and positions; videos are not read. Another order of windows, which attention does not
see; patches are embedded by a matrix product, which is what a convolution without overlap is. The frames of a film
attend apart, as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llava.errors import MethodError, UserError, unknown
from llava.model.llava_arch import EncodedImage, Llava, encoded_image_of
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.processing.image import Grid, QwenImageProcessor, as_rgb
from llava.reduction.modules import linear_flops
from llava.reduction.reducer import Reducer
from llava.reduction.scores import WITHOUT_CLS, TowerScore
from llava.reduction.token_layout import WITHOUT_PADDING, Canvas, ModelSpec, PatchGrid, single

if TYPE_CHECKING:
    from llava.pipeline.accounting import Operations, Timer

QUERY_ROWS = 64  # query rows of the attention map held at once, fewer where an image is so large that
SCORES = 1 << 24  # more scores than these would be


class QwenVL(Llava):
    """Qwen2.5-VL or Qwen2-VL.

    Args:
        min_pixels, max_pixels: bounds of an image after resizing; None takes the checkpoint's.
    """

    axes = True
    image_processor: QwenImageProcessor

    def __init__(
        self, checkpoint: Any, device: torch.device, min_pixels: int | None = None, max_pixels: int | None = None
    ):
        super().__init__(checkpoint, device)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        chosen: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
        self.image_processor = replace(self.image_processor, **chosen)

    @property
    def conventions(self) -> dict[str, Any]:
        return {"min_pixels": self.image_processor.min_pixels, "max_pixels": self.image_processor.max_pixels}

    def _read_tower(self) -> None:
        self.tower = self.hf_model.model.visual
        self.projector = Merger(self.tower)
        self.select_layer = -1
        # The largest square image.
        side = max(1, int(self.image_processor.max_pixels**0.5) // self._edge)
        self.layout = PatchGrid(side, side)

    @property
    def _edge(self) -> int:
        """Pixels along the edge of a merge group."""
        return self.image_processor.patch * self.image_processor.merge

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the largest image before any reduction."""
        return self.image_processor.max_pixels // self._edge**2

    @cached_property
    def spec(self) -> ModelSpec:
        layers, blocks, known = len(self.llm.layers), len(self.tower.blocks), self.text_tower is not None
        return ModelSpec(self.visual_tokens, layers, self.layout, blocks, has_cls=False, has_text_tower=known)

    def patches(self, images: Sequence[Any]) -> tuple[Tensor, tuple[Grid, ...]]:
        """Flattened patches of all images, one after another, and the grid of each."""
        return self.image_processor([as_rgb(image) for image in images])

    def canvas(self, image: Any) -> Canvas | None:
        return WITHOUT_PADDING

    def encode_images(
        self, images: Sequence[Any], keys: Sequence[object], reducer: Reducer, timer: "Timer"
    ) -> list[EncodedImage]:
        if "tower" in reducer.acts_in or "input_grid" in reducer.acts_in:
            raise MethodError(
                f"{reducer.name} acts on pixels or inside a CLIP tower; {self.name} has a tower of another kind. "
                "Choose a method that acts behind the tower."
            )
        patches, grids = self.patches(images)
        timer.mark("preprocess")
        scores = reducer.tower_scores(tiled=False)
        encoded = encode_qwen(self.tower, patches.to(self.device, non_blocking=True), grids, scores)
        return [encoded_image_of(one, single(*one.grid), keep_cls=False) for one in encoded]

    def count_tower(self, operations: "Operations", image: EncodedImage, images: int) -> None:
        merge = self.image_processor.merge
        grid = 1, image.encoded.grid[0] * merge, image.encoded.grid[1] * merge
        operations.add("tower", tower_flops, self.tower, grid, images=images)
        for score in image.encoded.scores:
            operations.add("selection", score_flops, self.tower, score, grid, images=images)

    def groups(self, image: EncodedImage) -> tuple[int, int, int]:
        """Frames, rows and columns of an image's tokens, from which their positions follow."""
        return 1, *image.encoded.grid


# The vision transformer


def encode_qwen(
    visual: Any, patches: Tensor, grids: Sequence[Grid], scores: Sequence[TowerScore] = ()
) -> list[Encoded]:
    """Run the vision transformer on images of any sizes.

    Args:
        visual: `model.visual` of a transformers Qwen2.5-VL or Qwen2-VL.
        patches: [sum of frames * rows * columns, 3 * temporal * patch * patch], as QwenImageProcessor gives them.
        grids: frames, rows and columns of patches of each image.
        scores: of the kinds in SIGNALS, which are defined there, or in WITHOUT_CLS, in whose place received attention
            stands; each is taken at `signal_block`.

    Returns:
        of each image its features [1, n, U * D], the output of the last block before the merger, groups in raster
        order and the patches of a group side by side (`Merger` makes visual tokens of them), scores [1, n] or
        [1, n, d] float32, and the grid of a frame in groups. There is no class token.
    """
    wanted: dict[int, list[TowerScore]] = {}
    for score in scores:
        wanted.setdefault(signal_block(visual, score), []).append(score)
    shapes = [_group_shape(visual, grid) for grid in grids]
    whole, windows = _orders(visual, shapes, patches.device)
    embedding = visual.patch_embed.proj.weight.flatten(1)
    hidden = F.linear(patches.to(embedding.dtype), embedding).unflatten(0, (-1, _unit(visual)))[whole.index]
    full, order, computed = full_blocks(visual), whole, {}
    for index, block in enumerate(visual.blocks):
        here = whole if index in full or windows is None else windows
        if here is not order:
            hidden, order = hidden[order.inverse[here.index]], here
        heads = _heads(block, hidden, order)
        for score in wanted.get(index, ()):
            stand_in = WITHOUT_CLS.get(score.kind)
            signal = SIGNALS[score.kind](heads) if stand_in is None else stand_in(received_attention(heads))
            computed[score] = signal[order.inverse]
        hidden = hidden + block.attn.proj(heads.attend(hidden.dtype))
        hidden = hidden + block.mlp(block.norm2(hidden))
    counts = [frames * rows * columns for frames, rows, columns in shapes]
    features = hidden[order.inverse].flatten(1).split(counts)
    parts = {score: values.split(counts) for score, values in computed.items()}
    return [
        Encoded(features[i][None], {score: values[i][None] for score, values in parts.items()}, (rows, columns))
        for i, (_, rows, columns) in enumerate(shapes)
    ]


# Orders of groups


@dataclass(frozen=True)
class _Order:
    """All groups in an order in which those that attend each other stand together.

    Attributes:
        index: [G] int64, the group at each place, in the processor's numbering.
        inverse: [G] int64, the place of each group.
        runs: (segments, groups in each) of equally large segments, one run after another.
        cos, sin: [G, U, 1, d] in this order.
    """

    index: Tensor
    inverse: Tensor
    runs: tuple[tuple[int, int], ...]
    cos: Tensor
    sin: Tensor


def _unit(visual: Any) -> int:
    """U, patches in a group."""
    patches: int = visual.config.spatial_merge_size**2
    return patches


def _group_shape(visual: Any, grid: Grid) -> Grid:
    """Frames, rows and columns of groups from those of patches."""
    merge = visual.config.spatial_merge_size
    return grid[0], grid[1] // merge, grid[2] // merge


def _window_side(visual: Any) -> int:
    """Groups along the edge of a window."""
    config = visual.config
    side: int = config.window_size // config.spatial_merge_size // config.patch_size
    return side


def _orders(visual: Any, shapes: Sequence[Grid], device: torch.device) -> tuple[_Order, _Order | None]:
    """By whole images and, for a tower that has them, by windows. Made on the host, so that run lengths are known."""
    merge = visual.config.spatial_merge_size
    groups = [torch.cartesian_prod(*map(torch.arange, shape)) for shape in shapes]  # [n, 3] frame, row, column
    inside = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))
    places = torch.cat([group[:, None, 1:] * merge + inside for group in groups]).flatten(0, 1)  # [G * U, 2]
    places = places.to(device, non_blocking=True)
    cos, sin = visual.rotary_pos_emb(places, places)  # of the first it takes the device
    cos, sin = (part.unflatten(0, (-1, merge * merge)).unsqueeze(2) for part in (cos, sin))

    def order(side: int | None) -> _Order:
        index, runs = _gathered(_segments(groups, shapes, side))
        index, inverse = (way.to(device, non_blocking=True) for way in (index, index.argsort()))
        return _Order(index, inverse, runs, cos[index], sin[index])

    windowed = len(full_blocks(visual)) < len(visual.blocks)
    return order(None), order(_window_side(visual)) if windowed else None


def _segments(groups: Sequence[Tensor], shapes: Sequence[Grid], side: int | None) -> Tensor:
    """[G] int64, the number of each group's frame, or of its window of side x side groups in the frame."""
    segments, before = [], 0
    for group, (frames, rows, columns) in zip(groups, shapes, strict=True):
        edge = side or max(rows, columns)
        down, across = -(-rows // edge), -(-columns // edge)
        frame, row, column = group.unbind(1)
        segments.append(before + (frame * down + row // edge) * across + column // edge)
        before += frames * down * across
    return torch.cat(segments)


def _gathered(segment: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """[G] segment numbers without gaps -> order in which segments stand together, small ones first, and its runs."""
    sizes = segment.bincount()
    index = (sizes[segment] * len(sizes) + segment).argsort(stable=True)
    size, count = sizes.unique(return_counts=True)
    return index, tuple(zip(count.tolist(), size.tolist(), strict=True))


# Attention and scores


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values of a block, each [G, U, H, d], in an order that has `runs`.

    Attributes:
        query, key: turned by their places, float32.
        flat_key: as the block projects it, before the turn.
    """

    query: Tensor
    key: Tensor
    flat_key: Tensor
    value: Tensor
    scale: float
    runs: tuple[tuple[int, int], ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[G, U, H, d] -> [segments, H, patches, d] of each run."""
        parts = tensor.split([segments * groups for segments, groups in self.runs])
        return [
            rearrange(part, "(segments groups) unit head d -> segments head (groups unit) d", segments=segments)
            for part, (segments, _) in zip(parts, self.runs, strict=True)
        ]

    def attend(self, dtype: torch.dtype) -> Tensor:
        """[G, U, D], every patch having looked at its segment."""
        states = (self.split(states.to(dtype)) for states in (self.query, self.key, self.value))
        seen = [
            F.scaled_dot_product_attention(query, key, value, scale=self.scale)
            for query, key, value in zip(*states, strict=True)
        ]
        unit = self.value.shape[1]
        folded = "segments head (groups unit) d -> (segments groups) unit (head d)"
        return torch.cat([rearrange(part, folded, unit=unit) for part in seen])


def _heads(block: Any, hidden: Tensor, order: _Order) -> _Heads:
    attention = block.attn
    states = attention.qkv(block.norm1(hidden))
    query, key, value = rearrange(states, "g u (three h d) -> three g u h d", three=3, h=attention.num_heads)
    turned_query, turned_key = (_turn(part.float(), order.cos, order.sin) for part in (query, key))
    return _Heads(turned_query, turned_key, key, value, attention.scaling, order.runs)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def received_attention(heads: _Heads) -> Tensor:
    """Average attention that a group receives from its image: a saliency without CLS.

    For patch j of an image with p patches: the mean over heads and over all patches i of softmax_j(q_i k_j / sqrt(d)),
    queries and keys turned by their places, so that it is the block's own attention. Then the mean over the patches of
    the group. The groups of an image sum to 1 / U. In a film every frame counts as an image.

    Returns:
        [G] float32. Query rows go through in slices, so no full attention map is ever held.
    """
    unit, received_by_run = heads.query.shape[1], []
    for query, key in zip(heads.split(heads.query), heads.split(heads.key), strict=True):
        segments, count, patches, _ = query.shape
        received = key.new_zeros(segments, patches)
        rows = max(1, min(QUERY_ROWS, SCORES // (segments * count * patches)))
        for part in query.split(rows, dim=2):
            received += (part @ key.transpose(-1, -2) * heads.scale).softmax(-1).sum((1, 2))
        received_by_run.append(received.view(-1, unit).mean(1) / (count * patches))
    return torch.cat(received_by_run)


def keys(heads: _Heads) -> Tensor:
    """Keys, mean over heads and over the patches of a group: the similarity space of VisionZip-like merging.

    Taken before they are turned, as CLIP's are never: turned keys of two alike patches differ by where they stand.

    Returns:
        [G, d] float32, not normalised.
    """
    return heads.flat_key.float().mean((1, 2))


def whole_keys(heads: _Heads) -> Tensor:
    """The same with all heads side by side.

    Returns:
        [G, D] float32, not normalised.
    """
    return heads.flat_key.float().mean(1).flatten(1)


SIGNALS: dict[str, Callable[[_Heads], Tensor]] = {
    "received_attention": received_attention,
    "keys": keys,
    "whole_keys": whole_keys,
}


def full_blocks(visual: Any) -> tuple[int, ...]:
    """Blocks that attend within whole images, ascending; Qwen2-VL names none because all do."""
    named = getattr(visual.config, "fullatt_block_indexes", None)
    return tuple(index for index in range(len(visual.blocks)) if named is None or index in named)


def signal_block(visual: Any, score: TowerScore) -> int:
    """The block a score is taken at: the one asked for, or the next after it that attends within whole images.

    In a windowed block a patch is compared with its window alone, and what it receives cannot be compared between
    windows. The default, the last block but one, becomes the last full-attention block of Qwen2.5-VL. It is the last
    block of all, and its output is what is projected, as the output of the default block is in LLaVA.

    Raises:
        UserError: there is no such score or block.
    """
    if score.kind not in SIGNALS | WITHOUT_CLS:
        raise unknown("tower score", score.kind, SIGNALS | WITHOUT_CLS)
    depth, full = len(visual.blocks), full_blocks(visual)
    index = score.index(depth)
    if not -depth <= index < depth:
        raise UserError(f"TowerScore {score.kind} needs tower block {index}, but the tower has {depth} blocks.")
    return next((block for block in full if block >= index % depth), full[-1])


# Operations of one image; those of the merger are llava.reduction.modules.projector_flops(visual.merger, tokens).


def tower_flops(visual: Any, grid: Grid) -> int:
    """Patch embedding and blocks."""
    frames, rows, columns = _group_shape(visual, grid)
    patches = frames * rows * columns * _unit(visual)
    total: int = 2 * patches * visual.patch_embed.proj.weight.numel()
    full = full_blocks(visual)
    for index, block in enumerate(visual.blocks):
        edge = max(rows, columns) if index in full else _window_side(visual)
        pairs = frames * _unit(visual) ** 2 * _squares(rows, edge) * _squares(columns, edge)
        total += sum(linear_flops(part, patches) for part in block.modules() if isinstance(part, nn.Linear))
        total += 4 * pairs * block.attn.proj.in_features
    return total


def _squares(length: int, edge: int) -> int:
    """Sum of the squared lengths of the pieces that `length` falls into; windows are all pairs of such pieces."""
    return length // edge * edge**2 + (length % edge) ** 2


def score_flops(visual: Any, score: TowerScore, grid: Grid) -> int:
    """One score beside the main path, whose own queries and keys it uses."""
    if score.kind in ("keys", "whole_keys"):
        return 0
    frames, rows, columns = grid
    width = visual.blocks[signal_block(visual, score)].attn.proj.in_features
    flops: int = 2 * frames * (rows * columns) ** 2 * width
    return flops


class Merger(nn.Module):
    """Qwen's projector, from groups to visual tokens: [..., n, U * D] -> [..., n, width of the decoder]."""

    def __init__(self, visual: Any):
        super().__init__()
        self.merger, self.unit = visual.merger, _unit(visual)

    def forward(self, features: Tensor) -> Tensor:
        patches = features.unflatten(-1, (self.unit, -1))
        tokens: Tensor = self.merger.mlp(self.merger.ln_q(patches).flatten(-2))
        return tokens
