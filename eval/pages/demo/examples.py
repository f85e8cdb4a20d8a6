"""Questions about toy test images that the demo offers."""

from dataclasses import dataclass
from pathlib import Path

from eval import benchmarks
from eval.benchmarks.media import Folder
from eval.config import DEFAULT_DATA

# Of the toy GQA: one image with few objects and three with many, chosen for being easy to read, not for the answers.
IDS = ("20000019", "20000010", "20000036", "20000054")


@dataclass(frozen=True)
class Example:
    """A question with its correct answer."""

    image: Path
    question: str
    answer: str


def examples(data: Path = DEFAULT_DATA) -> list[Example]:
    """The questions, in the order of IDS; none where the toy benchmarks are not installed."""
    benchmark = benchmarks.get("gqa")
    if not benchmark.is_in(data):
        return []
    found = benchmark.load(data, "testdev")
    assert isinstance(found.pictures, Folder)  # the toy GQA has files
    known = {question.id: question for question in found.questions}
    root = found.pictures.root
    return [
        Example(root / question.image, question.question, question.answer)
        for question in (known[name] for name in IDS if name in known)
        if question.image is not None
    ]
