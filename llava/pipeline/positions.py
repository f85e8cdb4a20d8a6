"""Position ids of whole prompts, of prompts after tokens were dropped, and of the first generated token.

Llama numbers a prompt 0, 1, 2, ...: positions are [B, L] int64. Qwen has multimodal rotary positions (M-RoPE), a
frame, a row and a column for every token: [B, L, 3]. A text token has the same number on all three axes. A visual token
has the first free number plus its frame, row and column, so an image takes as many numbers as its longer edge has
groups, and the text after it continues after the largest number in use.

There are two rules for a reduced prompt. By "original" every token keeps the position that it has with every visual
token present, including text after an image. By "renumber" the gaps are closed.

Prompts are padded on the left, and positions are 0 in the padding. Lengths and spans are integers on the host, so
nothing here waits for the device.

Paper: https://arxiv.org/abs/2409.12191, section 2.1
Official code read: transformers 5.23.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py, get_rope_index
Differs from it: text continues after the largest number on any axis, as in the paper; get_rope_index uses rows and
columns only, which is the same unless a video has more frames than its longer edge has groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.ranking import cached_by_sizes

Span = tuple[int, int]
Groups = tuple[int, int, int]  # frames, rows and columns of one image's tokens, each made of a group of patches


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a prompt: text, or one image's visual tokens.

    Attributes:
        tokens: [n, D] embeddings.
        inputs: number of tokens before any reduction, all of which the positions after this piece count.
        kept: [n] int64, which of the `inputs` are left; None for all of them in order.
        image: True for visual tokens. The prompt holds one placeholder id per image, but one id per text token.
        groups: frames, rows and columns of the `inputs`, for visual tokens whose positions have three axes.
    """

    tokens: Tensor
    inputs: int
    kept: Tensor | None = None
    image: bool = False
    groups: Groups | None = None


def original(prompts: Sequence[Sequence[Piece]], axes: bool, device: torch.device | str = "cpu") -> Tensor:
    """Positions by the rule "original", [B, L] or with three axes [B, L, 3].

    Args:
        prompts: for each sample, the pieces of its prompt in order.
        axes: True for positions with three axes.
    """
    rows = []
    for pieces in prompts:
        ids, start = [], 0
        for piece in pieces:
            if piece.groups is not None:
                numbers = (torch.arange(start, start + count, device=device) for count in piece.groups)
                own = torch.cartesian_prod(*numbers)
                start += max(piece.groups)
            else:
                own = torch.arange(start, start + piece.inputs, device=device)
                own = own[:, None].expand(-1, 3) if axes else own
                start += piece.inputs
            ids.append(own if piece.kept is None else own[piece.kept])
        rows.append(torch.cat(ids))
    width = max(map(len, rows))
    return torch.stack([F.pad(row, (*[0, 0] * (row.dim() - 1), width - len(row), 0)) for row in rows])


@cached_by_sizes
def contiguous(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B, width] int64: 0, 1, 2, ... over the tokens of each prompt, and 0 in the padding."""
    first = torch.tensor([width - length for length in lengths]).to(device, non_blocking=True)
    return (torch.arange(width, device=device) - first[:, None]).clamp(min=0)


def keep(position: Tensor, index: Tensor) -> Tensor:
    """Positions [B, K] or [B, K, 3] of the kept tokens by the rule "original": each token keeps its position.

    Args:
        position: [B, L] or [B, L, 3].
        index: [B, K] int64, the columns that are kept.
    """
    return position.gather(1, index if position.dim() == 2 else index[..., None].expand(-1, -1, 3))


def renumber(position: Tensor, lengths: tuple[int, ...], visual: Sequence[Sequence[Span]]) -> Tensor:
    """Positions by the rule "renumber": 0, 1, 2, ... over the tokens of a prompt, as LLaVA numbers a shortened prompt.

    With three axes, each axis of an image is renumbered separately. A token gets the first free number plus the rank of
    its coordinate among those still present in that image, so tokens of one row stay in one row. Text is numbered
    without gaps and continues after the largest number of the image before it. Prompts without dropped tokens do not
    change.

    Args:
        position: [B, L] or [B, L, 3] of the kept tokens, by the rule "original" or already renumbered. The padding
            becomes 0.
        lengths: length of each prompt, without padding.
        visual: spans of each sample's visual tokens, [start, stop) without padding, one per image.
    """
    if position.dim() == 2:
        return contiguous(lengths, position.shape[1], position.device)
    batch, width, _ = position.shape
    part = _parts(width, lengths, visual).to(position.device, non_blocking=True)  # [B, L]
    # The number of a token is the start of its part plus its rank in the part. Text ascends on all axes, so its rank is
    # its offset, and the rule is the same for text and images.
    rank = _rank(part[..., None] * (1 << 32) + position)  # [B, L, 3], over the whole prompt, part after part
    owner = part[..., None].expand(-1, -1, 3)
    count = max(2 * len(runs) + 2 for runs in visual)
    first = rank.new_full((batch, count, 3), width).scatter_reduce(1, owner, rank, "amin")
    rank = rank - first.gather(1, owner)
    # A part takes as many numbers as its longest axis has coordinates; an empty part takes none.
    taken = rank.new_full((batch, count, 3), -1).scatter_reduce(1, owner, rank, "amax").amax(2) + 1
    taken[:, 0] = 0
    start = taken.cumsum(1) - taken
    return (rank + start.gather(1, part)[..., None]).masked_fill(part[..., None] == 0, 0)


def _parts(width: int, lengths: Sequence[int], visual: Sequence[Sequence[Span]]) -> Tensor:
    """The part that each token belongs to, [B, L] int64: 0 for padding, then 1, 2, 3, ... for text, image, text, ...

    Empty parts are counted too.
    """
    rows = []
    for length, runs in zip(lengths, visual, strict=True):
        ends = [0, *(end for run in runs for end in run), length]
        counts = [width - length, *(stop - start for start, stop in pairwise(ends))]
        rows.append(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))
    return torch.stack(rows)


def _rank(keys: Tensor) -> Tensor:
    """[B, L, 3] -> the number of distinct smaller keys in the same row of the batch and on the same axis."""
    ordered, order = keys.sort(dim=1)
    steps = F.pad((ordered[:, 1:] != ordered[:, :-1]).long().cumsum(1), (0, 0, 1, 0))
    return torch.empty_like(steps).scatter_(1, order, steps)


def next_position(position: Tensor) -> Tensor:
    """Position of the first generated token, [B, 1], or with three axes [B, 1, 3].

    It is one more than the last position, or with three axes one more than the largest, as in a longer prompt.
    """
    if position.dim() == 2:
        return position[:, -1:] + 1
    return (position.amax((1, 2)) + 1)[:, None, None].expand(-1, 1, 3)
