"""Reductions of single crops put together into one reduction of the whole run of visual tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reduction.reduction import Reduction


@dataclass(frozen=True)
class Piece:
    """What one crop keeps.

    Attributes:
        places: [n] int64, places of the crop's tokens in the run.
        reduction: of these n tokens, for one picture.
        block: pieces of a lower block come first, whatever stands behind its kept tokens.
    """

    places: Tensor
    reduction: Reduction
    block: int = 0


def join(pieces: list[Piece], inputs: int) -> tuple[Reduction, Tensor]:
    """One reduction of a run of `inputs` tokens; what is in no piece is dropped.

    Kept tokens are in the order of the run. Tokens that a method puts behind the kept ones (`Reduction.appended`) come
    behind those of all pieces of the block.

    Returns:
        the reduction, and [K] int64: which of the pieces' outputs, one piece after another, each output is.
    """
    device = pieces[0].places.device
    anchor = torch.cat([piece.places[piece.reduction.anchor[0]] for piece in pieces])
    keys = []
    for piece in pieces:
        count, tail = piece.reduction.anchor.shape[1], piece.reduction.appended
        is_tail = torch.arange(count, device=device) >= count - tail
        keys.append((2 * piece.block + is_tail.long()) * inputs)
    order = (torch.cat(keys) + anchor).argsort(stable=True)
    appended = sum(piece.reduction.appended for piece in pieces if piece.block == max(p.block for p in pieces))
    known = {"encoder_space": any(piece.reduction.encoder_space for piece in pieces), "appended": appended}
    if not any(piece.reduction.merges for piece in pieces):
        return Reduction(anchor[order][None], inputs, **known), order
    slot = order.argsort()
    if any(piece.reduction.mix is not None for piece in pieces):
        return Reduction(anchor[order][None], inputs, mix=_mix(pieces, inputs)[order][None], **known), order
    owner = torch.full((inputs,), -1, device=device)
    weight = torch.zeros(inputs, device=device)
    done = 0
    for piece in pieces:
        one = piece.reduction.explicit()
        home = torch.where(one.owner[0] < 0, -1, slot[(one.owner[0] + done).clamp(min=0)])
        owner[piece.places], weight[piece.places] = home, one.weight[0]
        done += one.anchor.shape[1]
    return Reduction(anchor[order][None], inputs, owner[None], weight[None], **known), order


def _mix(pieces: list[Piece], inputs: int) -> Tensor:
    """[K, inputs] shares of the pieces' outputs, one piece after another."""
    rows = []
    for piece in pieces:
        reduction = piece.reduction
        mix = reduction.mix[0] if reduction.mix is not None else _dense(reduction.explicit())
        rows.append(mix.new_zeros(len(mix), inputs).index_copy(1, piece.places, mix))
    return torch.cat(rows)


def _dense(reduction: Reduction) -> Tensor:
    """[K, n] shares of a reduction with owners."""
    outputs = torch.arange(reduction.anchor.shape[1], device=reduction.anchor.device)
    return (reduction.owner[0][None] == outputs[:, None]) * reduction.weight[0]


def stack(reductions: list[Reduction]) -> Reduction:
    """Reductions of one image each [1, K] as one of a batch [B, K]; all merge by owner, to equally many tokens."""
    cat = lambda name: torch.cat([getattr(one, name) for one in reductions])  # noqa: E731
    return Reduction(cat("anchor"), reductions[0].inputs, cat("owner"), cat("weight"))
