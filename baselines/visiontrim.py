"""VisionTrim: half CLS attention and half attention among patches, and targets near the question that gather the rest.

Paper: https://arxiv.org/abs/2601.22674
Official code read: hanxunyu/VisionTrim@88063ae, llava/model/multimodal_encoder/clip_encoder.py
    (token_prune_visiontrim; the newest commit, 5590673, lost the folder)
Differs from it: any budget is split in the release's proportion, 48 + 16 of 64 (theirs for Video-LLaVA: 54 + 10, which
    is complement=0.15625). The text is the question alone, in several chunks if it is too long for CLIP; official=true
    reads the whole user message, cut off at CLIP's length, as the release does. Computed in float32 (theirs: in half
    precision). The temperature of CLIP is left out: it changes no maximum.
    The paper scores patches by their local affinity, too (LTAM: a kernel of features and places over 3 x 3 patches,
    weighted against the CLS attention by the variance of both). The release computes that and then overwrites it, so
    that nothing kept depends on it; it is left out here. There is no pruning while an answer is generated in either.

A dominant token is kept as it is. A complement is one of the other tokens that are nearest to the words of the
question, with the mean of the tokens that belong to it added in each of three rounds; it grows to almost twice the
length of its token.

Shapes: B images, N patches, K dominant tokens, R complements, L tokens of the question, P channels of CLIP's space.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    EncoderState,
    MatMul,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    gather_tokens,
    keep_top,
    option,
    register,
)

CLS, RECEIVED = TowerScore("cls_attention"), TowerScore("received_from_others")
ROUNDS = 3


def dominant(cls: Tensor, received: Tensor, count: int) -> Tensor:
    """[B, K] the highest sums of both attentions [B, N], each scaled to length 1, in raster order."""
    return keep_top(F.normalize(cls, dim=-1) + F.normalize(received, dim=-1), count)


def complemented(kept: Tensor, patches: Tensor, text: Tensor, count: int, matmul: MatMul = torch.matmul) -> Reduction:
    """Keep the dominant tokens `kept` [B, K], and append R complements made of the others.

    A projection is linear, so targets move in CLIP's space by the weights of their members.

    Args:
        patches: [B, N, P] in CLIP's space, of any length.
        text: [B, L, P] tokens of the questions; zeros where a question is shorter.
        count: R.
    """
    batch, total = patches.shape[:2]
    words = F.normalize(text, dim=-1)
    alike = matmul(F.normalize(patches, dim=-1), words.mT)  # [B, N, L]
    targets = keep_top(alike.sum(2).scatter(1, kept, -torch.inf), count)
    outputs = torch.cat([kept, targets], 1)
    member = patches.new_ones(batch, 1, total).scatter_(2, outputs.unsqueeze(1), 0)
    matrix = patches.new_zeros(batch, outputs.shape[1], total).scatter_(2, outputs.unsqueeze(2), 1)
    slots = torch.arange(count, device=kept.device).unsqueeze(1)
    centres = gather_tokens(patches, targets)
    for number in range(ROUNDS):
        # A token belongs to the target that is most like it by the words that both are like.
        owner = matmul(alike, matmul(words, F.normalize(centres, dim=-1).mT)).argmax(2)
        joins = (owner.unsqueeze(1) == slots) * member  # [B, R, N]
        share = joins / joins.sum(2, keepdim=True).clamp(min=1)
        matrix[:, kept.shape[1] :] += share
        if number < ROUNDS - 1:
            centres = centres + matmul(share, patches)
    return Reduction(outputs, total, merge_matrix=matrix, appended=count)


@register("visiontrim")
@dataclass(frozen=True, kw_only=True)
class VisionTrim(Reducer):
    """Acts before the projector and adds tower features."""

    summary: ClassVar[str] = "highest CLS and received attention, then what is near the question, with the rest added"
    needs_text_tower: ClassVar[bool] = True
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention and attention received from other patches, block −2; a quarter by CLIP similarity",
        rest="added to the quarter in three rounds, each token to the target that is like the same words",
        order="raster, the quarter last",
        needs="CLS token, CLIP text tower",
        reads=("cls_attention -2", "received_from_others -2", "features", "question"),
        similarity="none",
        weights="rounds",
        paper="VisionTrim, 2601.22674",
        url="https://arxiv.org/abs/2601.22674",
        code="hanxunyu/VisionTrim@88063ae",
        release=Release(
            batch="the padding of shorter questions counts as text",
            dtype="attention and similarities are ranked in half precision",
            norms="complements, 1.6 to 1.9 times in drawn cases",
            ours="computed in float32; norms as in the release",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "complements come after the dominant tokens",
        "scale": "a complement is its token plus the mean of its members in each round",
    }

    complement: float = option(0.25, "share of the budget for complements", least=0, most=1)
    official: bool = option(False, "read the whole message, cut off at CLIP's length, as the release does")

    def scores(self) -> tuple[TowerScore, ...]:
        return CLS, RECEIVED

    def encoder(self, state: EncoderState) -> Reduction:
        count = min(round(self.budget * self.complement), self.budget - 1)
        kept = dominant(state.scores[CLS], state.scores[RECEIVED], self.budget - count)
        if not count:
            return Reduction(kept, state.features.shape[1])
        texts, long = (state.messages, "truncate") if self.official else (state.questions, "frame")
        text, _, text_flops = state.clip.text(texts, long, every_token=True)
        patches, image_flops = state.clip.image(state.features, normed=False)
        state.flops += text_flops + image_flops
        return complemented(kept, patches, text, count, state.matmul)
