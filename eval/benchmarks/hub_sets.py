"""AI2D, ChartQA, RealWorldQA, DocVQA, InfographicVQA, MMStar and OCRBench: sets that exist on the hub only.

Read from DATA/hub/OWNER/NAME; those of lmms-lab-encoder also under their older owner lmms-lab:

    lmms-lab-encoder/ai2d           question, options, answer (index), image: diagrams of school books
    lmms-lab-encoder/ChartQA        type, question, answer, image: charts; half of the questions were written by people
                                    (human_test), half by a program (augmented_test)
    lmms-lab-encoder/RealWorldQA    question, answer, image: photographs mostly from cars
    lmms-lab-encoder/DocVQA         questionId, question, answers, image; two configurations, DocVQA (scanned pages) and
                                    InfographicVQA. The references of the test splits are not public; their answers go
                                    to the server of the Robust Reading Competition
    Lin-Chen/MMStar                 index, question (with its options), answer, category, l2_category, image: multiple
                                    choice that cannot be answered without the image
    echo840/OCRBench                dataset, question, question_type, answer (a list), image: reading text in images

A row of `SETS` says what sets them apart. Profile lmms is lmms-eval 0.7.3; MMStar and OCRBench have LLaVA's profile
too. Metrics: letters and words (eval/metrics/accuracy.py), ChartQA's relaxed accuracy and ANLS, equal to lmms-eval's on
the vectors in tests/data/chartqa and tests/data/anls, and those of MMStar's and OCRBench's authors.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.base import PARTS, Benchmark, Dataset, Question, listed, no_submission
from eval.benchmarks.hub import (
    check_answers,
    image_names,
    letters,
    open_table,
    option_lines,
    ungraded,
    unique_ids,
    with_version,
)
from eval.benchmarks.llava_files import LETTER, SHORT, as_number
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, write_xlsx
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import ai2d_score, extract_letter, mean_score, percent, realworldqa_score
from llava.errors import UserError, unknown


@dataclass(frozen=True)
class Asked:
    """What a row says.

    Attributes:
        suffix: the instruction how to answer.
        answer: the accepted answer or answers.
        kinds: name of a breakdown -> the group or groups that the question belongs to.
        reference: what the metric compares a text with, where that is more than the answer.
    """

    question: str
    suffix: str
    answer: str | Sequence[str]
    kinds: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    reference: Any = None


# Name of a breakdown -> question id -> the group or groups that the question belongs to.
Kinds = Mapping[str, Mapping[str, str | Sequence[str]]]


@dataclass(frozen=True)
class HubSet:
    """One of the sets as one profile asks and scores it.

    Attributes:
        title: for sentences.
        ids: repositories, the newest owner first.
        schema: of a row.
        columns: those that questions and scores depend on.
        ask: (row, its place for errors) -> the question.
        sample_score: (text, reference) -> score in [0, 1].
        expected: our split -> questions that published numbers are about.
        main: name of the mean sample score.
        finish: (the mean and its groups, groups of all questions) -> the metric, where it is more than that.
        config: configuration on the hub.
        hub_splits: our names of splits, which are lmms-eval's in its task names -> the hub's, where they differ.
        id: column with the question's id; rows without have their number for one, as in lmms-eval's samples.
        image: columns that together name the image, which several questions share; by default its content does.
        submission: (rows by question id, texts) -> files for who scores them; None where nobody else does.
        upload: name of the file with the answers to split test, which a server reads; "" where all splits are scored.
        tokens: the longest answer.
    """

    title: str
    ids: tuple[str, ...]
    schema: Any
    columns: tuple[str, ...]
    ask: Callable[[Any, str], Asked]
    sample_score: Callable[[str, Any], float | bool]
    expected: Mapping[str, int]
    main: str = "accuracy"
    finish: Callable[[Score, Kinds], Score] = lambda score, kinds: score
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    image: tuple[str, ...] = ()
    submission: Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]] | None = None
    upload: str = ""
    tokens: int = 128


def of_lmms_lab(name: str) -> tuple[str, str]:
    """A repository under both of its owners."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


