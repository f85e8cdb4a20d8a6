"""A reduction as data: the tokens that are kept, and the tokens that are averaged into each (`Reduction.apply`).

`merge_plan` makes the reduction of encoder-guided merging: the tokens that are not retained are averaged into a few of
them, or into the retained ones. ConsensusDrop, VisionDrop, VisionZip and VScan use it. `join` and `stack` put the
reductions of tiles and frames together.

Paper: https://arxiv.org/abs/2602.00946 (abstract: "the remainder is compressed by encoder-guided token merging")
Official code read: none was released; dvlab-research/VisionZip@3151f6d for the stride anchors and its sum.
Differs from it: anchors and weights are named choices. An anchor is a token that others are merged into.

Shapes: B images, N input tokens, K output tokens, R retained, M anchors, D channels of the encoder keys.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.reduction.ranking import cached_by_sizes, farthest_from, gather_tokens, others, places, split

ANCHORS = ("saliency", "stride", "farthest", "retained")
WEIGHTS = ("saliency", "mean", "anchor_plus_mean", "none")


@dataclass(frozen=True)
class Reduction:
    """Output tokens of one reduction for a batch of images with the same number of tokens.

    Attributes:
        kept: [B, K] int64, for each output token the index of the input token whose position id it gets. Ascending and
            unique unless a method documents otherwise.
        inputs: N.
        assignment: [B, N] int64, the output token into which each input token is averaged, -1 if dropped. None means
            pruning: every output token is the kept input token, unchanged.
        merge_weight: [B, N] float32, weight of each input token in its output token. None without assignment.
        encoder_space: merge encoder features and project the result, instead of merging projected tokens.
        merge_matrix: [B, K, N] float32, weights of all input tokens in every output token, for methods whose groups
            overlap; in place of assignment and merge_weight.
        appended: number of output tokens at the end that are not in raster order.
        drops: False if every input token is part of an output token, so that no assignment is -1.
        flops: operations of the matrix products by which `merge_plan` made it; the pipeline counts them.
    """

    kept: Tensor
    inputs: int
    assignment: Tensor | None = None
    merge_weight: Tensor | None = None
    encoder_space: bool = False
    merge_matrix: Tensor | None = None
    appended: int = 0
    drops: bool = True
    flops: int = 0

    @property
    def merges(self) -> bool:
        """Whether an output token can be the average of several input tokens."""
        return self.assignment is not None or self.merge_matrix is not None

    def only(self, index: int, on_cpu: bool = False) -> "Reduction":
        """The reduction of one image, with a batch axis of 1."""
        own = self.of(slice(index, index + 1))
        if not on_cpu:
            return own
        tensors: dict[str, Any] = {name: value.cpu() for name, value in own._tensors.items()}
        return replace(own, **tensors)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def of(self, images: slice) -> "Reduction":
        """The reduction of some of the images."""
        tensors: dict[str, Any] = {name: value[images] for name, value in self._tensors.items()}
        return replace(self, **tensors)

    def apply(self, tokens: Tensor) -> Tensor:
        """[B, N, D] tokens -> [B, K, D]: kept tokens, or weighted sums in float32, in the dtype of `tokens`."""
        if self.merge_matrix is not None:
            return (self.merge_matrix @ tokens.float()).to(tokens.dtype)
        if self.assignment is None or self.merge_weight is None:
            return gather_tokens(tokens, self.kept)
        outputs, target = self.kept.shape[1], self.assignment
        if self.drops:
            # Dropped tokens go to an extra last row that is cut off: no data-dependent shape, no wait for the device.
            target = torch.where(target < 0, outputs, target)
        weighted = tokens * self.merge_weight.unsqueeze(-1)  # float32, as the weights are
        if tokens.is_cuda:
            # A product with a matrix of zeros and ones: on a GPU scatter_add_ adds in no fixed order, and ranks that
            # share a model must choose by the same bits.
            slots = torch.arange(outputs, device=target.device).unsqueeze(1)
            return ((target.unsqueeze(1) == slots).to(weighted.dtype) @ weighted).to(tokens.dtype)
        out = weighted.new_zeros(len(tokens), outputs + self.drops, tokens.shape[2])
        out.scatter_add_(1, target.unsqueeze(-1).expand_as(weighted), weighted)
        out = out[:, :-1] if self.drops else out
        return out if out.dtype == tokens.dtype else out.to(tokens.dtype)

    def merged_count(self) -> Tensor:
        """[B] int64, the number of output tokens made of two or more input tokens."""
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
        """Operations of the matrix products in `apply`, for one image with tokens of `channels` channels."""
        return 0 if self.merge_matrix is None else 2 * self.merge_matrix[0].numel() * channels

    def after(self, first: "Reduction") -> "Reduction":
        """One reduction that does `first` and then this one; neither may have a merge matrix.

        Args:
            first: its outputs are the inputs of this one.
        """
        device = self.kept.device
        if not self.merges and not first.merges:
            return Reduction(first.kept.gather(1, self.kept), first.inputs)
        assignment_1, weight_1 = first.explicit()
        assignment_2, weight_2 = self.explicit()
        # An extra last entry is used for dropped tokens, before and after the second reduction.
        assignment = torch.cat([assignment_2, torch.full((len(assignment_2), 1), -1, device=device)], 1)
        weight = torch.cat([weight_2, weight_2.new_zeros(len(weight_2), 1)], 1)
        slot = torch.where(assignment_1 < 0, self.inputs, assignment_1)
        kept = first.kept.gather(1, self.kept)
        return Reduction(kept, first.inputs, assignment.gather(1, slot), weight_1 * weight.gather(1, slot))

    def explicit(self) -> tuple[Tensor, Tensor]:
        """Assignment and merge weight, [B, N] each, also of a reduction that only drops tokens."""
        if self.merge_matrix is not None:
            raise ValueError("a reduction with a merge matrix has no assignment: its groups overlap")
        if self.assignment is not None and self.merge_weight is not None:
            return self.assignment, self.merge_weight
        outputs = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        assignment = torch.full((len(self.kept), self.inputs), -1, device=self.kept.device)
        assignment = assignment.scatter(1, self.kept, outputs)
        return assignment, (assignment >= 0).float()

    def matrix(self) -> Tensor:
        """[K, N] weights of all input tokens in every output token, for a reduction of one image."""
        if self.merge_matrix is not None:
            return self.merge_matrix[0]
        assignment, weight = self.explicit()
        outputs = torch.arange(self.kept.shape[1], device=self.kept.device)
        return (assignment[0][None] == outputs[:, None]) * weight[0]

    def with_cls(self) -> "Reduction":
        """This reduction of N patches, extended to CLS and N patches; CLS is kept as the first output token."""
        cls = self.kept.new_zeros(len(self.kept), 1)
        longer = replace(self, kept=torch.cat([cls, self.kept + 1], 1), inputs=self.inputs + 1)
        if self.assignment is None or self.merge_weight is None:
            return longer
        moved = self.assignment + 1
        if self.drops:
            moved = torch.where(self.assignment < 0, self.assignment, moved)
        weight = torch.cat([self.merge_weight.new_ones(len(cls), 1), self.merge_weight], 1)
        return replace(longer, assignment=torch.cat([cls, moved], 1), merge_weight=weight)


@dataclass(frozen=True)
class Step:
    """One applied reduction of one image.

    Attributes:
        place: "input", "tower", "encoder", "prompt" or "layer N"; " #2" after it for a second image.
    """

    place: str
    reduction: Reduction

    @property
    def layer(self) -> int:
        """The first decoder layer that the output tokens enter."""
        name, _, number = self.place.partition(" #")[0].partition(" ")
        return int(number) if name == "layer" else 0


Trace = tuple[Step, ...]


def merge_plan(
    retained: Tensor,
    rest: Tensor,
    merged: int,
    saliency: Tensor,
    keys: Tensor,
    anchors: str,
    weights: str,
    appended: bool = False,
) -> Reduction:
    """The reduction that keeps `retained` and merges the rest.

    Args:
        retained, rest: [B, R] and [B, N - R] indices, each ascending.
        merged: M, the number of tokens that the rest is merged into; 0 with "retained" anchors.
        saliency: [B, N] float32, encoder saliency.
        keys: [B, N, D] encoder keys, of any length; a token joins the anchor with the highest cosine.
        anchors: rule of `choose_anchors`; "retained" merges the rest into the retained tokens.
        weights: rule of `member_weights`; "none" drops the members and keeps the anchors unchanged.
        appended: put merged tokens after the retained ones instead of in raster order.
    """
    batch, total = saliency.shape
    compares = weights != "none" and rest.shape[1] > 0 and (merged > 0 or anchors == "retained")
    unit, flops = keys, 0
    if compares or (merged and anchors == "farthest"):
        # Clamped, so that zeros stay zeros.
        unit = keys if keys.dtype == torch.float32 else keys.float()
        unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(1e-12)
    kept, members, centres = retained, rest, retained
    if merged:
        centres, members = choose_anchors(anchors, rest, saliency, unit, merged)
        kept = torch.cat([retained, centres], dim=1)
        if anchors == "farthest":
            flops += 2 * batch * rest.shape[1] * unit.shape[2] * (merged - 1)
    tail = merged if appended else 0
    if not appended:
        kept = kept.sort(dim=1).values
    if not compares:
        return Reduction(kept, total, appended=tail, flops=flops)
    # Zeros, not empty: keys that are not finite give repeated anchors, and then some token is in no group.
    assignment = torch.zeros_like(saliency, dtype=torch.int64).scatter_(1, kept, places(*kept.shape, kept.device))
    nearest = (gather_tokens(unit, members) @ gather_tokens(unit, centres).mT).argmax(-1)
    flops += 2 * batch * members.shape[1] * centres.shape[1] * unit.shape[2]
    # Appended centres are the last output tokens, in this order.
    home = nearest + retained.shape[1] if merged and appended else assignment.gather(1, centres.gather(1, nearest))
    assignment.scatter_(1, members, home)
    weight = member_weights(weights, assignment, kept, saliency)
    return Reduction(kept, total, assignment, weight, appended=tail, drops=False, flops=flops)


def choose_anchors(rule: str, rest: Tensor, saliency: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose M anchors among the L indices `rest`: [B, M] anchors and [B, L - M] others, both ascending.

    Args:
        rule: "saliency" (D1, the most salient), "stride" (D2, every n-th, as VisionZip does) or "farthest" (D3,
            farthest-point sampling by cosine of keys, starting from the most salient).
        unit: [B, N, D] encoder keys of length 1.
    """
    if rule == "stride":
        anchors, members = stride(rest.shape[1], count, rest.device)
        return rest.index_select(1, anchors), rest.index_select(1, members)
    local = saliency.gather(1, rest)
    if rule == "saliency":
        chosen, members = split(local, count)
    else:
        chosen = farthest_from(gather_tokens(unit, rest), local.argmax(1), count).sort(1).values
        members = others(chosen, rest.shape[1])
    return rest.gather(1, chosen), rest.gather(1, members)


