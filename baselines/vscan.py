"""VScan: keep tokens by CLS attention, per window and overall; then, in the decoder's middle, by the text's attention.

Paper: https://arxiv.org/abs/2505.22654
Official code read: Tencent/SelfEvolvingAgent@a82450e, VScan/llava/model/llava_arch.py (encode_images, token_merging),
VScan/llava/model/modeling_llama_x.py (layer_prune)
Differs from it: tokens that do not divide evenly over the windows go to the windows with the best tokens left
(official=true: these tokens are missing). Budgets other than its 64 keep the proportion of its stages, 96 and 32.

Shapes: B images, N visual tokens, K of them kept.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines._staged import two_stages
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    PatchGrid,
    PromptState,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    keep_top,
    merge_plan,
    option,
    others,
    planned,
    register,
    scaled_layers,
    tokens_by_layer,
)

SHALLOW = TowerScore("cls_attention", 5, depth=24)
DEEP = TowerScore("cls_attention", -2)


def windows(layout: PatchGrid, side: int) -> tuple[Tensor, int]:
    """[N] int64 window of each patch, and the number of windows. Windows at the border may be smaller."""
    across = -(-layout.columns // side)
    row = torch.arange(layout.rows) // side
    column = torch.arange(layout.columns) // side
    return (row[:, None] * across + column).flatten(), across * -(-layout.rows // side)


def keep_top_of_windows(score: Tensor, window: Tensor, count: int, windows: int) -> Tensor:
    """The best tokens of every window, equally many of each as far as `count` divides.

    Args:
        score: [B, N], higher means more important.
        window: [N] window of each token, below `windows`.

    Returns:
        [B, count] int64: the best of every window, then the second best of every window, and so on. If not all of the
        last rank fit, those with the highest score are taken.
    """
    order = score.float().argsort(dim=1, descending=True, stable=True)
    home = window[order]
    rank = F.one_hot(home, windows).cumsum(1).gather(2, home.unsqueeze(-1)).squeeze(-1)
    return order.gather(1, rank.argsort(dim=1, stable=True)[:, :count])


@register("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(Reducer):
    """Acts in two stages: on projected tokens before the decoder, and on hidden states before its middle layer."""

    summary: ClassVar[str] = "CLS attention in windows and overall, merge the rest; then the last token's attention"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layers 0 and 16 of 32",
        score="half by CLS attention of block 5 in 6 x 6 windows, half by that of block 22; then attention of the last "
        "prompt token in the next layer",
        rest="averaged into the most similar kept token; dropped in the decoder",
        needs="CLS token",
        reads=("cls_attention 5/24", "cls_attention -2", "tokens", "attention", "grid", "question"),
        similarity="tokens",
        weights="mean",
        paper="VScan, TMLR 2026",
        url="https://arxiv.org/abs/2505.22654",
        code="Tencent/SelfEvolvingAgent@a82450e",
        release=Release(
            count="tokens that do not divide evenly over the windows are missing",
            ours="they go to the windows with the best tokens left",
            licence="MIT",
        ),
    )

    tile_budget: str = option(
        "each", "the first stage splits the budget evenly over tiles, the second ranks all together", ("each",)
    )
    window: int = option(6, "side of a window in patches", least=1)
    official: bool = option(False, "leave out tokens that do not divide evenly over the windows")

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return scaled_layers((16,), 32, layers)

    def counts(self, spec: ModelSpec) -> tuple[int, int, int]:
        """Tokens chosen in the windows, all tokens kept by the first stage, and tokens kept by the second stage."""
        (stage,) = self.decoder_layers(spec.layers)
        first, second = two_stages(self.budget, stage, spec)
        local = first // 2
        if self.official and first < spec.visual_tokens:
            lacking = local % windows(spec.layout, self.window)[1]
            local, first = local - lacking, first - lacking
        return local, first, min(second, first)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        _, first, second = self.counts(spec)
        return tokens_by_layer(first, self.decoder_layers(spec.layers), (second,), spec.layers)

    def scores(self) -> tuple[TowerScore, ...]:
        return SHALLOW, DEEP

    def prompt(self, state: PromptState) -> Reduction | None:
        local, first, _ = self.counts(state.spec)
        total = state.tokens.shape[1]
        if first >= total:
            return None
        # Half by the shallow block, the same number in each window; the others by the deep block, over the whole image.
        shallow, deep = state.scores[SHALLOW], state.scores[DEEP]
        window, count = windows(state.layout, self.window)
        window = window.to(state.tokens.device, non_blocking=True)
        near = keep_top_of_windows(shallow, window, local, count)
        far = keep_top(deep.scatter(1, near, -torch.inf), first - local)
        kept = torch.cat([near, far], 1).sort(1).values
        # Each token that is not kept is averaged into the most similar kept one, by cosine of tokens.
        return merge_plan(kept, others(kept, total), 0, deep, state.tokens, "retained", "mean")

    def decoder(self, state: DecoderState) -> Reduction | None:
        tokens = planned(self, state.spec)
        assert tokens is not None  # it never depends on the image
        keep, total = tokens[state.layer], state.tokens.shape[1]
        if keep >= total:
            return None
        weights, _ = state.attention("last", at="next")  # [B, H, 1, N]
        return Reduction(keep_top(weights.mean(1)[:, 0], keep), total)
