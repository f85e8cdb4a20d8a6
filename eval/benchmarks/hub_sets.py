"""AI2D, ChartQA, RealWorldQA, DocVQA and InfographicVQA: sets of the hub, as lmms-eval 0.7.3 asks and scores them.

Read from DATA/hub/lmms-lab-encoder/NAME or its older name lmms-lab/NAME:

    ai2d          question, options, answer (index), image                       diagrams of school books
    ChartQA       type, question, answer, image; half of the questions were      charts
                  written by people (human_test), half by a program (augmented_test)
    RealWorldQA   question, answer, image                                        photographs mostly from cars
    DocVQA        questionId, question, answers, image; two configurations,      scanned pages; infographics
                  DocVQA and InfographicVQA. The references of the test splits are not public; their answers go to the
                  server of the Robust Reading Competition

A row of `SETS` says what sets them apart. Metrics: letters and words (eval/metrics/letters.py), ChartQA's relaxed
accuracy, and ANLS, equal to lmms-eval's on the vectors in tests/data/chartqa and tests/data/anls.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Benchmark, Dataset, Question, no_submission
from eval.benchmarks.hub import (
    Table,
    check_answers,
    dataset_of,
    letters,
    open_split,
    option_lines,
    picture_hashes,
    picture_names,
    ungraded,
    unique_ids,
    with_version,
)
from eval.benchmarks.llava_files import LETTER, SHORT, as_number
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict
from eval.metrics import Score
from eval.metrics.accuracy import mean_score, percent
from eval.metrics.letters import ai2d_score, realworldqa_score
from llava.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What a row says: the question, its instruction, the accepted answer or answers, and the groups it belongs to."""

    question: str
    suffix: str
    answer: str | Sequence[str]
    kinds: str | Sequence[str] = ()


@dataclass(frozen=True)
class HubSet:
    """One of the sets.

    Attributes:
        title: for sentences.
        repository: its name on the hub.
        schema: of a row.
        columns: those that questions and scores depend on.
        ask: (row, its place for errors) -> the question.
        sample_score: (text, answer or answers) -> score in [0, 1].
        score: (answers, texts, groups by question id) -> the metric.
        expected: our split -> questions that published numbers are about.
        config: configuration on the hub.
        hub_splits: our names of splits, which are lmms-eval's in its task names -> the hub's, where they differ.
        picture: columns that together name the image, which several questions share; by default its content does.
        upload: name of the file with the answers to split test, which a server reads; "" where all splits are scored.
        tokens: the longest answer.
    """

    title: str
    repository: str
    schema: Any
    columns: tuple[str, ...]
    ask: Callable[[Any, str], Asked]
    sample_score: Callable[[str, Any], float | bool]
    score: Callable[[Mapping[str, Any], Mapping[str, str], Mapping[str, Any]], Score]
    expected: Mapping[str, int]
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    picture: tuple[str, ...] = ()
    upload: str = ""
    tokens: int = 16

    @property
    def ids(self) -> tuple[str, ...]:
        """Repositories, the newest owner first."""
        return f"lmms-lab-encoder/{self.repository}", f"lmms-lab/{self.repository}"


SERVER = "https://rrc.cvc.uab.es/?ch=17"


