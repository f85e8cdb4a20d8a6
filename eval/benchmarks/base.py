"""What a benchmark gives to a run: questions, their images, and a way to score predictions.

What a benchmark is called in tables, published numbers, licences and the files to get are data: catalogue.yaml.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from eval.answers.jsonl import AnswerRow, read_bytes
from eval.benchmarks.media import Images, first_of_content
from eval.metrics import Score
from eval.metrics.accuracy import mean_score
from eval.yaml_files import read_yaml
from llava.errors import UserError
from llava.places import ASSETS, CHECKOUT, check_bundled

if TYPE_CHECKING:
    from llava.processing.prompt import Sample

# How questions are asked and answers read: as LLaVA's evaluation scripts do it, or as lmms-eval does.
PROFILES = ("llava", "lmms")
# Where questions come from: the official files, or the data set on the hub that lmms-eval reads.
SOURCES = ("auto", "official", "mirror")
PARTS: dict[str, Any] = read_yaml(Path(__file__).with_name("parts.yaml"))  # of benchmarks, by their names


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, its images still names.

    Attributes:
        id: unique within the benchmark.
        question: without the answer-format instruction, which query-aware methods must not look at.
        images: names in the data set's `images`; () for a question of text alone.
        answer: the reference, for tables.
        official: the benchmark's own id, where that is not unique or not a string.
        about: what questions about the same image share, where the images' names do not say it.
        kind: the kind of question by which the usual answer differs; "" where the data does not say.
    """

    id: str
    question: str
    suffix: str
    images: tuple[str, ...]
    answer: str
    official: str = ""
    about: str = ""
    kind: str = ""

    @property
    def image(self) -> str:
        """What questions about the same image share: its name, or the question's id where there is none."""
        return self.about or (self.images[0] if self.images else self.id)

    @property
    def message(self) -> str:
        """The user turn."""
        return f"{self.question}\n{self.suffix}" if self.suffix else self.question


Reference = TypeVar("Reference")


@dataclass(frozen=True)
class Contents(Generic[Reference]):
    """What one source holds of a split.

    Attributes:
        source: "official", or the name of the mirror, for the result.
        references: question id -> what scoring needs of the question.
        fingerprint: hash of what was read, images excepted.
    """

    source: str
    questions: tuple[Question, ...]
    references: Mapping[str, Reference]
    images: Images
    fingerprint: str

    def dataset(
        self,
        title: str,
        profile: str,
        score: "Callable[[Sequence[str], Mapping[str, str]], Score]",
        sample_score: "Callable[[Question, str], float] | None",
        submission: "Callable[[Mapping[str, str]], Mapping[str, Any]]",
        facts: "Mapping[str, Any]",
        **more: Any,
    ) -> "Dataset":
        """The data set of these questions.

        Args:
            facts: beside source and profile.
            more: further fields of the Dataset.
        """
        about = {"source": self.source, "profile": profile} | dict(facts)
        files = self.images, self.fingerprint
        return Dataset(title, self.questions, *files, score, sample_score, submission, facts=about, **more)


def no_submission(texts: Mapping[str, str]) -> dict[str, Any]:
    """For sets that no server grades and whose scripts read no file of answers alone."""
    return {}


