"""RealWorldQA, questions about photographs mostly from cars, as lmms-eval 0.7.3 asks and scores them.

Read from DATA/hub/lmms-lab-encoder/RealWorldQA or its older name lmms-lab/RealWorldQA: question, answer, image. A
question holds its options and the instruction how to answer. The instruction becomes the suffix where it is the last
line, so that the prompt stays as it is and query-aware methods see the question alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import check_answers, dataset_of, open_split, picture_hashes, picture_names
from eval.benchmarks.records import Filled, TypedDict
from eval.metrics import Score
from eval.metrics import letters as metric

IDS = ("lmms-lab-encoder/RealWorldQA", "lmms-lab/RealWorldQA")
COLUMNS = ("question", "answer")
EXPECTED = 765

INSTRUCTION = re.compile(r"(.*)\n(Please answer directly with [^\n]*)", re.DOTALL)


class Row(TypedDict):
    """A row of the table."""

    question: Filled
    answer: Filled


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read the split; rows have no id, so theirs is their number, as in lmms-eval's samples."""
    table = open_split(data, IDS, None, split, source)
    pictures = picture_names(picture_hashes(table))
    questions = tuple(
        Question(str(number), *split_instruction(record["question"].strip()), (pictures[number],), record["answer"])
        for number, record in enumerate(table.records(Row))
    )
    answers = {question.id: question.answer for question in questions}
    check_answers(table.where, answers)
    types = {name: answer_type(answer) for name, answer in answers.items()}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return metric.score({name: answers[name] for name in asked}, texts, metric.realworldqa_score, types)

    return dataset_of(f"RealWorldQA {split}", table, COLUMNS, questions, score, sample_score, profile, EXPECTED, 16)


def split_instruction(text: str) -> tuple[str, str]:
    """A question -> (question with options, instruction); all of it is question if the last line is no instruction."""
    found = INSTRUCTION.fullmatch(text)
    return (found.group(1), found.group(2)) if found else (text, "")


def answer_type(answer: str) -> str:
    """ "letter" or "word": which of the two rules reads the answer."""
    return "letter" if answer.strip().upper() in ("A", "B", "C", "D") else "word"


def sample_score(question: Question, text: str) -> float:
    """1 if the text is right."""
    return metric.realworldqa_score(text, question.answer)


BENCHMARK = Benchmark(
    name="realworldqa",
    summary="Questions about photographs of streets and other everyday scenes; letters and short answers.",
    splits=("test",),
    read=load,
    profiles=("lmms",),
    mirror=IDS,
    licence="see the data card",
)
