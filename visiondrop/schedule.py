"""How many tokens each stage of VisionDrop keeps: the released schedule, and a geometric rule for other budgets.

Paper: https://arxiv.org/abs/2506.22283
Official code read: Ruixxxx/VisionDrop@f7a9444, README.md and scripts/v1_5/visiondrop_eval
Differs from it: only an average of 32 is published; the rule for other budgets is ours, see docs/visiondrop.md.

Stages cut the decoder into segments; the first starts at layer 0 with the tokens that the encoder stage keeps.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

# (dominant, contextual) tokens of the four segments; CLS is one of the 42.
PUBLISHED = ((42, 6), (30, 5), (22, 4), (16, 3))
PUBLISHED_BUDGET, PUBLISHED_START, PUBLISHED_RATIO = 32, 1.5, 7
REACH = 3  # how far a count may move from the geometric value to make the mean exact


def segment_widths(stages: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers in each segment, for stages before the layers `stages`."""
    edges = (0, *stages, depth)
    return tuple(stop - start for start, stop in pairwise(edges))


def split(total: int, ratio: int) -> tuple[int, int]:
    """(dominant, contextual) tokens of `total`.

    Args:
        ratio: dominant tokens for one contextual; 0 makes all of them dominant.

    Ratio 7 gives the published pairs: ceil(total / 8) contextual tokens. At least one token is dominant.
    """
    contextual = min(-(-total // (ratio + 1)), total - 1) if ratio else 0
    return total - contextual, contextual


def plan(
    budget: int, widths: tuple[int, ...], most: int, rule: str, start: float, ratio: int
) -> tuple[tuple[int, int], ...]:
    """(dominant, contextual) tokens of every segment; their sums have the mean `budget` over layers.

    Args:
        budget: mean tokens per layer, below `most`.
        widths: layers in each segment.
        most: tokens of the unreduced image.
        rule: "published" uses a multiple of the released schedule where there is one, else the geometric rule.
        start: tokens of the first segment as a multiple of the budget.
        ratio: dominant tokens for one contextual.
    """
    if rule == "published" and start == PUBLISHED_START and has_published(budget, widths, most):
        times = budget // PUBLISHED_BUDGET
        pairs = tuple((times * dominant, times * contextual) for dominant, contextual in PUBLISHED)
        return pairs if ratio == PUBLISHED_RATIO else tuple(split(sum(pair), ratio) for pair in pairs)
    return tuple(split(total, ratio) for total in geometric(budget, widths, most, start))


def has_published(budget: int, widths: tuple[int, ...], most: int) -> bool:
    """Whether a multiple of the released schedule has this mean: four equal segments and a multiple of 32."""
    equal = len(widths) == len(PUBLISHED) and len(set(widths)) == 1
    return equal and budget % PUBLISHED_BUDGET == 0 and budget * PUBLISHED_START <= most


def geometric_means(budget: int, widths: tuple[int, ...], most: int, start: float) -> tuple[float, ...]:
    """Tokens of every segment before rounding: first * lambda^k, at least 1, with the mean `budget` over layers.

    The first segment gets `start` times the budget, or less if the image has fewer tokens or if no token would be left
    for later layers.
    """
    layers = sum(widths)
    spare = 1 + (budget - 1) * layers / widths[0]  # then every other layer has one token
    first = min(start * budget, most, spare)

    def values(factor: float) -> tuple[float, ...]:
        return tuple(max(1.0, first * factor**k) for k in range(len(widths)))

    low, high = 0.0, 1.0
    for _ in range(100):  # bisection: the mean grows with the factor
        middle = (low + high) / 2
        mean = sum(width * value for width, value in zip(widths, values(middle), strict=True)) / layers
        low, high = (middle, high) if mean < budget else (low, middle)
    return values(high)


@lru_cache
def geometric(budget: int, widths: tuple[int, ...], most: int, start: float) -> tuple[int, ...]:
    """The non-increasing integers nearest to `geometric_means` whose mean over layers is the budget.

    Among all counts within REACH of the geometric values, those with the mean nearest to the budget, and among these
    the ones with the least squared distance. The mean is exact unless the segment widths make that impossible.
    """
    ideal = geometric_means(budget, widths, most, start)
    # (tokens over all layers so far, last count) -> (squared distance, counts)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, most): (0.0, ())}
    for value, width in zip(ideal, widths, strict=True):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (total, last), (cost, counts) in best.items():
            for count in range(max(1, math.floor(value) - REACH), min(last, math.ceil(value) + REACH) + 1):
                key = (total + width * count, count)
                found = (cost + (count - value) ** 2, (*counts, count))
                longer[key] = min(found, longer.get(key, found))
        best = longer
    wanted = budget * sum(widths)
    return min((abs(total - wanted), *found) for (total, _), found in best.items())[-1]
