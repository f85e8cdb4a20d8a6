"""Base class of the baselines that drop visual tokens before some decoder layers, in one or several stages.

The number of tokens that the first stage keeps determines those of the later stages. It is chosen so that the mean over
layers of the visual tokens that enter a layer equals the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from llava.reduction import (
    DecoderState,
    ModelSpec,
    Reducer,
    Reduction,
    UserError,
    keep_top,
    option,
    refuse_budget,
    scaled_layers,
    tokens_by_layer,
)

REFERENCE = 32  # decoder layers of the papers' models
SCHEDULE = "mean: the budget is the mean over all layers; kept: over the layers after the first stage"


def proportional(first: int, parts: Sequence[int]) -> tuple[int, ...]:
    """Tokens that each stage keeps if the first keeps `first`: in proportion to `parts`, rounded down, at least 1.

    Parts 4, 2, 1 halve the tokens at each stage.
    """
    return tuple(max(1, first * part // parts[0]) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Staged(Reducer):
    """Drops visual tokens before a few decoder layers."""

    known_deviations: ClassVar[dict[str, str]] = {
        "uncounted with schedule=kept": "layers before the drop are not counted, as papers do"
    }

    tile_budget: str = option("global", "ranks the tokens of all tiles together", ("global",))
    schedule: str = option("mean", SCHEDULE, ("mean", "kept"))

    @property
    def published(self) -> tuple[int, ...]:
        """Decoder layers of the stages in a model of 32 layers; a class attribute in a method with one schedule."""
        return ()

    def score(self, state: DecoderState) -> Tensor:
        """[B, N], higher is kept."""
        raise TypeError(f"{type(self).__name__} must define score() or reduce()")

    def reduce(self, state: DecoderState, keep: int) -> Reduction | None:
        """Keep `keep` of the visual tokens, which is fewer than there are."""
        return Reduction(keep_top(self.score(state), keep), state.tokens.shape[1])

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        """Tokens that each stage keeps of an image with `tokens` tokens if the first stage keeps `first`."""
        return (first,)

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        """Tokens that each stage keeps under a schedule that is not fitted to the budget, else None."""
        return None

    def counts(self, keeps: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Visual tokens after each stage, merged ones included, of an image with `tokens` tokens."""
        return tuple(keeps)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return scaled_layers(self.published, REFERENCE, layers)

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        plan(self, spec, exact=True)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        counts = self.counts(plan(self, spec), spec.visual_tokens)
        return tokens_by_layer(spec.visual_tokens, self.decoder_layers(spec.layers), counts, spec.layers)

    def decoder(self, state: DecoderState) -> Reduction | None:
        keep = plan(self, state.spec)[self.decoder_layers(state.spec.layers).index(state.layer)]
        if keep >= state.tokens.shape[1]:
            return None  # this stage has nothing to do
        return self.reduce(state, keep)


def published_counts(method: Staged, spec: ModelSpec, shares: Sequence[float]) -> tuple[int, ...]:
    """Tokens that each stage keeps under a published schedule: shares of all visual tokens, rounded down, at least 1.

    Raises:
        UserError: the mean of the schedule is not the budget.
    """
    keeps = tuple(max(1, int(spec.visual_tokens * share)) for share in shares)
    stages = method.decoder_layers(spec.layers)
    mean = sum(tokens_by_layer(spec.visual_tokens, stages, keeps, spec.layers)) / spec.layers
    if abs(mean - method.budget) > method.rounding:
        raise UserError(
            f"{method.name}.schedule={method.schedule} has a mean of {mean:.4g} visual tokens per layer on this model "
            f"at any budget; ask for a budget of {mean:.0f}, or for schedule=mean, which is fitted to the budget."
        )
    return keeps


@dataclass(frozen=True, kw_only=True)
class OneStage(Staged):
    """Drops visual tokens before one decoder layer; kept tokens keep their position ids."""

    published: ClassVar[tuple[int, ...]] = (2,)

    positions: str = option("original", "position ids after the stage", ("renumber", "original"))
    layer: int = option(0, "decoder layer before which tokens are dropped; 0 for 2 of 32 in proportion", least=0)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        if self.layer >= layers:
            raise UserError(f"{self.name} acts before layer {self.layer}; this decoder has {layers} layers.")
        return (self.layer,) if self.layer else super().decoder_layers(layers)


@lru_cache(maxsize=256)
def plan(method: Staged, spec: ModelSpec, exact: bool = False) -> tuple[int, ...]:
    """Tokens that each stage keeps.

    Every schedule of a small image may stay below the budget. Then the one with most tokens is used.

    Args:
        exact: raise an error in that case, too.

    Raises:
        UserError: no schedule has the budget as its mean.
    """
    stages, tokens, depth = method.decoder_layers(spec.layers), spec.visual_tokens, spec.layers
    if method.budget >= tokens:
        return (tokens,) * len(stages)
    fixed = method.fixed(spec)
    if fixed is not None:
        return fixed
    start = stages[0] if method.schedule == "kept" else 0  # first of the layers that are counted
    counted = depth - start

    def total_of(first: int, method: Staged = method) -> int:
        counts = method.counts(method.keeps(first, tokens), tokens)
        return sum(tokens_by_layer(tokens, stages, counts, depth)[start:])

    # The first stage keeps the number whose mean is nearest to the budget, the smaller one on a tie.
    wanted = method.budget * counted
    first = min(range(1, tokens + 1), key=lambda x: (abs(total_of(x) - wanted), x))
    if abs(total_of(first) - wanted) <= counted / 2:
        return method.keeps(first, tokens)
    # Schedules may depend on the budget, so the limits are those at the lowest and the highest budget.
    smallest, largest = (total_of(x, replace(method, budget=x)) / counted for x in (1, tokens))
    if method.budget > largest and not exact:
        return replace(method, budget=tokens).keeps(tokens, tokens)
    if method.budget > largest:
        why, instead = "its stages keep fixed shares of one another", ""
    else:
        first_layers = f"{stages[0]} of {depth} layers" if stages[0] > 1 else f"of {depth} layers"
        why = f"all {tokens} enter the first {first_layers}"
        instead = f"Set {method.name}.schedule=kept to count only the layers after them." * (start == 0)
    raise refuse_budget(method.name, method.budget, smallest, largest, why, instead)
