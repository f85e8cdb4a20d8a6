"""Tower scores of a stock tower: a vision tower of transformers or of a serving engine whose own forward runs.

While the tower runs, the attention modules that a method reads record what they pass to their kernel: queries and keys
after all norms and rotations, and keys right after their projection. The model's own kernel then computes as usual.
Afterwards the recorded calls are cut into views (a tile, a frame or a whole image). Each view is a `BlockAttention`,
from which llava/reduction/scores.py computes scores.

Read: transformers 5.23.0, integrations/sdpa_attention.py, modeling of the families in llava/hf/families.py
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llava.reduction.ranking import in_float32
from llava.reduction.scores import TOWER_SCORES, WITHOUT_CLS, BlockAttention, TowerScore, by_block
from llava.transformers_names import ALL_ATTENTION_FUNCTIONS, KERNEL, set_kernel

RECORDING = "recorded_attention"  # the name of our kernel among those of transformers


class Call(NamedTuple):
    """What an attention module passed to its kernel.

    Attributes:
        query, key: [B, H, n, d] after norms and rotations; keys may have fewer heads than queries.
        projected: [B, H, n, d] keys before norms and rotations.
        mask: the kernel's mask for padding, or for several images in one row; None without a mask.
        scale: factor of the products of queries and keys.
    """

    query: Tensor
    key: Tensor
    projected: Tensor
    mask: Tensor | None
    scale: float


def attention_of_call(call: Call, cls: int) -> BlockAttention:
    """What scores read of a recorded call, whose rows are views of equal size.

    Args:
        cls: class tokens in front of the patches, 0 or 1.
    """
    heads = call.query.shape[1]

    def side_by_side(states: Tensor) -> Tensor:
        """[B, heads, n, d] -> [B, n, D] float32, each head of keys as often as query heads read it."""
        shared = heads // states.shape[1]
        states = in_float32(states if shared == 1 else states.repeat_interleave(shared, 1))
        return states.transpose(1, 2).flatten(2)

    return BlockAttention(
        lambda tokens: side_by_side(call.query[:, :, tokens]),
        side_by_side(call.key),
        side_by_side(call.projected),
        heads,
        call.scale,
        cls,
    )


def views_of(calls: Sequence[Call], patches: Sequence[int], cls: int | None) -> list[BlockAttention]:
    """Cut recorded calls into views, in order. Views that are equal rows of one call stay together.

    Args:
        patches: number of patches of each view.
        cls: place of the class token among a view's tokens, 0 or -1; None if there is none.
    """
    extra, views, done = int(cls is not None), [], 0
    for call in calls:
        if cls == -1:  # move the class token to the front, where scores expect it
            query, key, projected = (part.roll(1, 2) for part in call[:3])
            call = call._replace(query=query, key=key, projected=projected)
        images, tokens = call.query.shape[0], call.query.shape[2]
        if call.mask is None and tokens == patches[done] + extra:
            views.append(attention_of_call(call, extra))
            done += images
            continue
        # The rows of this call have padding, or several views one after another.
        real = None if call.mask is None else real_tokens(call.mask, images)
        for row in range(images):
            places = torch.arange(tokens, device=call.query.device) if real is None else real[row].nonzero()[:, 0]
            start = 0
            while start < len(places):
                own = places[start : start + patches[done] + extra]
                query, key, projected = (part[row, :, own][None] for part in call[:3])
                views.append(attention_of_call(Call(query, key, projected, None, call.scale), extra))
                start, done = start + len(own), done + 1
    return views


def real_tokens(mask: Tensor, images: int) -> Tensor:
    """The tokens that are not padding according to an attention kernel's mask, [B, n] bool."""
    if mask.dim() == 2:  # as FlashAttention takes it
        return mask.bool()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.expand(images, 1, *mask.shape[2:]).diagonal(dim1=2, dim2=3)[:, 0]  # a real token sees itself


