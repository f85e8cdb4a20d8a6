"""Multimodal rotary positions (M-RoPE) of Qwen's decoder: a frame, a row and a column for every token.

A text token has the same number on all three axes. A visual token has the first free number plus its frame, row and
column, so an image takes as many numbers as its longer edge has groups, and the text after it continues after the
largest number in use. Positions are [B, L, 3] int64, padded on the left with zeros like the prompts. Lengths and spans
are host integers, and nothing here waits for the device.

Paper: https://arxiv.org/abs/2409.12191, section 2.1
Official code read: transformers 5.23.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py, get_rope_index
Differs from it: text continues after the largest number on any axis, as in the paper; get_rope_index uses rows and
columns only, which is the same unless a video has more frames than its longer edge has groups.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]
Groups = tuple[int, int, int]  # frames, rows and columns of merge groups of one image
Part = int | Groups  # a number of text tokens, or one image


def picture_positions(groups: Groups, start: int, device: torch.device | str = "cpu") -> Tensor:
    """[frames * rows * columns, 3] int64 positions of the visual tokens of an image, from number `start` on."""
    axes = (torch.arange(start, start + count, device=device) for count in groups)
    return torch.cartesian_prod(*axes)


def positions(prompts: Sequence[Sequence[Part]], device: torch.device | str = "cpu") -> Tensor:
    """Positions of whole prompts before any reduction.

    Args:
        prompts: for each sample its parts in order, as [15, (1, 16, 12), 24]: text tokens, an image, text tokens.

    Returns:
        [B, L, 3] int64.
    """
    rows = [_prompt_positions(parts, device) for parts in prompts]
    width = max(map(len, rows))
    return torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows])


def _prompt_positions(parts: Sequence[Part], device: torch.device | str) -> Tensor:
    pieces, start = [], 0
    for part in parts:
        if isinstance(part, int):
            pieces.append(torch.arange(start, start + part, device=device)[:, None].expand(-1, 3))
            start += part
        else:
            pieces.append(picture_positions(part, start, device))
            start += max(part)
    return torch.cat(pieces)


def keep(position: Tensor, index: Tensor) -> Tensor:
    """The rule "original": every kept token keeps its position [B, L, 3], text after an image too.

    Args:
        index: [B, K] int64, the columns that are kept.
    """
    return position.gather(1, index[..., None].expand(-1, -1, 3))


def renumber(position: Tensor, lengths: Sequence[int], visual: Sequence[Sequence[Span]]) -> Tensor:
    """The rule "renumber": close the gaps between kept rows and columns of an image, and renumber the text after it.

    Each axis of an image is renumbered separately: a token gets the first free number plus the rank of its coordinate
    among those still present in that image, so tokens of one row stay in one row. Text is numbered without gaps and
    continues after the largest number of the image before it. Prompts without dropped tokens do not change.

    Args:
        position: [B, L, 3] of the kept tokens, by the rule "original" or already renumbered; the padding becomes 0.
        lengths: real length of each sample.
        visual: spans of visual tokens of each sample, [start, stop) without padding, one per image.
    """
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
    """[B, 1] or [B, 1, 3], position of the first generated token: after the last token, or after the largest number."""
    if position.dim() == 2:
        return position[:, -1:] + 1
    return (position.amax((1, 2)) + 1)[:, None, None].expand(-1, 1, 3)
