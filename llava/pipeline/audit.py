"""The record of what was really computed: how many visual tokens entered each decoder layer."""

from collections.abc import Sequence
from dataclasses import dataclass


def mean_visual_tokens(entering: Sequence[int]) -> float:
    """Mean over decoder layers of the visual tokens that enter each layer.

    Papers disagree: SparseVLM counts a layer that prunes on its way out as already pruned, DART
    counts only the layers after pruning. We count what each layer computes on.
    """
    return sum(entering) / len(entering)


@dataclass(frozen=True)
class Audit:
    """One sample's account.

    Attributes:
        entering: visual tokens that enter each decoder layer.
        visual_tokens: visual tokens before any reduction.
        images: images of the sample; the budget holds for each.
        merged: tokens among those entering layer 0 that are averages of several input tokens.
        kv_bytes: bytes of this sample's keys and values in the cache after prefill, padding left out.
        planned: mean visual tokens per layer and image that the method plans for these very images at its budget; None
            where a picture decides.
    """

    entering: tuple[int, ...]
    visual_tokens: int
    merged: int
    kv_bytes: int
    images: int = 1
    planned: float | None = None

    @property
    def mean(self) -> float:
        """Mean visual tokens per layer and image, the number that is held against the budget."""
        return mean_visual_tokens(self.entering) / max(1, self.images)
