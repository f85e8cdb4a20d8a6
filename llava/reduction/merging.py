"""Encoder-guided merging: average the tokens that are not retained into a few tokens, or into the retained ones.

Used by ConsensusDrop, VisionDrop, VisionZip and VScan.

Paper: https://arxiv.org/abs/2602.00946 (abstract: "the remainder is compressed by encoder-guided token merging")
Official code read: none was released; dvlab-research/VisionZip@3151f6d for the stride anchors and its sum.
Differs from it: anchors and weights are named choices. An anchor is a token that others are merged into.

Shapes: B images, N tokens, R retained, M anchors, D channels of the encoder keys.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llava.cached_tensors import made_once
from llava.reduction.greedy import farthest_from
from llava.reduction.ranking import gather_tokens, in_float32, others, places, split
from llava.reduction.reduction import Reduction

ANCHORS = ("saliency", "stride", "farthest", "retained")
WEIGHTS = ("saliency", "mean", "anchor_plus_mean", "none")


def unit_length(vectors: Tensor) -> Tensor:
    """[..., D] float32 vectors of length 1, whose products are cosines; zeros stay zeros."""
    vectors = in_float32(vectors)
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


@made_once
def stride(total: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[count] every n-th of `total` places, and all other places."""
    every = torch.arange(0, total, max(1, total // count))[:count]
    left = torch.ones(total, dtype=torch.bool).index_fill(0, every, False).nonzero().flatten()
    return every.to(device, non_blocking=True), left.to(device, non_blocking=True)


def choose_anchors(rule: str, rest: Tensor, saliency: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, M] indices of anchors among the L indices `rest`, and the L - M others; both ascending.

    Args:
        rule: "saliency" (D1, the most salient), "stride" (D2, every n-th, as VisionZip) or "farthest" (D3,
            farthest-point sampling by cosine of keys, from the most salient).
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


def assign(members: Tensor, anchors: Tensor, unit: Tensor) -> Tensor:
    """[B, L] members and [B, M] anchors -> [B, L] index into the anchors, the nearest by cosine of encoder keys.

    Args:
        unit: [B, N, D] encoder keys of length 1.
    """
    return (gather_tokens(unit, members) @ gather_tokens(unit, anchors).mT).argmax(-1)


def merge_flops(rule: str, total: int, retained: int, merged: int, channels: int, assigned: bool) -> int:
    """Operations of choosing anchors and assigning the remaining tokens for one image, matrix products only.

    Args:
        rule: how anchors are chosen; "farthest" compares each remaining token with each anchor but the last.
        merged: M; 0 if the other tokens are merged into the retained ones.
        assigned: False if the other tokens are dropped.
    """
    rest = total - retained
    choosing = 2 * rest * (merged - 1) * channels if rule == "farthest" and merged else 0
    assigning = 2 * (rest - merged) * (merged or retained) * channels if assigned else 0
    return choosing + assigning


def member_weights(rule: str, assignment: Tensor, kept: Tensor, saliency: Tensor) -> Tensor:
    """[B, N] float32 weight of each token in its output token.

    Args:
        rule: "saliency" (W1, average weighted by saliency), "mean" (W2) or "anchor_plus_mean" (W3, the anchor plus the
            unweighted mean of its members: a sum, as VisionZip's code does).
        assignment: [B, N] output index of every token; each output has at least one.
        kept: [B, K] index of each output token.
    """

    def per_output(values: Tensor) -> Tensor:
        """Sum over the members of each output token, repeated for every member."""
        return values.new_zeros(kept.shape).scatter_add_(1, assignment, values).gather(1, assignment)

    if rule == "saliency":
        # A lower bound, so that a group whose saliency underflows to zero is averaged instead of giving 0/0.
        weight = in_float32(saliency).clamp(min=1e-12)
        return weight / per_output(weight)
    every = ones(*assignment.shape, assignment.device)
    if rule == "mean":
        return per_output(every).reciprocal()
    member = every.scatter(1, kept, 0.0)
    return (member / per_output(member).clamp(min=1)).scatter(1, kept, 1.0)


@made_once
def ones(batch: int, count: int, device: torch.device) -> Tensor:
    """[B, N] float32. Shared: it must not be written into."""
    return torch.ones(batch, count, device=device)


def merge_plan(
    retained: Tensor,
    rest: Tensor,
    merged: int,
    saliency: Tensor,
    keys: Tensor,
    anchors: str,
    weights: str,
    appended: bool,
) -> Reduction:
    """The reduction that keeps `retained` and compresses the rest.

    Args:
        retained, rest: [B, R] and [B, N - R] indices, each ascending.
        merged: M, the tokens that the rest is merged into; 0 with "retained" anchors.
        saliency: [B, N] encoder saliency.
        keys: [B, N, D] encoder keys.
        anchors, weights: the rules above; weights "none" drops the members and keeps the anchors unchanged.
        appended: put merged tokens after the retained ones instead of in raster order.
    """
    total = saliency.shape[1]
    compares = weights != "none" and rest.shape[1] > 0 and (merged > 0 or anchors == "retained")
    unit = unit_length(keys) if compares or (merged and anchors == "farthest") else keys
    kept, members = retained, rest
    centres = retained
    if merged:
        centres, members = choose_anchors(anchors, rest, saliency, unit, merged)
        kept = torch.cat([retained, centres], dim=1)
    tail = merged if appended else 0
    if not appended:
        kept = kept.sort(dim=1).values
    if not compares:
        return Reduction(kept, total, appended=tail)
    slots = places(*kept.shape, kept.device)
    # Zeros, not empty: keys that are not finite give repeated anchors, and then some token is in no group.
    assignment = torch.zeros_like(saliency, dtype=torch.int64).scatter_(1, kept, slots)
    nearest = assign(members, centres, unit)
    # Appended centres are the last output tokens, in this order.
    home = nearest + retained.shape[1] if merged and appended else assignment.gather(1, centres.gather(1, nearest))
    assignment.scatter_(1, members, home)
    weight = member_weights(weights, assignment, kept, saliency)
    return Reduction(kept, total, assignment, weight, appended=tail, drops=False)


def with_cls(plan: Reduction) -> Reduction:
    """Extend a reduction of N patches to CLS and N patches; CLS is kept as the first output token."""
    cls = plan.kept.new_zeros(len(plan.kept), 1)
    kept = torch.cat([cls, plan.kept + 1], 1)
    if plan.assignment is None or plan.merge_weight is None:
        return replace(plan, kept=kept, inputs=plan.inputs + 1)
    moved = plan.assignment + 1
    if plan.drops:
        moved = torch.where(plan.assignment < 0, plan.assignment, moved)
    weight = torch.cat([plan.merge_weight.new_ones(len(cls), 1), plan.merge_weight], 1)
    return replace(plan, kept=kept, inputs=plan.inputs + 1, assignment=torch.cat([cls, moved], 1), merge_weight=weight)
