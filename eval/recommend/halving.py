"""Successive halving over methods and budgets with paired tests; docs/statistics.md defines each step.

A *loss* is the score of full minus that of a configuration on the same questions, in points of 100. Pictures are the
independent units, and a loss comes as two sums by picture: of full's sample scores minus the configuration's, and of
questions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from eval.metrics import Array
from eval.results.statistics import FEWEST_DECIDING, deciding

# Shares of the pictures at which configurations are dropped.
LOOKS = (1 / 8, 1 / 4, 1 / 2)
# Of the one-sided bounds at a look. They decide what is asked next, not what is recommended.
LOOK_LEVEL = 0.9
POWER = 0.8  # of the loss that a number of questions can show
# If fewer pictures than FEW decide the spread of a loss, and more than MANY questions are about the worst, one that is
# still worse is likely (simulated in lab/bench/recommend.py).
FEW, MANY = 2 * FEWEST_DECIDING, 8

# (configurations, pictures) -> sums [configurations, pictures] of full's sample scores minus those of a configuration,
# on the first pictures.
Ask = Callable[[Sequence[int], int], Array]


@dataclass(frozen=True)
class Look:
    """What is known of the configurations that were asked about the first `pictures` pictures.

    Attributes:
        estimates, lows, highs: configuration -> loss and its one-sided bounds: at a look at LOOK_LEVEL; of the test at
            the end `highs` has the corrected level.
        worse: configurations whose loss is above the tolerated one; nothing more is asked of them.
        kept: what is asked next; at the end what has passed.
    """

    pictures: int
    estimates: dict[int, float]
    lows: dict[int, float]
    highs: dict[int, float]
    worse: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What is recommended.

    Attributes:
        chosen: configuration; None for full.
        looks: the last one is the test on all pictures, if any configuration reached it.
    """

    chosen: int | None
    looks: tuple[Look, ...]


def halve(ask: Ask, asked: Array, costs: Sequence[float], full_cost: float, tolerated: float, level: float) -> Choice:
    """The cheapest configuration whose loss is shown to be at most `tolerated`.

    Args:
        asked: [pictures] number of questions about each picture, in the (shuffled) order in which they are asked.
        costs: of each configuration. Those that cost no less than `full_cost` are not asked, but count as tested.
        tolerated: points.
        level: confidence of the choice; the test at the end shares 1 - level among all configurations.
    """
    pictures, looks = len(asked), list[Look]()
    running = [one for one, cost in enumerate(costs) if cost < full_cost]
    if not running:
        return Choice(None, ())
    for share in LOOKS:
        count = math.ceil(share * pictures)
        look = bounds(ask(running, count), asked[:count], running, LOOK_LEVEL)
        worse = tuple(one for one in running if look.lows[one] > tolerated)
        ranked = sorted(set(running) - {*worse}, key=lambda one: (look.estimates[one] > tolerated, costs[one], one))
        # Without the safest, noise at the first look leaves cheap configurations alone, of which none passes.
        safest = min(running, key=lambda one: (look.highs[one], costs[one], one))
        kept = {safest, *ranked[: math.ceil(len(ranked) / 2)]}
        running = [one for one in running if one in kept]
        looks.append(Look(count, look.estimates, look.lows, look.highs, worse, tuple(running)))
    last = bounds(ask(running, pictures), asked, running, 1 - (1 - level) / len(costs))
    passed = sorted((one for one in running if last.highs[one] <= tolerated), key=lambda one: (costs[one], one))
    looks.append(Look(pictures, last.estimates, last.lows, last.highs, (), tuple(passed)))
    return Choice(passed[0] if passed else None, tuple(looks))


def bounds(lost: Array, asked: Array, names: Sequence[int], level: float) -> Look:
    """The losses of some configurations with one-sided bounds.

    Args:
        lost: [configurations, pictures].
        names: the configurations of the rows.
    """
    rows = dict(zip(names, lost, strict=True))
    return Look(
        len(asked),
        {one: 100 * float(row.sum() / asked.sum()) for one, row in rows.items()},
        {one: -upper_bound(-row, asked, level) for one, row in rows.items()},
        {one: upper_bound(row, asked, level) for one, row in rows.items()},
        (),
        (),
    )


