"""Split the budget of an image over its tiles (the base image and the tiles of LLaVA-NeXT, or the frames of a video).

The option `crops` names the rule:

* "each": evenly, the convention of most papers (640 tokens are 128 for each of five tiles). What a tile with too few
  patches cannot take goes to the others, so that the image's budget is met exactly.
* "thumbnail": the base image gets its even share; the tiles share the rest in proportion to the CLS attention of the
  base image to the region that each tile shows.
* "global": all patches are ranked together.

An image with no more tokens than the budget is not reduced. A method chooses among patches only: class tokens and
newline tokens are dropped, or, with newlines=keep, newline tokens are kept and counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from llava.errors import MethodError, UserError
from llava.reduction.model_spec import ModelSpec
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import TokenLayout

AnyReducer = TypeVar("AnyReducer", bound=Reducer)


def chooses_patches(reducer: Reducer) -> bool:
    """Whether the method acts before the decoder, where tiles can be told apart."""
    return not reducer.acts_in.isdisjoint(("input_grid", "tower", "encoder", "prompt"))


def divided(reducer: Reducer, crops: int) -> bool:
    """Whether an image of so many tiles is reduced tile by tile."""
    return crops > 1 and reducer.crops != "global" and chooses_patches(reducer)


def untouched(reducer: Reducer, spec: ModelSpec) -> bool:
    """Whether an image with tiles or newline tokens has no more tokens than its budget, and is not reduced."""
    several = bool(spec.crops or spec.newlines)
    return several and reducer.for_picture(spec).budget >= spec.visual_tokens


def for_patches(reducer: Reducer, newlines: int) -> int:
    """The part of the budget that is left for patches."""
    return reducer.budget - (newlines if reducer.newlines == "keep" else 0)


def over_crops(reducer: AnyReducer, spec: ModelSpec) -> list[tuple[AnyReducer, ModelSpec]]:
    """The method and the model spec for each tile, or for all tiles together; the budget is split evenly."""
    reducer = reducer.for_picture(spec)
    if divided(reducer, len(spec.crops)):
        given = deal(for_patches(reducer, spec.newlines), [crop.tokens for crop in spec.crops])
        return [(reducer.sized(share), spec.crop(number)) for number, share in enumerate(given) if share]
    if chooses_patches(reducer) and spec.patches < spec.visual_tokens:
        left = min(for_patches(reducer, spec.newlines), spec.patches)
        return [(reducer.sized(left), replace(spec, visual_tokens=spec.patches, newlines=0))]
    return [(reducer.sized(min(reducer.budget, spec.visual_tokens)), spec)]


def planned(reducer: Reducer, spec: ModelSpec) -> tuple[int, ...] | None:
    """Visual tokens of one image that are planned to enter each layer; None if that depends on the image."""
    if untouched(reducer, spec):
        return (spec.visual_tokens,) * spec.layers
    plans = [sized.tokens_per_layer(part) for sized, part in over_crops(reducer, spec)]
    known = [plan for plan in plans if plan is not None]
    if len(known) < len(plans):
        return None
    kept = spec.newlines if chooses_patches(reducer) and reducer.newlines == "keep" else 0
    return tuple(kept + sum(layer) for layer in zip(*known, strict=True))


@lru_cache(maxsize=256)
def require(reducer: Reducer, spec: ModelSpec) -> None:
    """Raise UserError if the method cannot run on this model at its budget."""
    reducer = reducer.for_picture(spec)
    if not spec.crops and not spec.newlines:
        check(reducer, spec)
        return
    if not 1 <= reducer.budget <= spec.visual_tokens:
        raise UserError(
            f"The budget must be 1 to {spec.visual_tokens} (visual tokens of this model), got {reducer.budget}."
        )
    parts = len(spec.crops) if divided(reducer, len(spec.crops)) else 1
    least = parts + (spec.most_newlines if chooses_patches(reducer) and reducer.newlines == "keep" else 0)
    if reducer.budget < least:
        raise UserError(
            f"{reducer.name} needs a budget of at least {least} here, got {reducer.budget}: one token for each of "
            f"{parts} tiles, and all newline tokens where they are kept ({reducer.name}.newlines=drop leaves them out)."
        )
    if not reducer.acts_in.isdisjoint(("tower", "input_grid")):
        refuse_unequal_crops(reducer, parts, not spec.newlines and len(set(spec.crops)) == 1)
    for sized, part in set(over_crops(reducer, spec)):
        check(sized, part)


def check(reducer: Reducer, spec: ModelSpec) -> None:
    """`Reducer.check`, and that the plan has a number for every decoder layer."""
    reducer.check(spec)
    plan: Any = reducer.tokens_per_layer(spec)
    if plan is not None and (not isinstance(plan, tuple) or len(plan) != spec.layers):
        found = f"{len(plan)} numbers" if isinstance(plan, tuple) else f"a {type(plan).__name__}"
        raise MethodError(
            f"{reducer.name}.tokens_per_layer: must return None or a tuple of {spec.layers} numbers, one for each "
            f"decoder layer, got {found}."
        )


def in_tower(reducer: Reducer, arrangement: TokenLayout) -> Reducer:
    """The method as it acts on the pixels or inside the tower, at the budget of one tile.

    Raises:
        UserError: the tiles would not all be reduced alike.
    """
    if reducer.acts_in.isdisjoint(("tower", "input_grid")):
        return reducer
    count = len(arrangement.crops)
    if count == 1 and not len(arrangement.newlines):
        return reducer
    refuse_unequal_crops(reducer, count, arrangement.whole)
    return reducer.sized(reducer.budget // count)


def refuse_unequal_crops(reducer: Reducer, crops: int, whole: bool) -> None:
    """Raise UserError where a method that acts on pixels or inside the tower cannot treat all tiles alike."""
    if not whole or reducer.budget % crops:
        raise UserError(
            f"{reducer.name} reduces every tile alike inside the tower: it needs whole tiles without newline tokens "
            f"(merge=spatial) and a budget divisible by {crops} tiles, got {reducer.budget}."
        )


def shares(reducer: Reducer, arrangement: TokenLayout, scores: dict[TowerScore, Tensor]) -> list[int]:
    """Tokens for each tile of one image.

    Args:
        scores: those of `tower_scores`, [tiles, P, ...], of whole tiles before unpadding.
    """
    sizes = [len(crop.patches) for crop in arrangement.crops]
    budget = for_patches(reducer, len(arrangement.newlines))
    own = reducer.crop_shares(arrangement, scores, budget)
    if own is not None:
        return own
    if reducer.crops == "each" or arrangement.tiles is None:
        return deal(budget, sizes)
    first = deal(budget, sizes)[0]
    seen = covered(arrangement, scores[TowerScore("cls_attention")][0])
    return [first, *deal(budget - first, sizes[1:], seen)]


def deal(budget: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
    """Split `budget` in proportion to `weights` (equal if None), at most sizes[i] to each.

    What one cannot take goes to the others in the same proportion. Fractions are cut off; the tokens that remain go
    one each to the largest fractions, on a tie to the first.
    """
    weights = [1.0] * len(sizes) if weights is None else list(weights)
    left, given = min(budget, sum(sizes)), [0] * len(sizes)
    open_ = [i for i, size in enumerate(sizes) if size]
    while open_:
        total = sum(weights[i] for i in open_)
        quota = {i: left * weights[i] / total if total > 0 else left / len(open_) for i in open_}
        full = [i for i in open_ if quota[i] >= sizes[i]]
        if not full:
            break
        for i in full:
            given[i] = sizes[i]
            left -= sizes[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        given[i] = int(quota[i])
        left -= given[i]
    for i in sorted(open_, key=lambda i: (given[i] - quota[i], i))[:left]:
        given[i] += 1
    return given


def covered(arrangement: TokenLayout, score: Tensor) -> list[float]:
    """Sum of the base image's scores [P] over the region that each tile shows.

    The base image and the stitched, unpadded tiles show the same image, each stretched over its own grid.
    """
    rows, columns = arrangement.grid
    # Shares become tensor lengths, so the host needs them: the one wait for the device.
    table = score.float().cpu().unflatten(0, (rows, columns))
    heights, widths = arrangement.tile_sides()
    sums = [
        table[_part(heights, row, rows), _part(widths, column, columns)].sum()
        for row in range(len(heights))
        for column in range(len(widths))
    ]
    return [value.item() for value in sums]


def _part(sizes: Sequence[int], index: int, length: int) -> slice:
    """The slice of `length` that corresponds to the index-th of adjacent parts of these sizes."""
    before, total = sum(sizes[:index]), max(1, sum(sizes))
    return slice(before * length // total, (before + sizes[index]) * length // total)
