"""AI2D, questions about diagrams of school books, as lmms-eval 0.7.3 asks and scores them.

Read from DATA/hub/lmms-lab-encoder/ai2d or its older name lmms-lab/ai2d: question, options, answer (index), image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import dataset_of, letters, open_split, option_lines, picture_hashes, picture_names
from eval.benchmarks.prompts import LETTER
from eval.benchmarks.records import Filled, Id, Texts, TypedDict
from eval.metrics import Score
from eval.metrics import letters as metric
from llava.errors import UserError

IDS = ("lmms-lab-encoder/ai2d", "lmms-lab/ai2d")
COLUMNS = ("question", "options", "answer")
EXPECTED = 3088


class Row(TypedDict):
    """A row of the table."""

    question: Filled
    options: Texts
    answer: Id


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read the split; rows have no id, so theirs is their number, as in lmms-eval's samples."""
    table = open_split(data, IDS, None, split, source)
    pictures = picture_names(picture_hashes(table))
    questions = tuple(
        ask(str(number), record, pictures[number], table.where) for number, record in enumerate(table.records(Row))
    )
    answers = {question.id: question.answer for question in questions}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return metric.score({name: answers[name] for name in asked}, texts, metric.ai2d_score)

    return dataset_of(f"AI2D {split}", table, COLUMNS, questions, score, sample_score, profile, EXPECTED, 16)


def ask(name: str, record: Row, picture: str, where: str) -> Question:
    """One row as a question with its options on lines of their own."""
    options = letters(record["options"])
    index = str(record["answer"])
    if not index.isdecimal() or int(index) >= len(options):
        raise UserError(f"{where} row {name} has answer {index!r}, expected an index of its {len(options)} options.")
    text = f"{record['question']}\n{option_lines(options)}"
    return Question(name, text, LETTER, (picture,), list(options)[int(index)])


def sample_score(question: Question, text: str) -> float:
    """1 if the text is the letter."""
    return metric.ai2d_score(text, question.answer)


BENCHMARK = Benchmark(
    name="ai2d",
    summary="Multiple choice about diagrams of school books.",
    splits=("test",),
    read=load,
    profiles=("lmms",),
    mirror=IDS,
    licence="see https://prior.allenai.org/projects/diagram-understanding and the data card",
)
