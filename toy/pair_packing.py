"""Question-answer pairs of any length, packed after the tokens of their image, and the decoder's loss on the answers.

Pairs follow each other without gaps, answers have several words, and a pair may have no image: it then sees the prompt
prefix alone, as a text-only prompt does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy.data.auxiliary_tasks import BLIND, TRAINED
from toy.data.corpus import Corpus
from toy.data.formats import LETTERS, Pair, compose, lmms_wording
from toy.data.instruct_vocabulary import INSTRUCT_WORDS
from toy.data.vocabulary import ASSISTANT, EOS, PAD
from toy.model.decoder import Decoded, predict
from toy.model.llava import Trainee
from toy.packing import Text

LATER_WORDS, END_OF_WORD = 0.4, 0.1  # weights of the loss: words and end of a sentence; end after a single word
# Where a letter is due, the word it stands for is predicted from the decoder's states after this many layers.
# Otherwise the model knows the word only in its last layers, too late to look up the letter beside it.
READ_AT, READ_LOSS = 5, 0.5


@dataclass(frozen=True)
class Line:
    """A question-answer pair as ids: the user turn, the assistant's role, the answer and the end token.

    Attributes:
        meant: the word that the answer's letter stands for, -100 where the answer is no letter.
    """

    format: str
    asked: Sequence[int]
    answer: Sequence[int]
    meant: int = -100

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.asked, INSTRUCT_WORDS.ids[ASSISTANT], *self.answer, INSTRUCT_WORDS.ids[EOS]]


@dataclass(frozen=True)
class Lines:
    """The pairs of B images, L ids in a row.

    Attributes:
        text: the ids of the pairs.
        target: [B, L] the id to predict there, -100 where none is.
        weight: [B, L] float32, of that prediction in the loss.
        meant: [B, L] the word that the letter to predict there stands for, -100 where there is none.
        formats: format of each pair of each row.
    """

    text: Text
    target: Tensor
    weight: Tensor
    meant: Tensor
    formats: list[list[str]]


def as_line(name: str, pair: Pair) -> Line:
    """A pair of the format `name` as ids."""
    answer, meant = INSTRUCT_WORDS.encode(pair.answer), -100
    if pair.options and pair.answer in LETTERS:
        (meant,) = INSTRUCT_WORDS.encode(pair.options[LETTERS.index(pair.answer)])
    return Line(name, INSTRUCT_WORDS.encode(pair.message), answer, meant)


def ask_lines(
    corpus: Corpus, rows: Sequence[int], names: Sequence[Sequence[str]], rng: np.random.Generator, lmms: float = 0.0
) -> Lines:
    """One pair of each format about each scene, where there is one; the share `lmms` in the words of lmms-eval."""
    found = []
    for row, wanted in zip(rows, names, strict=True):
        things = corpus.list_things(int(row))
        drawn = [(name, compose(things, name, rng, tries=12, formats=TRAINED)) for name in wanted]
        asked = [(name, pair) for name, pair in drawn if pair is not None]
        asked = [(name, lmms_wording(name, e) if rng.random() < lmms else e) for name, e in asked]
        found.append([as_line(name, pair) for name, pair in asked])
    return pack_lines(found)


def pack_lines(rows: Sequence[Sequence[Line]]) -> Lines:
    """Pairs after each other, shorter rows padded."""
    length = max(sum(len(line.ids) for line in row) for row in rows)
    table, owner = torch.full((len(rows), length), INSTRUCT_WORDS.ids[PAD]), torch.full((len(rows), length), -1)
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
            target[i, spoken] = torch.tensor([*line.answer, INSTRUCT_WORDS.ids[EOS]])
            weight[i, spoken], meant[i, spoken.start] = LATER_WORDS, line.meant
            if len(line.answer) == 1:
                weight[i, spoken] = torch.tensor([1.0, END_OF_WORD])
            start = whole.stop
    return Lines(
        Text(table, owner, place, blind), target, weight, meant, [[line.format for line in row] for row in rows]
    )


def predictions(model: Trainee, decoded: Decoded, lines: Lines) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] where an answer or its end is predicted, and [M, vocabulary] from the early states where
    a letter is due, both row by row.
    """
    pairs = ((decoded.states, lines.target), (decoded.early, lines.meant))
    said, read = [states[:, decoded.start :][at != -100] for states, at in pairs if states is not None]
    return predict(model, said), predict(model, read)


def pair_loss(said: Tensor, read: Tensor, lines: Lines) -> Tensor:
    """Weighted cross-entropy of the answers' words and ends, and of the words that letters stand for, per pair."""
    there = lines.target != -100
    words = F.cross_entropy(said, lines.target[there], reduction="none") * lines.weight[there]
    meant = F.cross_entropy(read, lines.meant[lines.meant != -100], reduction="sum")
    return (words.sum() + READ_LOSS * meant) / sum(map(len, lines.formats))


def right_answers(logits: Tensor, lines: Lines) -> list[tuple[str, bool]]:
    """(format, whether the whole answer, end included, is what greedy decoding would say) of every pair."""
    there = lines.target != -100
    wrong = logits.argmax(-1) != lines.target[there]
    row = torch.arange(len(lines.text.ids))[:, None].expand_as(lines.text.owner)[there]
    right = torch.ones(len(lines.text.ids), max(map(len, lines.formats)), dtype=torch.bool)
    right[row[wrong], lines.text.owner[there][wrong]] = False
    counted = zip(lines.formats, right.tolist(), strict=True)
    return [pair for names, flags in counted for pair in zip(names, flags, strict=False)]


def pair_accuracy(logits: Tensor, lines: Lines) -> dict[str, float]:
    """Share of right answers over all pairs and by format."""
    pairs = right_answers(logits, lines)
    numbers = {"all": float(np.mean([right for _, right in pairs]))}
    for name in TRAINED:
        mine = [right for format, right in pairs if format == name]
        if mine:
            numbers[name] = float(np.mean(mine))
    return numbers
