"""The vision tower, block by block: patch features, and only the scores that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from einops import rearrange
from torch import Tensor

from llava.errors import UserError
from llava.model.official_names import CLIPVisionTower as CLIPVisionTower  # from here scripts import it
from llava.reduction.merging import Reduction
from llava.reduction.modules import linear_flops
from llava.reduction.reducer import Reducer, check_reductions
from llava.reduction.scores import TowerScore, block_scores, by_block, clip_attention
from llava.reduction.states import BlockState
from llava.reduction.token_layout import ModelSpec

# (CLIPVisionModel, hidden [B, n, D], places) -> hidden states [B, n, D] behind so many blocks, in order of the places


@dataclass(frozen=True)
class Encoded:
    """What the tower gives for B images.

    Attributes:
        features: [B, N, D] patch features of the selected layer; [B, 1+N, D] when CLS was kept.
        scores: one tensor per requested score, patches only.
        grid: rows and columns of patches.
        merged: what was merged inside the tower, over patches; N is then what is left of them.
        tokens: CLS and patches that enter attention and MLP of every block that was run.
        spent: operations per image that a method spent on merging inside the tower.
    """

    features: Tensor
    scores: dict[TowerScore, Tensor]
    grid: tuple[int, int]
    merged: Reduction | None = None
    tokens: tuple[tuple[int, int], ...] = ()
    spent: int = 0

    def rows(self, index: slice) -> "Encoded":
        """The same for some of the images."""
        merged = self.merged
        if merged is not None:
            assignment, weight = merged.explicit()
            merged = Reduction(merged.kept[index], merged.inputs, assignment[index], weight[index])
        scores = {score: values[index] for score, values in self.scores.items()}
        return Encoded(self.features[index], scores, self.grid, merged, self.tokens, self.spent)


def patch_grid(tower: Any) -> tuple[int, int]:
    """Rows and columns of patches of the tower's own image size."""
    side = tower.config.image_size // tower.config.patch_size
    return side, side


