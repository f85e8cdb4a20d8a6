"""random: visual tokens drawn without replacement, the baseline that every method should beat.

Paper: none, a control.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.reduction import MethodMetadata, PromptState, Reducer, Reduction, option, register, seed_of


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Reducer):
    """Seeded by the sample's id, so the draw does not depend on batch, order or process."""

    summary: ClassVar[str] = "tokens drawn at random, seeded per question"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before decoder layer 0", score="a seed per question")
    seed: int = option(0, "seed of the draw")

    def prompt(self, state: PromptState) -> Reduction:
        total = state.tokens.shape[1]
        rows = []
        for name in state.ids:
            generator = torch.Generator().manual_seed(seed_of("random", self.seed, name))
            rows.append(torch.randperm(total, generator=generator)[: self.budget].sort().values)
        return Reduction(torch.stack(rows).to(state.tokens.device, non_blocking=True), total)
