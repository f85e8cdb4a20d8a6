"""Exchanges of any length packed behind the tokens of their picture, and the decoder's loss on their answers.

As in `tinyllava.language` an exchange sees the picture and itself, and its positions restart behind the picture. Here
exchanges follow each other without gaps, answers have several words, and an exchange may have no picture: it then sees
the beginning of the prompt alone, as a prompt of text does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllava.corpus import Corpus
from tinyllava.formats import LETTERS, Exchange, compose, lmms_wording
from tinyllava.instruct_vocabulary import encode, ids
from tinyllava.language import PATCHES
from tinyllava.practice import BLIND, TRAINED
from tinyllava.vocabulary import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER

LATER_WORDS, END_OF_WORD = 0.4, 0.1  # weights of the loss: words and end of a sentence; end behind a single word
# Where a letter is due, the word it stands for is read off the decoder's states behind this many layers. Left alone,
# the model knows the word only in its last layers, too late to look up the letter beside it.
READ_AT, READ_LOSS = 5, 0.5


@dataclass(frozen=True)
class Line:
    """An exchange as ids: the user turn, the assistant's role, the answer and the end token.

    Attributes:
        meant: the word that the answer's letter stands for, -100 where the answer is no letter.
    """

    format: str
    asked: Sequence[int]
    answer: Sequence[int]
    meant: int = -100

    @property
    def ids(self) -> list[int]:
        return [*self.asked, ids()[ASSISTANT], *self.answer, ids()[EOS]]


@dataclass(frozen=True)
class Lines:
    """The exchanges of B pictures, L ids in a row.

    Attributes:
        ids: [B, L].
        owner: [B, L] number of the exchange in its row, -1 for padding.
        place: [B, L] place in the exchange.
        blind: [B, L] bool, ids of exchanges without a picture.
        target: [B, L] the id to predict there, -100 where none is.
        weight: [B, L] float32, of that prediction in the loss.
        meant: [B, L] the word that the letter to predict there stands for, -100 where there is none.
        formats: format of each exchange of each row.
    """

    ids: Tensor
    owner: Tensor
    place: Tensor
    blind: Tensor
    target: Tensor
    weight: Tensor
    meant: Tensor
    formats: list[list[str]]


def prefix_ids() -> list[int]:
    """What the tokenizer makes of the prompt in front of the picture."""
    return [ids()[token] for token in (BOS, SYSTEM, USER)]


def as_line(name: str, exchange: Exchange) -> Line:
    answer, meant = encode(exchange.answer), -100
    if exchange.options and exchange.answer in LETTERS:
        (meant,) = encode(exchange.options[LETTERS.index(exchange.answer)])
    return Line(name, encode(exchange.message), answer, meant)


def ask_lines(
    corpus: Corpus, rows: Sequence[int], names: Sequence[Sequence[str]], rng: np.random.Generator, lmms: float = 0.0
) -> Lines:
    """One exchange of each given format about each scene, where there is one; a share `lmms` as lmms-eval asks."""
    found = []
    for row, wanted in zip(rows, names, strict=True):
        things = corpus.list_things(int(row))
        drawn = [(name, compose(things, name, rng, tries=12, formats=TRAINED)) for name in wanted]
        asked = [(name, exchange) for name, exchange in drawn if exchange is not None]
        asked = [(name, lmms_wording(name, e) if rng.random() < lmms else e) for name, e in asked]
        found.append([as_line(name, exchange) for name, exchange in asked])
    return pack_lines(found)


def pack_lines(rows: Sequence[Sequence[Line]]) -> Lines:
    """Exchanges behind each other, shorter rows padded."""
    length = max(sum(len(line.ids) for line in row) for row in rows)
    table, owner = torch.full((len(rows), length), ids()[PAD]), torch.full((len(rows), length), -1)
    place, blind = torch.zeros_like(owner), torch.zeros(len(rows), length, dtype=torch.bool)
    target, weight = torch.full_like(owner, -100), torch.zeros(len(rows), length)
    meant = torch.full_like(owner, -100)
    for i, row in enumerate(rows):
        start = 0
        for j, line in enumerate(row):
            whole = slice(start, start + len(line.ids))
            table[i, whole], owner[i, whole] = torch.tensor(line.ids), j
            place[i, whole], blind[i, whole] = torch.arange(len(line.ids)), line.format in BLIND
            spoken = slice(start + len(line.asked), whole.stop - 1)  # each place predicts the next one
            target[i, spoken] = torch.tensor([*line.answer, ids()[EOS]])
            weight[i, spoken], meant[i, spoken.start] = LATER_WORDS, line.meant
            if len(line.answer) == 1:
                weight[i, spoken] = torch.tensor([1.0, END_OF_WORD])
            start = whole.stop
    return Lines(table, owner, place, blind, target, weight, meant, [[line.format for line in row] for row in rows])


def packed_mask(lines: Lines, visual: int) -> Tensor:
    """[B, 1, T, T] bool for prefix, visual tokens and exchanges: causal, and nobody sees another exchange."""
    prefix = len(prefix_ids())
    batch, text = lines.ids.shape
    total = prefix + visual + text
    seen = torch.ones(total, total, dtype=torch.bool).tril().repeat(batch, 1, 1)
    seen[:, prefix + visual :, prefix : prefix + visual] &= ~lines.blind[..., None]
    seen[:, prefix + visual :, prefix + visual :] &= lines.owner[:, :, None] == lines.owner[:, None]
    return seen[:, None]


def packed_positions(lines: Lines, kept: Tensor, renumber: bool) -> Tensor:
    """[B, T] position ids; `kept` [B, V] are the patch positions of the visual tokens that are there."""
    batch, visual = kept.shape
    start = len(prefix_ids())
    picture = torch.arange(visual).expand(batch, -1) if renumber else kept
    after = torch.where(lines.blind, 0, visual if renumber else PATCHES)
    return torch.cat([torch.arange(start).expand(batch, -1), start + picture, start + after + lines.place], 1)


def forward(
    model: nn.Module, features: Tensor, kept: Tensor, lines: Lines, renumber: bool = False
) -> tuple[Tensor, Tensor]:
    """Where an answer or its end is predicted, row by row.

    Args:
        model: has `language_model` and `projector`.
        features: [B, V, D] of the visual tokens that are there.
        kept: [B, V] their patch positions, ascending.
        renumber: count positions over the tokens that are there.

    Returns:
        Logits [N, vocabulary] at all those places, and [M, vocabulary] behind READ_AT layers where a letter is due.
    """
    llama = model.language_model
    table = llama.embed_tokens.weight
    visual = model.projector(features.to(table.dtype))
    prefix = table[torch.tensor(prefix_ids())].expand(len(visual), -1, -1)
    hidden = torch.cat([prefix, visual, table[lines.ids]], 1)
    rotary = llama.rotary_emb(hidden, packed_positions(lines, kept, renumber))
    mask = packed_mask(lines, visual.shape[1])
    early, start = hidden, prefix.shape[1] + visual.shape[1]
    for number, layer in enumerate(llama.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        early = hidden if number + 1 == READ_AT else early
    spoken = [states[:, start:][at != -100] for states, at in ((hidden, lines.target), (early, lines.meant))]
    said, read = ((llama.norm(states) @ table.T).float() for states in spoken)
    return said, read


def answer_loss(said: Tensor, read: Tensor, lines: Lines) -> Tensor:
    """Weighted cross-entropy of the answers' words and ends, and of the words that letters stand for, per exchange."""
    there = lines.target != -100
    words = F.cross_entropy(said, lines.target[there], reduction="none") * lines.weight[there]
    meant = F.cross_entropy(read, lines.meant[lines.meant != -100], reduction="sum")
    return (words.sum() + READ_LOSS * meant) / sum(map(len, lines.formats))


def right_answers(logits: Tensor, lines: Lines) -> list[tuple[str, bool]]:
    """(format, whether the whole answer, end included, is what greedy decoding would say) of every exchange."""
    there = lines.target != -100
    wrong = logits.argmax(-1) != lines.target[there]
    row = torch.arange(len(lines.ids))[:, None].expand_as(lines.owner)[there]
    right = torch.ones(len(lines.ids), max(map(len, lines.formats)), dtype=torch.bool)
    right[row[wrong], lines.owner[there][wrong]] = False
    counted = zip(lines.formats, right.tolist(), strict=True)
    return [pair for names, flags in counted for pair in zip(names, flags, strict=False)]


def accuracy(logits: Tensor, lines: Lines) -> dict[str, float]:
    """Share of right answers over all exchanges and by format."""
    pairs = right_answers(logits, lines)
    numbers = {"all": float(np.mean([right for _, right in pairs]))}
    for name in TRAINED:
        mine = [right for format, right in pairs if format == name]
        if mine:
            numbers[name] = float(np.mean(mine))
    return numbers
