"""How a budget is written: as a number of visual tokens, or as a ratio of each image's tokens."""

import os
import re
import sys
from fractions import Fraction
from typing import Any

RETENTION_RATIO = "retention_ratio"
# The controls that have no budget to choose: one keeps every visual token, the other (blind) none.
FULL, BLIND = "full", "none"
WITHOUT_BUDGET = (FULL, BLIND)
COUNT = re.compile(r"[0-9]{1,9}")
RATIO = re.compile(r"(?P<above>[0-9]{1,9})/(?P<below>[0-9]{1,9})|[0-9]*\.[0-9]+(e-[0-9]+)?")


def count_or_ratio(budget: object) -> int | float:
    """A budget as every command line and `llava.reduce` take it.

    Args:
        budget: visual tokens, 64 or "64", or the ratio of each image's tokens to keep, "1/9", 0.111 or "0.111".

    Returns:
        An integer of at least 1, or the ratio as a float above 0 and up to 1.

    Raises:
        ValueError: the budget is neither.
    """
    text = str(budget)
    if COUNT.fullmatch(text) and int(text) >= 1:
        return int(text)
    found = RATIO.fullmatch(text)
    if found and int(found["below"] or 1) > 0:
        ratio = int(found["above"]) / int(found["below"]) if found["above"] else float(text)
        if 0 < ratio <= 1:
            return ratio
    raise ValueError(
        "should be a whole number of visual tokens, 1 or more (64), or a ratio of each image's, above 0 and up to 1 "
        f"(1/9 or 0.111), got {budget!r:.42}"
    )


def or_environment(method: str | None, budget: Any) -> tuple[str | None, Any]:
    """A method and a budget. VTR_METHOD and VTR_BUDGET replace those that are None, and standard error says so.

    Scripts written for LLaVA have no options for them, but the environment can be set before they start.
    """
    given = {"VTR_METHOD": method, "VTR_BUDGET": budget}
    acting = [name for name, value in given.items() if value is None and os.environ.get(name)]
    method, budget = (os.environ[name] if name in acting else value for name, value in given.items())
    if acting:
        asked = " and ".join(f"{name}={os.environ[name]}" for name in acting)
        print(f"{asked} in the environment: method {method or 'full'}, budget {budget or 'none'}.", file=sys.stderr)
    return method, budget


def budget_text(budget: int | None, ratio: float | None = None) -> str:
    """A budget as a person writes it: "64", or for a ratio of each image's tokens "1/9" or "0.35"."""
    if not ratio:
        return str(budget)
    short, simple = f"{ratio:.6g}", Fraction(ratio).limit_denominator(1000)
    return str(simple) if float(short) != ratio and float(simple) == ratio else short


def tokens_of(ratio: float, visual_tokens: int) -> int:
    """How many of an image's tokens a ratio keeps: the nearest number, at least 1."""
    return max(1, int(ratio * visual_tokens + 0.5))
