"""FastV: after the first layers, keep the visual tokens with the highest attention of the last prompt token.

Paper: https://arxiv.org/abs/2403.06764
Official code read: pkunlp-icler/FastV@d165972, src/FastV/lmms-eval/fastv_kvcache.py
Differs from it: it runs layer K-1 once (theirs runs it twice and caches its keys twice), and takes batches and any
number of visual tokens, image span and depth. The budget is a mean over layers; `schedule=kept` counts as the release.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines._staged import OneStage
from llava.reduction import DecoderState, MethodMetadata, Release, register


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(OneStage):
    """Prunes once, during the prefill; the caches of earlier layers keep every token."""

    summary: ClassVar[str] = "rank by the last prompt token's attention in an early decoder layer, prune once"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 2 of 32",
        score="attention of the last prompt token in the layer before",
        reads=("attention", "question"),
        paper="FastV, 2403.06764",
        url="https://arxiv.org/abs/2403.06764",
        code="pkunlp-icler/FastV@d165972",
        release=Release(
            count="the layers before the drop do not count",
            ours="the mean over layers; schedule=kept counts as the release",
            licence="none of its own; its copies of LLaVA and transformers are Apache-2.0",
        ),
    )

    def score(self, state: DecoderState) -> Tensor:
        weights, _ = state.attention("last", at="previous")  # [B, H, 1, N]
        return weights[:, :, 0].mean(1)
