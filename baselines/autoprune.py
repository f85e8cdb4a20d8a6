"""AutoPrune: drop visual tokens before every decoder layer, along a curve that is steeper for some samples than others.

Paper: https://arxiv.org/abs/2509.23931
Official code read: AutoLab-SAI-SJTU/AutoPrune@e4a9918, llava/model/language_model/modelling_sparse_llama.py, score.py,
utils.py
Differs from it: the release fits the curve so that the budget is the mean of what the layers leave, not of what enters
them. It does not count the tokens of layer 0, so 204 to 210 (192), 143 to 146 (128) and 80 to 82 (64) enter a layer. By
default layer 0 is counted here: the other layers share what it leaves of the budget, by the same rule. `official=true`
fits as the release does. One case is left out: the release does not fit a curve whose rough sum is within one token of
the budget. Without `official` the curve is stretched to decoders of other depths than 32 layers. Clusters are computed
without random noise, a single recycled token stays in its place, and equal scores go to the lower index.

Shapes: B images, N visual tokens, H heads, T rows of text.
"""

from dataclasses import dataclass
from math import ceil, exp
from typing import ClassVar

from torch import Tensor

from baselines._recycling import keep_and_recycle, recycled
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Reductions,
    Release,
    TowerScore,
    UserError,
    keep_top,
    option,
    places,
    refuse_budget,
    register,
)

REFERENCE = 32  # decoder layers of the paper's model
FIRST = 2.5  # tokens that layer 0 leaves, as a multiple of the budget
TEXT = 0.3  # weight of the text beside CLS in the first stage
MOST = 15.0  # by how much the release multiplies a curve that starts from 1, at most
TINY = 1e-6


def mutual_information(weights: Tensor, exists: Tensor) -> Tensor:
    """[B] mutual information of text and visual tokens in bits, summed over heads.

    Args:
        weights: [B, H, T, N] attention of the text to the image.
        exists: [B, T], False for padding.
    """
    rows = exists.sum(1)[:, None, None, None]
    joint = weights * exists[:, None, :, None] / rows
    ratio = joint / (joint.sum(2, keepdim=True) / rows + TINY)
    return (joint * ratio.clamp(min=TINY).log2()).sum((1, 2, 3))


def left_by(shares: list[float], first: int) -> tuple[list[int], list[int]]:
    """Tokens that each stage keeps, and those that it leaves with the clusters, if the first stage leaves `first`."""
    keeps, left, current = [], [], first
    for share in shares:
        keep = min(ceil((first - 1) * min(share, 1)), current)
        current = keep + (recycled(current - keep)[1] if keep < current else 0)
        keeps.append(keep)
        left.append(current)
    return keeps, left


def fitted(curve: list[float], first: int, wanted: int, most: float) -> tuple[list[int], list[int]]:
    """`left_by` for the curve times the factor with which all stages leave the nearest to `wanted` tokens together.

    Args:
        most: the highest factor.
    """
    low, high, best = 0.0, most, (float("inf"), 1.0)
    while low < (factor := (low + high) / 2) < high:
        total = first + sum(left_by([share * factor for share in curve], first)[1])
        best = min(best, (abs(total - wanted), factor), key=lambda one: one[0])
        if total == wanted:
            break
        low, high = (factor, high) if total < wanted else (low, factor)
    return left_by([share * best[1] for share in curve], first)


