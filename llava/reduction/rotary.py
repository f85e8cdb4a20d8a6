"""Rotary angles of a decoder at given positions, whatever its positions are made of."""

from torch import Tensor, nn

from llava.pipeline import positions as mrope


def angles(llm: nn.Module, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, two tensors [B, L, d].

    Args:
        llm: a module with rotary_emb.
        hidden: gives dtype and device.
        position: [B, L], or [B, L, 3] for a decoder that turns tokens by frame, row and column (see
        llava/pipeline/positions.py).
    """
    return llm.rotary_emb(hidden, position if position.dim() == 2 else position.permute(2, 0, 1))


def next_position(position: Tensor) -> Tensor:
    """[B, 1] or [B, 1, 3], where the first generated token stands: one behind the prompt."""
    return position[:, -1:] + 1 if position.dim() == 2 else mrope.next_position(position)
