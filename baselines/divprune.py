"""divprune: the tokens that are farthest from each other; neither the question nor CLS attention is used.

Paper: https://arxiv.org/abs/2503.02175
Official code read: vbdi/divprune@799e2d9, LLaVA/llava/model/llava_arch.py, DivPrune
Differs from it: distances are in float32 (theirs: in the model's float16, where many choices depend on rounding), and
    no token is chosen twice (in theirs one can be, when only duplicates are left).
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import MethodMetadata, PromptState, Reducer, Reduction, Release, farthest_apart, option, register


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Acts after the projector, as it compares projected tokens."""

    summary: ClassVar[str] = "the most diverse tokens: greedily the one farthest from all chosen"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="largest cosine distance of projected tokens to the nearest chosen one",
        reads=("tokens",),
        similarity="tokens",
        paper="DivPrune, 2503.02175",
        url="https://arxiv.org/abs/2503.02175",
        code="vbdi/divprune@799e2d9",
        release=Release(
            dtype="distances are in float16, whose rounding decides many choices",
            ours="distances in float32",
            licence="CC BY-NC 4.0",
        ),
    )

    tile_budget: str = option(
        "global",
        "all tiles together as in the release, or the budget split over tiles",
        ("global", "each", "thumbnail"),
    )

    def prompt(self, state: PromptState) -> Reduction | None:
        chosen = farthest_apart(state.tokens, self.budget, state.matmul)
        return Reduction(chosen.sort(dim=1).values, state.tokens.shape[1])