@dataclass(frozen=True)
class Dataset:
    """One split of a benchmark, read and checked.

    Attributes:
        title: for sentences, "GQA testdev".
        questions: in the order of the official file, which is the order they are asked in.
        fingerprint: hash of the files of questions and labels, which a score belongs to. The images are not in it: the
            hash of each is kept with the answer.
        score: (ids that were asked, raw text by id, in the order of the answer file) -> the official metric over those.
        sample_score: (question, raw text) -> score of one answer in [0, 1], for the progress bar and the sample table;
            None where one answer has none of its own.
        submission: raw text by id -> file name -> what the official scorer or server reads: JSON types, text or bytes;
            `no_submission` where there is neither.
        max_new_tokens: longest answer in this profile.
        facts: what a reader must know of the data beside a number: source, versions, counts.
        read: reader of answer files in a format of this benchmark alone; None from it leaves the file to
            eval.answers.reading.
        accepts: ids that an answer file may hold or lack.
        judging: how an LLM judge is asked, eval.judging.Judging, for benchmarks that need one.
        benchmark: name in the registry; "" where a data set was not loaded through it.
        normalise: text -> what the scorer compares with the references, to say whether two texts are the same answer;
            None where it has no such form of a text alone.
    """

    title: str
    questions: tuple[Question, ...]
    images: Images
    fingerprint: str
    score: Callable[[Sequence[str], Mapping[str, str]], Score]
    sample_score: Callable[[Question, str], float] | None
    submission: Callable[[Mapping[str, str]], Mapping[str, Any]]
    max_new_tokens: int = 128
    facts: Mapping[str, Any] = field(default_factory=dict)
    read: "Callable[[Path], Sequence[AnswerRow] | None] | None" = None
    accepts: frozenset[str] = frozenset()
    judging: Any = None
    benchmark: str = ""
    normalise: Callable[[str], str] | None = None

    @cached_property
    def questions_digest(self) -> str:
        """Hash of what is asked, which an answer belongs to: ids and texts of all questions, without the labels."""
        text = json.dumps([(one.id, one.question, one.suffix) for one in self.questions])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def labels(self, digests: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """What answers about the same image share, by question id and by name of the image.

        It is the first name that stands for the image's content, because one image may have several names: rows of a
        table with their own bytes, or copies of a file. A question without an image is one of its own.

        Args:
            digests: question id -> hashes of its images (eval.benchmarks.media.digest_of), as the answer store holds
                them. Without, the images are read as far as they are there.
        """
        shown = {one.id: one.images[0] for one in self.questions if one.images}
        if digests is None:
            same = first_of_content(self.images, shown.values())
        else:
            first: dict[str, str] = {}
            known = {name: (digests.get(name) or image).split()[0] for name, image in shown.items()}
            same = {image: first.setdefault(known[name], image) for name, image in shown.items()}
        return same | {one.id: one.about or same.get(one.image, one.image) for one in self.questions}

    def check_images(self, questions: Iterable[Question]) -> None:
        """Fail before the run starts, not at question 9,000."""
        names = dict.fromkeys(name for question in questions for name in question.images)
        missing = self.images.missing(names)
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            noun, where = self.images.noun, self.images.where
            raise UserError(f"{len(missing):,} of {len(names):,} {noun} are not in {where}: {shown}.")

    def sample(self, question: Question) -> "Sample":
        """The question with its images opened."""
        names = question.images
        return self.with_images(question, [*map(self.images.open, names)], [*map(self.images.digest, names)])

    @staticmethod
    def with_images(question: Question, opened: Sequence[Any], digests: Sequence[str]) -> "Sample":
        """The question with its images, which were opened before.

        Args:
            digests: hashes of the images' files. The vision tower's output is remembered by them and not by the
                images' names, which stand for other images in another benchmark or data folder.
        """
        from llava.processing.prompt import Sample

        return Sample(
            id=question.id,
            question=question.question,
            suffix=question.suffix,
            image=opened[0] if len(opened) == 1 else tuple(opened) or None,
            image_ids=tuple(digests),
        )


def scored_by(
    answers: Mapping[str, Reference],
    rule: Callable[[str, Reference], float | bool],
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Callable[[Sequence[str], Mapping[str, str]], Score], Callable[[Question, str], float]]:
    """`score` and `sample_score` of a data set whose score is a mean.

    Args:
        answers: question id -> reference.
        rule: (text, reference) -> sample score in [0, 1].
        kinds: of questions, as `mean_score` takes them.
    """

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return mean_score({name: answers[name] for name in asked}, texts, rule, kinds)

    return score, lambda question, text: float(rule(text, answers[question.id]))


@dataclass(frozen=True)
class Need:
    """A file or folder of a benchmark, for `python -m eval.show`.

    Attributes:
        path: below the data folder.
        source: where to get it, a URL or a sentence.
        count: how many files the folder should hold, where that is known.
        optional: the benchmark runs without it.
        others: further paths that do as well.
    """

    path: str
    source: str
    count: int | None = None
    optional: bool = False
    others: tuple[str, ...] = ()

    def found(self, data: Path) -> Path | None:
        """Where it lies below a data folder."""
        return next((data / path for path in (self.path, *self.others) if (data / path).exists()), None)


@dataclass(frozen=True)
class Benchmark:
    """An entry of the benchmark registry.

    Attributes:
        splits: the first whose question file is in the data folder is the default.
        read: (data folder, split, profile, source) -> the questions; call `load`, which returns them ready for use.
        profiles: those it has; the first is the default.
        model: the bundled toy model in assets/ that was trained on its format.
        published: what a 7B model reaches, with the metric's name; empty where no source was read.
        published_by: which model, and who says so.
        needs: the official files of the default split.
        mirror: repositories on the hub, the newest id first.
        licence: of the data.
        split_files: split -> its question file below the data folder, where users often have one split only.
    """

    name: str
    summary: str
    splits: tuple[str, ...]
    read: Callable[[Path, str, str, str], Dataset]
    profiles: tuple[str, ...] = PROFILES
    model: str = "tinyllava_instruct"
    published: str = ""
    published_by: str = ""
    needs: tuple[Need, ...] = ()
    mirror: tuple[str, ...] = ()
    licence: str = ""
    split_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def videos(self) -> bool:
        """Whether its questions are about videos."""
        return self.model == "tinyllava_video"

    def load(self, data: Path, split: str, profile: str | None = None, source: str = "auto") -> Dataset:
        """The questions of a split, checked; in the first profile if none is named."""
        profile = profile or self.profiles[0]
        if source != "mirror":  # which may come from the hub
            check_bundled(data)
        try:
            dataset = replace(self.read(data, split, profile, source), benchmark=self.name)
        except UserError as error:
            if CHECKOUT or source == "mirror" or self.is_in(data) or not data.is_relative_to(ASSETS):
                raise
            # Its own sentence would have files put into the folder of the toy wheel.
            raise UserError(
                f"The toy data of this installation lacks {self.name}: name the folder that holds it by --data."
            ) from error
        return with_stripped_answers(dataset) if profile == "lmms" else dataset

    def is_in(self, data: Path) -> bool:
        """Whether the official files that it cannot do without are in a data folder."""
        required = [need for need in self.needs if not need.optional]
        return bool(required) and all(need.found(data) for need in required)


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """What catalogue.yaml says of each benchmark."""
    content: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("catalogue.yaml"))
    return content


