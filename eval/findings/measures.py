"""Measures of a score over the patches of a picture: where it lies, how well it finds an object, how broad it is.

Shapes: S scores (any number of leading axes), N patches in raster order. All values are float64.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def auroc(scores: Array, mask: Mask, among: Mask | None = None) -> Array:
    """[...] chance that a patch of the mask scores above another patch; equal scores count one half.

    Args:
        scores: [..., N].
        mask: [N], some patches in it and some not.
        among: [N], patches that count; None for all.
    """
    if among is not None:
        scores, mask = scores[..., among], mask[among]
    return auroc_of_ranks(rankdata(scores, axis=-1), mask)


def auroc_of_ranks(ranks: Array, mask: Mask) -> Array:
    """`auroc` of scores whose ranks 1 .. N (1 for the lowest) are known."""
    inside, outside = int(mask.sum()), int((~mask).sum())
    return (ranks[..., mask].sum(-1) - inside * (inside + 1) / 2) / (inside * outside)


def average_precision(scores: Array, mask: Mask) -> Array:
    """[...] mean, over the patches of the mask, of the precision at their rank; its value by chance is the area."""
    hits = mask[np.argsort(-scores, axis=-1, kind="stable")]
    precision = hits.cumsum(-1) / np.arange(1, scores.shape[-1] + 1)
    return (precision * hits).sum(-1) / mask.sum()


def chosen(scores: Array, count: int) -> Mask:
    """[..., N] bool, the `count` highest, equal scores by the lower index as everywhere in the repository."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    found = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(found, order[..., :count], True, axis=-1)
    return found


def recall(scores: Array, mask: Mask, count: int) -> Array:
    """[...] share of the patches of the mask that are among the `count` highest scores."""
    return chosen(scores, count)[..., mask].mean(-1)


def share(scores: Array) -> Array:
    """[..., N] scores of at least 0, scaled to sum 1."""
    return scores / scores.sum(-1, keepdims=True)


def lift(scores: Array, mask: Mask) -> Array:
    """[...] share of the score inside the mask, divided by the mask's share of the area; 1 is chance."""
    return share(scores)[..., mask].sum(-1) / mask.mean()


def effective_share(scores: Array) -> Array:
    """[...] exp(entropy) / N of the score as a distribution: 1 if uniform, 1 / N if on one patch."""
    p = share(scores)
    return np.exp(-(p * np.log(np.clip(p, 1e-300, None))).sum(-1)) / scores.shape[-1]


def gini(scores: Array) -> Array:
    """[...] Gini coefficient: 0 if uniform, 1 - 1 / N if on one patch."""
    ordered, count = np.sort(scores, -1), scores.shape[-1]
    weight = 2 * np.arange(1, count + 1) - count - 1
    return (ordered * weight).sum(-1) / (count * ordered.sum(-1))


def spearman(a: Array, b: Array) -> Array:
    """[...] rank correlation of two scores [..., N] (one of them may lack leading axes)."""
    x, y = rankdata(a, axis=-1), rankdata(b, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), norm, out=np.zeros(np.shape(norm)), where=norm > 0)


def overlap(a: Array, b: Array, count: int) -> Array:
    """[...] share of the `count` highest of a that are among the `count` highest of b; by chance count / N."""
    return (chosen(a, count) & chosen(b, count)).sum(-1) / count


def mean_pairwise(scores: Array) -> float:
    """Mean rank correlation over all pairs of the Q rows of [Q, N]; 1 if all rows rank alike. Needs two rows."""
    rows = len(scores)
    ranks = rankdata(scores, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    norms = np.sqrt((ranks * ranks).sum(-1, keepdims=True))
    unit = np.divide(ranks, norms, out=np.zeros_like(ranks), where=norms > 0)
    product = unit @ unit.T
    return float((product.sum() - np.trace(product)) / (rows * (rows - 1)))
