"""The cache of reduced prompts, in the form that `generate` of transformers can reorder, repeat and crop.

Read: transformers 5.23.0, cache_utils.py and generation/utils.py
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.errors import UserError
from llava.pipeline.decoder import Prefilled, step
from llava.pipeline.kv_cache import ValidKeys

T = TypeVar("T")


class ReducedCache(DynamicCache):
    """Keys and values of which each layer may hold a different number.

    Attributes:
        valid: per layer which keys are real, or None if no row is padded; layers of equal length share one object.
        next_position: per layer [B, 1] or [B, 1, 3], position ids of the next token; shared in the same way.
    """

    valid: list[ValidKeys | None]
    next_position: list[Tensor]

    @classmethod
    def holding(cls, state: Prefilled, given: DynamicCache | None = None) -> "ReducedCache":
        """The cache of a prefill.

        Args:
            given: an empty cache of the caller, which is filled; None for a new one.
        """
        cache: Any = state.cache if given is None else given
        # The caller's cache changes its class: a DynamicCache would not reorder masks and positions with its rows.
        cache.__class__ = cls
        cache.layers, cache.layer_class_to_replicate = state.cache.layers, None
        cache.valid, cache.next_position = list(state.valid), list(state.next_position)
        return cache

    @property
    def rows(self) -> int:
        """B, of which beams and samples are part."""
        return len(self.next_position[0])

    def extend(self, llm: torch.nn.Module, token: Tensor) -> Tensor:
        """Run one embedded token per row through all layers: [B, 1, D] -> [B, 1, D] before the final norm."""
        state = Prefilled(token, self, self.valid, self.next_position)
        hidden = step(llm, state, token)
        self.valid, self.next_position = state.valid, state.next_position
        return hidden

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # a LongTensor is a Tensor of integers
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            for known in {id(known): known for known in self.valid if known is not None}.values():
                known.remove(-tokens_to_remove)
            self.next_position = shared_map(self.next_position, lambda place: place + tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.valid, self.next_position = [], []

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Refuse: a model's own forward asks this, but cannot use `valid` and `next_position`."""
        raise UserError(
            "This cache holds reduced prompts; continue it inside the `with reduce(...)` block that made it, or start "
            "again with the whole prompt and no cache."
        )

    def _change(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Choose other rows of masks and positions, once for all layers that share them."""
        self.valid = shared_map(
            self.valid, lambda known: None if known is None else ValidKeys(rows(known.room), known.length)
        )
        self.next_position = shared_map(self.next_position, rows)


def shared_map(items: Sequence[T], function: Callable[[T], T]) -> list[T]:
    """`function` of every item; of one that stands several times, once."""
    found = {id(item): item for item in items}
    results = {key: function(item) for key, item in found.items()}
    return [results[id(item)] for item in items]
