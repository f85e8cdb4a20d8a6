"""The vision tower, block by block: patch features, and only the scores that were asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llava.errors import UserError
from llava.reduction.reduction import Reduction
from llava.reduction.scores import BlockInput, TowerScore, mean_keys, tower_score

# (hidden [B, n, D], keys [B, n, d], sizes [B, n], block) -> what to merge inside the block
MergeAt = Callable[[Tensor, Tensor, Tensor, int], Reduction | None]
# (tower, hidden [B, n, D], places) -> hidden states [B, n, D] behind so many blocks, in the order of the places
RunBlocks = Callable[[nn.Module, Tensor, Sequence[int]], list[Tensor]]


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
            merged = Reduction(merged.kept[index], merged.inputs, merged.assignment[index], merged.merge_weight[index])
        scores = {score: values[index] for score, values in self.scores.items()}
        return Encoded(self.features[index], scores, self.grid, merged, self.tokens, self.spent)


def patch_grid(tower: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches of the tower's own image size."""
    side = tower.config.image_size // tower.config.patch_size
    return side, side


def run_blocks(tower: nn.Module, hidden: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Hidden states [B, n, D] behind the first k blocks, for each k in `places`, which ascend; 0 is the input."""
    found, done = [], 0
    for place in places:
        for block in tower.encoder.layers[done:place]:
            hidden = block(hidden, None)
        found.append(hidden)
        done = place
    return found


def encode(
    tower: nn.Module,
    pixels: Tensor,
    select_layer: int,
    scores: Sequence[TowerScore] = (),
    grid: tuple[int, int] | None = None,
    keep_cls: bool = False,
    merging: Sequence[int] = (),
    merge_at: MergeAt | None = None,
    run: RunBlocks = run_blocks,
) -> Encoded:
    """Run a CLIP vision tower as far as it is needed.

    Args:
        tower: a transformers CLIPVisionModel (embeddings, pre_layrnorm, encoder.layers).
        pixels: [B, 3, S, S], normalised.
        select_layer: index into hidden_states, -2 for LLaVA: the output of the last block but one.
        scores: scores to compute beside the main path.
        grid: shrink the image to rows x columns patches first (the `downsample` control); None keeps it.
        keep_cls: leave the CLS token before the patch features.
        merging: blocks inside which `merge_at` is called, between attention and MLP.
        run: runs the blocks, unless tokens are merged in some of them.

    Blocks after the selected layer run only when a score asks for them.
    """
    blocks = tower.encoder.layers
    hidden = tower.pre_layrnorm(_embed(tower, pixels, grid))
    depth = len(blocks)
    selected = select_layer % (depth + 1)  # hidden_states has depth + 1 entries
    wanted: dict[int, list[TowerScore]] = {}
    for score in scores:
        index = score.index(depth)
        if not -depth <= index < depth:
            raise UserError(f"TowerScore {score.kind} needs tower block {index}, but the tower has {depth} blocks.")
        wanted.setdefault(index % depth, []).append(score)
    if merging and hasattr(blocks[0], "before_space"):
        raise UserError(
            "A method that merges in the tower cannot run on a video tower: its attention over time needs the same "
            "positions in every frame; choose a method that acts behind the tower."
        )
    if merging and wanted:
        raise UserError("Tower scores are over all patches; a method that merges in the tower cannot ask for them.")
    merged, tokens = None, []
    found: dict[TowerScore, Tensor] = {}
    if merging:
        for index in range(selected):
            before = hidden.shape[1]
            if index in merging or merged is not None:
                reduce = merge_at if index in merging else None
                hidden, merged = _merging_block(blocks[index], hidden, merged, index, reduce)
            else:
                hidden = blocks[index](hidden, None)
            tokens.append((before, hidden.shape[1]))
        features = hidden
    else:
        # Scores are of the inputs of their blocks.
        places = sorted({selected, *wanted})
        inputs = dict(zip(places, run(tower, hidden, places), strict=True))
        for index, asked in wanted.items():
            seen = BlockInput(blocks[index], _before_space(blocks[index], inputs[index]))
            found |= {score: tower_score(score, seen) for score in asked}
        features, tokens = inputs[selected], [(hidden.shape[1], hidden.shape[1])] * places[-1]
    features = features if keep_cls else features[:, 1:]
    merged = None if merged is None else _patches_only(merged)
    return Encoded(features, found, grid or patch_grid(tower), merged, tuple(tokens))


def _before_space(block: nn.Module, hidden: Tensor) -> Tensor:
    """What the spatial attention of a block works on: its input, or what attention over time makes of it."""
    return block.before_space(hidden) if hasattr(block, "before_space") else hidden


def _merging_block(
    block: nn.Module, hidden: Tensor, merged: Reduction | None, index: int, merge_at: MergeAt | None
) -> tuple[Tensor, Reduction | None]:
    """One block that merges tokens between attention and MLP, and whose attention knows how large its tokens are."""
    sizes = _sizes(hidden, merged)
    # Proportional attention: a token that stands for s patches is attended as s equal tokens would be.
    bias = None
    if merged is not None:
        bias = sizes.log()[:, None, None, :].to(hidden.dtype).expand(-1, -1, hidden.shape[1], -1)
    normed = block.layer_norm1(hidden)
    attended = hidden + block.self_attn(hidden_states=normed, attention_mask=bias)[0]
    if merge_at is not None:
        reduction = merge_at(attended, mean_keys(block, normed), sizes, index)
        if reduction is not None:
            attended = reduction.apply(attended)
            merged = reduction if merged is None else reduction.after(merged)
    return attended + block.mlp(block.layer_norm2(attended)), merged


def _patches_only(merged: Reduction) -> Reduction:
    """The same without token 0, which is CLS and stays alone."""
    return Reduction(
        merged.kept[:, 1:] - 1, merged.inputs - 1, merged.assignment[:, 1:] - 1, merged.merge_weight[:, 1:]
    )


def _sizes(hidden: Tensor, merged: Reduction | None) -> Tensor:
    """[B, n] float32, how many of the first tokens each token stands for."""
    if merged is None:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.float32)
    counts = torch.zeros(hidden.shape[:2], device=hidden.device)
    return counts.scatter_add_(1, merged.assignment, torch.ones_like(merged.merge_weight))


def _embed(tower: nn.Module, pixels: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Patch and position embeddings, CLS first; for another grid, pixels and position table are resized."""
    embeddings = tower.embeddings
    pixels = pixels.to(embeddings.patch_embedding.weight.dtype)
    if grid is None or grid == patch_grid(tower):
        return embeddings(pixels)
    patch = tower.config.patch_size
    size = (grid[0] * patch, grid[1] * patch)
    small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)
    patches = rearrange(embeddings.patch_embedding(small), "b d rows columns -> b (rows columns) d")
    table = embeddings.position_embedding.weight
    square = rearrange(table[1:].float(), "(rows columns) d -> 1 d rows columns", rows=patch_grid(tower)[0])
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
    positions = rearrange(resized[0], "d rows columns -> (rows columns) d").to(table.dtype)
    cls = (embeddings.class_embedding + table[0]).expand(len(patches), 1, -1)
    return torch.cat([cls, patches + positions], dim=1)
