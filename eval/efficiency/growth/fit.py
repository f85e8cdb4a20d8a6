"""How fast a cost grows: a power of the number of tokens, and the share of the quadratic term."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """What was fitted to positive costs at several numbers of tokens.

    Attributes:
        exponent: e of cost ~ tokens^e over all points.
        last: the same over the last three points, where constant parts weigh least.
        quadratic: share of the term c N^2 of a + b N + c N^2 at the largest N; the terms are not negative, and
            relative errors are fitted.
    """

    exponent: float
    last: float
    quadratic: float


def fit(tokens: Sequence[int], costs: Sequence[float]) -> Fit:
    """Fit costs of three or more numbers of tokens.

    Raises:
        ValueError: fewer points, or a cost that is not positive.
    """
    from scipy.optimize import nnls

    if len(tokens) < 3 or min(costs) <= 0:
        raise ValueError(f"three or more positive costs are needed for a fit, got {list(costs)}")
    place, value = np.asarray(tokens, dtype=float), np.asarray(costs, dtype=float)
    slopes = [float(np.polyfit(np.log(place[-n:]), np.log(value[-n:]), 1)[0]) for n in (len(place), 3)]
    scaled = place / place[-1]
    terms = np.stack([np.ones_like(scaled), scaled, scaled**2], axis=1)
    found, _ = nnls(terms / value[:, None], np.ones_like(value))
    return Fit(slopes[0], slopes[1], float(found[2] / found.sum()))