@cached_by_sizes
def stride(total: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[count] every n-th of `total` places, and [total - count] the other places."""
    every = torch.arange(0, total, max(1, total // count))[:count]
    left = torch.ones(total, dtype=torch.bool).index_fill(0, every, False).nonzero().flatten()
    return every.to(device, non_blocking=True), left.to(device, non_blocking=True)


def member_weights(rule: str, assignment: Tensor, kept: Tensor, saliency: Tensor) -> Tensor:
    """[B, N] float32 weight of each token in its output token.

    Args:
        rule: "saliency" (W1, average weighted by saliency), "mean" (W2) or "anchor_plus_mean" (W3, the anchor plus the
            unweighted mean of its members, a sum as in VisionZip's code).
        assignment: [B, N] output index of every token; each output has at least one token.
        kept: [B, K] index of each output token.
    """
    if rule == "saliency":
        # Clamped, so that a group whose saliency underflows to zero is averaged instead of giving 0/0.
        share = saliency.clamp(min=1e-12)
    elif rule == "mean":
        share = ones(*assignment.shape, assignment.device)
    else:
        share = ones(*assignment.shape, assignment.device).scatter(1, kept, 0.0)
    # The sum over the members of each output token, repeated for every member.
    if share.is_cuda:  # in a fixed order, as in `Reduction.apply`
        slots = torch.arange(kept.shape[1], device=kept.device).unsqueeze(1)
        sums = torch.where(assignment.unsqueeze(1) == slots, share.unsqueeze(1), 0.0).sum(2)
    else:
        sums = share.new_zeros(kept.shape).scatter_add_(1, assignment, share)
    sums = sums.gather(1, assignment)
    if rule == "anchor_plus_mean":
        return (share / sums.clamp(min=1)).scatter(1, kept, 1.0)
    return share / sums


@cached_by_sizes
def ones(batch: int, count: int, device: torch.device) -> Tensor:
    """[B, N] float32 ones. Shared: do not write into it."""
    return torch.ones(batch, count, device=device)


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
    """Join the reductions of an image's views into one reduction; tokens that are in no view are dropped.

    Kept tokens are in the order of the image's tokens. Tokens that a method appends (`Reduction.appended`) come after
    the kept tokens of all views of their block.

    Args:
        inputs: number of visual tokens of the image.

    Returns:
        The reduction, and [K] int64: for each output token its index among the outputs of all views in a row.
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
        rows = []
        for view in views:
            own = view.reduction.matrix()
            rows.append(own.new_zeros(len(own), inputs).index_copy(1, view.indices, own))
        return replace(plain, merge_matrix=torch.cat(rows)[order][None]), order
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
    """Stack reductions of one image each [1, K] into one of a batch [B, K]; if one merges, as an assignment."""
    if not any(one.merges for one in reductions):
        return Reduction(torch.cat([one.kept for one in reductions]), reductions[0].inputs)
    assignments, weights = zip(*(one.explicit() for one in reductions), strict=True)
    kept = torch.cat([one.kept for one in reductions])
    return Reduction(kept, reductions[0].inputs, torch.cat(assignments), torch.cat(weights))
