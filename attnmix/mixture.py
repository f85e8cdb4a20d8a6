"""Two rankings of the visual tokens, by the text and by the vision tower, and how a budget is split between them.

Paper: https://arxiv.org/abs/2501.09532 (its equations were not available; docs/attnmix.md lists what is known)
Official code read: JiayiV/AdaV@58d1f8d, llava/model/language_model/llava_llama.py
Differs from it: see `release.py`, which has the released form of each difference.

Shapes: B images, N visual tokens (all tiles of an image together), T text tokens, D channels of the decoder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import keep_top

MatMul = Callable[[Tensor, Tensor], Tensor]


def text_scores(
    text: Tensor, exists: Tensor, visual: Tensor, temperature: float, matmul: MatMul = torch.matmul
) -> Tensor:
    """[B, N] float32, text score of each visual token: its largest weight over the text tokens.

    The weights of a text token are the softmax of cosine / temperature over all visual tokens.

    Args:
        text: [B, T, D] word embeddings, as they enter the decoder.
        exists: [B, T] bool, False where a row is padding.
        visual: [B, N, D] projected visual tokens.
    """
    text, visual = F.normalize(text.float(), dim=-1), F.normalize(visual.float(), dim=-1)
    share = (matmul(text, visual.transpose(1, 2)) / temperature).softmax(-1)
    return share.masked_fill(~exists.unsqueeze(-1), 0).amax(1)


def ordered(score: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] scores -> the same in float32 in descending order, and their indices; ties to the lower index."""
    return score.float().sort(dim=1, descending=True, stable=True)


def best_split(first: Tensor, second: Tensor) -> Tensor:
    """[B] int64, how many of K tokens go to the first of two rankings so that the kept masses balance.

    The split has the largest product (and so geometric mean) of the two masses; on a tie the first ranking gets fewer
    tokens. The scale of either ranking has no effect. A peaked ranking gets few tokens, a flat one many.

    Args:
        first, second: [B, K] scores in descending order, at least 0.
    """
    # Mass of the best k of each ranking, k = 0 .. K. Flipped, the second has the mass of its best K - k.
    mass = [F.pad(scores.cumsum(1), (1, 0)) for scores in (first, second)]
    return (mass[0] * mass[1].flip(1)).argmax(1)


def forced_count(budget: int, floor: float) -> int:
    """Tokens that each ranking gets before the split, `floor` of the budget rounded down."""
    return int(budget * floor + 1e-9)  # 0.29 * 100 is a little less than 29


def adaptive_count(text: Tensor, saliency: Tensor, budget: int, floor: float) -> Tensor:
    """[B] int64, tokens that are chosen by text: its least share and its part of the rest.

    Args:
        text, saliency: [B, at least budget] scores in descending order.
        floor: least share of the budget for each ranking, 0 to 0.5.
    """
    forced = forced_count(budget, floor)
    rest = slice(forced, budget - forced)
    return forced + best_split(text[:, rest], saliency[:, rest])


def crop_pool(saliency: Tensor, crops: int, size: int) -> Tensor:
    """[B, N] bool, the `size` most salient tokens of every tile."""
    inside = saliency.unflatten(1, (crops, -1))
    place = inside.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (place < size).flatten(1)


def mix(text: Tensor, saliency: Tensor, count: Tensor, budget: int) -> Tensor:
    """[B, budget] indices, ascending: the best `count` by text, then the most salient of the others.

    Args:
        text, saliency: [B, N] scores.
        count: [B] int64, at most `budget`.
    """
    place = text.float().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return keep_top(saliency.float().masked_fill(place < count.unsqueeze(1), torch.inf), budget)
