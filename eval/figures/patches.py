"""Where every patch of an image is after the reductions of one answer: in a token of its own, merged, or dropped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llava.errors import UserError
from llava.reduction import Reduction, Step

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

NONE = -1  # a cell of the patch grid that no visual token stands for
# Okabe and Ito's colours without black: readers with any colour blindness tell them apart.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


@dataclass(frozen=True)
class PatchAssignment:
    """Where N patches are after some steps; K tokens are left.

    Attributes:
        assignment: [N], the token that a patch is part of, -1 if it was dropped.
        kept: [K], the patch at which each token stands; -1 where that is no patch (a class token).
    """

    assignment: Ints
    kept: Ints
    members: Ints = field(init=False)  # [K], patches of each token

    def __post_init__(self) -> None:
        present = self.assignment[self.assignment >= 0]
        object.__setattr__(self, "members", np.bincount(present, minlength=len(self.kept)))

    @property
    def stands(self) -> Mask:
        """[N]: a token stands at this patch."""
        return np.isin(np.arange(len(self.assignment)), self.kept)

    @property
    def grouped(self) -> Mask:
        """[N]: the patch is part of a token of two or more patches."""
        if not len(self.kept):
            return np.zeros(len(self.assignment), bool)
        return (self.assignment >= 0) & (self.members[np.maximum(self.assignment, 0)] > 1)

    @property
    def target(self) -> Mask:
        """[N]: a token stands at this patch that others were merged into."""
        return self.stands & self.grouped

    @property
    def merged(self) -> Mask:
        """[N]: the patch was averaged into a token that stands elsewhere."""
        return (self.assignment >= 0) & ~self.stands

    @property
    def dropped(self) -> Mask:
        """[N]: the patch is part of no token."""
        return self.assignment < 0


def compose(trace: Sequence[Step], patches: int) -> PatchAssignment:
    """Follow every patch through the steps of one image; positions of a step count the previous step's outputs."""
    assignment = kept = np.arange(patches)
    for step in trace:
        if step.reduction.inputs != len(kept):
            raise ValueError(f"step at {step.place} takes {step.reduction.inputs} tokens, {len(kept)} are there")
        moved = step_assignment(step)
        assignment = np.where(assignment >= 0, moved[assignment], -1)
        kept = kept[step.reduction.kept[0].cpu().numpy()]
    return PatchAssignment(assignment, kept)


def step_assignment(step: Step) -> Ints:
    """[inputs]: the output token that each input of one step is part of, -1 if it is part of none."""
    reduction: Reduction = step.reduction
    kept = reduction.kept[0].cpu().numpy()
    if reduction.merge_matrix is not None:
        # Groups overlap: a patch is drawn with the token it has the largest weight in, a kept one with its own.
        weight = reduction.merge_matrix[0].cpu().numpy()
        assignment = np.where(weight.max(0) > 0, weight.argmax(0), -1)
        assignment[kept] = np.arange(len(kept))
        return assignment
    if reduction.assignment is not None:
        assignment = reduction.assignment[0].cpu().numpy()
        if reduction.merge_weight is not None:
            assignment = np.where(reduction.merge_weight[0].cpu().numpy() != 0, assignment, -1)
        own = np.where(assignment[kept] < 0, np.arange(len(kept)), assignment[kept])
        assignment = assignment.copy()
        assignment[kept] = own
        return assignment
    if step.place == "input":
        # A smaller image: no patch is dropped, each is part of the nearest token.
        return nearest(kept, grid_of(reduction.inputs))
    assignment = np.full(reduction.inputs, -1)
    assignment[kept] = np.arange(len(kept))
    return assignment


def nearest(kept: Ints, grid: tuple[int, int]) -> Ints:
    """[N]: index of the kept cell closest to each cell of the grid, the first of equals."""
    columns = grid[1]
    cells = np.arange(grid[0] * columns)
    rows = (cells[:, None] // columns - kept[None] // columns) ** 2
    return (rows + (cells[:, None] % columns - kept[None] % columns) ** 2).argmin(1)


def grid_of(tokens: int) -> tuple[int, int]:
    """The square grid of `tokens` patches, or of one less where the class token comes along."""
    for patches in (tokens, tokens - 1):
        side = math.isqrt(max(patches, 0))
        if side > 0 and side * side == patches:
            return side, side
    raise UserError(f"{tokens} tokens are no square grid of patches; an overlay needs the grid of the image.")


def without_cls(patches: PatchAssignment) -> PatchAssignment:
    """Leave out the class token at position 0; a token that stands at it has its kept patch at -1."""
    return PatchAssignment(patches.assignment[1:], patches.kept - 1)


def colour_groups(patches: PatchAssignment, grids: Sequence[Ints]) -> Ints:
    """Colours of the merge groups: groups that touch get different ones while the palette has enough.

    Args:
        grids: [rows, columns] each, the visual token of every cell of a panel, NONE where there is none.

    Returns:
        [K]: index into PALETTE, -1 for a token of one patch.
    """
    neighbours: dict[int, set[int]] = {int(token): set() for token in np.flatnonzero(patches.members > 1)}
    for grid in grids:
        groups = np.where(grid == NONE, -1, patches.assignment[grid])
        for line in (*groups, *groups.T):
            for one, other in pairwise(line.tolist()):
                if one != other and one in neighbours and other in neighbours:
                    neighbours[one].add(other)
                    neighbours[other].add(one)
    colours = np.full(len(patches.kept), -1)
    for order, token in enumerate(neighbours):
        taken = [int(colours[other]) for other in neighbours[token]]
        # The least used around the group; of equals the next in turn, so that no colour dominates the image.
        turn = [(order + shift) % len(PALETTE) for shift in range(len(PALETTE))]
        colours[token] = min(turn, key=taken.count)
    return colours