@register("autoprune")
@dataclass(frozen=True, kw_only=True)
class AutoPrune(Reducer):
    """The number of tokens in a layer depends on the sample; their mean over layers is the budget for each of them."""

    summary: ClassVar[str] = "rank by the text's attention before every decoder layer; a curve for each sample"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 1 to 31 of 32",
        score="CLS attention and that of the text in layer 0; then that of the text in the layer before",
        rest="from layer 2 on, three tenths averaged into clusters, a tenth as many",
        order="raster, clusters last",
        needs="CLS token",
        reads=("cls_attention -2", "tokens", "attention", "question"),
        similarity="tokens",
        weights="mean",
        paper="AutoPrune, 2509.23931",
        url="https://arxiv.org/abs/2509.23931",
        code="AutoLab-SAI-SJTU/AutoPrune@e4a9918",
        release=Release(
            random="noise of up to 1e-6 on the density of the tokens that are clustered",
            batch="takes one prompt at a time",
            dtype="mutual information in the model's precision",
            count="leaves out the tokens that enter layer 0",
            norms="divides a cluster by its number of members plus 1e-6",
            ours="no noise, the lower index on a tie; layer 0 is counted",
            licence="Apache-2.0",
        ),
    )
    image_decides: ClassVar[str] = (
        "the question and the image decide how the tokens are spread over the layers; the mean of each is the budget"
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "as in the release, recycled clusters follow the kept tokens",
        "uncounted with official=true": "the release does not count layer 0",
    }

    tile_budget: str = option("global", "ranks the tokens of all tiles together", ("global",))
    official: bool = option(False, "the budget as the release counts it: without layer 0; the curve at any depth as is")
    x0: float = option(
        14.9, "layer of 32 at which the curve has halved; with a higher one early layers keep more", least=0
    )
    k0: float = option(0.4, "steepness of the curve without mutual information; 0 for as many in every layer", least=0)
    gamma: float = option(0.2, "by how much one bit of mutual information makes the curve less steep", least=0)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if spec.layers < 2:
            raise UserError(f"{self.name} reduces between decoder layers; this decoder has {spec.layers} layer.")
        if self.budget >= spec.visual_tokens or self.official:
            return
        # One token in every layer but the first.
        least = (spec.visual_tokens + spec.layers - 1) / spec.layers
        if self.budget < least:
            why = f"all {spec.visual_tokens} enter layer 0 of {spec.layers} layers"
            instead = f"Set {self.name}.official=true to count only the layers after it."
            raise refuse_budget(self.name, self.budget, least, spec.visual_tokens, why, instead)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return (spec.visual_tokens,) * spec.layers if self.budget >= spec.visual_tokens else None

    def bounds(self, spec: ModelSpec) -> tuple[float, float]:
        fits = self.official or self.budget >= spec.visual_tokens
        return super().bounds(spec) if fits else (self.budget - self.rounding, self.budget + self.rounding)

    def first(self, spec: ModelSpec) -> int:
        """Tokens that enter layer 1."""
        wanted, counted = self.counted(spec)
        return max(1, min(int(FIRST * wanted / counted), spec.visual_tokens, wanted - counted + 1))

    def counted(self, spec: ModelSpec) -> tuple[int, int]:
        """The sum of the numbers that are fitted to the budget, beginning with that of layer 1; and how many they are.

        The release counts what layer 0 and every later layer leave, so that the last number enters no layer.
        """
        whole = spec.layers * self.budget
        return (whole, spec.layers) if self.official else (whole - spec.visual_tokens, spec.layers - 1)

    def plan(self, information: float, spec: ModelSpec) -> list[int]:
        """Tokens that are kept before layers 2, 3, ..., without clusters.

        Args:
            information: mutual information of the attention of layer 1.
        """
        wanted, counted = self.counted(spec)
        steepness = max(self.k0 - self.gamma * information, 0.0)
        stretched = 1 if self.official else REFERENCE / spec.layers
        above = (steepness * (layer * stretched - self.x0 - steepness) for layer in range(1, counted))
        curve = [1 / (1 + exp(min(one, 500.0))) for one in above]
        most = MOST if self.official or not curve else 1 / curve[-1]
        return fitted(curve, self.first(spec), wanted, most)[0]

    def decoder(self, state: DecoderState) -> Reductions:
        count = state.tokens.shape[1]
        if self.budget >= state.spec.visual_tokens:
            return None
        weights, exists = state.attention("after", at="previous")  # [B, H, T, N]
        shown = exists[:, :, None]
        score = (weights.mean(1) * shown).sum(1) / shown.sum(1)
        if state.layer == 1:
            shared = mutual_information(weights, exists) / exists.sum(1)
            score = state.tower(self.scores()[0]) + TEXT * shared[:, None] * score
            first = self.first(state.spec)
            return Reduction(keep_top(score, first), count) if first < count else None
        if state.layer == 2:  # the host waits once, because the sample decides
            bits = mutual_information(weights, exists).nan_to_num()  # a broken model is reported later
            for notes, information in zip(state.memory, bits.tolist(), strict=True):
                notes["keeps"] = self.plan(information, state.spec)
        keeps = [notes["keeps"][state.layer - 2] for notes in state.memory]
        if min(keeps) >= count:
            return None
        if len(set(keeps)) == 1:
            return keep_and_recycle(score, state.tokens, keeps[0])
        return [
            keep_and_recycle(own, tokens, keep) if keep < count else Reduction(places(1, count, own.device), count)
            for own, tokens, keep in zip(score.split(1), state.tokens.split(1), keeps, strict=True)
        ]