def load(one: HubSet, data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read a split. Rows without an id have their number for one, as in lmms-eval's samples."""
    table = open_split(data, one.ids, one.config, one.hub_splits.get(split, split), source)
    rows = table.records(one.schema)
    asked = [one.ask(row, f"{table.where} row {number}") for number, row in enumerate(rows)]
    names = unique_ids(row.get("questionId", number) for number, row in enumerate(rows))
    answers = {name: ask.answer for name, ask in zip(names, asked, strict=True)}
    kinds = {name: ask.kinds for name, ask in zip(names, asked, strict=True)}
    graded = not (one.upload and split == "test")
    if graded:
        check_answers(table.where, answers)
    pictures = picture_names(picture_keys(one, table, rows))
    questions = tuple(
        Question(
            name,
            ask.question,
            ask.suffix,
            (picture,),
            ask.answer if isinstance(ask.answer, str) else next(iter(ask.answer), ""),
            str(row.get("questionId", "")),
        )
        for name, ask, picture, row in zip(names, asked, pictures, rows, strict=True)
    )

    def score(names: Sequence[str], texts: Mapping[str, str]) -> Score:
        if not graded:
            return ungraded("anls", one.upload, SERVER)
        scored = one.score({name: answers[name] for name in names}, texts, kinds)
        return with_version(scored, len(questions), one.expected[split])

    def sample_score(question: Question, text: str) -> float:
        return float(one.sample_score(text, answers[question.id]))

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        official = {question.id: question.official for question in questions}
        return {one.upload: [{"questionId": as_number(official[name]), "answer": t} for name, t in texts.items()]}

    return dataset_of(
        f"{one.title} {split}",
        table,
        one.columns,
        questions,
        score,
        sample_score if graded else None,
        profile,
        one.expected[split],
        max_new_tokens=one.tokens,
        submission=submission if one.upload else no_submission,
    )


def picture_keys(one: HubSet, table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Per row what names its image: columns, its content, or the row's number where the table does not say it."""
    if not one.picture:
        return picture_hashes(table)
    keys = [tuple(row.get(column) for column in one.picture) for row in rows]
    return [row if any(part in (None, "") for part in key) else key for row, key in enumerate(keys)]


# -- AI2D ------------------------------------------------------------------------------------------------------------


class DiagramRow(TypedDict):
    """A row of AI2D."""

    question: Filled
    options: Texts
    answer: Id


def ask_ai2d(row: DiagramRow, where: str) -> Asked:
    """The question with its options on lines of their own."""
    options = letters(row["options"])
    index = str(row["answer"])
    if not index.isdecimal() or int(index) >= len(options):
        raise UserError(f"{where} has answer {index!r}, expected an index of its {len(options)} options.")
    return Asked(f"{row['question']}\n{option_lines(options)}", LETTER, list(options)[int(index)])


# -- RealWorldQA -----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"(.*)\n(Please answer directly with [^\n]*)", re.DOTALL)


class PhotographRow(TypedDict):
    """A row of RealWorldQA, whose question holds its options and the instruction how to answer."""

    question: Filled
    answer: Filled


def ask_realworldqa(row: PhotographRow, where: str) -> Asked:
    """The instruction becomes the suffix where it is the last line: the prompt stays as it is, and query-aware methods
    see the question alone. The group says which of two rules reads the answer."""
    text, answer = row["question"].strip(), row["answer"]
    apart = INSTRUCTION.fullmatch(text)
    question, suffix = apart.groups() if apart else (text, "")
    return Asked(question, suffix, answer, "letter" if answer.strip().upper() in ("A", "B", "C", "D") else "word")


# -- ChartQA ---------------------------------------------------------------------------------------------------------

TOLERANCE = 0.05  # relative error that a number read off a chart may have


class ChartRow(TypedDict):
    """A row of ChartQA."""

    question: Filled
    answer: Filled
    type: Filled


def ask_chartqa(row: ChartRow, where: str) -> Asked:
    return Asked(row["question"], "Answer the question with a single word.", row["answer"], row["type"])


def relaxed(prediction: str, target: str) -> bool:
    """Whether the prediction is right: within 5 % of a number, else the same text but for case.

    Quirks kept: a target of 0 is compared as text, so "0.0" is wrong for "0"; a percent sign divides by 100 on the side
    it stands on alone, so "12%" is wrong for "12"; nothing is stripped and thousands separators are not read.
    """
    said, wanted = number_of(prediction), number_of(target)
    if said is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(said - wanted) / abs(wanted) <= TOLERANCE


def number_of(text: str) -> float | None:
    """The value of "12", "1.2e1" or "1200%"; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqa_score(answers: Mapping[str, str], texts: Mapping[str, str], types: Mapping[str, str]) -> Score:
    """Percent of right answers over all questions and over each half.

    Args:
        answers: question id -> reference, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        types: question id -> "human_test", or "augmented_test" for questions a program made from captions.
    """
    score = mean_score(
        answers, texts, lambda text, answer: float(relaxed(text, answer)), {"type": types}, "relaxed_accuracy"
    )
    halves: dict[str, list[float]] = {"human": [], "augmented": []}
    for name, sample_score in score.correct.items():
        # As lmms-eval has it: what is not human is augmented.
        halves["human" if types[name] == "human_test" else "augmented"].append(sample_score)
    values = {name: percent(sample_scores) if sample_scores else None for name, sample_scores in halves.items()}
    return replace(score, values=score.values | values)


# -- DocVQA and InfographicVQA ---------------------------------------------------------------------------------------

THRESHOLD = 0.5  # below it an answer is taken for wrong rather than badly read


class DocumentRow(TypedDict):
    """A row of either table: its optional columns say what kind of question it is and which page it is about."""

    questionId: Id
    question: Filled
    answers: list[str] | None
    question_types: NotRequired[str | list[str] | None]
    answer_type: NotRequired[str | list[str] | None]
    ucsf_document_id: NotRequired[Id | None]
    ucsf_document_page_no: NotRequired[Id | None]
    image_url: NotRequired[Id | None]


def ask_document(kinds: str, row: DocumentRow, where: str) -> Asked:
    """A question may belong to no group, to one or to several, which column `kinds` names."""
    groups: Any = row.get(kinds) or ()
    groups = [groups] if isinstance(groups, str) else [str(group) for group in groups]
    return Asked(row["question"], SHORT, list(row["answers"] or ()), groups)


def edits(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that make one text the other."""
    if first == second:
        return 0
    above = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            replaced = above[column - 1] + (left != right)
            current.append(min(replaced, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: that to the nearest answer, in [0, 1], as lmms-eval defines it."""

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    # Lengths are those of the upper-case texts as they came, as officially: "ß" counts as two letters there.
    length = len(prediction.upper())
    return nearest((edits(folded(answer), folded(prediction)), max(len(answer.upper()), length)) for answer in answers)


def anls_m4c(prediction: str, answers: Sequence[str]) -> float:
    """The same as M4C's evaluator for ST-VQA has it: lower case and outer white space only, lengths after that."""
    prediction = prediction.strip().lower()
    answers = [answer.strip().lower() for answer in answers]
    return nearest((edits(answer, prediction), max(len(answer), len(prediction))) for answer in answers)


def nearest(distances: Any) -> float:
    """(edits, length) of each answer -> the best similarity, 0 below the threshold; two empty texts are equal."""
    best = max((1 - (distance / length if length else 0.0) for distance, length in distances), default=0.0)
    return best if best >= THRESHOLD else 0.0


def anls_score(
    answers: Mapping[str, Sequence[str]],
    texts: Mapping[str, str],
    kinds: Mapping[str, Sequence[str]] | None = None,
    breakdown: str = "question type",
) -> Score:
    """100 x mean ANLS.

    Args:
        answers: question id -> accepted answers, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        kinds: question id -> the groups it belongs to, which may be several.
    """
    score = mean_score(answers, texts, anls, {breakdown: kinds} if kinds else {}, "anls")
    plain = percent(anls_m4c(texts[name], accepted) for name, accepted in answers.items())
    note = "anls_m4c is the variant of M4C's ST-VQA evaluator, which keeps white space inside a text"
    return replace(score, values=score.values | {"anls_m4c": plain}, notes=(note,))


def documents(title: str, kinds: str, picture: tuple[str, ...], upload: str, expected: Mapping[str, int]) -> HubSet:
    """One configuration of the repository DocVQA.

    Args:
        kinds: column with the groups a question belongs to.
    """
    return HubSet(
        title=title,
        repository="DocVQA",
        config=title,
        schema=DocumentRow,
        columns=("questionId", "question", "answers"),
        ask=partial(ask_document, kinds),
        sample_score=anls,
        score=partial(anls_score, breakdown=kinds.removesuffix("s").replace("_", " ")),
        expected=expected,
        hub_splits={"val": "validation"},
        picture=picture,
        upload=upload,
        tokens=32,
    )


# Name of the benchmark -> the set, its summary and its licence.
SETS = {
    "ai2d": (
        HubSet(
            title="AI2D",
            repository="ai2d",
            schema=DiagramRow,
            columns=("question", "options", "answer"),
            ask=ask_ai2d,
            sample_score=ai2d_score,
            score=lambda answers, texts, kinds: mean_score(answers, texts, ai2d_score, main="exact_match"),
            expected={"test": 3088},
        ),
        "Multiple choice about diagrams of school books.",
        "see https://prior.allenai.org/projects/diagram-understanding and the data card",
    ),
    "chartqa": (
        HubSet(
            title="ChartQA",
            repository="ChartQA",
            schema=ChartRow,
            columns=("question", "answer", "type"),
            ask=ask_chartqa,
            sample_score=relaxed,
            score=chartqa_score,
            expected={"test": 2500},
        ),
        "Questions about charts; numbers may be 5 % off.",
        "GPL-3.0 (https://github.com/vis-nlp/ChartQA)",
    ),
    "realworldqa": (
        HubSet(
            title="RealWorldQA",
            repository="RealWorldQA",
            schema=PhotographRow,
            columns=("question", "answer"),
            ask=ask_realworldqa,
            sample_score=realworldqa_score,
            score=lambda answers, texts, kinds: mean_score(
                answers, texts, realworldqa_score, {"answer type": kinds}, "exact_match"
            ),
            expected={"test": 765},
        ),
        "Questions about photographs of streets and other everyday scenes; letters and short answers.",
        "see the data card",
    ),
    "docvqa": (
        documents(
            "DocVQA",
            "question_types",
            ("ucsf_document_id", "ucsf_document_page_no"),
            "docvqa_test_for_submission.json",
            {"val": 5349, "test": 5188},
        ),
        "Questions about scanned pages of documents; ANLS.",
        "see https://www.docvqa.org and the data card",
    ),
    "infovqa": (
        documents(
            "InfographicVQA",
            "answer_type",
            ("image_url",),
            "infovqa_test_for_submission.json",
            {"val": 2801, "test": 3288},
        ),
        "Questions about infographics; ANLS.",
        "see https://www.docvqa.org and the data card",
    ),
}

BENCHMARKS = tuple(
    Benchmark(name, summary, tuple(one.expected), partial(load, one), ("lmms",), mirror=one.ids, licence=licence)
    for name, (one, summary, licence) in SETS.items()
)
