"""Position ids of prompts: before a reduction, after tokens were dropped, and of the first generated token.

Llama numbers a prompt 0, 1, 2, ...: positions are [B, L] int64. Qwen has multimodal rotary positions (M-RoPE), a
frame, a row and a column for every token: [B, L, 3]. A text token has the same number on all three axes. A visual token
has the first free number plus its frame, row and column, so an image takes as many numbers as its longer edge has
groups, and the text after it continues after the largest number in use.

After a reduction there are two rules. By "original" every token keeps its position, also text after an image, which has
the position that it would have with every visual token present. By "renumber" the gaps are closed.

Prompts are padded on the left with zeros. Lengths and spans are host integers, and nothing here waits for the device.

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
Groups = tuple[int, int, int]  # frames, rows and columns of merge groups of one image


@dataclass(frozen=True)
class Piece:
    """A run of a prompt: some of its text, or the visual tokens of one image.

    Attributes:
        tokens: [n, D] embeddings.
        inputs: the tokens of a run before any reduction; the text after it is numbered after all of them.
        kept: [n] int64, which of the `inputs` are left; None for all of them in order.
        image: these are visual tokens; they stand for one id of the prompt, text for n.
        groups: frames, rows and columns of the `inputs`, for visual tokens whose positions have three axes.
    """

    tokens: Tensor
    inputs: int
    kept: Tensor | None = None
    image: bool = False
    groups: Groups | None = None


def original(prompts: Sequence[Sequence[Piece]], axes: bool, device: torch.device | str = "cpu") -> Tensor:
    """[B, L] or, with three axes, [B, L, 3]: every token has the position that it has with every visual token present.

    Args:
        prompts: for each sample its pieces in order.
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
    """[B, width] int64: 0, 1, 2, ... over the real tokens, 0 in the padding."""
    first = torch.tensor([width - length for length in lengths]).to(device, non_blocking=True)
    return (torch.arange(width, device=device) - first[:, None]).clamp(min=0)


def keep(position: Tensor, index: Tensor) -> Tensor:
    """The rule "original": every kept token keeps its position [B, L] or [B, L, 3], text after an image too.

    Args:
        index: [B, K] int64, the columns that are kept.
    """
    return position.gather(1, index if position.dim() == 2 else index[..., None].expand(-1, -1, 3))


def renumber(position: Tensor, lengths: tuple[int, ...], visual: Sequence[Sequence[Span]]) -> Tensor:
    """The rule "renumber": 0, 1, 2, ... over the real tokens, as LLaVA numbers a shortened sequence.

    With three axes: close the gaps between kept rows and columns of an image, and renumber the text after it. Each axis
    of an image is renumbered separately: a token gets the first free number plus the rank of its coordinate among those
    still present in that image, so tokens of one row stay in one row. Text is numbered without gaps and continues after
    the largest number of the image before it. Prompts without dropped tokens do not change.

    Args:
        position: [B, L] or [B, L, 3] of the kept tokens, by the rule "original" or already renumbered; the padding
            becomes 0.
        lengths: real length of each sample.
        visual: spans of visual tokens of each sample, [start, stop) without padding, one per image.
    """
    if position.dim() == 2:
        return contiguous(lengths, position.shape[1], position.device)
    batch, width, _ = position.shape
    part = _parts(width, lengths, visual).to(position.device, non_blocking=True)  # [B, L]
    # Text ascends on all axes, so its rank inside its part is its offset, and one rule serves text and images.
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
    """[B, L] int64: 0 in the padding, then 1, 2, 3, ... for text, image, text, ..., also for empty parts."""
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
    """[B, 1] or [B, 1, 3], position of the first generated token: after the last token, or after the largest number.

    Decoding continues the numbers of these prompts, so that it equals a longer prefill.
    """
    if position.dim() == 2:
        return position[:, -1:] + 1
    return (position.amax((1, 2)) + 1)[:, None, None].expand(-1, 1, 3)
