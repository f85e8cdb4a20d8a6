"""A reduction as data: the output tokens, and the input tokens that are averaged into each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.reduction.ranking import gather_tokens, in_float32


@dataclass(frozen=True)
class Reduction:
    """Output tokens of one reduction for a batch of images with the same number of tokens.

    B images, N input tokens, K output tokens.

    Attributes:
        kept: [B, K] int64, for each output token the index of the input token whose position id it has. Ascending and
            unique unless a method documents otherwise.
        inputs: N.
        assignment: [B, N] int64, the output token into which each input token is averaged, -1 if dropped. None means
            pruning: every output token is the kept input token, unchanged.
        merge_weight: [B, N] float32, weight of each input token in its output token. None without assignment.
        encoder_space: apply to encoder features and project again, instead of to projected tokens.
        merge_matrix: [B, K, N] float32, weights of all input tokens in every output token, for methods whose groups
            overlap; in place of assignment and merge_weight.
        appended: number of output tokens at the end that are not in raster order.
        drops: False where every input token is in an output token, so that no assignment is -1.
    """

    kept: Tensor
    inputs: int
    assignment: Tensor | None = None
    merge_weight: Tensor | None = None
    encoder_space: bool = False
    merge_matrix: Tensor | None = None
    appended: int = 0
    drops: bool = True

    @property
    def merges(self) -> bool:
        return self.assignment is not None or self.merge_matrix is not None

    def row(self, index: int) -> "Reduction":
        """The reduction of one image, on the CPU, with a batch axis of 1."""
        return self._each(lambda tensor: tensor[index : index + 1].cpu())

    def only(self, index: int) -> "Reduction":
        """The reduction of one image, on its device, with a batch axis of 1."""
        return self._each(lambda tensor: tensor[index : index + 1])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Reduction":
        changed: dict[str, Any] = {
            name: change(value) for name in TENSORS if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    def apply(self, tokens: Tensor) -> Tensor:
        """[B, N, D] tokens -> [B, K, D]; sums in float32, result in the dtype of `tokens`."""
        if self.merge_matrix is not None:
            return (self.merge_matrix @ tokens.float()).to(tokens.dtype)
        if self.assignment is None or self.merge_weight is None:
            return gather_tokens(tokens, self.kept)
        outputs, target = self.kept.shape[1], self.assignment
        if self.drops:
            # Dropped tokens go to an extra last row that is cut off: no data-dependent shape, no wait for the device.
            target = torch.where(target < 0, outputs, target)
        weighted = in_float32(tokens) * self.merge_weight.unsqueeze(-1)
        out = weighted.new_zeros(len(tokens), outputs + self.drops, tokens.shape[2])
        out.scatter_add_(1, target.unsqueeze(-1).expand_as(weighted), weighted)
        out = out[:, :-1] if self.drops else out
        return out if out.dtype == tokens.dtype else out.to(tokens.dtype)

    def merged_count(self) -> Tensor:
        """[B] int64, output tokens made of two or more input tokens."""
        batch, outputs = self.kept.shape
        if self.merge_matrix is not None:
            return ((self.merge_matrix != 0).sum(2) > 1).sum(1)
        if self.assignment is None or self.merge_weight is None:
            return self.kept.new_zeros(batch)
        members = self.kept.new_zeros(batch, outputs + 1)
        target = torch.where(self.assignment < 0, outputs, self.assignment)
        members.scatter_add_(1, target, (self.merge_weight != 0).long())
        return (members[:, :-1] > 1).sum(1)

    def apply_flops(self, channels: int) -> int:
        """Operations of `apply` on one image with tokens of `channels` channels, matrix products only."""
        return 0 if self.merge_matrix is None else 2 * self.merge_matrix[0].numel() * channels

    def after(self, first: "Reduction") -> "Reduction":
        """Composition: `first`, then this reduction; neither may have a merge matrix.

        Args:
            first: its outputs are the inputs of this one.
        """
        device = self.kept.device
        assignment_1, weight_1 = first.explicit()
        assignment_2, weight_2 = self.explicit()
        # An extra last entry is used for dropped tokens, before and after the second reduction.
        assignment = torch.cat([assignment_2, torch.full((len(assignment_2), 1), -1, device=device)], 1)
        weight = torch.cat([weight_2, weight_2.new_zeros(len(weight_2), 1)], 1)
        slot = torch.where(assignment_1 < 0, self.inputs, assignment_1)
        kept = first.kept.gather(1, self.kept)
        return Reduction(kept, first.inputs, assignment.gather(1, slot), weight_1 * weight.gather(1, slot))

    def explicit(self) -> tuple[Tensor, Tensor]:
        """Assignment and merge weight [B, N], also where the reduction only drops tokens."""
        if self.merge_matrix is not None:
            raise ValueError("a reduction with a merge matrix has no assignment: its groups overlap")
        if self.assignment is not None and self.merge_weight is not None:
            return self.assignment, self.merge_weight
        outputs = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        assignment = torch.full((len(self.kept), self.inputs), -1, device=self.kept.device)
        assignment = assignment.scatter(1, self.kept, outputs)
        return assignment, (assignment >= 0).float()


TENSORS = ("kept", "assignment", "merge_weight", "merge_matrix")


@dataclass(frozen=True)
class Step:
    """One applied reduction of one image.

    Attributes:
        place: "input", "tower", "encoder", "prompt" or "layer N"; " #2" after it for a second image.
    """

    place: str
    reduction: Reduction


Trace = tuple[Step, ...]


@dataclass(frozen=True)
class ViewReduction:
    """What is kept of one view (a tile, a frame, or newline tokens) of an image.

    Attributes:
        indices: [n] int64, indices of the view's tokens among the image's visual tokens.
        reduction: of these n tokens, for one image.
        block: the output tokens of a lower block come before those of a higher one.
    """

    indices: Tensor
    reduction: Reduction
    block: int = 0


def join(views: list[ViewReduction], inputs: int) -> tuple[Reduction, Tensor]:
    """Join the reductions of an image's views into one reduction; tokens of no view are dropped.

    Kept tokens are in the order of the image's tokens. Tokens that a method appends (`Reduction.appended`) come after
    those of all views of the block.

    Args:
        inputs: visual tokens of the image.

    Returns:
        the reduction, and [K] int64: for each output token its index among the views' outputs, one view after another.
    """
    device = views[0].indices.device
    kept = torch.cat([view.indices[view.reduction.kept[0]] for view in views])
    keys = []
    for view in views:
        count, tail = view.reduction.kept.shape[1], view.reduction.appended
        is_tail = torch.arange(count, device=device) >= count - tail
        keys.append((2 * view.block + is_tail.long()) * inputs)
    order = (torch.cat(keys) + kept).argsort(stable=True)
    appended = sum(view.reduction.appended for view in views if view.block == max(v.block for v in views))
    encoder_space = any(view.reduction.encoder_space for view in views)
    plain = Reduction(kept[order][None], inputs, encoder_space=encoder_space, appended=appended)
    if not any(view.reduction.merges for view in views):
        return plain, order
    if any(view.reduction.merge_matrix is not None for view in views):
        return replace(plain, merge_matrix=_joined_matrix(views, inputs)[order][None]), order
    slot = order.argsort()
    assignment = torch.full((inputs,), -1, device=device)
    weight = torch.zeros(inputs, device=device)
    done = 0
    for view in views:
        own, own_weight = view.reduction.explicit()
        assignment[view.indices] = torch.where(own[0] < 0, -1, slot[(own[0] + done).clamp(min=0)])
        weight[view.indices] = own_weight[0]
        done += view.reduction.kept.shape[1]
    return replace(plain, assignment=assignment[None], merge_weight=weight[None]), order


def stack(reductions: list[Reduction]) -> Reduction:
    """Stack reductions of one image each [1, K] into one of a batch [B, K]; all merge by assignment."""
    assignments, weights = zip(*(one.explicit() for one in reductions), strict=True)
    kept = torch.cat([one.kept for one in reductions])
    return Reduction(kept, reductions[0].inputs, torch.cat(assignments), torch.cat(weights))


def _joined_matrix(views: list[ViewReduction], inputs: int) -> Tensor:
    """[K, inputs] weights of the views' outputs, one view after another."""
    rows = []
    for view in views:
        matrix = view.reduction.merge_matrix
        own = _matrix(view.reduction) if matrix is None else matrix[0]
        rows.append(own.new_zeros(len(own), inputs).index_copy(1, view.indices, own))
    return torch.cat(rows)


def _matrix(reduction: Reduction) -> Tensor:
    """[K, n] weights of a reduction without merge matrix, for one image."""
    assignment, weight = reduction.explicit()
    outputs = torch.arange(reduction.kept.shape[1], device=reduction.kept.device)
    return (assignment[0][None] == outputs[:, None]) * weight[0]
