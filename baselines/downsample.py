"""downsample: a smaller image with as many patches as the budget, a control that also makes the tower cheaper.

Paper: none, a control.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import MethodMetadata, ModelSpec, PatchGrid, Reducer, UserError, option, register

WIDEST = 2.0  # largest stretch of a patch


def grid_of(layout: PatchGrid, budget: int) -> tuple[int, int] | None:
    """rows x columns = budget with the least stretched patches, or None if that would stretch them too much."""
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
    """Pixels are resized (bicubic, antialiased), the tower's position table is interpolated."""

    summary: ClassVar[str] = "a smaller image with budget patches"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before the tower", rest="averaged by resizing")

    crops: str = option("each", "every tile is shrunk alike", ("each",))

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