def upper_bound(lost: Array, asked: Array, level: float) -> float:
    """One-sided upper confidence bound of a loss, in points.

    Student's bound of a ratio over pictures. The picture that loses most is counted twice: few pictures lose anything,
    so that a sample easily lacks the worst. Its double loses twice as much, at most all, if it has more than MANY
    questions and fewer than FEW pictures decide the spread. Degrees of freedom are Satterthwaite's, as for intervals.
    If even fewer (FEWEST_DECIDING) decide it, the bound is Clopper and Pearson's for the share of pictures that lose
    something, which is exact for one question per picture and no gains.

    Args:
        lost: [pictures] sums of full's sample scores minus those of the method.
        asked: [pictures] numbers of questions.
    """
    count, loss = len(lost), float(lost.sum() / asked.sum())
    few, worst = deciding(lost - loss * asked), int(np.argmax(lost / asked))
    most = max(0.0, float(lost[worst]))
    double = min(float(asked[worst]), 2 * most) if few < FEW and asked[worst] > MANY else most
    more, questions = np.append(lost, double), np.append(asked, asked[worst])
    total = float(questions.sum())
    shares = (more - more.sum() / total * questions) / total
    if (few := deciding(shares)) < FEWEST_DECIDING:
        losing = int((lost > 0).sum())
        exact = 1.0 if losing == count else float(stats.beta.ppf(level, losing + 1, count - losing))
        return 100 * max(loss, exact)
    freedom = 2 / max(1 / few - 1 / (count + 1), 1e-12)
    error = math.sqrt((shares**2).sum() * (count + 1) / count)
    return 100 * (float(more.sum()) / total + float(stats.t.ppf(level, freedom)) * error)


# -- what a number of questions can show -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What a number of questions can show, from the first of them.

    Attributes:
        changed: p, the share of the questions whose sample score changes, of the configuration in which fewest do.
        design: D, how many times larger the variance of a loss is than if all questions were independent; at least 1.
        shown: the smallest tolerated loss in points that such a configuration is shown to keep, with probability POWER,
            if it loses nothing.
        needed: questions for the tolerated loss.
    """

    changed: float
    design: float
    shown: float
    needed: int


def plan(
    lost: Sequence[Array], about: NDArray[np.int64], questions: int, compared: int, tolerated: float, level: float
) -> Planned:
    """What `questions` questions can show.

    With z the quantiles of the corrected level and of POWER, a loss of 100 (z + z') sqrt(p D / n) points can be shown,
    but never less than the exact bound of n / D independent questions without a loss. One comparison at 95 % has
    z + z' = 2.5. A change and a question are added to those counted for p, since none among few is not p = 0.

    Args:
        lost: for each configuration, [first questions] full's sample score minus the configuration's.
        about: [first questions] number of the question's picture.
        compared: number of configurations among which 1 - level is shared.
    """
    table, error = np.array(lost), (1 - level) / compared
    changed = float(((table != 0).sum(1).min() + 1) / (table.shape[1] + 1))
    apart = table - table.mean(1, keepdims=True)
    by_picture = np.stack([apart[:, about == one].sum(1) for one in np.unique(about)])
    design = max(1.0, float((by_picture**2).sum() / max(1e-12, (apart**2).sum())))
    width = float(stats.norm.isf(error) + stats.norm.ppf(POWER))
    shown = 100 * max(width * math.sqrt(changed * design / questions), 1 - error ** (design / questions))
    exact = design * math.log(error) / math.log(1 - tolerated / 100)
    needed = max(width**2 * changed * design * (100 / tolerated) ** 2, exact)
    return Planned(changed, design, shown, math.ceil(needed - 1e-9))
