"""AttnMix (AdaFV, AdaV): keep the tokens most similar to the question and those with the highest CLS attention.

Paper: https://arxiv.org/abs/2501.09532 and https://aclanthology.org/2025.findings-acl.258 (the equations of neither
    were available)
Official code read: JiayiV/AdaV@58d1f8d, llava/model/language_model/llava_llama.py, generate
Differs from it: a token that both rankings choose counts once, so that the budget is met; saliency is ranked over all
    tiles together, in the order of the tokens; the text is the question. `official` follows the release in all of
    these. docs/attnmix.md explains each difference.

Shapes: B images, N visual tokens (all tiles of an image together), T text tokens, D channels of the decoder; in the
released form C tiles of n tokens, and V output tokens. B1 to B6 number the faults that docs/attnmix.md lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PromptState,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    UserError,
    keep_top,
    option,
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]


def text_scores(
    text: Tensor, exists: Tensor, visual: Tensor, temperature: float, matmul: MatMul = torch.matmul
) -> Tensor:
    """[B, N] float32, the text score of each visual token: the largest weight that a text token gives it.

    A text token's weights are the softmax of cosine / temperature over all visual tokens.

    Args:
        text: [B, T, D] word embeddings, as they enter the decoder.
        exists: [B, T] bool, False where a row is padding.
        visual: [B, N, D] projected visual tokens.
    """
    text, visual = F.normalize(text.float(), dim=-1), F.normalize(visual.float(), dim=-1)
    share = (matmul(text, visual.transpose(1, 2)) / temperature).softmax(-1)
    return share.masked_fill(~exists.unsqueeze(-1), 0).amax(1)


def ordered(score: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] scores -> float32 scores in descending order and their indices; ties go to the lower index."""
    return score.float().sort(dim=1, descending=True, stable=True)


def best_split(first: Tensor, second: Tensor) -> Tensor:
    """[B] int64, how many of K tokens go to the first of two rankings.

    The split has the largest product (and so the largest geometric mean) of the masses that both keep; on a tie the
    first ranking gets fewer tokens. A peaked ranking gets few tokens, a flat one many; its scale has no effect.

    Args:
        first, second: [B, K] scores in descending order, at least 0.
    """
    # Mass of the best k of each ranking, k = 0 .. K. Flipped, the second has the mass of its best K - k.
    if first.is_cuda:  # `cumsum` adds in no fixed order there, and ranks that share a model kept different tokens
        upper = torch.ones(first.shape[1], first.shape[1], device=first.device).triu()
        sums = [scores @ upper for scores in (first, second)]
    else:
        sums = [scores.cumsum(1) for scores in (first, second)]
    mass = [F.pad(scores, (1, 0)) for scores in sums]
    return (mass[0] * mass[1].flip(1)).argmax(1)


def forced_count(budget: int, floor: float) -> int:
    """Tokens that each ranking gets before the split, `floor` of the budget rounded down."""
    return int(budget * floor + 1e-9)  # 0.29 * 100 is a little less than 29


def adaptive_count(text: Tensor, saliency: Tensor, budget: int, floor: float) -> Tensor:
    """[B] int64, tokens that are chosen by text: its guaranteed share, and its part of the rest.

    Args:
        text, saliency: [B, at least budget] scores in descending order.
        floor: least share of the budget for each ranking, 0 to 0.5.
    """
    forced = forced_count(budget, floor)
    rest = slice(forced, budget - forced)
    return forced + best_split(text[:, rest], saliency[:, rest])


def mix(text: Tensor, saliency: Tensor, count: Tensor, budget: int) -> Tensor:
    """[B, budget] indices, ascending: the best `count` by text, and the most salient of the others.

    Args:
        text, saliency: [B, N] scores.
        count: [B] int64, at most `budget`.
    """
    place = text.float().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return keep_top(saliency.float().masked_fill(place < count.unsqueeze(1), torch.inf), budget)


# Distance between the indices of neighbouring tiles. It should be n; at 1 all salient indices point into tile 0 (B1).
STRIDE = 1


def released_count(budget: int, crops: int, mix: str) -> int:
    """V, the tokens kept at a budget: the same number of every tile, and an even number for two rankings (B5)."""
    return budget // crops * crops if mix == "t2i" else 2 * (budget // 2 // crops) * crops


