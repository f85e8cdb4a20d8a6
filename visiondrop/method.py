"""VisionDrop: rank tokens by visual attention in stages, in the encoder and inside the decoder, and merge the rest.

Paper: https://arxiv.org/abs/2506.22283
Official code read: Ruixxxx/VisionDrop@f7a9444, llava/visionzip and llava/model/modeling_llama_visiondrop.py
Differs from it: merged tokens are means (theirs adds the mean to the target token, as `official` does). It takes
batches, several images, grouped-query heads, and any budget and depth. With tiles, also with `official`, the decoder
stages reduce all of them (theirs: the first view alone), and merged tokens are in raster order of the stitched tiles
(theirs: tile after tile).

Stages cut the decoder into segments. The first segment starts at layer 0 with the tokens that the encoder stage keeps.
The release says how many tokens each segment has for an average of 32 alone (README.md, scripts/v1_5/visiondrop_eval);
the rule for other budgets is ours (docs/visiondrop.md).

Shapes: B images, n visual tokens, W keys up to the last visual token, H heads of width d, D channels.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    AttentionInputs,
    DecoderState,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    UserError,
    angles_of,
    attention_flops,
    attention_rows,
    heads_of,
    linear_flops,
    merge_plan,
    option,
    over_crops,
    places,
    planned,
    register,
    scaled_layers,
    split,
    tokens_by_layer,
)

STAGES, REFERENCE = (8, 16, 24), 32
# (dominant, contextual) tokens of the four segments; CLS is one of the 42.
PUBLISHED = ((42, 6), (30, 5), (22, 4), (16, 3))
PUBLISHED_BUDGET, PUBLISHED_START, PUBLISHED_RATIO = 32, 1.5, 7
REACH = 3  # how far a count may move from the geometric value to make the mean exact

ENCODER_SCORES = {"cls": "cls_attention", "received": "received_attention"}
ATTENTIONS = ("causal", "visual", "bidirectional")
AVERAGES = ("all", "viewers")
METRICS = ("rotated", "unrotated", "hidden")
MERGES = {"mean": "mean", "target_plus_mean": "anchor_plus_mean", "none": "none"}
FREE = ("budget", "official", "layers", "start", "ratio", "encoder_only")  # options that leave a stage as released
SLICE = 2**24  # attention weights held at a time: 64 MB in float32


# How many tokens each stage keeps: the released schedule, and a geometric rule for other budgets.


def plan(budget: int, widths: tuple[int, ...], most: int, start: float, ratio: int) -> tuple[tuple[int, int], ...]:
    """(dominant, contextual) tokens of every segment; their sums have the mean `budget` over layers.

    For four equal segments and a multiple of 32 this is a multiple of the released schedule, otherwise it is geometric.

    Args:
        budget: mean tokens per layer, below `most`.
        widths: layers in each segment.
        most: tokens of the unreduced image.
        start: tokens of the first segment as a multiple of the budget.
        ratio: dominant tokens for each contextual one.
    """
    equal = len(widths) == len(PUBLISHED) and len(set(widths)) == 1
    released = equal and budget % PUBLISHED_BUDGET == 0 and budget * PUBLISHED_START <= most
    if start == PUBLISHED_START and released:
        times = budget // PUBLISHED_BUDGET
        pairs = tuple((times * dominant, times * contextual) for dominant, contextual in PUBLISHED)
        return pairs if ratio == PUBLISHED_RATIO else tuple(dominant_and_contextual(sum(pair), ratio) for pair in pairs)
    return tuple(dominant_and_contextual(total, ratio) for total in geometric(budget, widths, most, start))


def dominant_and_contextual(total: int, ratio: int) -> tuple[int, int]:
    """Split `total` tokens into (dominant, contextual), with at least one dominant token.

    Args:
        ratio: dominant tokens for each contextual one; 0 makes all of them dominant. 7 gives the published pairs, with
            ceil(total / 8) contextual tokens.
    """
    contextual = min(-(-total // (ratio + 1)), total - 1) if ratio else 0
    return total - contextual, contextual


def geometric_means(budget: int, widths: tuple[int, ...], most: int, start: float) -> tuple[float, ...]:
    """Tokens of segment k before rounding: first * factor^k, at least 1, with the mean `budget` over layers.

    The first segment gets `start` times the budget, or less if the image has fewer tokens or if no token would be left
    for later layers.
    """
    layers = sum(widths)
    spare = 1 + (budget - 1) * layers / widths[0]  # then every other layer has one token
    first = min(start * budget, most, spare)

    def values(factor: float) -> tuple[float, ...]:
        return tuple(max(1.0, first * factor**k) for k in range(len(widths)))

    low, high = 0.0, 1.0
    for _ in range(100):  # bisection: the mean grows with the factor
        middle = (low + high) / 2
        mean = sum(width * value for width, value in zip(widths, values(middle), strict=True)) / layers
        low, high = (middle, high) if mean < budget else (low, middle)
    return values(high)


def geometric(budget: int, widths: tuple[int, ...], most: int, start: float) -> tuple[int, ...]:
    """The non-increasing integers nearest to `geometric_means` whose mean over layers is the budget.

    Of all counts within REACH of the geometric values, it takes those with the mean nearest to the budget, and of these
    the ones with the least squared distance. The mean is exact unless the segment widths make that impossible.
    """
    ideal = geometric_means(budget, widths, most, start)
    # (tokens over all layers so far, last count) -> (squared distance, counts)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, most): (0.0, ())}
    for value, width in zip(ideal, widths, strict=True):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (total, last), (cost, counts) in best.items():
            for count in range(max(1, math.floor(value) - REACH), min(last, math.ceil(value) + REACH) + 1):
                key = (total + width * count, count)
                candidate = (cost + (count - value) ** 2, (*counts, count))
                longer[key] = min(candidate, longer.get(key, candidate))
        best = longer
    wanted = budget * sum(widths)
    return min((abs(total - wanted), *candidate) for (total, _), candidate in best.items())[-1]


# Attention that the visual tokens of a decoder layer receive from each other. Only the rows of visual tokens are
# computed, in slices.


def attention_inputs(state: DecoderState, attention: str) -> AttentionInputs:
    """Prepare a kind of attention; its operations are counted in `state.flops`.

    Args:
        attention: What every visual token sees. "causal", as in the layer itself: all before it, and itself.
            "visual": the visual tokens before it, and itself. "bidirectional": all visual tokens of its image.
    """
    if attention == "causal":
        # No visual token sees the text after the image, so that text needs no keys.
        return state.attention_inputs("visual")
    layer, (batch, count) = state.llm.layers[state.layer], state.tokens.shape[:2]
    rows, sequence = layer.input_layernorm(state.tokens), state.sequence
    angles = tuple(sequence.take(part, sequence.images) for part in angles_of(state.llm, sequence, state.layer))
    keys = heads_of(layer, "key", rows, angles)
    columns = places(batch, count, rows.device)
    unseen = None if attention == "bidirectional" else (columns[:, None] > columns[..., None])[:, None]
    state.flops += batch * attention_flops(layer, count, count, count)
    return AttentionInputs(rows, angles, keys, unseen, ((0, count),) * batch)


def visual_scores(state: DecoderState, seen: AttentionInputs, attention: str, average: str, diagonal: bool) -> Tensor:
    """[B, n] float32, mean attention that each visual token receives, over heads and visual tokens; higher is kept.

    Args:
        seen: `attention_inputs` of this kind of `attention`.
        average: mean over "all" visual tokens, with zeros from those that cannot see the token, or over its "viewers",
            which can.
        diagonal: count the attention of a token to itself.
    """
    layer, batch, count, width = state.llm.layers[state.layer], *seen.rows.shape[:2], seen.keys.shape[2]
    heads = layer.self_attn.q_proj.out_features // layer.self_attn.head_dim
    step = max(1, SLICE // (batch * heads * width))  # rows at a time, so that the whole map is never held
    received = []
    for start in range(0, count, step):
        rows, angles, unseen = seen.rows, seen.angles, seen.unseen
        if step < count:
            part = slice(start, start + step)
            rows, unseen = rows[:, part], None if unseen is None else unseen[:, :, part]
            angles = None if angles is None else (angles[0][:, part], angles[1][:, part])
        weights = seen.at_visual(attention_rows(layer, rows, seen.keys, unseen, angles).mean(1))
        if not diagonal:
            own = torch.eye(count, dtype=torch.bool, device=weights.device)
            weights = weights.masked_fill(own[start : start + step], 0)
        received.append(weights.sum(1))
    total = sum(received[1:], received[0])
    if average == "all":
        return total / count
    if attention == "bidirectional":
        viewers = torch.full((count,), float(count), device=total.device)
    else:
        viewers = torch.arange(count, 0, -1, device=total.device, dtype=torch.float32)
    return total / (viewers if diagonal else viewers - 1).clamp(min=1)


def merge_metric(state: DecoderState, seen: AttentionInputs, metric: str) -> Tensor:
    """[B, n, d] (or [B, n, D]) float32 vectors by whose cosine merging compares tokens.

    Args:
        metric: "rotated" or "unrotated" for the next layer's keys with or without rotation by position, as mean over
            heads; or "hidden" for the hidden states.
    """
    if metric == "hidden":
        return state.tokens.float()
    if metric == "unrotated":
        layer = state.llm.layers[state.layer]
        state.flops += len(state.tokens) * linear_flops(layer.self_attn.k_proj, state.tokens.shape[1])
        return heads_of(layer, "key", seen.rows).mean(1)
    return seen.at_visual(seen.keys, -2).mean(1)


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
        reads=("cls_attention -2", "keys -2", "attention", "order"),
        similarity="keys",
        weights="mean",
        paper="VisionDrop, 2506.22283",
        url="https://arxiv.org/abs/2506.22283",
        code="Ruixxxx/VisionDrop@f7a9444",
        release=Release(
            batch="answers in a batch are wrong from the second token on",
            order="merged tokens come last, with tiles tile after tile",
            norms="merged tokens: the mean of the members is added to the target, again in every stage",
            ours="means, in batches of any size",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "as in the release, contextual tokens follow the dominant ones",
        "scale with official=true": "the release adds the mean of its members to a contextual token",
        "scale with merge=target_plus_mean": "the sum that the release uses",
    }

    tile_budget: str = option(
        "each", "the encoder stage splits the budget evenly over tiles, the decoder ranks all together", ("each",)
    )
    official: bool = option(False, "exactly as released: a merged token is its target plus the mean of the others")
    layers: tuple[int, ...] = option(
        (), "decoder layers before which to reduce; empty for 8, 16, 24 of 32 in proportion"
    )
    start: float = option(
        PUBLISHED_START, "tokens after the encoder stage, as a multiple of the budget; 3 for video", least=1
    )
    ratio: int = option(PUBLISHED_RATIO, "dominant tokens per contextual token; 0 for dominant tokens only", least=0)
    keep_cls: bool = option(True, "CLS, where there is one, is the first dominant token after the encoder stage")
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
    encoder_only: bool = option(
        False, "the encoder stage alone, which keeps the whole budget, as for an engine; not the paper's method"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_only:
            if self.layers or self.start != PUBLISHED_START:
                raise UserError("visiondrop.encoder_only leaves no decoder stages; leave out layers and start.")
            object.__setattr__(self, "acts_in", type(self).acts_in - {"decoder"})
        if any(b <= a for a, b in pairwise((0, *self.layers))):
            raise UserError(f"visiondrop.layers must ascend from 1, got {', '.join(map(str, self.layers))}.")
        changed = [f.name for f in fields(self) if f.name not in FREE and getattr(self, f.name) != f.default]
        if self.official and changed:
            raise UserError(f"visiondrop.official is the release as it is; leave out {', '.join(changed)}.")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.encoder_only:
            return
        first = self.decoder_layers(spec.layers)[0]
        if self.start * first >= spec.layers:
            raise UserError(
                f"visiondrop.start={self.start:g} spends the whole budget on the first {first} of {spec.layers} "
                f"layers; it must be below {spec.layers / first:g}."
            )

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore(ENCODER_SCORES[self.encoder_score]), TowerScore("keys")

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        if self.encoder_only:
            return ()
        stages = self.layers or scaled_layers(STAGES, REFERENCE, layers)
        if stages[-1] >= layers:
            raise UserError(f"visiondrop.layers must be below {layers} (decoder layers), got {stages[-1]}.")
        return stages

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        first, *counts = map(sum, stages_of(self, spec).values())
        return tokens_by_layer(first, self.decoder_layers(spec.layers), counts, spec.layers)

    def encoder(self, state: EncoderState) -> Reduction | None:
        score, keys = (state.scores[score] for score in self.scores())
        images, patches = score.shape
        dominant, contextual = stages_of(self, state.spec)[0]
        keep_cls = state.features.shape[1] > patches
        if dominant + contextual >= patches:
            if not keep_cls:
                return None
            every = torch.arange(1, patches + 1, device=score.device)  # without CLS, as LLaVA does without reduction
            return Reduction(every.expand(images, -1), patches + 1)
        if keep_cls:
            # CLS gets the highest score, so that it is kept and its key is never compared.
            score, keys = F.pad(score, (1, 0), value=float("inf")), F.pad(keys, (0, 0, 1, 0))
        return self._reduce(score, keys, dominant, contextual)

    def decoder(self, state: DecoderState) -> Reduction | None:
        dominant, contextual = decoder_stages(self, state.spec)[state.layer]
        if dominant + contextual >= state.tokens.shape[1]:
            return None  # this stage has nothing to do
        seen = attention_inputs(state, self.attention)
        score = visual_scores(state, seen, self.attention, self.average, self.diagonal)
        metric = merge_metric(state, seen, self.metric)
        return self._reduce(score, metric, dominant, contextual)

    def _reduce(self, score: Tensor, metric: Tensor, dominant: int, contextual: int) -> Reduction:
        """Keep the `dominant` best tokens, and merge the others into `contextual` of them."""
        weights = MERGES["target_plus_mean" if self.official else self.merge]
        retained, rest = split(score, dominant)
        appended = self.order == "appended"
        return merge_plan(retained, rest, contextual, score, metric, "stride", weights, appended)


@lru_cache(maxsize=256)
def stages_of(method: VisionDrop, spec: ModelSpec) -> dict[int, tuple[int, int]]:
    """Layer before which a stage acts -> (dominant, contextual) tokens it keeps; 0 for the encoder stage."""
    layers = method.decoder_layers(spec.layers)
    if method.budget >= spec.visual_tokens:
        return dict.fromkeys((0, *layers), (spec.visual_tokens, 0))
    if not layers:
        return {0: dominant_and_contextual(method.budget, method.ratio)}
    widths = tuple(stop - start for start, stop in pairwise((0, *layers, spec.layers)))
    pairs = plan(method.budget, widths, spec.visual_tokens, method.start, method.ratio)
    return dict(zip((0, *layers), pairs, strict=True))


@lru_cache(maxsize=256)
def decoder_stages(method: VisionDrop, spec: ModelSpec) -> dict[int, tuple[int, int]]:
    """Layer before which a decoder stage acts -> (dominant, contextual) tokens it keeps of an image with all its tiles.

    With tiles, the number of contextual tokens is the sum of those of each tile. All tokens are ranked together,
    including newline tokens that are kept.
    """
    tokens = planned(method, spec)
    assert tokens is not None  # it never depends on the image
    parts = [stages_of(part, own) for part, own in over_crops(method, spec)]
    contextual = {layer: sum(stages[layer][1] for stages in parts) for layer in method.decoder_layers(spec.layers)}
    return {layer: (tokens[layer] - merged, merged) for layer, merged in contextual.items()}
