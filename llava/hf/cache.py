"""The cache of reduced prompts as `generate` handles it: rows are reordered with all that belongs to them.

Read: transformers 5.23.0, cache_utils.py and generation/utils.py
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.errors import UserError
from llava.pipeline.decoder import Prefilled, step


class ReducedCache(DynamicCache):
    """Keys and values with a length of their own in every layer.

    Attributes:
        valid: per layer [B, keys] bool, or None where no row is padded; layers of equal length share one tensor.
        next_position: per layer [B, 1] or [B, 1, 3], where the next token stands; shared in the same way.
    """

    valid: list[Tensor | None]
    next_position: list[Tensor]

    @classmethod
    def holding(cls, state: Prefilled, given: DynamicCache | None = None) -> "ReducedCache":
        """The cache of a prefill.

        Args:
            given: an empty cache that the caller holds; it is filled, as the models of transformers do.
        """
        cache = state.cache if given is None else given
        # Only the class knows that masks and positions belong to the rows, so a cache that was given must become one.
        cache.__class__ = cls
        cache.layers, cache.layer_class_to_replicate = state.cache.layers, None
        cache.valid, cache.next_position = list(state.valid), list(state.next_position)
        return cache

    def extend(self, llm: torch.nn.Module, token: Tensor) -> Tensor:
        """Feed one embedded token per row, [B, 1, D] -> [B, 1, D] before the final norm; every layer grows by one."""
        state = Prefilled(token, self, self.valid, self.next_position)
        hidden = step(llm, state, token)
        self.valid, self.next_position = state.valid, state.next_position
        return hidden

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
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
            self._change(lambda mask: mask[:, :tokens_to_remove], lambda place: place + tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.valid, self.next_position = [], []

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The models of transformers ask this and know nothing of `valid` and `next_position`."""
        raise UserError(
            "This cache belongs to prompts that were reduced; continue it inside the `with reduce(...)` block that "
            "made it, or start again with the whole prompt and no cache."
        )

    def _change(self, mask: Callable[[Tensor], Tensor], place: Callable[[Tensor], Tensor] | None = None) -> None:
        """Apply to masks and positions once for all layers that share them."""
        masks = {id(rows): mask(rows) for rows in self.valid if rows is not None}
        places = {id(rows): (place or mask)(rows) for rows in self.next_position}
        self.valid = [None if rows is None else masks[id(rows)] for rows in self.valid]
        self.next_position = [places[id(rows)] for rows in self.next_position]
