"""Budgets of methods that reduce between decoder layers: how many visual tokens enter each layer.

The budget is the mean over layers of the visual tokens that enter a layer. Papers give stages for a decoder of 32 (or
40) layers; they are scaled in proportion to another depth.
"""

from collections.abc import Callable, Sequence

from llava.errors import UserError


def scaled_layers(stages: Sequence[int], reference: int, depth: int) -> tuple[int, ...]:
    """Scale stages from a decoder of `reference` layers to one of `depth`: at least 1, strictly increasing.

    Raises:
        UserError: the decoder has too few layers for that many stages.
    """
    found: list[int] = []
    for stage in stages:
        place = max(1, int(stage * depth / reference + 0.5))
        found.append(max(place, found[-1] + 1) if found else place)
    if found and found[-1] >= depth:
        raise UserError(
            f"Stages before layers {', '.join(map(str, stages))} of {reference} do not fit into {depth} decoder "
            "layers; name layers of this model with the method's `layers` option."
        )
    return tuple(found)


def tokens_by_layer(before: int, stages: Sequence[int], counts: Sequence[int], depth: int) -> tuple[int, ...]:
    """Visual tokens entering each layer: `before` up to the first stage, then `counts[i]` from `stages[i]` on."""
    tokens, place = [], before
    changes = dict(zip(stages, counts, strict=True))
    for layer in range(depth):
        place = changes.get(layer, place)
        tokens.append(place)
    return tuple(tokens)


def proportional(first: int, parts: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each stage in proportion to `parts`, `first` at the first stage: rounded down, at least 1.

    Parts 4, 2, 1 halve the tokens at each stage.
    """
    return tuple(max(1, first * part // parts[0]) for part in parts)


def largest_within(budget: int, most: int, total_of: Callable[[int], int], depth: int) -> int | None:
    """The x in 1..most for which `total_of(x)`, a sum over layers that grows with x, is nearest to the budget.

    Returns:
        x whose mean over `depth` layers is nearest to `budget` (the smaller x on a tie), or None if even that one is
        off by more than half a token.
    """
    best = min(range(1, most + 1), key=lambda x: (abs(total_of(x) - budget * depth), x))
    return best if abs(total_of(best) - budget * depth) <= depth / 2 else None


def refuse_budget(name: str, budget: int, smallest: float, largest: float, why: str, instead: str = "") -> UserError:
    """The error for a budget that a method's structure cannot meet.

    Args:
        smallest, largest: means over layers that it can meet on this model.
        instead: one more sentence, on what to do about it.
    """
    return UserError(
        f"{name} cannot reach a mean of {budget} visual tokens per layer: {why}. "
        f"On this model it reaches {smallest:.4g} to {largest:.4g}." + (f" {instead}" if instead else "")
    )
