"""Several texts about one image or video, packed after one copy of its visual tokens, and the decoder's pass over them.

Each text sees the prompt prefix, the visual tokens and itself, and its positions start after the visual tokens. This
is the same computation as one prompt per text, at a fraction of the cost. A training step may leave out visual tokens:
the others keep the positions that they have in the whole sequence. A text without an image sees the prompt prefix
alone, as a text-only prompt does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.toy.data.questions import PlainQuestion
from lab.toy.data.vocabulary import ASSISTANT, EOS, Vocabulary
from lab.toy.llava import Trainee

LATER_WORDS, END_OF_WORD = 0.4, 0.1  # weights of the loss: words and end of a sentence; end after a single word


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
class Line:
    """A question-answer pair as ids.

    Attributes:
        kind: the family of its question, or its format.
        asked: the user turn and the assistant's role.
        answer: the answer and the end token.
        meant: the word that the answer's letter stands for, -100 where the answer is no letter.
        blind: whether it does not see the visual tokens.
    """

    kind: str
    asked: Sequence[int]
    answer: Sequence[int]
    meant: int = -100
    blind: bool = False


def as_line(words: Vocabulary, kind: str, message: str, answer: str, meant: int = -100, blind: bool = False) -> Line:
    """A user turn and its answer as ids of a vocabulary."""
    asked, said = [*words.encode(message), words.ids[ASSISTANT]], [*words.encode(answer), words.ids[EOS]]
    return Line(kind, asked, said, meant, blind)


def question_line(words: Vocabulary, question: PlainQuestion) -> Line:
    """A question with the suffix of the vocabulary, and its answer."""
    return as_line(words, question.family, f"{question.text}\n{words.suffix}", question.answer)


@dataclass(frozen=True)
class Lines:
    """The pairs of B images after one another, L ids in a row.

    Attributes:
        ids: [B, L].
        owner: [B, L], number of the pair in its row, -1 for padding.
        place: [B, L], place in the pair.
        blind: [B, L] bool, ids of pairs that do not see the visual tokens.
        target: [B, L] the id to predict there, -100 where none is.
        weight: [B, L] float32, of that prediction in the loss.
        meant: [B, L] the word that the letter to predict there stands for, -100 where there is none.
        kinds: kind of each pair of each row.
    """

    ids: Tensor
    owner: Tensor
    place: Tensor
    blind: Tensor
    target: Tensor
    weight: Tensor
    meant: Tensor
    kinds: list[list[str]]


def pack(rows: Sequence[Sequence[Line]]) -> Lines:
    """Pairs after each other; shorter rows are padded with zeros."""
    shape = len(rows), max(sum(len(line.asked) + len(line.answer) for line in row) for row in rows)
    ids, place = torch.zeros((2, *shape), dtype=torch.long)
    owner, target, meant = (torch.full(shape, value) for value in (-1, -100, -100))
    blind, weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for i, row in enumerate(rows):
        start = 0
        for j, line in enumerate(row):
            stop = start + len(line.asked) + len(line.answer)
            said = slice(start + len(line.asked) - 1, stop - 1)  # each place predicts the next one
            ids[i, start:stop], owner[i, start:stop] = torch.tensor([*line.asked, *line.answer]), j
            place[i, start:stop], blind[i, start:stop] = torch.arange(stop - start), line.blind
            target[i, said], meant[i, said.start] = torch.tensor(line.answer), line.meant
            weight[i, said] = torch.tensor([1.0, END_OF_WORD]) if len(line.answer) == 2 else LATER_WORDS
            start = stop
    return Lines(ids, owner, place, blind, target, weight, meant, [[line.kind for line in row] for row in rows])


def attention_mask(visuals: Visuals, lines: Lines, prefix: int) -> Tensor:
    """[B, 1, T, T] bool for prefix, visual tokens and texts: causal, and no text sees another one."""
    start = prefix + visuals.positions.shape[1]
    owner = torch.cat([torch.full((len(lines.owner), start), -1), lines.owner], 1)
    mask = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    mask[:, start:, prefix:start] &= ~lines.blind[..., None]
    if visuals.present is not None and not visuals.present.all():
        there = torch.ones(len(visuals.present), mask.shape[-1], dtype=torch.bool)
        there[:, prefix:start] = visuals.present
        # A padding token sees itself, so that no row of the softmax is empty.
        mask = mask & (there[:, None] | torch.eye(mask.shape[-1], dtype=torch.bool))
    return mask[:, None]


def position_ids(visuals: Visuals, lines: Lines, prefix: int, renumber: bool) -> Tensor:
    """[B, T] positions of prefix, visual tokens and texts."""
    batch, count = visuals.positions.shape
    image, after = visuals.positions, visuals.total
    if renumber:
        image = torch.arange(count).expand(batch, -1)
        after = torch.full((batch,), count) if visuals.present is None else visuals.present.sum(1)
    skipped = torch.where(lines.blind, 0, after[:, None])
    return torch.cat([torch.arange(prefix).expand(batch, -1), prefix + image, prefix + skipped + lines.place], 1)


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of prompt prefix, visual tokens and texts, T tokens in this order.

    Attributes:
        states: [B, T, D] after the last layer, not normalised.
        early: after `early_at` layers; [B, V, numbers] predicted by the probe of the model from the visual tokens, or
            all states [B, T, D] where the model has no probe; None without `early_at`.
        visual: [B, V, D] the visual tokens as they enter the decoder.
        start: number of tokens before the texts.
    """

    states: Tensor
    early: Tensor | None
    visual: Tensor
    start: int


