"""CDPruner: the subset of tokens that is most diverse under a point process weighted by relevance to the question.

Paper: https://arxiv.org/abs/2506.10967
Official code read: Theia-4869/CDPruner@9541616, llava/model/llava_arch.py (encode_images) and
llava/model/multimodal_encoder/clip_encoder.py
Differs from it: relevance is scaled over one image (theirs: over all tiles of a batch, which are one image in
LLaVA-1.5). When the chosen tokens span all others, the others follow by relevance (theirs divides by zero and repeats
tokens). Every chunk of a text that is too long for CLIP has a begin and an end token (official=true: only the first
chunk has the begin token and only the last one the end token). Features are normalised in float32 (theirs in the
model's float16; in one of twelve drawn cases 58 of 64 tokens agree).

Shapes: B images, N visual tokens, K of them kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import (
    RELEVANCE,
    MethodMetadata,
    PromptState,
    Reducer,
    Reduction,
    Release,
    largest_determinant,
    option,
    register,
)


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Reducer):
    """Compares projected tokens with each other, and tower features with the question."""

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
        release=Release(
            batch="relevance is scaled over all tiles of a batch, so that they change each other",
            dtype="features are normalised in float16",
            ours="one image alone, in float32",
            licence="Apache-2.0",
        ),
    )

    relevance: str = option(
        "tower", "CLIP similarity as relevance: negated (the release), plain, or by the text tower's config", RELEVANCE
    )
    official: bool = option(False, "cut texts that are too long for CLIP as the release does")

    def prompt(self, state: PromptState) -> Reduction | None:
        long = "cut" if self.official else "frame"
        relevance = state.relevance(state.questions, self.relevance, cosine=True, long=long)  # [B, N]
        # Scaled to 0..1 in every image. The lowest is just above 0, so that no row of the kernel is zero.
        low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
        weight = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        chosen = largest_determinant(state.tokens, weight, self.budget, state.matmul)  # [B, K]
        return Reduction(chosen.sort(1).values, state.tokens.shape[1])
