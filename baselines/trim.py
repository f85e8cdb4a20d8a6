"""TRIM: keep the tokens most similar to the question in CLIP's space, and the mean of all others as one token.

Paper: https://arxiv.org/abs/2409.10994
Official code read: FreedomIntelligence/TRIM@f5a232d, llava/model/multimodal_encoder/clip_encoder.py
Differs from it: the mean is one of the budget's tokens. The text is the question alone, in several chunks if it is too
long for CLIP. official=true: the mean comes on top of the budget, and the text is the whole user message, cut off at
CLIP's length.

Shapes: B images, N visual tokens, K output tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    RELEVANCE,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Release,
    keep_top,
    option,
    register,
)


def keep_and_average(kept: Tensor, total: int) -> Reduction:
    """Keep the tokens `kept` [B, K-1] unchanged and append the plain mean of all others.

    The mean gets the index of the last token in it.
    """
    batch, count = kept.shape
    slots = torch.arange(count, device=kept.device).expand(batch, -1)
    assignment = torch.full((batch, total), count, device=kept.device).scatter(1, kept, slots)
    rest = assignment == count
    weight = torch.where(rest, 1 / (total - count), 1.0)
    places = torch.arange(total, device=kept.device)
    end = torch.where(rest, places, -1).amax(1, keepdim=True)
    return Reduction(torch.cat([kept, end], 1), total, assignment, weight, appended=1)


def outliers(score: Tensor) -> Tensor:
    """[B, N] float32 -> [B] int64, the number of scores more than 1.5 interquartile ranges above the third quartile."""
    low, high = score.quantile(torch.tensor([0.25, 0.75], device=score.device), dim=1, keepdim=True)
    number: Tensor = (score > high + 1.5 * (high - low)).sum(1)
    return number


@register("trim")
@dataclass(frozen=True, kw_only=True)
class TRIM(Reducer):
    """Acts before the projector and averages tower features."""

    summary: ClassVar[str] = "rank by CLIP similarity to the question, average the rest into one token"
    needs_text_tower: ClassVar[bool] = True
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "the mean of the rest has no position of its own and comes last",
        "uncounted with official=true": "the release keeps one token more",
    }
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="(negated) CLIP similarity to the question",
        rest="one mean token",
        order="raster, the mean last",
        needs="CLIP text tower",
        reads=("features", "question"),
        similarity="none",
        weights="mean",
        paper="TRIM, COLING 2025",
        url="https://arxiv.org/abs/2409.10994",
        code="FreedomIntelligence/TRIM@f5a232d",
        release=Release(
            count="the mean of the others comes on top of the budget",
            ours="the mean is one of the budget's tokens",
            licence="Apache-2.0",
        ),
    )

    relevance: str = option(
        "tower", "CLIP similarity as relevance: negated (the release), plain, or by the text tower's config", RELEVANCE
    )
    adaptive: bool = option(False, "keep the outliers of the score, whose number does not depend on the budget")
    official: bool = option(False, "budget + 1 tokens, and the whole message as text, as the release does")

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        if self.adaptive:
            return None
        return (min(self.budget + self.official, spec.visual_tokens),) * spec.layers

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.adaptive

    def encoder(self, state: EncoderState) -> Reduction | list[Reduction] | None:
        total = state.features.shape[1]
        texts, long = (state.messages, "truncate") if self.official else (state.questions, "frame")
        score = state.relevance(texts, self.relevance, cosine=False, long=long).softmax(-1)
        if not self.adaptive:
            return keep_and_average(keep_top(score, self.budget - (not self.official)), total)
        counts = outliers(score).clamp(max=total - 1).tolist()
        return [keep_and_average(keep_top(row[None], count), total) for row, count in zip(score, counts, strict=True)]