def forward(
    model: Trainee,
    prefix: list[int],
    visuals: Visuals,
    lines: Lines,
    renumber: bool = False,
    early_at: int | None = None,
) -> Decoded:
    """Run the decoder.

    Args:
        prefix: ids before the visual tokens.
        renumber: number the visual tokens that are there 0, 1, ... instead of by their position in the whole sequence.
        early_at: number of layers after which to look at the states as well.
    """
    llama = model.language_model
    table = llama.embed_tokens.weight
    visual = model.projector(visuals.features.to(table.dtype))
    if visuals.newline is not None:
        visual = torch.where(visuals.newline[..., None], model.newline, visual)
    start = table[torch.tensor(prefix)].expand(len(visual), -1, -1)
    hidden = torch.cat([start, visual, table[lines.ids]], 1)
    rotary = llama.rotary_emb(hidden, position_ids(visuals, lines, len(prefix), renumber))
    mask = attention_mask(visuals, lines, len(prefix))
    early, after = None, len(prefix) + visual.shape[1]
    for number, layer in enumerate(llama.layers):
        if number == early_at:
            # Here, not after the loop: the order of operations decides the last bits of the gradients.
            early = hidden if model.probe is None else model.probe(hidden[:, len(prefix) : after]).float()
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return Decoded(hidden, early, visual, after)


def predict(model: Trainee, states: Tensor, start: int, target: Tensor) -> Tensor:
    """[N, vocabulary] float32 logits where a target is due, row by row.

    Args:
        states: [B, T, D], of which the texts start at `start`.
        target: [B, L], -100 where no token is due.
    """
    llama = model.language_model
    return (llama.norm(states[:, start:][target != -100]) @ llama.embed_tokens.weight.T).float()


def answer_loss(logits: Tensor, lines: Lines) -> Tensor:
    """Weighted cross-entropy of the answers' words and ends, per pair."""
    there = lines.target != -100
    words = F.cross_entropy(logits, lines.target[there], reduction="none") * lines.weight[there]
    return words.sum() / sum(map(len, lines.kinds))


def accuracy(logits: Tensor, lines: Lines) -> dict[str, float]:
    """Share of pairs whose whole answer is what greedy decoding would say, over all pairs and by kind.

    Of an answer in one word the end does not count.
    """
    there = lines.target != -100
    wrong = (logits.argmax(-1) != lines.target[there]) & (lines.weight[there] != torch.tensor(END_OF_WORD))
    row = torch.arange(len(lines.ids))[:, None].expand_as(lines.owner)[there]
    right = torch.ones(len(lines.ids), max(map(len, lines.kinds)), dtype=torch.bool)
    right[row[wrong], lines.owner[there][wrong]] = False
    by_kind: dict[str, list[bool]] = {"all": []}
    for kinds, flags in zip(lines.kinds, right.tolist(), strict=True):
        for kind, flag in zip(kinds, flags, strict=False):
            by_kind["all"].append(flag)
            by_kind.setdefault(kind, []).append(flag)
    return {kind: float(np.mean(flags)) for kind, flags in by_kind.items()}
