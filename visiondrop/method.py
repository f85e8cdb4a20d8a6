"""VisionDrop: rank tokens by visual attention in stages, in the encoder and inside the decoder, and merge the rest.

Paper: https://arxiv.org/abs/2506.22283
Official code read: Ruixxxx/VisionDrop@f7a9444, llava/visionzip and llava/model/modeling_llama_visiondrop.py
Differs from it: merged tokens are means (theirs adds the mean to the target token, as `official` does); batches,
several images, grouped-query heads, any budget and depth. With tiles, `official` too reduces all of them in the decoder
(theirs: the first view alone) and keeps merged tokens in raster order of the tiles' grid (theirs: tile after tile).
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    DecoderState,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    State,
    TowerScore,
    UserError,
    merge_flops,
    merge_plan,
    option,
    over_crops,
    planned,
    refuse_budget,
    register,
    scaled_layers,
    split,
    tokens_by_layer,
)
from visiondrop.schedule import PUBLISHED_RATIO, PUBLISHED_START, plan, segment_widths
from visiondrop.scoring import ATTENTIONS, AVERAGES, METRICS, look, merge_metric, visual_scores

STAGES, REFERENCE = (8, 16, 24), 32
ENCODER_SCORES = {"cls": "cls_attention", "received": "received_attention"}
MERGES = {"mean": "mean", "target_plus_mean": "anchor_plus_mean", "none": "none"}
FREE = ("budget", "official", "layers", "schedule", "start", "ratio")  # arguments of the release


@register("visiondrop")
@dataclass(frozen=True, kw_only=True)
class VisionDrop(Reducer):
    """Acts before the projector and before three decoder layers; no stage reads the question."""

    summary: ClassVar[str] = "rank by visual attention in stages, encoder first, then decoder layers; merge the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower, before decoder layers 8, 16 and 24 of 32",
        score="CLS attention, then attention received from visual tokens",
        rest="merged by keys into an eighth of the tokens",
        order="raster, merged ones last",
        needs="CLS token",
        paper="VisionDrop, 2506.22283",
        url="https://arxiv.org/abs/2506.22283",
        code="Ruixxxx/VisionDrop@f7a9444",
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "as in the release, contextual tokens follow the dominant ones",
        "unused schedule": "on small images both schedules round to the same numbers of tokens",
        "scale with official=true": "the release adds the mean of its members to a contextual token",
        "scale with merge=target_plus_mean": "the sum that the release uses",
    }

    crops: str = option(
        "each", "the encoder stage splits the budget evenly over tiles, the decoder ranks all together", ("each",)
    )
    official: bool = option(False, "exactly as released: a merged token is its target plus the mean of the others")
    layers: tuple = option((), "decoder layers before which to reduce; empty for 8, 16, 24 of 32 in proportion")
    schedule: str = option(
        "published",
        "multiples of the released 48/35/26/19 where budget and segments allow, else geometric; or always geometric",
        ("published", "geometric"),
    )
    start: float = option(
        PUBLISHED_START, "tokens after the encoder stage, as a multiple of the budget; 3 for video", least=1
    )
    ratio: int = option(PUBLISHED_RATIO, "dominant tokens per contextual token; 0 for dominant tokens only", least=0)
    keep_cls: bool = option(True, "CLS is the first dominant token after the encoder stage")
    encoder_score: str = option(
        "cls", "rank patches by the attention of CLS, or received from all patches", tuple(ENCODER_SCORES)
    )
    attention: str = option(
        "causal", "decoder score: the layer's own rows, over visual keys only, or without causality", ATTENTIONS
    )
    average: str = option("all", "decoder score: mean over all visual tokens, or over those that see it", AVERAGES)
    diagonal: bool = option(True, "decoder score: count the attention of a token to itself")
    metric: str = option("rotated", "decoder: what is compared in merging, keys or hidden states", METRICS)
    merge: str = option("mean", "a merged token: mean, target plus mean of the others, or its target", tuple(MERGES))
    order: str = option("appended", "place of contextual tokens", ("appended", "raster"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(b <= a for a, b in pairwise((0, *self.layers))):
            raise UserError(f"visiondrop.layers must ascend from 1, got {', '.join(map(str, self.layers))}.")
        changed = [f.name for f in fields(self) if f.name not in FREE and getattr(self, f.name) != f.default]
        if self.official and changed:
            raise UserError(f"visiondrop.official is the release as it is; leave out {', '.join(changed)}.")

    def check(self, spec: ModelSpec) -> None:
        if not spec.has_cls and (self.keep_cls or self.encoder_score == "cls"):
            raise UserError(
                "visiondrop ranks by the CLS token and keeps it, and it cannot be read here. Set "
                "visiondrop.encoder_score=received and visiondrop.keep_cls=false."
            )
        super().check(spec)
        first = self.decoder_layers(spec.layers)[0]
        if self.start * first >= spec.layers:
            raise UserError(
                f"visiondrop.start={self.start:g} spends the whole budget on the first {first} of {spec.layers} "
                f"layers; it must be below {spec.layers / first:g}."
            )
        mean = sum(self.tokens_per_layer(spec)) / spec.layers
        if abs(mean - self.budget) > self.rounding:
            raise refuse_budget(
                self.name,
                self.budget,
                mean,
                spec.visual_tokens,
                "the number of layers in its segments does not allow it",
            )

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore(ENCODER_SCORES[self.encoder_score]), TowerScore("keys")

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        stages = self.layers or scaled_layers(STAGES, REFERENCE, layers)
        if stages[-1] >= layers:
            raise UserError(f"visiondrop.layers must be below {layers} (decoder layers), got {stages[-1]}.")
        return stages

    def stages(self, spec: ModelSpec) -> dict[int, tuple[int, int]]:
        """(dominant, contextual) tokens from each stage's layer on; layer 0 is for the encoder stage."""
        layers = self.decoder_layers(spec.layers)
        widths = segment_widths(layers, spec.layers)
        pairs = plan(self.budget, widths, spec.visual_tokens, self.schedule, self.start, self.ratio)
        return dict(zip((0, *layers), pairs, strict=True))

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        if self.budget >= spec.visual_tokens:
            return (spec.visual_tokens,) * spec.layers
        layers, (first, *counts) = self.decoder_layers(spec.layers), map(sum, self.stages(spec).values())
        return tokens_by_layer(first, layers, counts, spec.layers)

    def encoder(self, state: EncoderState) -> Reduction | None:
        assert state.spec is not None  # the pipeline sets it
        score, keys = (state.scores[score] for score in self.scores())
        patches = score.shape[1]
        if self.tokens_per_layer(state.spec)[0] >= patches:
            return _drop_cls(state.features) if self.keep_cls else None
        if self.keep_cls:
            # CLS gets the highest score, so it is kept and its key is never compared.
            score, keys = F.pad(score, (1, 0), value=float("inf")), F.pad(keys, (0, 0, 1, 0))
        return self._reduce(state, score, keys, *self.stages(state.spec)[0])

    def decoder(self, state: DecoderState) -> Reduction | None:
        assert state.spec is not None  # the pipeline sets it
        tokens = planned(self, state.spec)
        assert tokens is not None  # it never depends on the image
        if tokens[state.layer] >= state.tokens.shape[1]:
            return None  # this stage has nothing to do
        seen = look(state, self.attention)
        score = visual_scores(state, seen, self.attention, self.average, self.diagonal)
        # For an image with tiles, the sum of what the stage would keep of each tile; all tokens are ranked together,
        # newline tokens that are kept among them.
        contextual = sum(sized.stages(part)[state.layer][1] for sized, part in over_crops(self, state.spec))
        dominant = tokens[state.layer] - contextual
        return self._reduce(state, score, merge_metric(state, seen, self.metric), dominant, contextual)

    def _reduce(self, state: State, score: Tensor, metric: Tensor, dominant: int, contextual: int) -> Reduction:
        """Keep the `dominant` best tokens, merge the others into `contextual` of them."""
        merge = MERGES["target_plus_mean" if self.official else self.merge]
        merges = merge != "none" and contextual > 0
        inputs, channels = metric.shape[1:]
        state.flops += len(metric) * merge_flops("stride", inputs, dominant, contextual, channels, merges)
        retained, rest = split(score, dominant)
        return merge_plan(retained, rest, contextual, score, metric, "stride", merge, self.order == "appended")


def _drop_cls(features: Tensor) -> Reduction:
    """Keep all patches and drop CLS, as LLaVA does without reduction."""
    count = features.shape[1]
    return Reduction(torch.arange(1, count, device=features.device).expand(len(features), -1), count)
