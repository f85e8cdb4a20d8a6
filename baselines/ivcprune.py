"""IVC-Prune: keep tokens at the implicit coordinates of RoPE, and tokens whose values are like those of the question.

Paper: https://arxiv.org/abs/2602.03060
Official code read: FireRedTeam/IVC-Prune@03afd9c, transformers/src/transformers/models/llama/modeling_llama.py
Differs from it: the release keeps the union of fixed shares of all tokens, which is at most 31 % and differs from image
to image; `official` does that. By default the shares grow together until the union has the size that the budget asks
for, so the count is exact, and at the release's count the set is the release's. The budget is a mean over layers, of
which 16 see every token; `schedule=kept` counts the layers after the drop, and `layer` drops earlier. With positions of
three axes the frequencies are those that the decoder rotates by (the release: every frequency on every axis). Text rows
are all of the text where no more than two tokens follow the image.

Shapes: B images, N visual tokens, T rows, L tokens of the padded prompts, H heads of values.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines._staged import OneStage, Staged
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Reduction,
    Reductions,
    Release,
    angles_of,
    in_float32,
    keep_top,
    option,
    ranks,
    register,
)

SEEDS, VALUES = 0.01, 0.2  # shares of all tokens in the release
SKIPPED = 2  # tokens behind the image that are not counted as text


@register("ivcprune")
@dataclass(frozen=True, kw_only=True)
class IVCPrune(OneStage):
    """Dropped tokens leave the caches of earlier layers, too, but for layer 0."""

    summary: ClassVar[str] = (
        "keep tokens at RoPE's implicit coordinates and tokens whose values are like the question's"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 16 of 32",
        score="similarity of values to the text and to the tokens most like it; mean cosine and sine of RoPE's angles",
        reads=("values", "question", "order"),
        paper="IVC-Prune, 2602.03060",
        url="https://arxiv.org/abs/2602.03060",
        code="FireRedTeam/IVC-Prune@03afd9c",
        release=Release(
            batch="one prompt at a time",
            count="no budget: at most 31 % of the tokens after layer 16, all of them before",
            ours="its shares grow or shrink together to a given count",
            licence="a badge says MIT, no licence file",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **OneStage.known_deviations,
        "uncounted with official=true": "the release keeps shares of all tokens, whose union differs between images",
    }
    published: ClassVar[tuple[int, ...]] = (16,)

    layer: int = option(0, "decoder layer before which tokens are dropped; 0 for 16 of 32 in proportion", least=0)
    coordinates: float = option(
        0.05, "share by mean cosine, and as much by mean sine, beside 0.2 by value", least=0, most=1
    )
    official: bool = option(False, "as released: the union of the shares, whatever the budget")

    def check(self, spec: ModelSpec) -> None:
        if self.official:  # no schedule that could miss a budget
            self.decoder_layers(spec.layers)
            super(Staged, self).check(spec)
        else:
            super().check(spec)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:  # type: ignore[override]
        return None if self.official else super().tokens_per_layer(spec)

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.official

    def cut_caches(self, layer: int) -> range:
        return range(1, layer)

    def decoder(self, state: DecoderState) -> Reductions:  # type: ignore[override]
        if not self.official:
            return super().decoder(state)
        # The number of tokens depends on the image, so the host waits for the device.
        total = state.tokens.shape[1]
        seeds, value, cosine, sine = self.sets(state, total)
        union = (value < round(VALUES * total)).scatter(1, seeds, True)
        for rank in (cosine, sine):
            union = union | (rank < round(self.coordinates * total))
        return [Reduction(row.nonzero().T, total) for row in union]

    def reduce(self, state: DecoderState, keep: int) -> Reduction:
        seeds, value, cosine, sine = self.sets(state, keep)
        # The size of the sets, in parts of all tokens, at which each token comes in; in the release it is 1.
        size = torch.minimum((value + 0.5) / VALUES, (torch.minimum(cosine, sine) + 0.5) / self.coordinates)
        return Reduction(keep_top(-size.scatter(1, seeds, 0.0), keep), state.tokens.shape[1])

    def sets(self, state: DecoderState, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices [B, S] of seeds, at most `most`, and ranks [B, N] by value, by mean cosine and by mean sine."""
        prompts = state.entered
        values, total = in_float32(state.values()), state.tokens.shape[1]  # [B, H, L, d]
        visual, _ = prompts.row_index(prompts.images)
        scale: float = values.shape[3] ** -0.5
        unseen = ~prompts.valid()[:, None, None] if prompts.padded else None

        def likeness(rows: Tensor) -> Tensor:
            """[B, T] columns -> [B, T, N]: softmax over all tokens of the products of values, mean over heads."""
            picked = values.take_along_dim(rows[:, None, :, None], 2) * scale
            product = state.matmul(picked, values.mT)
            product = product if unseen is None else product.masked_fill(unseen, -torch.inf)
            return product.softmax(-1).mean(1).take_along_dim(visual.unsqueeze(1), 2)

        spans = [(start + SKIPPED * (stop - start > SKIPPED), stop) for start, stop in prompts.after]
        rows, exists = prompts.row_index(spans)
        score = (likeness(rows) * exists.unsqueeze(2)).sum(1)
        seeds = keep_top(score, min(most, max(1, round(SEEDS * total))))
        score = score + likeness(visual.gather(1, seeds)).sum(1)
        cosine, sine = (
            part.mean(-1).gather(1, visual) for part in angles_of(state.llm, state.sequence, state.layer - 1)
        )
        return seeds, ranks(score), ranks(cosine), ranks(sine)
