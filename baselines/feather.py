"""FEATHER: in two stages, keep the visual tokens with the highest attention without rotation, and first an even grid.

Paper: https://arxiv.org/abs/2412.13180
Official code read: markendo/FEATHER@c2a09b2, prismatic-vlms/prismatic/models/backbones/llm/llama2_models.py
Differs from it: the first stage of the release keeps three tenths of the tokens by attention and a grid of every third
row and column, so how many it keeps depends on how many are in both; its second stage keeps 9 % of these. By default
the first stage here keeps a number that is fitted to the budget: the grid, and then the tokens with most attention.
`schedule=release` does what the release does. Equal scores go to the lower index. The image may have any shape, and
tiles, of which each has a grid of its own.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from baselines._staged import SCHEDULE, Staged
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Reduction,
    Reductions,
    Release,
    TokenLayout,
    UserError,
    keep_top,
    option,
    register,
    tokens_by_layer,
)

FIRST, SECOND = 0.3, 0.09  # the part of the tokens that a stage of the release keeps by attention


@lru_cache(maxsize=1024)
def on_grid(layout: TokenLayout, stride: int, device: torch.device) -> Tensor:
    """[N] bool: the patches of an image in every `stride`-th row and column of their tile."""
    with torch.inference_mode(False):
        places = layout.origins()[:, 1:]
        return ((places >= 0) & (places % stride == 0)).all(1).to(device, non_blocking=True)


@register("feather")
@dataclass(frozen=True, kw_only=True)
class Feather(Staged):
    """The layer before each stage has run; only its attention is computed again, without rotation."""

    summary: ClassVar[str] = "rank by the last prompt token's attention without rotation in two stages; keep a grid"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 8 and 16 of 32",
        score="attention of the last prompt token in the layer before, without rotation by position",
        reads=("attention", "question", "grid"),
        paper="FEATHER, 2412.13180",
        url="https://arxiv.org/abs/2412.13180",
        code="markendo/FEATHER@c2a09b2",
        release=Release(
            batch="takes one image at a time",
            dtype="rounds each head's attention to the model's precision before the mean over heads",
            count="how many tokens enter depends on how many are both on the grid and chosen by attention",
            ours="a number fitted to the budget, the grid first; float32; ties go to the lower index",
            licence="MIT",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **Staged.known_deviations,
        "uncounted with schedule=release": "its shares have a mean of their own, which depends on the image",
    }

    positions: str = option("original", "position ids after a stage", ("renumber", "original"))
    schedule: str = option(
        "mean",
        f"{SCHEDULE}; release: the grid and 30 %, then 9 % of these (195 to 214 of 576 tokens as a mean)",
        ("mean", "kept", "release"),
    )
    layers: tuple[int, ...] = option((), "the two layers before which to reduce; empty for 8, 16 of 32 in proportion")
    stride: int = option(3, "rows and columns from one token of the grid to the next", least=1)

    published: ClassVar[tuple[int, ...]] = (8, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers and (len(self.layers) != 2 or any(b <= a for a, b in pairwise((0, *self.layers)))):
            raise UserError(f"feather.layers must be two that ascend from 1, got {', '.join(map(str, self.layers))}.")

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        stages = self.layers or super().decoder_layers(layers)
        if stages[-1] >= layers:
            raise UserError(f"feather.layers must be below {layers} (decoder layers), got {stages[-1]}.")
        return stages

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        return first, max(1, int(SECOND * first))

    def check(self, spec: ModelSpec) -> None:
        if self.schedule != "release":
            return super().check(spec)
        super(Staged, self).check(spec)
        tokens, stages = spec.visual_tokens, self.decoder_layers(spec.layers)
        by_attention = int(FIRST * tokens)
        grid = sum(-(-one.rows // self.stride) * -(-one.columns // self.stride) for one in spec.crops or [spec.layout])
        least, most = (
            sum(tokens_by_layer(tokens, stages, self.keeps(first, tokens), spec.layers)) / spec.layers
            for first in (max(by_attention, grid, 1), min(by_attention + grid, tokens))
        )
        if not least - self.rounding <= self.budget <= most + self.rounding and self.budget < tokens:
            raise UserError(
                f"feather.schedule=release has a mean of {least:.4g} to {most:.4g} visual tokens per layer on this "
                "model at any budget; ask for one of these, or for schedule=mean, which is fitted to the budget."
            )

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:  # type: ignore[override]
        every = self.budget >= spec.visual_tokens
        return None if self.schedule == "release" and not every else super().tokens_per_layer(spec)

    def decoder(self, state: DecoderState) -> Reductions:  # type: ignore[override]
        if self.schedule != "release" or self.budget >= state.spec.visual_tokens:
            return super().decoder(state)
        count = state.tokens.shape[1]
        if not self.is_first(state):
            return self.reduce(state, max(1, int(SECOND * count)))
        score, grid = self.score(state), self.grid(state)
        twice = grid.gather(1, keep_top(score, int(FIRST * count))).sum(1)
        sizes = (int(FIRST * count) + grid.sum(1) - twice).tolist()  # decided by the image, so the host has to wait
        ranked = (score + grid).split(1)
        return [Reduction(keep_top(own, max(1, size)), count) for own, size in zip(ranked, sizes, strict=True)]

    def reduce(self, state: DecoderState, keep: int) -> Reduction:
        score = self.score(state)
        if self.is_first(state):
            score = score + self.grid(state)  # attention is below 1, so the grid comes first
        return Reduction(keep_top(score, keep), score.shape[1])

    def is_first(self, state: DecoderState) -> bool:
        """Whether this is the stage that keeps the grid."""
        return state.layer == self.decoder_layers(state.spec.layers)[0]

    def score(self, state: DecoderState) -> Tensor:
        """[B, N] attention of the last token to the image alone, mean over heads."""
        weights, _ = state.attention("last", at="previous", rotary=False)  # [B, H, 1, N]
        seen = weights[:, :, 0]
        return (seen / seen.sum(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)).mean(1)

    def grid(self, state: DecoderState) -> Tensor:
        """[B, N] bool, the tokens that are on the grid of their tile."""
        whole = [on_grid(layout, self.stride, state.tokens.device) for layout in state.layouts]
        return torch.stack(whole).gather(1, state.members())
