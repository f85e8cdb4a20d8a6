"""The mixture as in the released code, with its apparent errors (B1 to B5 in docs/attnmix.md).

Paper: https://arxiv.org/abs/2501.09532
Official code read: JiayiV/AdaV@58d1f8d, llava/model/language_model/llava_llama.py, generate
Differs from it: float32 (theirs: float16), batches, ties to the lower index.

Shapes: B images, N visual tokens in C tiles of n, V output tokens.
"""

import torch
from torch import Tensor

from attnmix.mixture import adaptive_count, forced_count, ordered
from llava.reduction import keep_top

# Distance of the indices of two neighbouring tiles. It should be n; with 1 all salient indices point into tile 0 (B1).
STRIDE = 1


def released_count(budget: int, crops: int, mix: str) -> int:
    """V, the tokens kept at a budget: equally many of every tile, and an even number for two rankings (B5)."""
    return budget // crops * crops if mix == "t2i" else 2 * (budget // 2 // crops) * crops


def salient_by_crop(saliency: Tensor, crops: int, size: int, stride: int) -> tuple[Tensor, Tensor]:
    """The most salient tokens tile after tile, in descending order inside each tile only.

    Args:
        saliency: [B, N].
        size: tokens taken of each tile.
        stride: see STRIDE.

    Returns:
        Scores [B, C * size] and their indices, int64.
    """
    inside = saliency.float().unflatten(1, (crops, -1))
    score, place = inside.sort(dim=2, descending=True, stable=True)
    start = torch.arange(crops, device=saliency.device)[:, None] * stride
    return score[:, :, :size].flatten(1), (place[:, :, :size] + start).flatten(1)


def released_tokens(
    text: Tensor, saliency: Tensor, crops: int, budget: int, floor: float, mix: str = "adaptive", stride: int = STRIDE
) -> Tensor:
    """[B, V] indices, ascending; a token that both rankings choose is in it twice (B4).

    Args:
        text: [B, N] scores by text; unused with "cls".
        saliency: [B, N]; unused with "t2i".
        floor: share of V forced from each ranking; for saliency these come from the first tiles, not the best (B3).
        mix: "adaptive", "t2i" or "cls".
    """
    total = released_count(budget, crops, mix)
    if mix == "t2i":
        return keep_top(text, total)
    value, place = salient_by_crop(saliency, crops, total // crops, stride)
    if mix == "cls":
        return place.sort(dim=1).values
    forced = forced_count(total, floor)
    rest, again = ordered(value[:, forced:])
    value = torch.cat([value[:, :forced], rest], 1)
    place = torch.cat([place[:, :forced], place[:, forced:].gather(1, again)], 1)
    text_value, text_place = ordered(text)
    count = adaptive_count(text_value, value, total, floor).unsqueeze(1)
    rank = torch.arange(total, device=place.device)
    # Tokens that are not chosen get an index after all tokens, so that sorting moves them out of the first V.
    nothing = text.shape[1]
    chosen = torch.cat(
        [
            text_place[:, :total].masked_fill(rank >= count, nothing),
            place.masked_fill(rank >= total - count, nothing),
        ],
        1,
    )
    return chosen.sort(dim=1).values[:, :total]
