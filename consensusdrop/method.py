"""ConsensusDrop: retain by a consensus of encoder saliency and query-aware attention, merge the remainder.

Paper: https://arxiv.org/abs/2602.00946 (abstract only)
Official code read: none was released.
Differs from it: unknown. docs/consensusdrop.md separates fact from reconstruction.

The encoder saliency `v` is dense and the cross-modal saliency `c` is sparse. Their values are therefore not on one
scale, but their ranks are. `alpha` is the weight of the encoder: 1 is encoder only, 0 is cross-modal only.

Shapes: B images, N visual tokens, T text rows, H heads.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    ANCHORS,
    WEIGHTS,
    MethodMetadata,
    ModelSpec,
    PromptState,
    Reducer,
    Reduction,
    TowerScore,
    UserError,
    merge_plan,
    option,
    ranks,
    register,
    split,
)

TINY = 1e-12
FUSIONS = ("rank", "raw", "minmax", "zscore", "log", "rrf", "cross_first", "gate")


def rank01(score: Tensor) -> Tensor:
    """Ranks scaled to [0, 1], 1 for the highest score; equal scores rank by lower index."""
    return 1 - ranks(score) / max(score.shape[1] - 1, 1)


def rescaled(score: Tensor, rule: str) -> Tensor:
    """[B, N] scores on the scale on which a rule of `fuse` averages them."""
    if rule == "minmax":  # F2: from 0 to 1
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        return (score - low) / (high - low).clamp(min=TINY)
    if rule == "zscore":  # F3: mean 0 and standard deviation 1
        centred = score - score.mean(1, keepdim=True)
        return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=TINY)
    if rule == "log":  # F4: a weighted product of two distributions
        return (score / score.sum(1, keepdim=True).clamp(min=TINY)).clamp(min=TINY).log()
    if rule == "rrf":  # F5: reciprocal rank fusion, 1 / (60 + rank)
        rank = (1 - rank01(score)) * (score.shape[1] - 1) + 1
        return 1 / (60.0 + rank)
    # "raw", a control: as they are. A product of softmaxes, softmax(v)^alpha softmax(c)^(1 - alpha), keeps the same
    # tokens, as its logarithm is this mean and a constant. A common temperature divides both and changes nothing.
    return score


def fuse(v: Tensor, c: Tensor | None, rule: str, keep: int, alpha: float, cross_top: float = 0) -> Tensor:
    """[B, N] consensus score, higher is kept.

    Args:
        v: [B, N] encoder saliency, at least 0.
        c: [B, N] cross-modal saliency, at least 0; None ranks by the encoder alone.
        rule: one of FUSIONS.
        keep: number of tokens that will be retained (used by "cross_first").
        alpha: weight of the encoder, 0 to 1.
        cross_top: "rank" ranks this many of the highest cross-modal scores, and all others get 0 (the low values of a
            sparse score are noise); 0 ranks all.
    """
    if c is None:
        return rank01(v)
    total = v.shape[1]
    if rule == "rank":
        # F1: weighted mean of the ranks times a common denominator. In whole numbers, equal sums of ranks are equal,
        # and the lower index is kept on every device.
        share = Fraction(alpha).limit_denominator(1_000_000)
        last, last_cross = total - 1, max((cross_top or total) - 1, 1)
        rank, rank_cross = ranks(torch.stack([v, c])).unbind()
        encoder, cross = last - rank, (last_cross - rank_cross).clamp(min=0)
        return share.numerator * last_cross * encoder + (share.denominator - share.numerator) * max(last, 1) * cross
    if rule == "cross_first":
        # F6: the tokens with the highest cross-modal saliency first, then the encoder's.
        head = round((1 - alpha) * keep)
        first = rank01(c) > 1 - (head - 0.5) / max(total - 1, 1) if head else torch.zeros_like(c, dtype=torch.bool)
        return rank01(v) + 2 * first.float()
    if rule == "gate":
        # F7: the encoder's score times 1 + cross-modal saliency / its mean, without alpha.
        return v * (1 + c / c.mean(1, keepdim=True).clamp(min=TINY))
    return alpha * rescaled(v, rule) + (1 - alpha) * rescaled(c, rule)


# Anchors and their share were chosen on the toy validation split, see docs/consensusdrop.md. For comparison, VisionZip
# merges into 10/64 of its tokens (54 + 10, 108 + 20, 162 + 30) with stride anchors.
MERGED_SHARE = 0.5


def pool_attention(weights: Tensor, rows: Tensor | None, heads: str, pooling: str) -> Tensor:
    """Cross-modal saliency c [B, N] from the attention [B, H, T, N] of text rows.

    Args:
        rows: [B, T] bool, the rows that exist; None if all do.
        heads: "mean" over all heads, or "sharp" for the half of the heads with the lowest entropy (the other heads
            spread their attention over the whole image).
        pooling: "mean" or "max" over rows.
    """
    count = weights.shape[2] if rows is None else rows.sum(-1)[:, None].clamp(min=1)
    if heads == "sharp":
        entropy = -(weights.clamp(min=1e-12).log() * weights).sum(-1)
        entropy = (entropy if rows is None else entropy * rows[:, None]).sum(-1) / count
        half = max(1, weights.shape[1] // 2)
        sharpest = entropy.argsort(dim=1, stable=True)[:, :half]
        weights = weights.gather(1, sharpest[:, :, None, None].expand(-1, -1, *weights.shape[2:]))
    weights = weights if rows is None else weights * rows[:, None, :, None]
    if pooling == "max":
        return weights.amax(2).mean(1)
    return weights.sum(2).mean(1) / count


@register("consensusdrop")
@dataclass(frozen=True, kw_only=True)
class ConsensusDrop(Reducer):
    """Acts before decoder layer 0, when the question is known and no decoder layer has run yet."""

    summary: ClassVar[str] = "rank by encoder saliency and question attention together, merge the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="CLS attention and question attention, as ranks",
        rest="merged by encoder keys into half of the budget",
        needs="CLS token",
        reads=("cls_attention -2", "keys -2", "attention", "question"),
        similarity="keys",
        weights="score",
        paper="ConsensusDrop, 2602.00946 (reconstruction)",
        url="https://arxiv.org/abs/2602.00946",
    )

    known_deviations: ClassVar[dict[str, str]] = {
        "appended with order=appended": "merged tokens follow the retained ones",
        "scale with weights=anchor_plus_mean": "the sum that VisionZip's release uses",
    }

    alpha: float = option(
        0.5, "weight of the encoder in the ranking: 1 encoder only, 0 cross-modal only", least=0, most=1
    )
    fusion: str = option(
        "rank", "rule that fuses the two rankings; raw ranks as a product of their softmaxes does", FUSIONS
    )
    cross_top: int = option(0, "rank fusion: rank only so many of the cross-modal scores, 0 for all", least=0)
    probe: str = option("static", "inputs of the probe: embeddings, or real layer inputs", ("static", "contextual"))
    probe_layer: int = option(0, "decoder layer whose norm and projections the probe uses")
    query: str = option(
        "question", "text rows whose attention to the image is used", ("question", "instruction", "last")
    )
    pooling: str = option("mean", "over text rows", ("mean", "max"))
    heads: str = option("mean", "all heads, or the sharper half", ("mean", "sharp"))
    rope: bool = option(False, "rotate the probe's queries and keys by their positions")
    block: int = option(-2, "tower block that gives saliency and keys")
    merged_share: float = option(MERGED_SHARE, "share of the budget that merged tokens take")
    anchors: str = option("farthest", "the tokens that the rest is merged into", ANCHORS)
    weights: str = option("saliency", "how a merged token is averaged; none drops the rest", WEIGHTS)
    merge_space: str = option("projected", "merge projected tokens or tower features", ("projected", "encoder"))
    cls_token: bool = option(False, "keep the CLS token as one of the budget")
    order: str = option("raster", "place of merged tokens", ("raster", "appended"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.merged_share < 1:
            raise UserError(f"consensusdrop.merged_share must be at least 0 and below 1, got {self.merged_share}.")
        if self.cls_token and self.tile_budget == "global":
            raise UserError(
                "consensusdrop.cls_token keeps a token of every tile; it needs consensusdrop.tile_budget=each."
            )
        if self.probe == "static" and self.query == "last":
            # Its embedding is the same for every question, so the ranking would not depend on the question.
            raise UserError(
                "consensusdrop.query=last needs consensusdrop.probe=contextual and a probe_layer of at least 1."
            )
        if self.probe == "contextual" and self.probe_layer < 1:
            raise UserError(
                "consensusdrop.probe=contextual needs a probe_layer of at least 1; layer 0 sees embeddings only."
            )

    @property
    def keep_cls(self) -> bool:
        return self.cls_token

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.cls_token and not spec.has_cls:
            raise UserError("consensusdrop.cls_token keeps the CLS token, and this tower has none; leave it out.")
        if not 0 <= self.probe_layer < spec.layers:
            raise UserError(
                f"consensusdrop.probe_layer must be below {spec.layers} (decoder layers), got {self.probe_layer}."
            )

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("cls_attention", self.block), TowerScore("keys", self.block)

    def cross_saliency(self, state: PromptState) -> Tensor:
        """[B, N] float32, how much the text rows attend to each visual token."""
        attention = state.text_attention(self.probe_layer, self.query, self.rope, self.probe == "contextual")
        return pool_attention(*attention, self.heads, self.pooling)[:, int(self.cls_token) :]

    def prompt(self, state: PromptState) -> Reduction | None:
        # How important each token is to the encoder and to the question.
        saliency, keys = (state.scores[score] for score in self.scores())
        weighted = self.fusion == "gate" or self.alpha < 1  # else the cross-modal saliency has weight 0
        cross = self.cross_saliency(state) if weighted else None

        # The tokens with the highest consensus of both are retained.
        budget = self.budget - self.cls_token
        merged = 0 if self.anchors == "retained" else round(budget * self.merged_share)
        score = fuse(saliency, cross, self.fusion, budget - merged, self.alpha, self.cross_top)
        retained, rest = split(score, budget - merged)

        # The others are merged, guided by the encoder's keys.
        appended = self.order == "appended"
        plan = merge_plan(retained, rest, merged, saliency, keys, self.anchors, self.weights, appended)
        plan = plan.with_cls() if self.cls_token else plan
        return replace(plan, encoder_space=self.merge_space == "encoder")
