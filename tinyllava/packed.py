"""Questions about one picture or video, packed behind one copy of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """One question as ids: `words` in front of the answer's role, and the answer, one word."""

    family: str
    words: Sequence[int]
    answer: int


@dataclass(frozen=True)
class Packed:
    """K questions for each of B runs, padded to L ids.

    Attributes:
        ids: [B, K, L].
        ask_at: [B, K], the position that predicts the answer.
        answer: [B, K], -100 where there is no question.
        family: [B, K] names, "" where there is no question.
    """

    ids: Tensor
    ask_at: Tensor
    answer: Tensor
    family: np.ndarray


def pack(asked: Sequence[Sequence[Asked | None]], tail: Sequence[int], length: int, pad: int) -> Packed:
    """`tail` are the ids between a question and its answer: suffix and role."""
    shape = (len(asked), max(map(len, asked)))
    ids, ask_at = torch.full((*shape, length), pad), torch.zeros(shape, dtype=torch.long)
    answer, family = torch.full(shape, -100), np.full(shape, "", dtype=object)
    for i, questions in enumerate(asked):
        for j, question in enumerate(questions):
            if question is not None:
                line = [*question.words, *tail, question.answer]
                ids[i, j, : len(line)] = torch.tensor(line)
                ask_at[i, j], answer[i, j], family[i, j] = len(line) - 2, question.answer, question.family
    return Packed(ids, ask_at, answer, family)
