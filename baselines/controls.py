"""The controls: all tokens, none, tokens drawn at random, an even grid of tokens, and a smaller image.

Paper: none, these are controls.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PatchGrid,
    PromptState,
    Reducer,
    Reduction,
    UserError,
    even_grid,
    option,
    register,
    seed_of,
)

WIDEST = 2.0  # largest ratio of a patch's sides after downsampling


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Reducer):
    """Reduces nothing; the only budget is the number of visual tokens."""

    summary: ClassVar[str] = "no reduction, the reference of every table"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="nowhere", rest="nothing")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.budget != spec.visual_tokens:
            raise UserError(
                f"full keeps all {spec.visual_tokens} visual tokens, got budget {self.budget}; leave the budget out."
            )


@register("none")
@dataclass(frozen=True, kw_only=True)
class Blind(Reducer):
    """The model answers from the text: what it gets right so needs no image.

    The prompt is that of a question with its image, template included; only the image's place in it is empty.
    Positions count what is there, so the logits are those of the same text without an image. With the positions of the
    unreduced prompt half of the toy model's answers are others. That is another control, so there is no option.
    """

    summary: ClassVar[str] = "no visual token: what is answered without seeing the image"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before the tower", rest="all dropped")
    blind: ClassVar[bool] = True

    budget: int = 0
    positions: str = option("renumber", "position ids as in a prompt of text alone", ("renumber",))
    tile_budget: str = option("each", "no tile has tokens", ("each",))
    newlines: str = option("drop", "newline tokens are dropped", ("drop",))

    def check(self, spec: ModelSpec) -> None:
        """Nothing depends on the model."""


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Reducer):
    """The sample's id seeds the draw, so that it does not depend on batch, order or process."""

    summary: ClassVar[str] = "tokens drawn at random, seeded per question"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0", score="a seed per question", reads=("order",)
    )
    seed: int = option(0, "seed of the draw")

    def prompt(self, state: PromptState) -> Reduction:
        total = state.tokens.shape[1]
        rows = []
        for name in state.ids:
            generator = torch.Generator().manual_seed(seed_of("random", self.seed, name))
            rows.append(torch.randperm(total, generator=generator)[: self.budget].sort().values)
        return Reduction(torch.stack(rows).to(state.tokens.device, non_blocking=True), total)


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """The same indices in every image."""

    summary: ClassVar[str] = "an even grid of tokens"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0", score="an even grid", reads=("grid", "order")
    )

    tile_budget: str = option(
        "each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail")
    )

    def prompt(self, state: PromptState) -> Reduction:
        kept = even_grid(state.layout, self.budget).to(state.tokens.device, non_blocking=True)
        return Reduction(kept.expand(len(state.tokens), -1), state.tokens.shape[1])


def grid_of(layout: PatchGrid, budget: int) -> tuple[int, int] | None:
    """(rows, columns) of the grid of `budget` patches that stretches them least; None if all stretch them too much."""
    best = None
    for rows in range(1, min(layout.rows, budget) + 1):
        columns, rest = divmod(budget, rows)
        if rest or columns > layout.columns:
            continue
        across, along = layout.rows / rows, layout.columns / columns
        stretch = max(across / along, along / across)
        # On a tie (8 x 16 or 16 x 8) the wider grid, as most images are wider than high.
        if stretch <= WIDEST and (best is None or stretch < best[0]):
            best = (stretch, (rows, columns))
    return best and best[1]


@register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample(Reducer):
    """Resizes the pixels (bicubic, antialiased) and interpolates the tower's position table."""

    summary: ClassVar[str] = "a smaller image with budget patches"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before the tower", rest="averaged by resizing")

    tile_budget: str = option("each", "every tile is shrunk alike", ("each",))

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if grid_of(spec.layout, self.budget) is None:
            possible = [b for b in range(1, spec.visual_tokens + 1) if grid_of(spec.layout, b)]
            near = sorted(sorted(possible, key=lambda b: abs(b - self.budget))[:4])
            raise UserError(
                f"downsample needs a budget that is rows x columns of a grid stretched at most {WIDEST:g} times, "
                f"got {self.budget}; near it are {', '.join(map(str, near))}."
            )

    def input_grid(self, layout: PatchGrid) -> tuple[int, int] | None:
        return grid_of(layout, self.budget)