class StockTower:
    """The blocks of a tower, and how its patches become visual tokens.

    Args:
        blocks: the blocks in order; None for a block that an engine does not build.
        vision: configuration of the tower.
        cls: place of the class token, 0 or -1; None for no class token.
        runs: True if the patches of a token follow one another; False if they are a square of the patch grid.
        last: negative index of the block that is read when a method asks for its default block, see `block_of`.
    """

    def __init__(self, blocks: Sequence[Any], vision: Any, cls: int | None, runs: bool, last: int = -1):
        self.blocks, self.cls, self.runs, self.last = blocks, cls, runs, last
        # The blocks that attend within whole images, and the edge in tokens of the windows of all other blocks.
        self.whole: Sequence[int] = range(len(blocks))
        self.window = 0
        if hasattr(vision, "fullatt_block_indexes"):
            self.whole = sorted(vision.fullatt_block_indexes)
            self.window = vision.window_size // vision.spatial_merge_size // vision.patch_size

    def block_of(self, score: TowerScore) -> int:
        """The tower block that a score is read from.

        Methods choose blocks as in LLaVA, where the output of the last block but one is projected. So that block stands
        for the block `last` of this tower, and other negative indices are moved by the same number of blocks. If the
        tower has windows, the next block that attends within whole images is read, because attention that patches
        receive within a window cannot be compared between windows.

        Raises:
            UserError: there is no such score or block.
        """
        depth = len(self.blocks)
        (index,) = by_block((score,), depth)
        if score.index(depth) < 0:
            index = min(index + self.last + 2, depth - 1)
        return next((block for block in self.whole if block >= index), self.whole[-1])

    @contextmanager
    def recording(self, scores: Iterable[TowerScore]) -> Iterator[dict[TowerScore, list[Call]]]:
        """Record, inside the context, what the blocks of the scores pass to their attention kernels.

        The result maps each score to the calls of its block, of which there may be several.
        """
        modules = {score: attention_of(self.blocks[self.block_of(score)]) for score in scores}
        with recording(modules.values()) as calls:
            yield {score: calls[module] for score, module in modules.items()}

    def scores_of_tokens(
        self,
        calls: Mapping[TowerScore, Sequence[Call]],
        grids: Sequence[tuple[int, int]],
        side: int,
        device: torch.device,
    ) -> dict[TowerScore, list[Tensor]]:
        """For each score, the values of every view's tokens, [n] or [n, d].

        The value of a token made of several patches is the mean over these.

        Args:
            calls: for each score, the recorded calls of its block.
            grids: for each view, its rows and columns of patches.
            side: patches along the edge of a token.
        """
        patches, found = [rows * columns for rows, columns in grids], {}
        for score, recorded in calls.items():
            kind, stand_in = score.kind, None
            if self.cls is None and kind in WITHOUT_CLS:
                kind, stand_in = "received_attention", WITHOUT_CLS[kind]
            views = views_of(recorded, patches, self.cls)
            values = [row.to(device) for view in views for row in TOWER_SCORES[kind].compute(view)]
            tokens = [grouped(row, grid, side, self.runs) for row, grid in zip(values, grids, strict=True)]
            if self.window:
                shapes = [(rows // side, columns // side) for rows, columns in grids]
                tokens = [by_rows(row, *shape, self.window) for row, shape in zip(tokens, shapes, strict=True)]
            found[score] = tokens if stand_in is None else [stand_in(row) for row in tokens]
        return found

    def score_flops(self, calls: Mapping[TowerScore, Sequence[Call]], patches: int) -> int:
        """Operations of a view's scores: only products, because the tower has computed the queries and keys anyway."""
        total = 0
        for score, recorded in calls.items():
            stands_in = self.cls is None and score.kind in WITHOUT_CLS
            kind = TOWER_SCORES["received_attention" if stands_in else score.kind]
            width = recorded[0].query.shape[1] * recorded[0].query.shape[3]
            total += kind.product_flops(patches, int(self.cls is not None), width)
        return total


def grouped(values: Tensor, grid: tuple[int, int], side: int, runs: bool) -> Tensor:
    """Values [P, ...] of patches -> [n, ...]: for each token, the mean over its patches."""
    if side == 1:
        return values
    if runs:
        return values.view(-1, side * side, *values.shape[1:]).mean(1)
    rows, columns = grid
    squares = values.view(rows // side, side, columns // side, side, *values.shape[1:])
    means: Tensor = squares.mean((1, 3)).flatten(0, 1)
    return means


def by_rows(values: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Reorder values [n, ...] of tokens from the order of windows of side x side tokens to raster order."""
    row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    window = row // side * columns + column // side
    return values[window.argsort(stable=True).argsort().to(values.device, non_blocking=True)]


# -- recording in a model of transformers


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of a tower block."""
    names = ("attn", "self_attn", "attention")
    found: nn.Module = next(part for name, part in block.named_modules() if name.rpartition(".")[2] in names)
    return found


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    config = module.config
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    # The kernel may be called several times, for one image or frame after another.
    own, config.keys = config.keys.tensor_split([key.shape[2]], 1)
    own = own.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    config.calls.append(Call(query, key, own, attention_mask, scale))
    known = vars(sys.modules[type(module).__module__])  # Llama 4 has a kernel of its own for its tower
    eager = known.get("vision_eager_attention_forward", known["eager_attention_forward"])
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(getattr(config.own, KERNEL), eager)
    module.config = config.own  # FlashAttention reads the kernel's name from it
    try:
        return kernel(module, query, key, value, attention_mask, **options)
    finally:
        module.config = config


AttentionInterface.register(RECORDING, _record)


@contextmanager
def recording(modules: Iterable[Any]) -> Iterator[dict[Any, list[Call]]]:
    """Record, inside the context, what attention modules pass to their kernels: module -> calls."""
    calls: dict[Any, list[Call]] = {module: [] for module in modules}
    configs, hooks = {module: module.config for module in calls}, []

    def keep(module: Any, layer: nn.Module, args: Any, output: Tensor) -> None:
        keys = output if hasattr(module, "k_proj") else output.chunk(3, -1)[1]
        module.config.keys = keys if keys.dim() == 3 else keys[None]

    try:
        for module, config in configs.items():
            projection = module.k_proj if hasattr(module, "k_proj") else module.qkv
            hooks.append(projection.register_forward_hook(partial(keep, module)))
            module.config = copy.copy(config)
            module.config.calls, module.config.own = calls[module], config
            set_kernel(module.config, RECORDING)
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for module, config in configs.items():
            module.config = config
