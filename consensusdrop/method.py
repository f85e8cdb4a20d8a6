"""ConsensusDrop: retain by a consensus of encoder saliency and query-aware attention, merge the remainder.

Paper: https://arxiv.org/abs/2602.00946 (abstract only)
Official code read: none was released.
Differs from it: unknown. docs/consensusdrop.md separates fact from reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from consensusdrop.fusion import FUSIONS, fuse
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
    merge_flops,
    merge_plan,
    option,
    register,
    split,
    with_cls,
)

# Anchors and their share were chosen on the toy validation split, see docs/consensusdrop.md. VisionZip merges into
# 10/64 of its tokens (54 + 10, 108 + 20, 162 + 30) with stride anchors.
MERGED_SHARE = 0.5


def pool_attention(weights: Tensor, rows: Tensor | None, heads: str, pooling: str) -> Tensor:
    """Cross-modal saliency c [B, N] from attention [B, H, T, N] of text rows.

    Args:
        rows: [B, T] bool, the rows that exist; None if all do.
        heads: "mean" over all heads, or "sharp" for the half of the heads with the lowest entropy (attention of
            the others is spread over the whole image).
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

    version: ClassVar[str] = "2"  # 2: equal sums of ranks keep the lower index
    summary: ClassVar[str] = "rank by encoder saliency and question attention together, merge the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="CLS attention and question attention, as ranks",
        rest="merged by encoder keys into half of the budget",
        needs="CLS token",
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
        "rank", "rule that fuses the two rankings; raw ranks as a product of their softmaxes does", tuple(FUSIONS)
    )
    cross_top: int = option(0, "rank fusion: rank only so many of the cross-modal scores, 0 for all", least=0)
    temperature: float = option(1.0, "log fusion: sharpen the cross-modal distribution")
    rrf_k: float = option(60.0, "reciprocal rank fusion: the constant k")
    gate_beta: float = option(1.0, "gate fusion: how strongly the text raises the encoder's score")
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
        if self.cls_token and self.crops == "global":
            raise UserError("consensusdrop.cls_token keeps a token of every tile; it needs consensusdrop.crops=each.")
        if self.temperature <= 0:
            raise UserError(f"consensusdrop.temperature must be above 0, got {self.temperature}.")
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
        if not 0 <= self.probe_layer < spec.layers:
            raise UserError(
                f"consensusdrop.probe_layer must be below {spec.layers} (decoder layers), got {self.probe_layer}."
            )

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("cls_attention", self.block), TowerScore("keys", self.block)

    @property
    def reads_question(self) -> bool:
        """False if the cross-modal saliency has weight 0 and need not be computed."""
        return self.fusion == "gate" or self.alpha < 1

    def prompt(self, state: PromptState) -> Reduction | None:
        saliency, keys = (state.scores[score] for score in self.scores())
        cross = self._cross_saliency(state) if self.reads_question else None
        plan, merged = self._plan(saliency, cross, keys), self._merged()
        keep = plan.kept.shape[1] - merged
        cost = merge_flops(self.anchors, plan.inputs, keep, merged, keys.shape[-1], plan.merges)
        state.flops += len(plan.kept) * cost
        if self.cls_token:
            plan = with_cls(plan)
        return replace(plan, encoder_space=self.merge_space == "encoder")

    def _cross_saliency(self, state: PromptState) -> Tensor:
        attention = state.text_attention(self.probe_layer, self.query, self.rope, self.probe == "contextual")
        cross = pool_attention(*attention, self.heads, self.pooling)
        return cross[:, 1:] if self.cls_token else cross

    def _merged(self) -> int:
        return 0 if self.anchors == "retained" else round((self.budget - self.cls_token) * self.merged_share)

    def _plan(self, saliency: Tensor, cross: Tensor | None, keys: Tensor) -> Reduction:
        merged = self._merged()
        keep = self.budget - self.cls_token - merged
        choices = {name: getattr(self, name) for name in ("alpha", "cross_top", "temperature", "rrf_k", "gate_beta")}
        retained, rest = split(fuse(saliency, cross, self.fusion, keep, **choices), keep)
        appended = self.order == "appended"
        return merge_plan(retained, rest, merged, saliency, keys, self.anchors, self.weights, appended)