def released_tokens(
    text: Tensor, saliency: Tensor, crops: int, budget: int, floor: float, mix: str = "adaptive", stride: int = STRIDE
) -> Tensor:
    """[B, V] indices, ascending; a token that both rankings choose occurs twice (B4).

    Args:
        text: [B, N] scores by text; unused with "cls".
        saliency: [B, N]; unused with "t2i".
        floor: share of V forced from each ranking; for saliency these come from the first tiles, not the best (B3).
        mix: "adaptive", "t2i" or "cls".
        stride: see STRIDE.
    """
    total = released_count(budget, crops, mix)
    if mix == "t2i":
        return keep_top(text, total)

    # The most salient tokens tile after tile, in descending order inside each tile only.
    inside: Tensor = saliency.float().unflatten(1, (crops, -1))
    value, place = inside.sort(dim=2, descending=True, stable=True)
    start = torch.arange(crops, device=saliency.device)[:, None] * stride
    size = total // crops
    value, place = value[:, :, :size].flatten(1), (place[:, :, :size] + start).flatten(1)  # [B, V]
    if mix == "cls":
        return place.sort(dim=1).values

    # The forced ones first, and the others by saliency over all tiles; then as many of each ranking as it gets.
    forced = forced_count(total, floor)
    rest, again = ordered(value[:, forced:])
    value = torch.cat([value[:, :forced], rest], 1)
    place = torch.cat([place[:, :forced], place[:, forced:].gather(1, again)], 1)
    text_value, text_place = ordered(text)
    count = adaptive_count(text_value, value, total, floor).unsqueeze(1)
    rank = torch.arange(total, device=place.device)
    # Tokens that are not chosen get an index after all tokens, so that sorting moves them out of the first V.
    nothing = text.shape[1]
    chosen = torch.cat(
        [text_place[:, :total].masked_fill(rank >= count, nothing), place.masked_fill(rank >= total - count, nothing)],
        1,
    )
    return chosen.sort(dim=1).values[:, :total]


@register("attnmix")
@dataclass(frozen=True, kw_only=True)
class AttnMix(Reducer):
    """Compares visual tokens with word embeddings, so that it needs no text tower and runs no decoder layer."""

    summary: ClassVar[str] = (
        "highest similarity to the question's words and highest CLS attention, split by their geometric mean"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="cosine to word embeddings, and CLS attention, block −2",
        needs="CLS token",
        reads=("cls_attention -2", "tokens", "question"),
        paper="AdaFV / AdaV, 2501.09532",
        url="https://arxiv.org/abs/2501.09532",
        code="JiayiV/AdaV@58d1f8d",
        release=Release(
            batch="the tiles of all samples count as those of one image",
            count="a token that both rankings choose counts twice, so that fewer are kept",
            ours="it counts once, and each image has its own ranking",
            licence="none; LLaVA's files are Apache-2.0",
        ),
    )

    known_deviations: ClassVar[dict[str, str]] = {
        "duplicates with official=true": "the release keeps a token twice that both rankings choose"
    }

    tile_budget: str = option("global", "ranks the tokens of all tiles together", ("global",))
    mix: str = option(
        "adaptive",
        "split by the geometric mean, text to image only, CLS only, or half of the budget each",
        ("adaptive", "t2i", "cls", "half"),
    )
    floor: float = option(0.25, "adaptive: least share of the budget for each ranking", least=0, most=0.5)
    temperature: float = option(0.01, "of the softmax of a text token over the visual tokens")
    text: str = option("question", "text that is compared with the image", ("question", "instruction", "after"))
    block: int = option(-2, "tower block whose CLS attention is the saliency")
    official: bool = option(False, "exactly as released: duplicates, rounding, tiles and all text after the image")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"attnmix.temperature must be above 0, got {self.temperature:g}.")
        if self.official and self.mix == "half":
            raise UserError("attnmix.mix=half is in no release; leave out attnmix.official.")
        if self.official and self.text == "instruction":
            raise UserError("attnmix.official takes text=after; leave out attnmix.text.")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.official and not self._kept(spec.layout.crops):
            least = spec.layout.crops * (1 if self.mix == "t2i" else 2)
            raise UserError(
                f"The budget must be at least {least} with attnmix.official: the release rounds it down to a multiple "
                f"of {least}, got {self.budget}."
            )

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        return (self._kept(spec.layout.crops),) * spec.layers

    def scores(self) -> tuple[TowerScore, ...]:
        return () if self.mix == "t2i" else (TowerScore("cls_attention", self.block),)

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.official

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens, crops = state.tokens.shape[1], state.layout.crops
        text = saliency = torch.zeros(state.tokens.shape[:2], device=state.tokens.device)
        if self.mix != "cls":
            embeddings, exists = state.text("after" if self.official else self.text)
            text = text_scores(embeddings, exists, state.tokens, self.temperature, state.matmul)
        if self.mix != "t2i":
            saliency = state.scores[self.scores()[0]]
        if self.official:
            return Reduction(released_tokens(text, saliency, crops, self.budget, self.floor, self.mix), tokens)
        if self.mix == "adaptive":
            count = adaptive_count(ordered(text)[0], ordered(saliency)[0], self.budget, self.floor)
        else:
            share = {"t2i": self.budget, "cls": 0, "half": self.budget // 2}[self.mix]
            count = torch.full((len(text),), share, device=text.device)
        return Reduction(mix(text, saliency, count, self.budget), tokens)

    def _kept(self, crops: int) -> int:
        return released_count(self.budget, crops, self.mix) if self.official else self.budget
