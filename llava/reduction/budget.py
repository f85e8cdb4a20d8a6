"""Turn a budget into tokens per tile and tokens per decoder layer. (llava/budget.py says how a budget is written.)

The budget is the mean over decoder layers of the visual tokens that enter a layer. Papers give stages for a decoder of
32 (or 40) layers; they are scaled in proportion to another depth.

An image with several tiles (the base image and the tiles of LLaVA-NeXT, or the frames of a video) has one budget. The
option `tile_budget` names the rule that splits it:

* "each": evenly, the convention of most papers (640 tokens are 128 for each of five tiles). Tokens that do not fit into
  a tile with too few patches go to the other tiles, so that the image's budget is met exactly.
* "thumbnail": the base image gets its even share; the tiles share the rest in proportion to the CLS attention of the
  base image to the region that each tile shows.
* "global": all patches are ranked together.

An image with no more tokens than the budget is not reduced. A method chooses among patches only: class tokens and
newline tokens are dropped, or, with newlines=keep, newline tokens are kept and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from llava.errors import MethodError, UserError
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, spec_of

AnyReducer = TypeVar("AnyReducer", bound=Reducer)


# Tokens per decoder layer.


def scaled_layers(stages: Sequence[int], reference: int, depth: int) -> tuple[int, ...]:
    """Scale stages from a decoder of `reference` layers to one of `depth`: at least 1, strictly increasing.

    Raises:
        UserError: the decoder has too few layers for that many stages.
    """
    scaled: list[int] = []
    for stage in stages:
        place = max(1, int(stage * depth / reference + 0.5))
        scaled.append(max(place, scaled[-1] + 1) if scaled else place)
    if scaled and scaled[-1] >= depth:
        raise UserError(
            f"Stages before layers {', '.join(map(str, stages))} of {reference} do not fit into {depth} decoder layers."
        )
    return tuple(scaled)


def tokens_by_layer(before: int, stages: Sequence[int], counts: Sequence[int], depth: int) -> tuple[int, ...]:
    """Visual tokens entering each layer: `before` up to the first stage, then `counts[i]` from `stages[i]` on."""
    tokens, entering = [], before
    changes = dict(zip(stages, counts, strict=True))
    for layer in range(depth):
        entering = changes.get(layer, entering)
        tokens.append(entering)
    return tuple(tokens)


def refuse_budget(name: str, budget: int, smallest: float, largest: float, why: str, instead: str = "") -> UserError:
    """The error for a budget that a method's structure cannot meet.

    Args:
        smallest, largest: the lowest and highest mean over layers that it can meet on this model.
        instead: one more sentence that says what to do about it.
    """
    return UserError(
        f"{name} cannot reach a mean of {budget} visual tokens per layer: {why}. "
        f"On this model it reaches {smallest:.4g} to {largest:.4g}." + (f" {instead}" if instead else "")
    )


@dataclass(frozen=True)
class ImagePlan:
    """What is known about reducing images of one size before any of them is processed.

    Attributes:
        spec: the model with the tokens and tiles of one of these images.
        fits: True if the image has tiles or newline tokens and no more tokens than its budget. Then it is not reduced.
        tokens: visual tokens that are planned to enter each layer; None if that depends on the image.
        asked: visual tokens that the budget asks for, as a mean over layers, whatever the method plans: the number or
            the ratio of this image's tokens, and at most what the image has.
    """

    spec: ModelSpec
    fits: bool
    tokens: tuple[int, ...] | None
    asked: int


@lru_cache(maxsize=1024)
def plan_image(reducer: Reducer, model: ModelSpec, layout: TokenLayout) -> ImagePlan:
    """The plan of a method for all images of a model with one token layout.

    It is cached, and shared by all instances with the same options, so it does not hold the instance.
    """
    spec = spec_of(model, layout)
    own, fits = reducer.for_image(spec), fits_budget(reducer, spec)
    most = spec.visual_tokens
    if chooses_patches(own) and not fits:
        # Class tokens are never kept, newline tokens only with newlines=keep.
        most = spec.patches + (spec.newlines if own.newlines == "keep" else 0)
    return ImagePlan(spec, fits, planned(reducer, spec), min(own.budget, most))


def planned(reducer: Reducer, spec: ModelSpec) -> tuple[int, ...] | None:
    """Visual tokens of one image that are planned to enter each layer; None if that depends on the image."""
    if fits_budget(reducer, spec):
        return (spec.visual_tokens,) * spec.layers
    plans = [part.tokens_per_layer(own) for part, own in over_crops(reducer, spec)]
    known = [plan for plan in plans if plan is not None]
    if len(known) < len(plans):
        return None
    kept = spec.newlines if chooses_patches(reducer) and reducer.newlines == "keep" else 0
    plan = tuple(kept + sum(layer) for layer in zip(*known, strict=True))
    if second := reducer.for_image(spec).second:
        second, spec = in_decoder(second, spec, plan[0])
        return second.tokens_per_layer(spec)
    return plan


def bounds(reducer: Reducer, spec: ModelSpec) -> tuple[float, float]:
    """The least and the most visual tokens of one image, as a mean over layers; equal where there is a plan."""
    if (plan := planned(reducer, spec)) is not None:
        return (sum(plan) / len(plan),) * 2
    if reducer.parts:
        return 1.0, float(spec.visual_tokens)
    kept = spec.newlines if chooses_patches(reducer) and reducer.newlines == "keep" else 0
    least, most = zip(*(part.bounds(own) for part, own in over_crops(reducer, spec)), strict=True)
    return kept + sum(least), kept + sum(most)


def in_decoder(second: Reducer, spec: ModelSpec, entering: int) -> tuple[Reducer, ModelSpec]:
    """The second method of a composition, and the model as it finds it.

    Args:
        second: at the budget of the image.
        entering: number of tokens that the first method leaves of the image; they are in one row.
    """
    own = replace(spec, visual_tokens=entering, layout=PatchGrid(1, entering), crops=(), newlines=0)
    return second.with_budget(min(second.budget, entering)), own


@lru_cache(maxsize=256)
def require(reducer: Reducer, spec: ModelSpec) -> None:
    """Raise UserError if the method cannot run on this model at its budget."""
    if reducer.parts and reducer.second:
        reducer.check(spec)  # calls this function for each part
        return
    if reducer.blind:
        return  # no budget that could be wrong
    reducer = reducer.for_image(spec)
    parts = {(reducer, spec)}
    if spec.crops or spec.newlines:
        if not 1 <= reducer.budget <= spec.visual_tokens:
            raise UserError(
                f"The budget must be 1 to {spec.visual_tokens} (visual tokens of this model), got {reducer.budget}."
            )
        tiles = len(spec.crops) if divided(reducer, len(spec.crops)) else 1
        least = tiles + (spec.most_newlines if chooses_patches(reducer) and reducer.newlines == "keep" else 0)
        if reducer.budget < least:
            raise UserError(
                f"{reducer.name} needs a budget of at least {least} here, got {reducer.budget}: one token for each of "
                f"{tiles} tiles, and all newline tokens where they are kept "
                f"({reducer.name}.newlines=drop leaves them out)."
            )
        if not reducer.acts_in.isdisjoint(("tower", "input_grid")):
            refuse_unequal_crops(reducer, tiles, not spec.newlines and len(set(spec.crops)) == 1)
        parts = set(over_crops(reducer, spec))
    for part, own in parts:
        part.check(own)
        plan: Any = part.tokens_per_layer(own)
        if plan is not None and (not isinstance(plan, tuple) or len(plan) != own.layers):
            got = f"{len(plan)} numbers" if isinstance(plan, tuple) else f"a {type(plan).__name__}"
            raise MethodError(
                f"{part.name}.tokens_per_layer: must return None or a tuple of {own.layers} numbers, one for each "
                f"decoder layer, got {got}."
            )


# Tokens per tile.


def chooses_patches(reducer: Reducer) -> bool:
    """Whether the method acts before the decoder, where tiles can be told apart."""
    return not reducer.acts_in.isdisjoint(("input_grid", "tower", "encoder", "prompt"))


def divided(reducer: Reducer, crops: int) -> bool:
    """Whether an image of so many tiles is reduced tile by tile."""
    return crops > 1 and reducer.tile_budget != "global" and chooses_patches(reducer)


def fits_budget(reducer: Reducer, spec: ModelSpec) -> bool:
    """Whether an image with tiles or newline tokens has no more tokens than its budget, and is not reduced."""
    several = bool(spec.crops or spec.newlines)
    return several and reducer.for_image(spec).budget >= spec.visual_tokens


def for_patches(reducer: Reducer, newlines: int) -> int:
    """The part of the budget that is left for patches."""
    return reducer.budget - (newlines if reducer.newlines == "keep" else 0)


def over_crops(reducer: AnyReducer, spec: ModelSpec) -> list[tuple[AnyReducer, ModelSpec]]:
    """The method and the model spec for each tile, or for all tiles together; the budget is split evenly."""
    reducer = reducer.for_image(spec).before_decoder(spec)
    if divided(reducer, len(spec.crops)):
        given = split_evenly(for_patches(reducer, spec.newlines), [crop.tokens for crop in spec.crops])
        return [(reducer.with_budget(share), spec.crop(number)) for number, share in enumerate(given) if share]
    if chooses_patches(reducer) and spec.patches < spec.visual_tokens:
        left = min(for_patches(reducer, spec.newlines), spec.patches)
        return [(reducer.with_budget(left), replace(spec, visual_tokens=spec.patches, newlines=0))]
    return [(reducer.with_budget(min(reducer.budget, spec.visual_tokens)), spec)]


def in_tower(reducer: Reducer, layout: TokenLayout) -> Reducer:
    """The method as it acts on the pixels or inside the tower, at the budget of one tile.

    Raises:
        UserError: the tiles would not all be reduced alike.
    """
    count = len(layout.crops)
    if reducer.acts_in.isdisjoint(("tower", "input_grid")) or (count == 1 and not len(layout.newlines)):
        return reducer
    refuse_unequal_crops(reducer, count, layout.whole)
    return reducer.with_budget(reducer.budget // count)


def refuse_unequal_crops(reducer: Reducer, crops: int, whole: bool) -> None:
    """Raise UserError if a method that acts on pixels or inside the tower cannot treat all tiles alike."""
    if not whole or reducer.budget % crops:
        raise UserError(
            f"{reducer.name} reduces every tile alike inside the tower: it needs whole tiles without newline tokens "
            f"(merge=spatial) and a budget divisible by {crops} tiles, got {reducer.budget}."
        )


def shares(reducer: Reducer, layout: TokenLayout, scores: dict[TowerScore, Tensor]) -> list[int]:
    """Tokens for each tile of one image.

    Args:
        scores: the scores that `tower_scores` names, [tiles, P, ...], of whole tiles before unpadding.
    """
    sizes = [len(crop.patches) for crop in layout.crops]
    budget = for_patches(reducer, len(layout.newlines))
    own = reducer.crop_shares(layout, scores, budget)
    if own is not None:
        return own
    even = split_evenly(budget, sizes)
    if reducer.tile_budget == "each" or layout.tiles is None:
        return even
    seen = covered(layout, scores[TowerScore("cls_attention")][0])
    return [even[0], *split_evenly(budget - even[0], sizes[1:], seen)]


def split_evenly(budget: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
    """Split `budget` in equal parts, or in proportion to `weights`, with at most sizes[i] for part i.

    Tokens that do not fit into a part go to the others in the same proportion. Fractions are cut off, and the remaining
    tokens go one each to the largest fractions, on a tie to the first.
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


def covered(layout: TokenLayout, score: Tensor) -> list[float]:
    """Sum the base image's scores [P] over the region that each tile shows; one number per tile.

    The base image and the stitched, unpadded tiles show the same image, each stretched over its own grid.
    """
    rows, columns = layout.grid
    # Shares become tensor lengths, so the host needs them: the one wait for the device.
    table = score.float().cpu().unflatten(0, (rows, columns))

    def regions(sizes: Sequence[int], length: int) -> list[slice]:
        """Slices of `length` that correspond to adjacent parts of these sizes."""
        ends = [sum(sizes[: index + 1]) * length // max(1, sum(sizes)) for index in range(len(sizes))]
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    heights, widths = layout.tile_sides()
    return [table[row, column].sum().item() for row in regions(heights, rows) for column in regions(widths, columns)]
