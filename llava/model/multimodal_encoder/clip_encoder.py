"""CLIP's vision tower, run block by block: patch features, and only those tower scores that a method asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from einops import rearrange
from torch import Tensor

from llava.errors import UserError
from llava.model.official_names import CLIPVisionTower as CLIPVisionTower  # scripts import it from here
from llava.reduction.merging import Reduction
from llava.reduction.modules import linear_flops
from llava.reduction.ranking import places
from llava.reduction.reducer import Reducer, check_reductions
from llava.reduction.scores import TOWER_SCORES, TowerScore, by_block, clip_attention
from llava.reduction.states import BlockState
from llava.reduction.token_layout import ModelSpec


@dataclass(frozen=True)
class Encoded:
    """The tower's output for B images.

    Attributes:
        features: [B, N, D] patch features of the selected layer; [B, 1+N, D] with class tokens.
        scores: one tensor per requested score, for patches only.
        grid: rows and columns of patches.
        merged: the reduction of patches inside the tower; N patches are then left. None without one.
        tokens: for every block that was run, how many tokens (CLS and patches) enter its attention and its MLP.
        spent: operations per image that a method spent on merging inside the tower, or on scores of a stock tower.
        each: `tokens` and `spent` of every image, if a method acts in the tower; those above are of the first one.
    """

    features: Tensor
    scores: dict[TowerScore, Tensor]
    grid: tuple[int, int]
    merged: Reduction | None = None
    tokens: tuple[tuple[int, int], ...] = ()
    spent: int = 0
    each: tuple[tuple[tuple[tuple[int, int], ...], int], ...] = ()

    def rows(self, index: slice) -> "Encoded":
        """The output for some of the images."""
        merged = self.merged and self.merged.of(index)
        scores = {score: values[index] for score, values in self.scores.items()}
        each = self.each[index]
        tokens, spent = each[0] if each else (self.tokens, self.spent)
        return Encoded(self.features[index], scores, self.grid, merged, tokens, spent, each)


def encode(
    tower: Any,
    pixels: Tensor,
    select_layer: int,
    scores: Sequence[TowerScore] = (),
    grid: tuple[int, int] | None = None,
    keep_cls: bool = False,
    merger: "TowerMerger | None" = None,
) -> Encoded:
    """Run a CLIP vision tower as far as it is needed: blocks after the selected layer run only for scores.

    Args:
        tower: a transformers CLIPVisionModel (embeddings, pre_layrnorm, encoder.layers).
        pixels: [B, 3, S, S], normalised.
        select_layer: index into hidden_states; LLaVA's -2 is the output of the last block but one.
        scores: scores to compute as well.
        grid: rows and columns of patches to which the image is shrunk first (`downsample`); None keeps its size.
        keep_cls: keep the CLS token before the patch features.
        merger: merges tokens inside some of the blocks; None for no merging.
    """
    blocks = tower.encoder.layers
    side, depth = tower.config.image_size // tower.config.patch_size, len(blocks)
    own = side, side
    # One name for all steps from pixels to hidden states, so that their memory is freed before the blocks run.
    hidden = pixels.to(tower.embeddings.patch_embedding.weight.dtype)
    hidden = tower.embeddings(hidden) if grid in (None, own) else _embed_coarse(tower, hidden, grid)
    hidden = tower.pre_layrnorm(hidden)
    selected = select_layer % (depth + 1)  # hidden_states has depth + 1 entries
    wanted = by_block(tuple(scores), depth)
    if merger and hasattr(blocks[0], "before_space"):
        raise UserError(
            "A method that merges in the tower cannot run on a video tower: its attention over time needs the same "
            "positions in every frame; choose a method that acts behind the tower."
        )
    if merger and wanted:
        raise UserError("Tower scores are over all patches; a method that merges in the tower cannot ask for them.")
    grid = grid or own
    if merger:
        features, merged, tokens = merger.run(hidden, selected)
        each = tuple(zip(tokens, merger.flops, strict=True))
        return Encoded(features if keep_cls else features[:, 1:], {}, grid, merged, *each[0], each)
    # Run the blocks, and keep the inputs of those whose output is selected or whose scores are asked for. Blocks may be
    # on several devices.
    places, device, done = sorted({selected, *wanted}), hidden.device, 0
    inputs: dict[int, Tensor] = {}
    for place in places:
        for block in blocks[done:place]:
            hidden = block(hidden, None)
        inputs[place], done = hidden.to(device), place
    computed: dict[TowerScore, Tensor] = {}
    for index, asked in wanted.items():
        block, entered = blocks[index], inputs[index]
        if hasattr(block, "before_space"):
            # In a video tower, attention over time comes before the attention that scores are read from.
            entered = block.before_space(entered)
        seen = clip_attention(block.self_attn, block.layer_norm1(entered))
        computed |= {score: TOWER_SCORES[score.kind].compute(seen) for score in asked}
    features = inputs[selected] if keep_cls else inputs[selected][:, 1:]
    return Encoded(features, computed, grid, None, ((hidden.shape[1], hidden.shape[1]),) * places[-1])


class TowerMerger:
    """Runs the tower while a method drops or merges tokens inside its blocks, between attention and MLP (stage 0).

    While tiles have different numbers of tokens left, rows of those with fewer end in others, to which nothing attends.

    Args:
        blocks: indices of the blocks in which the method is called.
        tiles: for each image of the batch, its number of tiles.

    Attributes:
        flops: operations that the method has spent on each tile so far.
        memory: what the method wrote down in earlier blocks.
        left: for each tile, how many tokens it has left.
        filling: [B, n] bool, True for the other tokens in the rows; None if there are none.
    """

    def __init__(self, reducer: Reducer, spec: ModelSpec, tower: Any, blocks: Sequence[int], tiles: Sequence[int]):
        self.reducer, self.spec, self.tower, self.blocks, self.tiles = reducer, spec, tower, blocks, tuple(tiles)
        self.names = tuple(map(str, range(sum(tiles))))
        self.flops = [0] * len(self.names)
        self.memory: dict[str, Tensor] = {}
        self.left: list[int] = []
        self.filling: Tensor | None = None

    def run(self, hidden: Tensor, selected: int) -> tuple[Tensor, Reduction | None, list[tuple[tuple[int, int], ...]]]:
        """Run the first `selected` blocks.

        Args:
            hidden: [B, 1 + P, D], CLS first.

        Returns:
            Hidden states [B, 1 + N, D], the reduction of patches, and for every tile and every block the number of
            tokens that enter its attention and its MLP.
        """
        merged, self.left = None, [hidden.shape[1]] * len(hidden)
        counts = [self.left]
        for index, block in enumerate(self.tower.encoder.layers[:selected]):
            if index in self.blocks or merged is not None:
                hidden, merged = self.run_block(block, index, hidden, merged)
            else:
                hidden = block(hidden, None).to(hidden.device)
            counts.append(self.left)
        if merged is not None:  # leave out token 0, which is CLS and is never merged
            plain = Reduction(merged.kept[:, 1:] - 1, merged.inputs - 1)
            target, weight = merged.assignment, merged.merge_weight
            if target is None or weight is None:
                merged = plain
            else:
                merged = replace(plain, assignment=(target[:, 1:] - 1).clamp(min=-1), merge_weight=weight[:, 1:])
        return hidden, merged, [tuple(pairwise(own)) for own in zip(*counts, strict=True)]

    def run_block(
        self, block: Any, index: int, hidden: Tensor, merged: Reduction | None
    ) -> tuple[Tensor, Reduction | None]:
        """Run one block, in which the method may drop or merge tokens.

        The block's attention weighs merged tokens by their size.

        Args:
            merged: the reduction made in earlier blocks.
        """
        # How many of the original tokens each token stands for: [B, n] float32.
        sizes, bias = hidden.new_ones(hidden.shape[:2], dtype=torch.float32), None
        if merged is not None and merged.merges:
            counts = torch.zeros(hidden.shape[:2], device=hidden.device)
            assignment, weight = merged.explicit()
            sizes = counts.scatter_add_(1, assignment.clamp(min=0), (assignment >= 0).to(weight.dtype))
            # Proportional attention: a token that stands for s patches is attended as s equal tokens would be.
            bias = sizes.log()
        if self.filling is not None:
            bias = (torch.zeros_like(sizes) if bias is None else bias).masked_fill(self.filling, -torch.inf)
        if bias is not None:
            bias = bias[:, None, None, :].to(hidden.dtype).expand(-1, -1, hidden.shape[1], -1)
        normed = block.layer_norm1(hidden)
        attended = hidden + block.self_attn(hidden_states=normed, attention_mask=bias)[0]
        reduction = None
        if index in self.blocks:
            seen = replace(clip_attention(block.self_attn, normed), filling=self.filling)
            state = BlockState(
                ids=self.names,
                spec=self.spec,
                tokens=attended,
                keys=seen.head_keys.mean(1),
                sizes=sizes,
                block=index,
                last=max(self.blocks),
                attended=seen,
                memory=self.memory,
                tiles=self.tiles,
                left=self.left,
            )
            reduction = self.reducer.tower(state)
            check_reductions(self.reducer, f"tower in block {index}", reduction, self.names, hidden.shape[1])
            for row, left in enumerate(self.left):
                own = state.flops * left // (len(self.left) * hidden.shape[1])  # without what fills up the rows
                self.flops[row] += own + linear_flops(block.self_attn.k_proj, left)
        if reduction is not None:
            attended = reduction.apply(attended)
            width = attended.shape[1]
            self.left, self.filling = state.leaves or [width] * len(attended), None
            if min(self.left) < width:
                ends = torch.tensor(self.left).to(hidden.device, non_blocking=True)
                self.filling = places(1, width, hidden.device) >= ends[:, None]
            merged = reduction if merged is None else reduction.after(merged)
        return attended + block.mlp(block.layer_norm2(attended)), merged


def _embed_coarse(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch and position embeddings for another grid, CLS first; pixels and position table are resized."""
    embeddings, patch = tower.embeddings, tower.config.patch_size
    size = (grid[0] * patch, grid[1] * patch)
    small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)
    patches = rearrange(embeddings.patch_embedding(small), "b d rows columns -> b (rows columns) d")
    # Inside these contexts, weights that accelerate has offloaded are loaded.
    with align_module_device(embeddings), align_module_device(embeddings.position_embedding):
        own, table = (
            part.to(patches.device) for part in (embeddings.class_embedding, embeddings.position_embedding.weight)
        )
    square = rearrange(table[1:].float(), "(rows columns) d -> 1 d rows columns", rows=tower.config.image_size // patch)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
    positions = rearrange(resized[0], "d rows columns -> (rows columns) d").to(table.dtype)
    cls = (own + table[0]).expand(len(patches), 1, -1)
    return torch.cat([cls, patches + positions], dim=1)
