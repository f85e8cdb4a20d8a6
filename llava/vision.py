"""The vision tower, block by block: patch features, and only the signals that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import UserError
from llava.signals import Signal, tower_signal


@dataclass(frozen=True)
class Encoded:
    """What the tower gives for B images.

    Attributes:
        features: [B, N, D] patch features of the selected layer; [B, 1+N, D] when CLS was kept.
        signals: one tensor per requested signal, patches only.
        grid: rows and columns of patches.
    """

    features: Tensor
    signals: dict[Signal, Tensor]
    grid: tuple[int, int]

    def rows(self, index: Tensor) -> "Encoded":
        """The same for images `index`, which may repeat."""
        return Encoded(self.features[index], {s: t[index] for s, t in self.signals.items()}, self.grid)


def patch_grid(tower: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches of the tower's own image size."""
    side = tower.config.image_size // tower.config.patch_size
    return side, side


def encode(
    tower: nn.Module,
    pixels: Tensor,
    select_layer: int,
    signals: Sequence[Signal] = (),
    grid: tuple[int, int] | None = None,
    keep_cls: bool = False,
) -> Encoded:
    """Run a CLIP vision tower as far as it is needed.

    Args:
        tower: a transformers CLIPVisionModel (embeddings, pre_layrnorm, encoder.layers).
        pixels: [B, 3, S, S], normalised.
        select_layer: index into hidden_states, -2 for LLaVA: the output of the last block but one.
        signals: signals to compute beside the main path.
        grid: shrink the image to rows x columns patches first (the `downsample` control); None keeps it.
        keep_cls: leave the CLS token in front of the patch features.

    Blocks behind the selected layer run only when a signal asks for them.
    """
    blocks = tower.encoder.layers
    hidden = tower.pre_layrnorm(_embed(tower, pixels, grid))
    depth = len(blocks)
    selected = select_layer % (depth + 1)  # hidden_states has depth + 1 entries
    wanted: dict[int, list[Signal]] = {}
    for signal in signals:
        if not -depth <= signal.block < depth:
            raise UserError(f"Signal {signal.kind} needs tower block {signal.block}, but the tower has {depth} blocks.")
        wanted.setdefault(signal.block % depth, []).append(signal)
    features, found = hidden, {}
    for index in range(max(selected, max(wanted, default=-1) + 1)):
        for signal in wanted.get(index, ()):
            found[signal] = tower_signal(signal, blocks[index], hidden)
        if index < selected or any(later > index for later in wanted):
            hidden = blocks[index](hidden, None)
        if index + 1 == selected:
            features = hidden
    return Encoded(features if keep_cls else features[:, 1:], found, grid or patch_grid(tower))


def _embed(tower: nn.Module, pixels: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Patch and position embeddings, CLS first; for another grid, pixels and position table are resized."""
    embeddings = tower.embeddings
    pixels = pixels.to(embeddings.patch_embedding.weight.dtype)
    if grid is None or grid == patch_grid(tower):
        return embeddings(pixels)
    patch = tower.config.patch_size
    size = (grid[0] * patch, grid[1] * patch)
    small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)
    patches = embeddings.patch_embedding(small).flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    square = table[1:].float().unflatten(0, patch_grid(tower)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
    positions = resized[0].flatten(1).T.to(table.dtype)
    cls = (embeddings.class_embedding + table[0]).expand(len(patches), 1, -1)
    return torch.cat([cls, patches + positions], dim=1)
