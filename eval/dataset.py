"""What a benchmark gives to a run: questions, their images, and a way to score predictions."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from eval.jsonl import read_bytes
from eval.metrics import Score
from llava.errors import UserError

if TYPE_CHECKING:
    from llava.sample import Sample


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, its image still a file name.

    Attributes:
        id: unique within the benchmark.
        image: path relative to the image folder; it never leaves it.
        answer: the reference, for tables.
    """

    id: str
    question: str
    suffix: str
    image: str
    answer: str


@dataclass(frozen=True)
class Dataset:
    """One split of a benchmark, read and checked.

    Attributes:
        title: for sentences, "GQA testdev".
        questions: in the order of the official file, which is the order they are asked in.
        images: the image folder.
        fingerprint: hash of the question files. The images are not in it, hashing them would take longer than
            answering on some benchmarks.
        score: (ids that were asked, raw text by id) -> the official metric over those.
        judge: (question, raw text) -> credit in [0, 1], the contribution of one question to the accuracy.
        submission: raw text by id -> the predictions as the official scorer or server reads them.
    """

    title: str
    questions: tuple[Question, ...]
    images: Path
    fingerprint: str
    score: Callable[[Sequence[str], Mapping[str, str]], Score]
    judge: Callable[[Question, str], float]
    submission: Callable[[Mapping[str, str]], object]

    def check_images(self, questions: Iterable[Question]) -> None:
        """Fail before the run starts, not at question 9,000."""
        names = dict.fromkeys(question.image for question in questions)
        missing = [name for name in names if not (self.images / name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"{len(missing):,} of {len(names):,} images are not in {self.images}: {shown}.")

    def sample(self, question: Question) -> "Sample":
        """The question with its image opened."""
        # torch comes with these: a benchmark can be scored without it.
        from llava.image import open_image
        from llava.sample import Sample

        return Sample(
            id=question.id,
            question=question.question,
            suffix=question.suffix,
            image=open_image(self.images / question.image),
            image_id=question.image,
        )


@dataclass(frozen=True)
class Benchmark:
    """An entry of the benchmark registry.

    Attributes:
        splits: the first is the default.
        load: (data folder, split) -> the questions.
    """

    name: str
    summary: str
    splits: tuple[str, ...]
    load: Callable[[Path, str], Dataset]


def image_name(name: str, where: str) -> str:
    """A file name from a question file, refused if it points out of the image folder.

    Links inside the folder are followed: their owner put them there, the question file's author did not.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where} names the image {name!r}, which is not inside the image folder.")
    return name


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the contents of `files`, in the order given."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(read_bytes(file)).digest())
    return total.hexdigest()[:16]
