"""SparseVLM: in stages, keep the visual tokens to which the text raters attend most, and recycle some of the others.

Paper: https://arxiv.org/abs/2410.04417
Official code read: Gumpest/SparseVLMs@26a5f48, llava/model/language_model/modelling_sparse_llama.py, score.py, utils.py
Differs from it: of equally dense tokens, the one with the higher score counts as denser (theirs adds random noise of
1e-6). A cluster is the mean of its members (theirs divides by their number plus 1e-6). A single recycled token stays in
its place. If no word is a rater, all words are. The release has four tables, and counts a layer that prunes its own
output as pruned; by default its proportions are fitted to the tokens that enter the layers. `schedule=release` takes
its tables; there is no `official`.

Shapes: B images, N visual tokens, T words, M recycled tokens, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines._recycling import keep_and_recycle, recycled
from baselines._staged import SCHEDULE, Staged, proportional
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Reduction,
    Release,
    UserError,
    angles_of,
    gather_tokens,
    keep_top,
    option,
    register,
    seeing_spans,
)


def text_raters(relation: Tensor, exists: Tensor) -> Tensor:
    """Choose the words that rate the visual tokens (the text raters).

    Args:
        relation: [B, N, T] products of visual and text embeddings.
        exists: [B, T], False for padding.

    Returns:
        [B, T] bool: words whose weight in the visual tokens' softmax over words is above the mean; all words if there
        is none.
    """
    gained = relation.float().masked_fill(~exists[:, None], -torch.inf).softmax(-1).mean(1)
    above = (gained > gained.sum(1, keepdim=True) / exists.sum(1, keepdim=True)) & exists
    return torch.where(above.any(1, keepdim=True), above, exists)


# Budget -> tokens that the three stages keep, without recycled ones.
TABLES = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
TOKENS, HEADS, SHARP = 576, 32, 14  # visual tokens in the tables; heads of their model, and how many of them v2 uses


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Ranks tokens by the attention of the layer before each stage, which has run on all of them."""

    summary: ClassVar[str] = (
        "rank by the attention of the text raters in three decoder stages; recycle some of the rest"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 3, 7 and 16 of 32",
        score="attention of the text raters in the layer before",
        rest="three tenths averaged into clusters, a tenth as many",
        order="raster, clusters last",
        reads=("tokens", "attention", "question"),
        similarity="tokens",
        weights="mean",
        paper="SparseVLM, 2410.04417",
        url="https://arxiv.org/abs/2410.04417",
        code="Gumpest/SparseVLMs@26a5f48",
        release=Release(
            random="noise of 1e-6, which decides between equally dense tokens, and these are frequent",
            count="a layer that prunes its output counts as pruned",
            ours="of equally dense tokens the one with the higher score, and tokens that enter a layer count",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **Staged.known_deviations,
        "appended": "as in the release, recycled clusters follow the kept tokens",
        "uncounted with schedule=release": "the release's tables belong to a decoder of 32 layers",
    }
    published: ClassVar[tuple[int, ...]] = (3, 7, 16)  # "after" layers 2, 6 and 15

    positions: str = option(
        "variant",
        "position ids after a stage; variant: renumber for v1, original for v2",
        ("variant", "renumber", "original"),
    )
    variant: str = option(
        "v1",
        "v1; v2 is SparseVLM+: no recycling, attention corrected for distance, heads of most attention",
        tuple(TABLES),
    )
    schedule: str = option(
        "mean",
        f"{SCHEDULE}; release: the release's tables, for budgets of 192, 128, 96 and 64",
        ("mean", "kept", "release"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "variant":
            object.__setattr__(self, "positions", {"v1": "renumber", "v2": "original"}[self.variant])

    def keeps(self, first: int, tokens: int) -> tuple[int, ...]:
        tables = TABLES[self.variant]
        nearest = min(tables, key=lambda known: abs(known / TOKENS - self.budget / tokens))
        return proportional(first, tables[nearest])

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        if self.schedule != "release":
            return None
        tables, left, keeps = TABLES[self.variant], spec.visual_tokens, []
        if self.budget not in tables:
            raise UserError(
                f"sparsevlm.schedule=release has the budgets {', '.join(map(str, tables))}, got {self.budget}; "
                "schedule=mean is fitted to the budget."
            )
        for keep in tables[self.budget]:
            keeps.append(min(keep, left - 1))
            left = self.counts(keeps, spec.visual_tokens)[-1]
        return tuple(keeps)

    def counts(self, keeps: Sequence[int], tokens: int) -> tuple[int, ...]:
        counts: list[int] = []
        for keep in keeps:
            extra = recycled(tokens - keep)[1] if self.variant == "v1" and keep < tokens else 0
            tokens = min(keep, tokens) + extra
            counts.append(tokens)
        return tuple(counts)

    def reduce(self, state: DecoderState, keep: int) -> Reduction:
        # The raters are chosen by the embeddings that enter layer 0, so they are the same at every stage.
        start = state.start
        index, exists = start.row_index(seeing_spans(start, "after"))
        words, visual = gather_tokens(start.hidden, index).float(), start.take(start.hidden, start.images).float()
        raters = text_raters(state.matmul(visual, words.transpose(1, 2)), exists)  # [B, T]

        # Their attention ranks the tokens. The rows of all words are computed, because only the device knows which of
        # them are raters, and the host should not wait for it.
        weights, _ = state.attention("after", at="previous")  # [B, H, T, N]
        if self.variant == "v2":
            weights = weights / rotary_scores(state)[:, None]
        given = weights.masked_fill(~raters[:, None, :, None], 0.0).sum(2)  # [B, H, N]
        if self.variant == "v2":
            heads = max(1, int(SHARP * given.shape[1] / HEADS + 0.5))
            given = gather_tokens(given, keep_top(given.sum(-1), heads))
        score = given.mean(1)
        if self.variant == "v1":
            return keep_and_recycle(score, state.tokens, keep)
        return Reduction(keep_top(score, keep), state.tokens.shape[1])


def rotary_scores(state: DecoderState) -> Tensor:
    """[B, T, N] attention scores between words and visual tokens if all entries of queries and keys were 1.

    At positions p and r the score is 2 sum(cos p cos r + sin p sin r) over frequencies; it falls with their distance.
    """
    entered = state.entered
    index, _ = entered.row_index(seeing_spans(entered, "after"))
    cos, sin = angles_of(state.llm, entered, state.layer - 1)
    angles = torch.cat([cos, sin], -1).float()
    visual = entered.take(angles, entered.images)
    score: Tensor = state.matmul(gather_tokens(angles, index), visual.transpose(1, 2)) * cos.shape[-1] ** -0.5
    return score
