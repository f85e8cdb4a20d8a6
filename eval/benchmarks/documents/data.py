"""DocVQA and InfographicVQA: two configurations of one data set of the hub, asked and scored alike by lmms-eval 0.7.3.

Read from DATA/hub/lmms-lab-encoder/DocVQA or its older name lmms-lab/DocVQA: questionId, question, answers, image. The
references of the test splits are not public; their answers go to the server of the Robust Reading Competition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.documents import metric as anls
from eval.benchmarks.hub import check_answers, facts, open_split, picture_names, ungraded, unique_ids, with_version
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict
from eval.metrics import Score

IDS = ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
COLUMNS = ("questionId", "question", "answers")
# Our names of splits, which are lmms-eval's in its task names, and the hub's.
SPLITS = {"val": "validation", "test": "test"}


class Row(TypedDict):
    """A row of either table: its optional columns say what kind of question it is and which page it is about."""

    questionId: Id
    question: Filled
    answers: list[str] | None
    question_types: NotRequired[str | list[str] | None]
    answer_type: NotRequired[str | list[str] | None]
    ucsf_document_id: NotRequired[Id | None]
    ucsf_document_page_no: NotRequired[Id | None]
    image_url: NotRequired[Id | None]


@dataclass(frozen=True)
class Documents:
    """One of the two sets.

    Attributes:
        title: for sentences.
        config: its configuration on the hub.
        kinds: optional column with the groups a question belongs to, and the breakdown's name.
        picture: optional columns that together name the image, which several questions share.
        submission: name of the file that the server reads.
        expected: questions of each split.
    """

    title: str
    config: str
    kinds: tuple[str, str]
    picture: tuple[str, ...]
    submission: str
    expected: Mapping[str, int]


def load(documents: Documents, data: Path, split: str, profile: str, source: str) -> Dataset:
    """Read a split of one of the sets."""
    table = open_split(data, IDS, documents.config, SPLITS[split], source)
    records = table.records(Row)
    names = unique_ids(record["questionId"] for record in records)
    answers = {name: list(record["answers"] or ()) for name, record in zip(names, records, strict=True)}
    kinds = {name: as_list(record.get(documents.kinds[0])) for name, record in zip(names, records, strict=True)}
    if split != "test":
        check_answers(table.where, answers)
    pictures = picture_names(picture_key(record, documents.picture, row) for row, record in enumerate(records))
    questions = tuple(
        Question(name, r["question"], SHORT, (picture,), (answers[name] or [""])[0], str(r["questionId"]))
        for name, r, picture in zip(names, records, pictures, strict=True)
    )

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        if split == "test":
            return ungraded("anls", documents.submission, "https://rrc.cvc.uab.es/?ch=17")
        found = anls.score({name: answers[name] for name in asked}, texts, kinds, documents.kinds[1])
        return with_version(found, len(questions), documents.expected[split])

    def sample_score(question: Question, text: str) -> float:
        return anls.anls(text, answers[question.id])

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        official = {question.id: question.official for question in questions}
        return {
            documents.submission: [{"questionId": number(official[name]), "answer": t} for name, t in texts.items()]
        }

    return Dataset(
        f"{documents.title} {split}",
        questions,
        table.pictures(),
        table.fingerprint(COLUMNS),
        score,
        sample_score if split != "test" else None,
        submission,
        max_new_tokens=32,
        facts=facts(table, profile, documents.expected[split]),
    )


def picture_key(record: Mapping[str, Any], columns: Sequence[str], row: int) -> Any:
    """What names a row's image; the row where the table does not say it."""
    key = tuple(record.get(column) for column in columns)
    return row if any(part in (None, "") for part in key) else key


def as_list(value: Any) -> list[str]:
    """The groups of a question, which may be none, one text or several."""
    return [value] if isinstance(value, str) else [str(part) for part in value or ()]


def number(name: str) -> int | str:
    """An id as the server wants it, a number; ids that are none stay as they are."""
    return int(name) if name.isdecimal() else name
