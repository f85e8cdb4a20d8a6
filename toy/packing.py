"""Several texts about one image or video, packed after one copy of its visual tokens.

Each text sees the prompt prefix, the visual tokens and itself, and its positions start after the visual tokens. This
is the same computation as one prompt per text, at a fraction of the cost. A training step may leave out visual tokens:
the others keep the positions that they have in the whole sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Visuals:
    """V visual tokens of each of B visual token sequences.

    Attributes:
        features: [B, V, D], anything where `newline` or not `present`.
        positions: [B, V] int64, position in the whole sequence, ascending.
        total: [B] int64, tokens of the whole sequence.
        newline: [B, V] bool, tokens that are the learned newline vector; None where the model has none.
        present: [B, V] bool, False for padding at the end of a row; None where there is no padding.
    """

    features: Tensor
    positions: Tensor
    total: Tensor
    newline: Tensor | None = None
    present: Tensor | None = None


def whole(features: Tensor, newline: Tensor | None = None) -> Visuals:
    """[B, V, D] features of complete sequences."""
    batch, count = features.shape[:2]
    return Visuals(features, torch.arange(count).expand(batch, -1), torch.full((batch,), count), newline)


@dataclass(frozen=True)
class Text:
    """Texts after one another, T ids in a row.

    Attributes:
        ids: [B, T].
        owner: [B, T] or [1, T], number of the text in its row, -1 for padding.
        place: [B, T] or [1, T], place in the text.
        blind: [B, T] bool, ids of texts that do not see the visual tokens; None where there are no such texts.
    """

    ids: Tensor
    owner: Tensor
    place: Tensor
    blind: Tensor | None = None


def attention_mask(visuals: Visuals, text: Text, prefix: int) -> Tensor:
    """[B or 1, 1, T, T] bool for prefix, visual tokens and texts: causal, and no text sees another one."""
    start = prefix + visuals.positions.shape[1]
    shared = torch.full((len(text.owner), start), -1)
    owner = torch.cat([shared, text.owner], 1)
    mask = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    if text.blind is not None:
        mask[:, start:, prefix:start] &= ~text.blind[..., None]
    if visuals.present is not None and not visuals.present.all():
        there = torch.ones(len(visuals.present), mask.shape[-1], dtype=torch.bool)
        there[:, prefix:start] = visuals.present
        # A padding token sees itself, so that no row of the softmax is empty.
        mask = mask & (there[:, None] | torch.eye(mask.shape[-1], dtype=torch.bool))
    return mask[:, None]


def position_ids(visuals: Visuals, text: Text, prefix: int, renumber: bool) -> Tensor:
    """[B, T] positions of prefix, visual tokens and texts."""
    batch, count = visuals.positions.shape
    image, after = visuals.positions, visuals.total
    if renumber:
        image = torch.arange(count).expand(batch, -1)
        after = torch.full((batch,), count) if visuals.present is None else visuals.present.sum(1)
    skipped = after[:, None] if text.blind is None else torch.where(text.blind, 0, after[:, None])
    return torch.cat([torch.arange(prefix).expand(batch, -1), prefix + image, prefix + skipped + text.place], 1)


@dataclass(frozen=True)
class Asked:
    """One question as ids: `words` before the assistant's role, and the answer, one word."""

    family: str
    words: Sequence[int]
    answer: int


@dataclass(frozen=True)
class Questions:
    """K questions for each of B images, padded to L ids.

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

    @property
    def text(self) -> Text:
        """The questions after one another."""
        _, count, length = self.ids.shape
        owner = torch.arange(count).repeat_interleave(length)
        return Text(self.ids.flatten(1), owner[None], torch.arange(length).repeat(count)[None])

    def answering(self, states: Tensor, start: int) -> Tensor:
        """[B, 2 K, D] the states that predict each answer and its end token; the texts start at `start`."""
        _, count, length = self.ids.shape
        at = (start + torch.arange(count) * length + self.ask_at)[..., None] + torch.arange(2)
        return states.gather(1, at.flatten(1)[..., None].expand(-1, -1, states.shape[-1]))


def pack(asked: Sequence[Sequence[Asked | None]], tail: Sequence[int], length: int, pad: int) -> Questions:
    """Pad questions to `length` ids. `tail` are the ids between a question and its answer: suffix and role."""
    shape = (len(asked), max(map(len, asked)))
    ids, ask_at = torch.full((*shape, length), pad), torch.zeros(shape, dtype=torch.long)
    answer, family = torch.full(shape, -100), np.full(shape, "", dtype=object)
    for i, questions in enumerate(asked):
        for j, question in enumerate(questions):
            if question is not None:
                line = [*question.words, *tail, question.answer]
                ids[i, j, : len(line)] = torch.tensor(line)
                ask_at[i, j], answer[i, j], family[i, j] = len(line) - 2, question.answer, question.family
    return Questions(ids, ask_at, answer, family)


def answer_loss(logits: Tensor, answer: Tensor, end: int) -> Tensor:
    """Cross-entropy on the answer word, and lightly on the end token after it.

    Args:
        logits: [B, K, 2, vocabulary] as from `toy.model.decoder.answer_logits`.
        answer: [B, K], -100 where there is no question.
    """
    ends = torch.where(answer == -100, -100, end)
    word = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answer.flatten())
    return word + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), ends.flatten())


def accuracy(logits: Tensor, questions: Questions, families: Sequence[str]) -> dict[str, float]:
    """Share of right first words, over all questions and by family."""
    right, asked = (logits[:, :, 0].argmax(-1) == questions.answer).numpy(), (questions.answer != -100).numpy()
    numbers = {"all": right[asked].mean().item()}
    for family in families:
        mine = asked & (questions.family == family)
        if mine.any():
            numbers[family] = right[mine].mean().item()
    return numbers
