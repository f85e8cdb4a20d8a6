"""Positions of Qwen's decoder, which turns every token by a frame, a row and a column.

A text token stands at the same number on all three axes. A visual token stands at the first free number plus its frame,
row and column, so a picture takes no more numbers than its longer edge has groups, and the text behind it goes on
behind the largest number in use. Positions are [B, L, 3] int64, padded on the left with zeros like the prompts. Lengths
and spans are host integers, and nothing here waits for the device.

Paper: https://arxiv.org/abs/2409.12191, section 2.1
Official code read: transformers 5.23.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py, get_rope_index
Differs from it: text goes on behind the largest number on any axis, as the paper says; get_rope_index looks at rows and
columns only, which is the same unless a film has more frames than its longer edge has groups.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]
Groups = tuple[int, int, int]  # frames, rows and columns of merge groups of one picture
Part = int | Groups  # a run of so many text tokens, or one picture


def picture_positions(groups: Groups, start: int, device: torch.device | str = "cpu") -> Tensor:
    """[frames * rows * columns, 3] int64, the visual tokens of a picture whose first free number is `start`."""
    axes = (torch.arange(start, start + count, device=device) for count in groups)
    return torch.cartesian_prod(*axes)


def positions(prompts: Sequence[Sequence[Part]], device: torch.device | str = "cpu") -> Tensor:
    """Positions of whole prompts, nothing dropped.

    Args:
        prompts: of each sample the parts in order, as in [15, (1, 16, 12), 24]: text tokens, a picture, text tokens.

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
    """The rule "original": what is left of [B, L, 3] stands where it stood.

    Args:
        index: [B, K] int64, the columns that are left; text behind a picture keeps its numbers too.
    """
    return position.gather(1, index[..., None].expand(-1, -1, 3))


def renumber(position: Tensor, lengths: Sequence[int], visual: Sequence[Sequence[Span]]) -> Tensor:
    """The rule "renumber": the rows and columns that are left of a picture move together, and text follows.

    Every axis of a picture is compacted on its own: a token's number becomes the first free number plus the rank of its
    coordinate among those still present in that picture, so tokens of one row stay in one row. Text is numbered without
    gaps and goes on behind the largest number of the picture in front of it. A prompt that lost nothing stays as it is.

    Args:
        position: [B, L, 3] of the tokens that are left, by the rule "original" or already renumbered; anything in the
            padding, which becomes 0.
        lengths: real length of each sample.
        visual: runs of visual tokens of each sample, [start, stop) without padding, one per picture.
    """
    batch, width, _ = position.shape
    part = _parts(width, lengths, visual).to(position.device, non_blocking=True)  # [B, L]
    # Text ascends on all axes, so its rank among its own part is its place, and one rule serves text and pictures.
    rank = _rank(part[..., None] * (1 << 32) + position)  # [B, L, 3], over the whole prompt, part after part
    owner = part[..., None].expand(-1, -1, 3)
    count = max(2 * len(runs) + 2 for runs in visual)
    first = rank.new_full((batch, count, 3), width).scatter_reduce(1, owner, rank, "amin")
    rank = rank - first.gather(1, owner)
    # A part takes as many numbers as its longest axis has coordinates; one of which nothing is left takes none.
    taken = rank.new_full((batch, count, 3), -1).scatter_reduce(1, owner, rank, "amax").amax(2) + 1
    taken[:, 0] = 0
    start = taken.cumsum(1) - taken
    return (rank + start.gather(1, part)[..., None]).masked_fill(part[..., None] == 0, 0)


def _parts(width: int, lengths: Sequence[int], visual: Sequence[Sequence[Span]]) -> Tensor:
    """[B, L] int64: 0 in the padding, then 1, 2, 3, ... for text, picture, text, ... whether empty or not."""
    rows = []
    for length, runs in zip(lengths, visual, strict=True):
        ends = [0, *(end for run in runs for end in run), length]
        counts = [width - length, *(stop - start for start, stop in pairwise(ends))]
        rows.append(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))
    return torch.stack(rows)


def _rank(keys: Tensor) -> Tensor:
    """[B, L, 3] -> the number of different smaller keys in the same row and on the same axis."""
    ordered, order = keys.sort(dim=1)
    steps = F.pad((ordered[:, 1:] != ordered[:, :-1]).long().cumsum(1), (0, 0, 1, 0))
    return torch.empty_like(steps).scatter_(1, order, steps)


def next_position(position: Tensor) -> Tensor:
    """[B, 1] or [B, 1, 3], where the first generated token stands: after the prompt, or after its largest number."""
    if position.dim() == 2:
        return position[:, -1:] + 1
    return (position.amax((1, 2)) + 1)[:, None, None].expand(-1, 1, 3)
