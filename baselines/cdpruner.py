"""CDPruner: the subset of tokens that is most diverse under a point process weighted by relevance to the question.

Paper: https://arxiv.org/abs/2506.10967
Official code read: Theia-4869/CDPruner@9541616, llava/model/llava_arch.py (encode_images) and
llava/model/multimodal_encoder/clip_encoder.py
Differs from it: relevance is scaled over one image (theirs over all tiles of a batch: one in LLaVA-1.5); when the
chosen tokens span all others, these follow by relevance (theirs divides by zero and repeats tokens); every chunk of a
text too long for CLIP is a framed text (official=true: only the first has its begin, only the last its end token);
features are normalised in float32 (in a float16 model theirs are in float16, before relevance and similarity are cast
to float32: 58 of 64 tokens in common in one of twelve drawn cases).

Shapes: B images, N visual tokens, K of them kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.reduction import (
    RELEVANCE,
    MethodMetadata,
    PromptState,
    Reducer,
    Reduction,
    largest_determinant,
    option,
    register,
)


def unit_interval(relevance: Tensor) -> Tensor:
    """[B, N] -> [B, N] between 0 and 1 in every row, the lowest just above 0, so that no kernel row is zero."""
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Reducer):
    """Uses the similarity of projected tokens; relevance is computed from tower features."""

    summary: ClassVar[str] = "a diverse subset by a determinantal point process, weighted by relevance to the question"
    needs_text_tower: ClassVar[bool] = True
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="greedy determinant of the cosine kernel, scaled by (negated) CLIP similarity to the question",
        needs="CLIP text tower",
        reads=("features", "tokens", "question"),
        similarity="tokens",
        paper="CDPruner, NeurIPS 2025",
        url="https://arxiv.org/abs/2506.10967",
        code="Theia-4869/CDPruner@9541616",
    )

    relevance: str = option(
        "tower", "CLIP similarity as relevance: negated (the release), plain, or by the text tower's config", RELEVANCE
    )
    official: bool = option(False, "cut texts that are too long for CLIP as the release does")

    def prompt(self, state: PromptState) -> Reduction | None:
        total = state.tokens.shape[1]
        long = "cut" if self.official else "frame"
        relevance = unit_interval(state.relevance(state.questions, self.relevance, cosine=True, long=long))
        chosen = largest_determinant(state.tokens, relevance, self.budget, state.matmul)
        return Reduction(chosen.sort(1).values, total)
