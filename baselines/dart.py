"""DART: keep a few pivots, and the visual tokens that are least similar to them.

Paper: https://arxiv.org/abs/2502.11494
Official code read: ModelTC/LightCompress@9701d03, llmc/compression/token_reduction/dart.py (a port; the authors'
repository was not available)
Differs from it: pivots choose in a fixed order, image before text and by descending key norm (theirs: in the order of a
Python set, which changes the greedy choice). It keeps exactly the budget (theirs keeps 8 * (T // 8) + 4 tokens after
the layer). `official` follows the release in both.

Shapes: B images, N visual tokens, P pivots, L tokens of the padded prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines._staged import OneStage
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    ModelSpec,
    Reduction,
    Release,
    UserError,
    gather_tokens,
    option,
    register,
)

if TYPE_CHECKING:
    from llava.pipeline.sequence import PromptBatch

PIVOTS = 4  # of the image, and as many of the text


def pick_different(similarity: Tensor, pivots: Tensor, picks: Sequence[int]) -> Tensor:
    """Each pivot in turn picks the tokens least similar to it among those that are not taken yet.

    Args:
        similarity: [B, P, N] similarity of each pivot, in the order of their turns, to the visual tokens.
        pivots: [B, I] indices of the pivots that are visual tokens themselves.
        picks: number of tokens that each of the P pivots takes.

    Returns:
        [B, I + sum(picks)] indices of pivots and picked tokens, ascending.
    """
    chosen, free = [pivots], torch.ones_like(similarity[:, 0], dtype=torch.bool).scatter(1, pivots, False)
    for turn, count in enumerate(picks):
        different = similarity[:, turn].masked_fill(~free, torch.inf)
        chosen.append(different.argsort(dim=1, stable=True)[:, :count])
        free = free.scatter(1, chosen[-1], False)
    return torch.cat(chosen, 1).sort(1).values


def hash_order(columns: Tensor, sequence: "PromptBatch") -> Tensor:
    """[B, P] columns of the padded prompts, reordered as a Python set of their positions iterates.

    The order depends on integer hashes, so the host needs the values and waits for the device.
    """
    rows = []
    for sample, row in enumerate(columns.tolist()):
        padding = sequence.padding(sample)
        rows.append([place + padding for place in set([column - padding for column in row])])  # noqa: C403
    return torch.tensor(rows, device=columns.device)


@register("dart")
@dataclass(frozen=True, kw_only=True)
class Dart(OneStage):
    """Reads keys and hidden states, but no attention."""

    summary: ClassVar[str] = "keep pivots with large keys and the tokens least similar to them"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 2 of 32",
        score="least cosine similarity to 4 image and 4 text pivots of the largest keys",
        reads=("tokens", "keys", "question"),
        similarity="tokens",
        paper="DART, 2502.11494",
        url="https://arxiv.org/abs/2502.11494",
        code="ModelTC/LightCompress@9701d03",
        release=Release(
            random="nothing is drawn, but the greedy choice follows the order of a Python set",
            count="8 * (budget // 8) + 4 tokens after the layer, and the layers before it do not count",
            ours="pivots by descending key norm, and exactly the budget",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        **OneStage.known_deviations,
        "uncounted with official=true": "the release keeps 8 * (budget // 8) + 4 tokens after the layer",
    }

    official: bool = option(False, "as released: keeps 8 * (budget // 8) + 4 after the layer, pivots in hash order")

    def fixed(self, spec: ModelSpec) -> tuple[int, ...] | None:
        turns = 2 * PIVOTS
        return (min(self.budget // turns * turns + PIVOTS, spec.visual_tokens),) if self.official else None

    def reduce(self, state: DecoderState, keep: int) -> Reduction:
        # The text that pivots come from: all after the image, or the question where that is too short.
        sequence = state.sequence
        pairs = zip(sequence.after, sequence.question, strict=True)
        spans = [after if after[1] - after[0] >= PIVOTS else question for after, question in pairs]
        shortest = min(stop - start for start, stop in spans)
        if shortest < PIVOTS:
            raise UserError(
                f"dart takes {PIVOTS} pivots from the text after the image; a prompt has {shortest} tokens."
            )
        words, exists = sequence.row_index(spans)
        visual, _ = sequence.row_index(sequence.images)

        # Pivots: the visual and text tokens with the largest keys, by L1 norm over all heads; ties to the lower index.
        size = state.keys.float().abs().sum((1, 3))  # [B, L]
        word_size = size.gather(1, words).masked_fill(~exists, -torch.inf)
        text = word_size.argsort(dim=1, descending=True, stable=True)[:, :PIVOTS]
        image = size.gather(1, visual).argsort(dim=1, descending=True, stable=True)[:, : min(PIVOTS, keep)]
        columns = torch.cat([visual.gather(1, image), words.gather(1, text)], 1)
        if self.official:
            columns = hash_order(columns, sequence)

        # Each pivot picks the tokens least similar to it: equally many, one more for the first ones if need be.
        pivots = gather_tokens(sequence.hidden, columns)
        pivots, tokens = (F.normalize(state.llm.norm(t).float(), dim=-1) for t in (pivots, state.tokens))
        similarity = state.matmul(pivots, tokens.transpose(1, 2))  # [B, P, N]
        rest, turns = keep - image.shape[1], columns.shape[1]
        picks = [rest // turns + (turn < rest % turns) for turn in range(turns)]
        return Reduction(pick_different(similarity, image, picks), state.tokens.shape[1])
