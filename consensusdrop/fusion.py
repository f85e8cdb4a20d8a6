"""Consensus ranking: fuse encoder saliency and cross-modal saliency into one score.

Paper: https://arxiv.org/abs/2602.00946 (abstract only)
Official code read: none was released.
Differs from it: unknown; the rule is a named choice, `docs/consensusdrop.md` compares them.

The encoder saliency `v` is dense and the cross-modal saliency `c` is sparse, so their values are not on one scale, but
their ranks are. `alpha` is the weight of the encoder: 1 is encoder only, 0 is cross-modal only. Shapes: [B, N] float32.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from llava.reduction import ranks

TINY = 1e-12


def rank01(score: Tensor, top: int = 0) -> Tensor:
    """Ranks scaled to [0, 1], 1 for the highest score; equal scores rank by lower index.

    Args:
        top: rank only the `top` highest, all others get 0 (the low values of a sparse score are noise); 0 ranks all.
    """
    total = score.shape[1]
    counted = top or total
    return (1 - ranks(score) / max(counted - 1, 1)).clamp(min=0)


def _rank(v: Tensor, c: Tensor, alpha: float, cross_top: int, **_: object) -> Tensor:
    """F1: convex combination of ranks, times a common denominator.

    Returns:
        [B, N] int64: whole numbers, so that equal sums of ranks are equal and the lower index is kept on every device.
    """
    share = Fraction(alpha).limit_denominator(1_000_000)
    last, last_cross = v.shape[1] - 1, max((cross_top or v.shape[1]) - 1, 1)
    rank, rank_cross = ranks(torch.stack([v, c])).unbind()
    encoder, cross = last - rank, (last_cross - rank_cross).clamp(min=0)
    return share.numerator * last_cross * encoder + (share.denominator - share.numerator) * max(last, 1) * cross


def _raw(v: Tensor, c: Tensor, alpha: float, **_: object) -> Tensor:
    """Control: weighted mean of the raw values.

    A product of softmaxes, softmax(v)^alpha softmax(c)^(1 - alpha), keeps the same tokens: its logarithm is this mean
    and a constant. A common temperature divides both values and changes nothing.
    """
    return alpha * v + (1 - alpha) * c


def _minmax(v: Tensor, c: Tensor, alpha: float, **_: object) -> Tensor:
    """F2: weighted mean of the scores scaled to [0, 1]."""

    def stretch(score: Tensor) -> Tensor:
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        return (score - low) / (high - low).clamp(min=TINY)

    return alpha * stretch(v) + (1 - alpha) * stretch(c)


def _zscore(v: Tensor, c: Tensor, alpha: float, **_: object) -> Tensor:
    """F3: weighted mean of the scores scaled to mean 0 and standard deviation 1."""

    def standard(score: Tensor) -> Tensor:
        centred = score - score.mean(1, keepdim=True)
        return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=TINY)

    return alpha * standard(v) + (1 - alpha) * standard(c)


def _log(v: Tensor, c: Tensor, alpha: float, temperature: float, **_: object) -> Tensor:
    """F4: weighted product of the two distributions, the cross-modal one sharpened by `temperature` < 1."""
    normal = lambda score: (score / score.sum(1, keepdim=True).clamp(min=TINY)).clamp(min=TINY)  # noqa: E731
    return alpha * normal(v).log() + (1 - alpha) * normal(c).log() / temperature


def _rrf(v: Tensor, c: Tensor, alpha: float, rrf_k: float, **_: object) -> Tensor:
    """F5: reciprocal rank fusion, 1 / (k + rank)."""
    total = v.shape[1]

    def reciprocal(score: Tensor) -> Tensor:
        rank = (1 - rank01(score)) * (total - 1) + 1
        return 1 / (rrf_k + rank)

    return alpha * reciprocal(v) + (1 - alpha) * reciprocal(c)


def _cross_first(v: Tensor, c: Tensor, alpha: float, keep: int, **_: object) -> Tensor:
    """F6: the tokens with the highest cross-modal saliency first, then the encoder's, up to `keep` tokens."""
    head = round((1 - alpha) * keep)
    chosen = rank01(c) > 1 - (head - 0.5) / max(c.shape[1] - 1, 1) if head else torch.zeros_like(c, dtype=torch.bool)
    return rank01(v) + 2 * chosen.float()


def _gate(v: Tensor, c: Tensor, gate_beta: float, **_: object) -> Tensor:
    """F7: the encoder's score times 1 + gate_beta * (cross-modal saliency / its mean). `alpha` is not used."""
    return v * (1 + gate_beta * c / c.mean(1, keepdim=True).clamp(min=TINY))


FUSIONS: dict[str, Callable[..., Tensor]] = {
    "rank": _rank,
    "raw": _raw,
    "minmax": _minmax,
    "zscore": _zscore,
    "log": _log,
    "rrf": _rrf,
    "cross_first": _cross_first,
    "gate": _gate,
}


def fuse(v: Tensor, c: Tensor | None, rule: str, keep: int, **choices: float) -> Tensor:
    """Consensus score, higher is kept.

    Args:
        v: [B, N] encoder saliency, at least 0.
        c: [B, N] cross-modal saliency, at least 0; None ranks by the encoder alone.
        rule: a key of FUSIONS.
        keep: tokens that will be retained (used by cross_first).
        choices: alpha, cross_top, temperature, rrf_k, gate_beta.
    """
    if c is None:
        return rank01(v)
    return FUSIONS[rule](v, c, keep=keep, **choices)