SERVER = "https://rrc.cvc.uab.es/?ch=17"


def load(profiles: Mapping[str, HubSet], data: Path, split: str, profile: str, source: str = "auto") -> Dataset:
    """Read one split in one of the profiles."""
    one = profiles[profile]
    table = open_table(data, one.ids, one.config, one.hub_splits.get(split, split), source)
    rows = table.records(one.schema)
    names = unique_ids(row[one.id] if one.id else number for number, row in enumerate(rows))
    records = dict(zip(names, rows, strict=True))
    asked = {name: one.ask(row, f"{table.where} row {number}") for number, (name, row) in enumerate(records.items())}
    references = {name: ask.answer if ask.reference is None else ask.reference for name, ask in asked.items()}
    kinds: dict[str, dict[str, str | Sequence[str]]] = defaultdict(dict)
    for name, ask in asked.items():
        for breakdown, group in ask.kinds.items():
            kinds[breakdown][name] = group
    graded = not (one.upload and split == "test")
    if graded:
        check_answers(table.where, {name: ask.answer for name, ask in asked.items()})
    images = image_names(table, image_keys(one.image, rows) if one.image else None)
    questions = []
    for (name, ask), image in zip(asked.items(), images, strict=True):
        answer = ask.answer if isinstance(ask.answer, str) else next(iter(ask.answer), "")
        official = str(records[name].get(one.id, ""))
        questions.append(Question(name, ask.question, ask.suffix, (image,), answer, official))

    def score(names: Sequence[str], texts: Mapping[str, str]) -> Score:
        wanted = {name: references[name] for name in names}
        scored = one.finish(mean_score(wanted, texts, one.sample_score, kinds, one.main), kinds)
        return with_version(scored, len(questions), one.expected[split])

    def sample_score(question: Question, text: str) -> float:
        return float(one.sample_score(text, references[question.id]))

    return table.contents(questions, references, one.columns).dataset(
        f"{one.title} {split}",
        profile,
        score if graded else ungraded(one.main, one.upload, SERVER),
        sample_score if graded else None,
        partial(one.submission, records) if one.submission is not None else no_submission,
        {"questions": len(table), "expected_questions": one.expected[split]},
        max_new_tokens=one.tokens,
    )


