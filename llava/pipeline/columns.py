"""Columns of padded prompts as index tensors, made from host integers, so that nothing waits for the device.

B prompts are padded on the left to a width; a span is [start, stop) in columns of the padded batch here. Prompts of
equal lengths share these tensors (llava/cached_tensors.py): they must not be written into.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.cached_tensors import made_once

Span = tuple[int, int]
Cut = tuple[int, int, int]  # a reduced image: its first column, its tokens before and after


@made_once
def first_columns(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B] int64, column of each prompt's first real token."""
    return torch.tensor([width - length for length in lengths]).to(device, non_blocking=True)


@made_once
def lengths_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B, 1] int64."""
    return torch.tensor(lengths)[:, None].to(device, non_blocking=True)


@made_once
def real_columns(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B, width] bool, False in the padding."""
    return torch.arange(width, device=device) >= first_columns(lengths, width, device)[:, None]


@made_once
def numbers_from_zero(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B, width] int64: 0, 1, 2, ... over the real tokens, 0 in the padding."""
    return (torch.arange(width, device=device) - first_columns(lengths, width, device)[:, None]).clamp(min=0)


@made_once
def rows_of(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """[n] int64 index of rows of the batch."""
    return torch.tensor(samples).to(device, non_blocking=True)


@made_once
def columns_of(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    """[B, T] int64, the columns of one span per prompt, all of the same length T."""
    return torch.stack([torch.arange(start, stop) for start, stop in spans]).to(device, non_blocking=True)


@made_once
def sources(lengths: tuple[int, ...], width: int, cuts: tuple[tuple[Cut, ...], ...], device: torch.device) -> Tensor:
    """[B * shorter width] int64, where the tokens of shortened prompts come from, prompt by prompt.

    For a text token its column before, for a token of a reduced image the first column of that image, 0 in the padding.

    Args:
        lengths, width: before.
        cuts: of each prompt its reduced images in order.
    """
    rows = []
    for length, images in zip(lengths, cuts, strict=True):
        pieces, done = [], width - length
        for first, before, after in images:
            pieces += [torch.arange(done, first), torch.full((after,), first)]
            done = first + before
        rows.append(torch.cat([*pieces, torch.arange(done, width)]))
    shorter = max(map(len, rows))
    return torch.cat([F.pad(row, (shorter - len(row), 0)) for row in rows]).to(device, non_blocking=True)


@made_once
def line_of(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    """[n] int64, the places of spans one after the other."""
    return torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device, non_blocking=True)


@made_once
def assembled(lengths: tuple[int, ...], order: tuple[tuple[Span, ...], ...], device: torch.device) -> Tensor:
    """[B, width] int64: for every column its row in a list of embeddings; row 0 in the padding.

    Args:
        order: for each prompt its pieces in order, as spans of rows of the list.
    """
    width = max(lengths)
    rows = [torch.cat([torch.arange(start, stop) for start, stop in pieces]) for pieces in order]
    return torch.stack([F.pad(row, (width - len(row), 0)) for row in rows]).to(device, non_blocking=True)