def listed(name: str, read: Callable[..., Dataset], splits: Sequence[str], **fields: Any) -> Benchmark:
    """The registry's entry of a benchmark that stands in catalogue.yaml."""
    about = {key: value for key, value in catalogue()[name].items() if key != "module"}
    needs = tuple(Need(**need | {"others": tuple(need.get("others", ()))}) for need in about.pop("needs", ()))
    return Benchmark(name=name, read=read, splits=tuple(splits), **{"needs": needs, **about, **fields})


def with_stripped_answers(data: Dataset) -> Dataset:
    """The data set as lmms-eval scores it, which strips every answer first (ConfigurableTask.process_results)."""

    def over(function: Callable[[Sequence[str], Mapping[str, str]], Any]) -> Callable[..., Any]:
        return lambda asked, texts: function(asked, stripped(texts))

    sample_score, judging, normalise = data.sample_score, data.judging, data.normalise
    if judging is not None:
        judging = replace(judging, requests=over(judging.requests), match=over(judging.match))
    return replace(
        data,
        score=over(data.score),
        sample_score=None if sample_score is None else lambda question, text: sample_score(question, text.strip()),
        submission=no_submission
        if data.submission is no_submission
        else lambda texts: data.submission(stripped(texts)),
        judging=judging,
        normalise=None if normalise is None else lambda text: normalise(text.strip()),
    )


def stripped(texts: Mapping[str, str]) -> dict[str, str]:
    """The answers without white space around them."""
    return {name: text.strip() for name, text in texts.items()}


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the contents of `files`, in the order given."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(read_bytes(file)).digest())
    return total.hexdigest()[:16]
