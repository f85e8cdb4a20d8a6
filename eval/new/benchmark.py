"""template_name, questions with one short answer each. Read from DATA/template_name.

questions.jsonl    question_id, image, question, answer
images/            the files that `image` names
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint, scored_by
from eval.benchmarks.llava_files import SHORT
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, TypedDict, check_lines
from eval.metrics.accuracy import exact_match
from llava.errors import UserError


class Line(TypedDict):
    """A line of the question file. Lines are checked where they are read."""

    question_id: Id
    image: Filled
    question: Filled
    answer: Filled


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split; everything that can be wrong with its file is said here, images excepted."""
    path = data / "template_name" / "questions.jsonl"
    questions = tuple(
        Question(str(row["question_id"]), row["question"], SHORT, (image_name(row["image"], where),), row["answer"])
        for where, row in check_lines(path, Line)
    )
    answers = {question.id: question.answer for question in questions}
    if len(answers) < len(questions):
        raise UserError(f"{path} has a question_id more than once.")

    # For a mean of sample scores; another metric is a function of the ids that were asked and of the texts by id.
    score, sample_score = scored_by(answers, exact_match)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        # What the official scorer or server reads; `no_submission` where there is neither.
        return {"predictions.json": [{"question_id": name, "text": text} for name, text in texts.items()]}

    return Dataset(
        f"template_name {split}",
        questions,
        Folder(path.parent / "images"),
        fingerprint([path]),
        score,
        sample_score,
        submission,
        max_new_tokens=16,
        facts={"source": "official files", "profile": profile, "questions": len(questions)},
    )


BENCHMARK = Benchmark(
    name="template_name",
    summary="Questions with one short answer each.",
    splits=("test",),
    read=load,
    profiles=("llava",),
    needs=(
        Need("template_name/questions.jsonl", "where to get it"),
        Need("template_name/images", "where to get it"),
    ),
    licence="its licence",
)
