"""CLSE: in three stages, keep the tokens that the last row attends to; the first also asks how their detail changed.

Paper: https://arxiv.org/abs/2606.24165
Official code read: zjubinchen/CLSE@cfc9710, LLaVA1.5/llava/model/language_model/clse_model.py and tools.py
Differs from it: the release's counts leave out layer 0, which all tokens enter; by default they are scaled so that
the mean over all layers is the budget, and `schedule=release` takes its tables. Each tile of an image is filtered on
its own grid, as the release does with frames of a video; newline and class tokens have no detail. The release knows one
image of 24 x 24 patches.

Shapes: B images, N visual tokens, D channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines._staged import SCHEDULE, Staged, proportional
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Release,
    TokenLayout,
    UserError,
    cached_by_sizes,
    gather_tokens,
    in_float32,
    option,
    register,
)

# Budget -> tokens that the three stages keep, of 576.
TABLES = {192: (330, 210, 62), 128: (220, 140, 41), 64: (110, 70, 20)}
CUTOFF = 0.1  # standard deviation of the low-pass, in parts of half the shorter side of the grid
TEMPERATURE = 0.1
TINY = 1e-6


@cached_by_sizes
def high_pass(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns // 2 + 1, 1]: the factor of each frequency of a real map, 0 at its mean."""
    down, across = torch.fft.fftfreq(rows) * rows, torch.fft.rfftfreq(columns) * columns
    width = CUTOFF * max(1, min(rows, columns) // 2)
    kept = 1 - torch.exp(-(down[:, None] ** 2 + across**2) / (2 * width**2))
    return kept.unsqueeze(-1).to(device, non_blocking=True)


def detail(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """[B, N, D] all tokens of images with one layout -> [B, N]: magnitude after the high-pass, mean over channels."""
    found = tokens.new_zeros(tokens.shape[:2])
    for tile in layout.crops:
        shape = tile.rows, tile.columns
        place = tile.indices.to(tokens.device, non_blocking=True)
        own = tokens if layout.is_one_tile and tile.cls is None else tokens[:, place]
        waves = torch.fft.rfft2(own.unflatten(1, shape), dim=(1, 2)) * high_pass(*shape, tokens.device)
        fine: Tensor = torch.fft.irfft2(waves, s=shape, dim=(1, 2)).abs().mean(-1).flatten(1)
        if own is tokens:
            return fine
        found[:, place] = fine
    return found


def evolution(before: Tensor, after: Tensor) -> Tensor:
    """[B, N] detail before and after some layers -> [B, N] in (0, 1), highest where it changed most in proportion."""
    change = ((after - before).abs() / (before.mean(-1, keepdim=True) + before + TINY)).clamp(max=1)
    standard = (change - change.mean(-1, keepdim=True)) / (change.std(-1, keepdim=True) + TINY)
    return (standard / TEMPERATURE).sigmoid()


@register("clse")
@dataclass(frozen=True, kw_only=True)
class CLSE(Staged):
    """Dropped tokens leave the caches of all earlier layers, too."""

    summary: ClassVar[str] = (
        "rank by the last row's attention in three stages, at first times the change of fine detail"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 1, 11 and 21 of 32",
        score="attention of the last prompt token in the layer before; at first times the change of high frequencies",
        reads=("attention", "question", "tokens", "grid"),
        paper="CLSE, 2606.24165",
        url="https://arxiv.org/abs/2606.24165",
        code="zjubinchen/CLSE@cfc9710",
        release=Release(
            batch="one prompt at a time, with its image at columns 35 to 610",
            count="layer 0; its 192, 128 and 64 are means of 208.1, 144.6 and 81.1",
            ours="counts in the release's proportions whose mean over all layers is the budget",
            licence="a badge says Apache-2.0, no licence file",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **Staged.known_deviations,
        "uncounted with schedule=release": "the release does not count layer 0",
    }
    published: ClassVar[tuple[int, ...]] = (1, 11, 21)

    positions: str = option("original", "position ids after a stage", ("renumber", "original"))
    schedule: str = option(
        "mean",
        f"{SCHEDULE}; release: the release's tables, for budgets of 192, 128 and 64",
        ("mean", "kept", "release"),
    )

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        return proportional(first, TABLES[192])  # those of the other tables

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        if self.schedule != "release":
            return None
        if self.budget not in TABLES:
            raise UserError(
                f"clse.schedule=release has the budgets {', '.join(map(str, TABLES))}, got {self.budget}; "
                "schedule=mean is fitted to the budget."
            )
        return tuple(min(count, spec.visual_tokens) for count in TABLES[self.budget])

    def cut_caches(self, layer: int) -> range:
        return range(layer)

    def score(self, state: DecoderState) -> Tensor:
        weights, _ = state.attention("last", at="previous")  # [B, H, 1, N]
        attention = weights[:, :, 0].mean(1)
        if state.layer != self.decoder_layers(state.spec.layers)[0]:
            return attention
        before = state.start.take(state.start.hidden, state.start.images)
        both = in_float32(torch.stack([before, state.tokens], 1))  # [B, 2, N, D]
        left = None if both.shape[2] == state.layouts[0].tokens else state.members()
        alike = all(layout is state.layouts[0] for layout in state.layouts)
        fine = []
        for rows in [slice(None)] if alike else [slice(image, image + 1) for image in range(len(both))]:
            layout, own = state.layouts[rows][0], both[rows].flatten(0, 1)
            if left is None:
                fine.append(detail(own, layout))
            else:  # where an earlier method left no token, the map is zero
                place = left[rows].repeat_interleave(2, 0)
                whole = own.new_zeros(len(own), layout.tokens, own.shape[2])
                whole.scatter_(1, place.unsqueeze(2).expand_as(own), own)
                fine.append(gather_tokens(detail(whole, layout), place))
        first, now = torch.cat(fine).unflatten(0, (-1, 2)).unbind(1)
        return attention * evolution(first, now)