def run_blocks(tower: Any, hidden: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Hidden states [B, n, D] behind the first k blocks, for each k in `places`, which ascend; 0 is the input.

    They are on the device of the input, wherever the blocks are.
    """
    states, done, device = [], 0, hidden.device
    for place in places:
        for block in tower.encoder.layers[done:place]:
            hidden = block(hidden, None)
        states.append(hidden.to(device))
        done = place
    return states


def encode(
    tower: Any,
    pixels: Tensor,
    select_layer: int,
    scores: Sequence[TowerScore] = (),
    grid: tuple[int, int] | None = None,
    keep_cls: bool = False,
    merger: "TowerMerger | None" = None,
) -> Encoded:
    """Run a CLIP vision tower as far as it is needed.

    Args:
        tower: a transformers CLIPVisionModel (embeddings, pre_layrnorm, encoder.layers).
        pixels: [B, 3, S, S], normalised.
        select_layer: index into hidden_states, -2 for LLaVA: the output of the last block but one.
        scores: scores to compute beside the main path.
        grid: shrink the image to rows x columns patches first (the `downsample` control); None keeps it.
        keep_cls: leave the CLS token before the patch features.
        merger: merges tokens inside some of the blocks.

    Blocks after the selected layer run only when a score asks for them.
    """
    blocks = tower.encoder.layers
    own, depth = patch_grid(tower), len(blocks)
    # One name from pixels to hidden states, so that none of them lives while the blocks run.
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
        return Encoded(features if keep_cls else features[:, 1:], {}, grid, merged, tokens, merger.flops)
    # Scores are of the inputs of their blocks.
    places = sorted({selected, *wanted})
    inputs = dict(zip(places, run_blocks(tower, hidden, places), strict=True))
    computed: dict[TowerScore, Tensor] = {}
    for index, asked in wanted.items():
        computed |= block_scores(asked, blocks[index], inputs[index])
    features = inputs[selected] if keep_cls else inputs[selected][:, 1:]
    return Encoded(features, computed, grid, None, ((hidden.shape[1], hidden.shape[1]),) * places[-1])


class TowerMerger:
    """Merges tokens inside blocks of the tower, between attention and MLP, as a method says (stage 0).

    Args:
        blocks: inside which the method is asked.
        tiles: images in the batch.

    Attributes:
        flops: operations per image that the method has spent so far.
    """

    def __init__(self, reducer: Reducer, spec: ModelSpec, tower: Any, blocks: Sequence[int], tiles: int):
        self.reducer, self.spec, self.tower, self.blocks = reducer, spec, tower, blocks
        self.names = tuple(map(str, range(tiles)))
        self.flops = 0

    def run(self, hidden: Tensor, selected: int) -> tuple[Tensor, Reduction | None, tuple[tuple[int, int], ...]]:
        """Run the first `selected` blocks.

        Args:
            hidden: [B, 1 + P, D], CLS first.

        Returns:
            hidden states [B, 1 + N, D], what was merged over patches, and the tokens that enter attention and MLP of
            every block.
        """
        merged, tokens = None, []
        for index, block in enumerate(self.tower.encoder.layers[:selected]):
            before = hidden.shape[1]
            if index in self.blocks or merged is not None:
                hidden, merged = self.run_block(block, index, hidden, merged)
            else:
                hidden = block(hidden, None).to(hidden.device)
            tokens.append((before, hidden.shape[1]))
        if merged is not None:  # without token 0, which is CLS and stays alone
            assignment, weight = merged.explicit()
            merged = Reduction(merged.kept[:, 1:] - 1, merged.inputs - 1, assignment[:, 1:] - 1, weight[:, 1:])
        return hidden, merged, tuple(tokens)

    def run_block(
        self, block: Any, index: int, hidden: Tensor, merged: Reduction | None
    ) -> tuple[Tensor, Reduction | None]:
        """One block whose attention knows how large its tokens are, and in which the method may merge.

        Args:
            merged: what was merged before.
        """
        # How many of the first tokens each token stands for: [B, n] float32.
        sizes, bias = hidden.new_ones(hidden.shape[:2], dtype=torch.float32), None
        if merged is not None:
            counts = torch.zeros(hidden.shape[:2], device=hidden.device)
            assignment, weight = merged.explicit()
            sizes = counts.scatter_add_(1, assignment, torch.ones_like(weight))
            # Proportional attention: a token that stands for s patches is attended as s equal tokens would be.
            bias = sizes.log()[:, None, None, :].to(hidden.dtype).expand(-1, -1, hidden.shape[1], -1)
        normed = block.layer_norm1(hidden)
        attended = hidden + block.self_attn(hidden_states=normed, attention_mask=bias)[0]
        reduction = None
        if index in self.blocks:
            keys = clip_attention(block.self_attn, normed).head_keys.mean(1)
            state = BlockState(ids=self.names, spec=self.spec, tokens=attended, keys=keys, sizes=sizes, block=index)
            reduction = self.reducer.tower(state)
            check_reductions(self.reducer, f"tower in block {index}", reduction, self.names, hidden.shape[1])
            projection = linear_flops(block.self_attn.k_proj, hidden.shape[1])
            self.flops += state.flops // len(self.names) + projection
        if reduction is not None:
            attended = reduction.apply(attended)
            merged = reduction if merged is None else reduction.after(merged)
        return attended + block.mlp(block.layer_norm2(attended)), merged


def _embed_coarse(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch and position embeddings, CLS first, for another grid: pixels and position table are resized."""
    embeddings, patch = tower.embeddings, tower.config.patch_size
    size = (grid[0] * patch, grid[1] * patch)
    small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)
    patches = rearrange(embeddings.patch_embedding(small), "b d rows columns -> b (rows columns) d")
    # Weights that accelerate has offloaded are there inside the contexts.
    with align_module_device(embeddings), align_module_device(embeddings.position_embedding):
        own, table = (
            part.to(patches.device) for part in (embeddings.class_embedding, embeddings.position_embedding.weight)
        )
    square = rearrange(table[1:].float(), "(rows columns) d -> 1 d rows columns", rows=patch_grid(tower)[0])
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
    positions = rearrange(resized[0], "d rows columns -> (rows columns) d").to(table.dtype)
    cls = (own + table[0]).expand(len(patches), 1, -1)
    return torch.cat([cls, patches + positions], dim=1)
