"""V2Drop: in stages, keep the visual tokens that the layer before changed most.

Paper: https://arxiv.org/abs/2509.01552
Official code read: xuyang-liu16/V2Drop@219e03e, llava/model/language_model/V2Drop.py
Differs from it: it takes batches, any image span and any number of visual tokens (theirs: one sample, 576 tokens from
place 35). Changes are measured in float32 (theirs: in the model's type). The release has one schedule, which keeps a
half, then a half, then one token, a mean of 203; no other is published. By default both ratios are fitted to the
budget; `schedule=paper` takes the published ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines._staged import SCHEDULE, Staged, published_counts
from llava.reduction import DecoderState, MethodMetadata, ModelSpec, Release, option, register


@register("v2drop")
@dataclass(frozen=True, kw_only=True)
class V2Drop(Staged):
    """Reads no attention: the score is how far one layer moved a token."""

    summary: ClassVar[str] = "rank by the change that the layer before made to a token, in three decoder stages"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 3, 17 and 22 of 32",
        score="distance between a token's hidden states before and after the last layer",
        reads=("tokens",),
        paper="V2Drop, 2509.01552",
        url="https://arxiv.org/abs/2509.01552",
        code="xuyang-liu16/V2Drop@219e03e",
        release=Release(
            batch="one sample at a time",
            dtype="changes are rounded to it, so many are equal",
            count="it has one schedule, of 203 tokens; none for 192, 128 or 64",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **Staged.known_deviations,
        "uncounted with schedule=paper": "its ratios have a mean of their own",
    }
    published: ClassVar[tuple[int, ...]] = (3, 17, 22)

    positions: str = option("original", "position ids after a stage", ("renumber", "original"))
    schedule: str = option(
        "mean", f"{SCHEDULE}; paper: a half, a half and 1 token (mean 203 of 576)", ("mean", "kept", "paper")
    )

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        return first, max(1, first * first // tokens), 1  # the same ratio twice

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return published_counts(self, spec, (1 / 2, 1 / 4, 0)) if self.schedule == "paper" else None

    def score(self, state: DecoderState) -> Tensor:
        before = state.entered.take(state.entered.hidden, state.entered.images)
        change: Tensor = (state.tokens.float() - before.float()).norm(dim=-1)
        return change
