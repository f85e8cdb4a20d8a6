"""PriorTR: keep the visual tokens to which the question gives more attention than a row that has not seen it.

Paper: https://arxiv.org/abs/2606.24156
Official code read: CodeChildCZJ/PriorTR@e442a4c, image/LLaVA/llava/vtr/strategy/priortr.py
Differs from it: it takes batches and any image span. Attention is in float32 (theirs: in the model's type). The budget
is a mean over layers; `schedule=kept` counts as the release, whose 192, 128 and 64 tokens are means of 228, 170 and
112. The paper's other variant, which runs the model once more without the question, is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines._staged import OneStage
from llava.reduction import DecoderState, MethodMetadata, Release, option, register

TINY = 1e-10


def information(task: Tensor, prior: Tensor) -> Tensor:
    """[B, N] each token's part of the divergence of two distributions, task · ln(task / prior); may be negative.

    Args:
        task, prior: [B, N] attention to the visual tokens, at least 0; scaled here to sum to 1.
    """
    task, prior = (part / (part.sum(-1, keepdim=True) + TINY) for part in (task, prior))
    return task * ((task + TINY) / (prior + TINY)).log()


@register("priortr")
@dataclass(frozen=True, kw_only=True)
class PriorTR(OneStage):
    """The prior is the attention of the first token after the image: it is the same for every question."""

    summary: ClassVar[str] = "rank by the question's attention against that of the first token after the image"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 3 of 32",
        score="how far the question's attention in the layer before exceeds that of the first token after the image",
        reads=("attention", "question"),
        paper="PriorTR, 2606.24156",
        url="https://arxiv.org/abs/2606.24156",
        code="CodeChildCZJ/PriorTR@e442a4c",
        release=Release(
            batch="one sample at a time",
            dtype="the attention is rounded to it before logarithms are taken",
            count="the layers before the drop are left out",
            licence="Apache-2.0",
        ),
    )
    published: ClassVar[tuple[int, ...]] = (3,)

    layer: int = option(0, "decoder layer before which tokens are dropped; 0 for 3 of 32 in proportion", least=0)
    rows: str = option(
        "release",
        "attention of the question: mean of all text after the image, or its last token; release: last for tiles",
        ("release", "after", "last"),
    )

    def score(self, state: DecoderState) -> Tensor:
        weights, mask = state.attention("after", at="previous")  # [B, H, T, N], [B, T]
        attention = weights.mean(1)
        last = self.rows == "last" or (self.rows == "release" and bool(state.spec.crops))
        # A shorter text repeats its last row, so that the last row is always that of the last token.
        task = attention[:, -1] if last else (attention * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return information(task, attention[:, 0])
