"""PyramidDrop: in stages, keep the visual tokens with the highest attention of the last instruction token.

Paper: https://arxiv.org/abs/2410.17247
Official code read: Cooperx521/PyramidDrop@6444f30, llava/model/modeling_llama_pdrop.py
Differs from it: the paper's stages have a mean of 270 tokens, and no other mean is published. By default stages before
layers 2, 10 and 20 halve the tokens, and the first count is fitted to the budget; `schedule` offers the published
stages.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines._staged import SCHEDULE, Staged, proportional, published_counts
from llava.reduction import DecoderState, MethodMetadata, ModelSpec, option, register

HALVING = (4, 2, 1)
# Schedules as ratios of all visual tokens: (decoder layers of 32, ratio kept after each).
SHARES = {
    "paper": ((8, 16, 24), (0.5, 0.25, 0.125)),
    # Evaluation scripts of other projects call this "PyramidDrop at 128 tokens".
    "third_party": ((2, 10, 20), (0.32, 0.16, 0.08)),
}


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Each stage ranks the remaining tokens by their attention in the next layer."""

    summary: ClassVar[str] = "rank by the last prompt token's attention in three decoder stages, halve at each"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 2, 10 and 20 of 32",
        score="attention of the last prompt token in the next layer",
        reads=("attention", "question"),
        paper="PyramidDrop, 2410.17247",
        url="https://arxiv.org/abs/2410.17247",
        code="Cooperx521/PyramidDrop@6444f30",
    )

    known_deviations: ClassVar[dict[str, str]] = {
        **Staged.known_deviations,
        "uncounted with schedule=paper": "its shares have a mean of their own",
        "uncounted with schedule=third_party": "its shares have a mean of their own",
    }

    schedule: str = option(
        "mean",
        f"{SCHEDULE}; paper: 1/2, 1/4, 1/8 at layers 8, 16, 24 (mean 270); third_party: .32, .16, .08 at 2, 10, 20",
        ("mean", "kept", *SHARES),
    )

    @property
    def published(self) -> tuple[int, ...]:
        return SHARES[self.schedule][0] if self.schedule in SHARES else SHARES["third_party"][0]

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        return proportional(first, HALVING)

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return published_counts(self, spec, SHARES[self.schedule][1]) if self.schedule in SHARES else None

    def score(self, state: DecoderState) -> Tensor:
        weights, _ = state.attention("last")  # [B, H, 1, N]
        return weights[:, :, 0].mean(1)
