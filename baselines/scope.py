"""SCOPE: greedily keep the token with the largest gain in coverage times CLS attention.

Paper: https://arxiv.org/abs/2510.24214
Official code read: kinredon/SCOPE@6bf7306, scope/clip_encoder.py, SCOPE
Differs from it: no difference is known. alpha, an environment variable in the release, is an option.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import (
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    cover_greedily,
    option,
    register,
)


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Reducer):
    """Chooses by saliency and coverage together, without the question."""

    summary: ClassVar[str] = "greedy gain in coverage, weighted by CLS attention"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="gain in cosine coverage × CLS attention, block −2",
        needs="CLS token",
        reads=("cls_attention -2", "features"),
        similarity="features",
        paper="SCOPE, 2510.24214",
        url="https://arxiv.org/abs/2510.24214",
        code="kinredon/SCOPE@6bf7306",
        release=Release(
            licence="none of its own; its copy of LLaVA is Apache-2.0",
        ),
    )

    alpha: float = option(1.0, "power of the CLS attention: 0 is coverage alone", least=0)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        # The release sums over heads; the mean differs by a constant factor, so the choices are the same.
        weight = state.scores[TowerScore("cls_attention")].pow(self.alpha)
        chosen = cover_greedily(state.features, weight, self.budget, state.matmul)
        return Reduction(chosen.sort(dim=1).values, state.features.shape[1])
