"""Encoder-guided merging: average the tokens that are not retained into a few tokens, or into the retained ones.

Used by ConsensusDrop, VisionDrop, VisionZip and VScan.

Paper: https://arxiv.org/abs/2602.00946 (abstract: "the remainder is compressed by encoder-guided token merging")
Official code read: none was released; dvlab-research/VisionZip@3151f6d for the stride anchors and its sum.
Differs from it: anchors and weights are named choices. An anchor is a token that others are merged into.

Shapes: B images, N tokens, R retained, M anchors, D channels of the encoder keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy import farthest_from
from llava.reduction.ranking import gather_tokens, keep_top, others, places
from llava.reduction.reduction import Reduction

ANCHORS = ("saliency", "stride", "farthest", "retained")
WEIGHTS = ("saliency", "mean", "anchor_plus_mean", "none")


def choose_anchors(rule: str, rest: Tensor, saliency: Tensor, keys: Tensor, count: int) -> Tensor:
    """[B, M] indices of anchors among the indices `rest`, ascending.

    Args:
        rule: "saliency" (D1, the most salient), "stride" (D2, every n-th, as VisionZip) or "farthest" (D3,
            farthest-point sampling by cosine of keys, from the most salient).
    """
    if rule == "stride":
        step = max(1, rest.shape[1] // count)
        return rest[:, ::step][:, :count]
    local = saliency.gather(1, rest)
    if rule == "saliency":
        return rest.gather(1, keep_top(local, count))
    unit = F.normalize(gather_tokens(keys, rest), dim=-1)
    return rest.gather(1, farthest_from(unit, local.argmax(1), count).sort(1).values)


def assign(members: Tensor, anchors: Tensor, keys: Tensor) -> Tensor:
    """[B, L] members and [B, M] anchors -> [B, L] index into the anchors, the nearest by cosine of encoder keys."""
    unit = F.normalize(keys.float(), dim=-1)
    return (gather_tokens(unit, members) @ gather_tokens(unit, anchors).transpose(1, 2)).argmax(-1)


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
    """[B, N] weight of each token in its output token.

    Args:
        rule: "saliency" (W1, average weighted by saliency), "mean" (W2) or "anchor_plus_mean" (W3, the anchor plus the
            unweighted mean of its members: a sum, as VisionZip's code does).
        assignment: [B, N] output index or -1.
        kept: [B, K] index of each output token.
    """
    outputs = kept.shape[1]
    used = assignment >= 0
    slot = torch.where(used, assignment, outputs)

    def per_output(values: Tensor) -> Tensor:
        """Sum over the members of each output token, repeated for every member."""
        return values.new_zeros(len(values), outputs + 1).scatter_add_(1, slot, values).gather(1, slot)

    if rule == "anchor_plus_mean":
        member = used.float().scatter(1, kept, 0.0)
        return (member / per_output(member).clamp(min=1)).scatter(1, kept, 1.0)
    # A lower bound, so that a group whose saliency underflows to zero is averaged instead of giving 0/0.
    weight = torch.where(used, saliency.float().clamp(min=1e-12) if rule == "saliency" else 1.0, 0.0)
    return weight / per_output(weight).clamp(min=1e-30)


def merge_plan(
    retained: Tensor, merged: int, saliency: Tensor, keys: Tensor, anchors: str, weights: str, appended: bool
) -> Reduction:
    """The reduction that keeps `retained` and compresses the rest.

    Args:
        retained: [B, R] indices, ascending.
        merged: M, the tokens that the rest is merged into; 0 with "retained" anchors.
        saliency: [B, N] encoder saliency.
        keys: [B, N, D] encoder keys.
        anchors, weights: the rules above; weights "none" drops the members and keeps the anchors unchanged.
        appended: put merged tokens after the retained ones instead of in raster order.
    """
    total = saliency.shape[1]
    rest = others(retained, total)
    kept, centres = retained, retained if anchors == "retained" else None
    if merged:
        centres = choose_anchors(anchors, rest, saliency, keys, merged)
        kept = torch.cat([retained, centres], dim=1)
    tail = merged if appended else 0
    if not appended:
        kept = kept.sort(dim=1).values
    if weights == "none" or centres is None or not rest.shape[1]:
        return Reduction(kept, total, appended=tail)
    slots = places(*kept.shape, kept.device)
    assignment = torch.full((len(kept), total), -1, device=kept.device).scatter_(1, kept, slots)
    members = others(kept, total) if merged else rest
    nearest = assign(members, centres, keys)
    # Appended centres are the last output tokens, in this order.
    home = nearest + retained.shape[1] if merged and appended else assignment.gather(1, centres.gather(1, nearest))
    assignment.scatter_(1, members, home)
    return Reduction(kept, total, assignment, member_weights(weights, assignment, kept, saliency), appended=tail)


def with_cls(plan: Reduction) -> Reduction:
    """Extend a reduction of N patches to CLS and N patches; CLS is kept as the first output token."""
    cls = plan.kept.new_zeros(len(plan.kept), 1)
    kept = torch.cat([cls, plan.kept + 1], 1)
    if plan.assignment is None or plan.merge_weight is None:
        return Reduction(kept, plan.inputs + 1, appended=plan.appended)
    assignment = torch.cat([cls, torch.where(plan.assignment < 0, plan.assignment, plan.assignment + 1)], 1)
    weight = torch.cat([plan.merge_weight.new_ones(len(cls), 1), plan.merge_weight], 1)
    return Reduction(kept, plan.inputs + 1, assignment, weight, appended=plan.appended)