def image_keys(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Per row the columns that name its image, or the row's number where the table does not say it."""
    keys = [tuple(row.get(column) for column in columns) for row in rows]
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
    kind = "letter" if answer.strip().upper() in ("A", "B", "C", "D") else "word"
    return Asked(question, suffix, answer, {"answer type": kind})


# -- ChartQA ---------------------------------------------------------------------------------------------------------

TOLERANCE = 0.05  # relative error that a number read off a chart may have


class ChartRow(TypedDict):
    """A row of ChartQA."""

    question: Filled
    answer: Filled
    type: Filled


def ask_chartqa(row: ChartRow, where: str) -> Asked:
    return Asked(row["question"], "Answer the question with a single word.", row["answer"], {"type": row["type"]})


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


def halves(score: Score, kinds: Kinds) -> Score:
    """The score over all questions and that over each half."""
    scores_of: dict[str, list[float]] = {"human": [], "augmented": []}
    for name, sample_score in score.correct.items():
        # As lmms-eval has it: what is not human is augmented.
        scores_of["human" if kinds["type"][name] == "human_test" else "augmented"].append(sample_score)
    values = {name: percent(sample_scores) if sample_scores else None for name, sample_scores in scores_of.items()}
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
    breakdown = kinds.removesuffix("s").replace("_", " ")
    return Asked(row["question"], SHORT, list(row["answers"] or ()), {breakdown: groups})


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
    """Average normalised Levenshtein similarity: that to the nearest answer, in [0, 1], 0 below the threshold.

    As lmms-eval defines it; two empty texts are equal.
    """

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    best = 0.0
    for answer in answers:
        # Lengths are those of the upper-case texts as they came, as officially: "ß" counts as two letters there.
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edits(folded(answer), folded(prediction))
        best = max(best, 1 - (distance / length if length else 0.0))
    return best if best >= THRESHOLD else 0.0


def upload_documents(file: str, records: Mapping[str, DocumentRow], texts: Mapping[str, str]) -> dict[str, Any]:
    """The file for the server."""
    ids = {name: as_number(str(record["questionId"])) for name, record in records.items()}
    return {file: [{"questionId": ids[name], "answer": text} for name, text in texts.items()]}


def documents(title: str, kinds: str, image: tuple[str, ...], upload: str, expected: Mapping[str, int]) -> HubSet:
    """One configuration of the repository DocVQA.

    Args:
        kinds: column with the groups a question belongs to.
    """
    return HubSet(
        title=title,
        ids=of_lmms_lab("DocVQA"),
        config=title,
        schema=DocumentRow,
        columns=("questionId", "question", "answers"),
        ask=partial(ask_document, kinds),
        sample_score=anls,
        main="anls",
        expected=expected,
        hub_splits={"val": "validation"},
        id="questionId",
        image=image,
        submission=partial(upload_documents, upload),
        upload=upload,
        tokens=32,
    )


# -- MMStar ----------------------------------------------------------------------------------------------------------

# Profile llava: the rule of the authors' script (evaluate/mmstar.py of MMStar), right / all over 1,500 questions and
# right / 250 per category. Their prompt is the question as the data set has it; LLaVA's instruction for multiple choice
# follows, because the authors' own wrapper for LLaVA ends on it wherever it knows the options, and because without it
# LLaVA answers in sentences, which a rule that reads first characters takes for wrong.
# Profile lmms: the instruction is the same without the full stop. Letters are read with lmms-eval's extractor and
# averaged over the 18 second-level categories instead of over questions. Where a run asked only some questions, both
# divide by what was asked; on the whole split that is the same.

# lmms-eval takes this out of questions, a remainder of MME's task.
LMMS_REMOVED = " Please answer yes or no."
# What may stand before the letter in an answer that the authors' script reads.
OPENINGS = ("", "(", "option ", "the answer is ")


class StarSource(TypedDict):
    """Where a question was taken from."""

    source: NotRequired[str | None]


class StarRow(TypedDict):
    """A row of MMStar."""

    index: Id
    question: Filled
    answer: Filled
    category: str
    l2_category: str
    meta_info: NotRequired[StarSource | None]


def ask_mmstar(lmms: bool, row: StarRow, where: str) -> Asked:
    """lmms-eval strips questions, the authors do not."""
    question = row["question"].strip().replace(LMMS_REMOVED, "") if lmms else row["question"]
    kinds = {"category": row["category"], "detail": row["l2_category"]}
    return Asked(question, LETTER.removesuffix(".") if lmms else LETTER, row["answer"], kinds)


def mmstar_workbook(records: Mapping[str, StarRow], texts: Mapping[str, str]) -> dict[str, Any]:
    """The input of the authors' script, with the set a question was taken from as "bench"."""
    asked: list[tuple[Mapping[str, Any], str]] = [(records[name], text) for name, text in texts.items()]
    rows = (
        [*(record[column] for column in MMSTAR.columns), (record.get("meta_info") or {}).get("source", ""), text]
        for record, text in asked
    )
    return {"MMStar.xlsx": write_xlsx([*MMSTAR.columns, "bench", "prediction"], rows)}


def mmstar_sample_score(text: str, answer: str) -> float:
    """1 if the letter stands at the start or after one of OPENINGS, in either case; what follows is not looked at."""
    text, answer = (string.lower().strip().replace("\n", " ") for string in (text, answer))
    return float(any(text.startswith(opening) and text[len(opening) :][:1] == answer for opening in OPENINGS))


def mmstar_lmms_sample_score(text: str, answer: str) -> float:
    """1 if lmms-eval's extractor finds the letter."""
    return float(extract_letter(text) == answer.strip().upper())


def average_of_details(score: Score, kinds: Kinds) -> Score:
    """With the mean of the second-level categories' percentages, over all and within each category, in front."""
    names = tuple(score.correct)
    details = sorted({str(kinds["detail"][name]) for name in names})
    sums = np.zeros((len(names), 2, len(details)))
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        sums[row, :, details.index(str(kinds["detail"][name]))] = score.correct[name], 1
        rows_of[str(kinds["category"][name])].append(row)
    flat = sums.reshape(len(names), -1)
    averages = {name: (float(macro_average(flat[r].sum(0))), len(r)) for name, r in sorted(rows_of.items())}
    return replace(
        score,
        values={"average": float(macro_average(flat.sum(0))), **score.values},
        groups=score.groups | {"category": averages},
        notes=("average is over second-level categories, as lmms-eval prints it; accuracy is over questions",),
        main="average",
        terms=SufficientStatistics("question", names, names, flat, macro_average, most=100),
    )


def macro_average(sums: Array) -> Array:
    """Sums [..., right per group then asked per group] -> 100 x the mean rate of the groups that were asked at all."""
    right, asked = np.split(np.asarray(sums), 2, axis=-1)
    return 100 * divide(divide(right, asked).sum(-1), (asked > 0).sum(-1))


# -- OCRBench --------------------------------------------------------------------------------------------------------

# One point for every answer that the text contains. Profile llava: the benchmark's script for LLaVA-1.5
# (scripts/LLaVA1_5.py of MultimodalOCR), with LLaVA's instruction for short answers. Profile lmms: asked without one,
# and full-width ASCII is taken for ASCII. In both, formulas of HME100k keep their case and lose their spaces.

FULL = 1000
FORMULAS = "HME100k"

RECOGNITION: tuple[str, ...] = tuple(PARTS["ocrbench"]["recognition"])
TYPES: tuple[str, ...] = (*RECOGNITION, *PARTS["ocrbench"]["others"])

# The 94 printable ASCII characters stand in the same order from U+FF01 on; U+3000 is their space.
HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | {0x3000: 0x20}


class TextRow(TypedDict):
    """A row of OCRBench. The answer is a list or one text."""

    dataset: str
    question: Filled
    question_type: str
    answer: Filled | Texts


@dataclass(frozen=True)
class TextItem:
    """What the metric needs of a question.

    Attributes:
        set: the data set it was taken from.
    """

    answers: Sequence[str]
    set: str


def ask_ocrbench(lmms: bool, row: TextRow, where: str) -> Asked:
    """lmms-eval strips questions, the script does not."""
    kind, answer = row["question_type"], row["answer"]
    if kind not in TYPES:
        raise unknown("OCRBench question type", kind, TYPES)
    answers = [answer] if isinstance(answer, str) else answer
    question, suffix = (row["question"].strip(), "") if lmms else (row["question"], SHORT)
    return Asked(question, suffix, answers, {"type": kind}, TextItem(answers, row["dataset"]))


def ocrbench_sample_score(text: str, item: TextItem, fold: bool) -> float:
    """1 if the text contains one of the answers.

    Args:
        fold: take full-width ASCII for ASCII, as lmms-eval does outside HME100k.
    """

    def plain(string: str) -> str:
        string = string.strip().replace("\n", " ")
        if item.set == FORMULAS:
            return string.replace(" ", "")
        return (string.translate(HALF_WIDTH) if fold else string).lower()

    said = plain(text)
    return float(any(plain(answer) in said for answer in item.answers))


def points_of(questions: int) -> Callable[[Array], Array]:
    """Points if as many questions were asked: images that are drawn anew have more questions or fewer."""
    return lambda sums: divide(questions * sums[..., 0], sums[..., 1])


def counted_points(score: Score, kinds: Kinds) -> Score:
    """Points over all questions that were asked, of the recognition types together, and per type."""
    points: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for name, sample_score in score.correct.items():
        points[str(kinds["type"][name])].append(sample_score)
    read = float(sum(sum(points[kind]) for kind in RECOGNITION))
    values: dict[str, float | None] = {"score": sum(score.correct.values()), "text_recognition": read}
    notes = []
    if len(score.correct) != FULL:
        values |= score.values
        notes.append(
            f"score counts {len(score.correct):,} questions, published scores are out of {FULL:,}: compare accuracy"
        )
    names, sums = tuple(score.correct), np.array([(value, 1.0) for value in score.correct.values()])
    return replace(
        score,
        values=values,
        groups={"type": {kind: (sum(there), len(there)) for kind, there in points.items() if there}},
        notes=tuple(notes),
        main="score",
        points=frozenset({"score", "text_recognition", "type"}),
        terms=SufficientStatistics("question", names, names, sums, points_of(len(names)), most=len(names)),
    )


# -- the sets --------------------------------------------------------------------------------------------------------

AI2D = HubSet(
    title="AI2D",
    ids=of_lmms_lab("ai2d"),
    schema=DiagramRow,
    columns=("question", "options", "answer"),
    ask=ask_ai2d,
    sample_score=ai2d_score,
    main="exact_match",
    expected={"test": 3088},
    tokens=16,
)
CHARTQA = HubSet(
    title="ChartQA",
    ids=of_lmms_lab("ChartQA"),
    schema=ChartRow,
    columns=("question", "answer", "type"),
    ask=ask_chartqa,
    sample_score=relaxed,
    expected={"test": 2500},
    main="relaxed_accuracy",
    finish=halves,
    tokens=16,
)
REALWORLDQA = HubSet(
    title="RealWorldQA",
    ids=of_lmms_lab("RealWorldQA"),
    schema=PhotographRow,
    columns=("question", "answer"),
    ask=ask_realworldqa,
    sample_score=realworldqa_score,
    main="exact_match",
    expected={"test": 765},
    tokens=16,
)
DOCVQA = documents(
    "DocVQA",
    "question_types",
    ("ucsf_document_id", "ucsf_document_page_no"),
    "docvqa_test_for_submission.json",
    {"val": 5349, "test": 5188},
)
INFOVQA = documents(
    "InfographicVQA", "answer_type", ("image_url",), "infovqa_test_for_submission.json", {"val": 2801, "test": 3288}
)
# Of all answers the longest is the default of LLaVA's scripts, and lmms-eval's where a task sets none.
MMSTAR = HubSet(
    title="MMStar",
    ids=("Lin-Chen/MMStar",),
    schema=StarRow,
    columns=("index", "question", "answer", "category", "l2_category"),
    ask=partial(ask_mmstar, False),
    sample_score=mmstar_sample_score,
    expected={"val": 1500},
    id="index",
    submission=mmstar_workbook,
)
OCRBENCH = HubSet(
    title="OCRBench",
    ids=("echo840/OCRBench",),
    schema=TextRow,
    columns=("dataset", "question", "question_type", "answer"),
    ask=partial(ask_ocrbench, False),
    sample_score=partial(ocrbench_sample_score, fold=False),
    expected={"test": FULL},
    finish=counted_points,
)

# Name of the benchmark -> profile -> the set.
SETS = {
    "ai2d": {"lmms": AI2D},
    "chartqa": {"lmms": CHARTQA},
    "realworldqa": {"lmms": REALWORLDQA},
    "docvqa": {"lmms": DOCVQA},
    "infovqa": {"lmms": INFOVQA},
    "mmstar": {
        "llava": MMSTAR,
        "lmms": replace(
            MMSTAR, ask=partial(ask_mmstar, True), sample_score=mmstar_lmms_sample_score, finish=average_of_details
        ),
    },
    "ocrbench": {
        "llava": OCRBENCH,
        "lmms": replace(
            OCRBENCH, ask=partial(ask_ocrbench, True), sample_score=partial(ocrbench_sample_score, fold=True)
        ),
    },
}


def entry(name: str) -> Benchmark:
    """The registry's entry of a set, whose variants have repositories and splits in common."""
    profiles = SETS[name]
    one = next(iter(profiles.values()))
    return listed(name, partial(load, profiles), tuple(one.expected), profiles=tuple(profiles), mirror=one.ids)


BENCHMARKS = tuple(map(entry, SETS))
