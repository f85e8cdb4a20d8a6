"""RealWorldQA, MMStar and OCRBench: sets that exist on the hub only and are asked or scored in a way of their own.

Read from DATA/hub/OWNER/NAME; that of lmms-lab-encoder also under its older owner lmms-lab:

    lmms-lab-encoder/RealWorldQA    question, answer, image: photographs mostly from cars
    Lin-Chen/MMStar                 index, question (with its options), answer, category, l2_category, image: multiple
                                    choice that cannot be answered without the image
    echo840/OCRBench                dataset, question, question_type, answer (a list), image: reading text in images

A row of `SETS` says what sets them apart; plain sets of the hub are files of sets/. Profile lmms is lmms-eval 0.7.3.
MMStar and OCRBench have LLaVA's profile too. Metrics: letters and words (eval/metrics/accuracy.py), and those of
MMStar's and OCRBench's authors.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from eval.benchmarks.base import PARTS, Benchmark, listed
from eval.benchmarks.hub import HubQuestion, HubSet, Kinds, read_set
from eval.benchmarks.llava_files import LETTER, SHORT
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, write_xlsx
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import extract_letter, realworldqa_score
from llava.errors import unknown

# -- RealWorldQA -----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"(.*)\n(Please answer directly with [^\n]*)", re.DOTALL)


class PhotographRow(TypedDict):
    """A row of RealWorldQA, whose question holds its options and the instruction how to answer."""

    question: Filled
    answer: Filled


def ask_realworldqa(row: PhotographRow, where: str) -> HubQuestion:
    """The instruction becomes the suffix where it is the last line: the prompt stays as it is, and query-aware methods
    see the question alone. The group says which of two rules reads the answer."""
    text, answer = row["question"].strip(), row["answer"]
    apart = INSTRUCTION.fullmatch(text)
    question, suffix = apart.groups() if apart else (text, "")
    kind = "letter" if answer.strip().upper() in ("A", "B", "C", "D") else "word"
    return HubQuestion(question, suffix, answer, {"answer type": kind})


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


def ask_mmstar(lmms: bool, row: StarRow, where: str) -> HubQuestion:
    """lmms-eval strips questions, the authors do not."""
    question = row["question"].strip().replace(LMMS_REMOVED, "") if lmms else row["question"]
    kinds = {"category": row["category"], "detail": row["l2_category"]}
    return HubQuestion(question, LETTER.removesuffix(".") if lmms else LETTER, row["answer"], kinds)


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


def ask_ocrbench(lmms: bool, row: TextRow, where: str) -> HubQuestion:
    """lmms-eval strips questions, the script does not."""
    kind, answer = row["question_type"], row["answer"]
    if kind not in TYPES:
        raise unknown("OCRBench question type", kind, TYPES)
    answers = [answer] if isinstance(answer, str) else answer
    question, suffix = (row["question"].strip(), "") if lmms else (row["question"], SHORT)
    return HubQuestion(question, suffix, answers, {"type": kind}, TextItem(answers, row["dataset"]))


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

REALWORLDQA = HubSet(
    title="RealWorldQA",
    ids=("lmms-lab-encoder/RealWorldQA", "lmms-lab/RealWorldQA"),
    schema=PhotographRow,
    columns=("question", "answer"),
    ask=ask_realworldqa,
    sample_score=realworldqa_score,
    main="exact_match",
    expected={"test": 765},
    tokens=16,
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
    "realworldqa": {"lmms": REALWORLDQA},
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
    return listed(name, partial(read_set, profiles), tuple(one.expected), profiles=tuple(profiles), mirror=one.ids)


BENCHMARKS = tuple(map(entry, SETS))
