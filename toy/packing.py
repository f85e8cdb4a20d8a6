"""Several texts about one image or video, packed after one copy of its visual tokens, and the decoder's pass over them.

Each text sees the prompt prefix, the visual tokens and itself, and its positions start after the visual tokens. This
is the same computation as one prompt per text, at a fraction of the cost. A training step may leave out visual tokens:
the others keep the positions that they have in the whole sequence.

Texts are `Questions`, padded to one length and answered in a word, or `Lines`, question-answer pairs of any length that
follow each other without gaps. A pair may have no image: it then sees the prompt prefix alone, as a text-only prompt
does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy.data.corpus import Corpus
from toy.data.formats import BLIND, INSTRUCT_WORDS, LETTERS, TRAINED, Pair, compose, lmms_wording
from toy.data.questions import PlainQuestion
from toy.data.vocabulary import ASSISTANT, EOS, PAD, Vocabulary
from toy.llava import Trainee


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


def pack(
    asked: Sequence[Sequence[PlainQuestion | None]], words: Vocabulary, tail: Sequence[str], length: int
) -> Questions:
    """Pad questions to `length` ids of a vocabulary; of an answer the first word is taken.

    Args:
        tail: the tokens between a question and its answer: suffix and role.
    """
    shape = (len(asked), max(map(len, asked)))
    ids, ask_at = torch.full((*shape, length), words.ids[PAD]), torch.zeros(shape, dtype=torch.long)
    answer, family = torch.full(shape, -100), np.full(shape, "", dtype=object)
    for i, questions in enumerate(asked):
        for j, question in enumerate(questions):
            if question is not None:
                first = words.encode(question.answer)[0]
                line = [*words.encode(question.text), *(words.ids[token] for token in tail), first]
                ids[i, j, : len(line)] = torch.tensor(line)
                ask_at[i, j], answer[i, j], family[i, j] = len(line) - 2, first, question.family
    return Questions(ids, ask_at, answer, family)


def answer_loss(logits: Tensor, answer: Tensor, end: int) -> Tensor:
    """Cross-entropy on the answer word, and lightly on the end token after it.

    Args:
        logits: [B, K, 2, vocabulary] as from `toy.packing.answer_logits`.
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
    text: Text,
    renumber: bool = False,
    early_at: int | None = None,
) -> Decoded:
    """Run the decoder.

    Args:
        model: a `toy.llava.Trainee`.
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
    hidden = torch.cat([start, visual, table[text.ids]], 1)
    rotary = llama.rotary_emb(hidden, position_ids(visuals, text, len(prefix), renumber))
    mask = attention_mask(visuals, text, len(prefix))
    early, after = None, len(prefix) + visual.shape[1]
    for number, layer in enumerate(llama.layers):
        if number == early_at:
            # Here, not after the loop: the order of operations decides the last bits of the gradients.
            early = hidden if model.probe is None else model.probe(hidden[:, len(prefix) : after]).float()
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return Decoded(hidden, early, visual, after)


def predict(model: Trainee, states: Tensor) -> Tensor:
    """[..., D] states -> [..., vocabulary] float32 logits."""
    llama = model.language_model
    return (llama.norm(states) @ llama.embed_tokens.weight.T).float()


def answer_logits(model: Trainee, decoded: Decoded, questions: Questions) -> Tensor:
    """[B, K, 2, vocabulary] where the answer and the end token of each question are predicted."""
    logits = predict(model, questions.answering(decoded.states, decoded.start))
    return logits.view(*questions.answer.shape, 2, -1)


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
    by_row = []
    for row, wanted in zip(rows, names, strict=True):
        things = corpus.list_things(int(row))
        drawn = [(name, compose(things, name, rng, tries=12, formats=TRAINED)) for name in wanted]
        asked = [(name, pair) for name, pair in drawn if pair is not None]
        asked = [(name, lmms_wording(name, e) if rng.random() < lmms else e) for name, e in asked]
        by_row.append([as_line(name, pair) for name, pair in asked])
    return pack_lines(by_row)


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
