"""Tokens needed: the smallest measured budget at which a method is shown to keep 99 % of the full model's score.

Budgets are tested from the largest to the smallest, each at the same level, and the first one that fails ends the
sequence (fixed-sequence testing). The probability that a budget below the share is named is then at most the level,
without a correction for the number of budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from eval.metrics import SufficientStatistics
from eval.results.statistics import RESAMPLES
from eval.statistics.noninferiority import lower_bound, p_value
from eval.statistics.pairs import pair
from llava.errors import UserError

SHARE, LEVEL = 0.99, 0.05


@dataclass(frozen=True)
class BudgetTest:
    """One budget against the full model.

    Attributes:
        of_full: score in percent of that of the full model.
        low: one-sided lower bound of `of_full` in percent, at the level of the test.
        p: of "at most the share", for this budget alone.
        passed: whether `p` is at most the level here and at all larger measured budgets.
    """

    of_full: float
    low: float
    p: float
    passed: bool


@dataclass(frozen=True)
class TokensNeeded:
    """The answer and the tests behind it.

    Attributes:
        tokens: None where the largest budget already fails.
        tests: budget -> its test, from the largest budget down.
    """

    tokens: int | None
    share: float
    level: float
    tests: dict[int, BudgetTest]

    @property
    def text(self) -> str:
        """ "192", or "more than 448"."""
        return f"more than {max(self.tests):,}" if self.tokens is None else f"{self.tokens:,}"


def tokens_needed(
    full: SufficientStatistics,
    by_budget: Mapping[int, SufficientStatistics],
    share: float = SHARE,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TokensNeeded:
    """The smallest budget from which on the score is shown to be more than `share` of the full model's.

    Args:
        by_budget: visual tokens -> the method's score on the same questions.
        level: probability of naming a budget at which the score is at most the share.

    Raises:
        UserError: no budget, other questions, or a full model that scores 0.
    """
    if not by_budget:
        raise UserError("Tokens needed: at least one measured budget is needed.")
    if not 0 < share <= 1 or not 0 < level < 1:
        raise UserError(
            f"The share should be above 0 and up to 1, and the level between 0 and 1; got {share}, {level}."
        )
    tests: dict[int, BudgetTest] = {}
    tokens: int | None = None
    going_on = True
    for budget in sorted(by_budget, reverse=True):
        pairs = pair(by_budget[budget], full)
        of_method, of_full = map(float, pairs.scores(pairs.counts))
        if of_full <= 0:
            raise UserError(f"The full model scores {of_full:g} on these questions; a share of that says nothing.")
        p = p_value(pairs, share, resamples, seed)
        going_on = going_on and p <= level
        low = lower_bound(pairs, level, share if p <= level else None, resamples, seed)
        tests[budget] = BudgetTest(100 * of_method / of_full, 100 * low, p, going_on)
        tokens = budget if going_on else tokens
    return TokensNeeded(tokens, share, level, tests)
