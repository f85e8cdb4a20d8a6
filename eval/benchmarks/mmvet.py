"""MM-Vet, read from DATA/mm-vet (LLaVA's scripts) or DATA/mmvet (LLaVA's documentation), or from lmms-eval's mirror.

    mm-vet.json            official questions: "v1_0" -> imagename, question, answer, capability
    llava-mm-vet.jsonl     LLaVA's question file, optional: question_id, image, text
    images/

Answers are judged, see eval/judging/. In both profiles the judge is asked as MM-Vet's own script asks it; lmms-eval
words the head of its table a little differently and allows longer replies.

The score is the mean of the judge's scores from 0 to 1, over all questions, capabilities and combinations of them.
Source of the definitions: mm-vet_evaluator.py (https://github.com/yuweihao/MM-Vet, acde843). Differs from it: the
official names of combinations are in no fixed order, here capabilities come in the order of the paper; and numbers are
not rounded to one decimal before they are printed.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import QuestionRecord, each_once, prompts_by_id
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, NotRequired, Number, Texts, TypedDict, check_map
from eval.judging import Judging, Request, Verdict, judged_facts, prompts
from eval.metrics import Score
from eval.metrics.accuracy import contains, grouped, words

FOLDERS = ("mm-vet", "mmvet")
MIRROR = ("lmms-lab-encoder/MMVet", "lmms-lab/MMVet")
COLUMNS = ("question_id", "question", "answer", "capability")
COUNT = 218
SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

# lmms-eval asks so. It stands before the question, where a prompt has no part of its own for it.
STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)


class Official(TypedDict):
    """A question of the official file."""

    imagename: Filled
    question: Filled
    answer: Filled
    capability: Texts


class MirrorRow(QuestionRecord):
    """A row of the mirror, whose capabilities are a list or one text with commas."""

    answer: Filled
    capability: Filled | Texts


class Grade(TypedDict):
    """What a grade file holds of a question: a score for each run of the judge."""

    score: Annotated[list[Number], Field(min_length=1)]
    model: NotRequired[list[str] | str]


@dataclass(frozen=True)
class Entry:
    """One question with what the judge is told.

    Attributes:
        image: its name in the data set's `images`.
        text: what LLaVA's profile asks.
        question: as the benchmark words it, which is what the judge sees.
    """

    image: str
    text: str
    question: str
    answer: str
    capabilities: tuple[str, ...]


Entries = Mapping[str, Entry]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The 218 questions. LLaVA's files number them, MM-Vet's name them "v1_" and that number."""
    official = official_file(data, source, "MM-Vet", [data / name / "mm-vet.json" for name in FOLDERS], MIRROR)
    contents = read_mirror(data, source) if official is None else read_official(official)
    if profile == "lmms":
        asked = (replace(q, question=STEP_BY_STEP + contents.references[q.id].question) for q in contents.questions)
        contents = replace(contents, questions=tuple(asked))
    judging = judge_with(contents.references)
    return contents.dataset(
        "MM-Vet",
        profile,
        judging.match,
        None,
        # The input of MM-Vet's evaluator, as LLaVA's convert_mmvet_for_eval.py writes it.
        lambda texts: {"mmvet_results.json": dict(texts)},
        judged_facts(judging, len(contents.questions), COUNT),
        # model_vqa.py's generate call, and lmms-eval's mmvet.yaml.
        max_new_tokens=1024,
        judging=judging,
    )


def ask(entries: Entries) -> tuple[Question, ...]:
    """In LLaVA's words."""
    return tuple(
        Question(name, entry.text, "", (entry.image,), entry.answer, name.removeprefix("v1_"))
        for name, entry in entries.items()
    )


def read_official(official: Path) -> Contents[Entry]:
    """Entries in the order of LLaVA's file, or of the official one."""
    entries: dict[str, Entry] = {}
    for name, record in check_map(official, Official).items():
        image = image_name(record["imagename"], f"{official}, question {name},")
        text = record["question"]
        entries[name] = Entry(image, text, text, record["answer"], tuple(record["capability"]))
    prompts_file, files = official.with_name("llava-mm-vet.jsonl"), [official]
    if is_file(prompts_file):
        files.insert(0, prompts_file)
        prompts = prompts_by_id(prompts_file, official, entries, entries, prefix="v1_")
        entries = {name: replace(entries[name], text=one.text, image=one.image) for name, one in prompts}
    return Contents("official", ask(entries), entries, Folder(official.parent / "images"), fingerprint(files))


def read_mirror(data: Path, source: str) -> Contents[Entry]:
    """The hub's table."""
    table = open_table(data, MIRROR, None, "test", source)
    rows = table.records(MirrorRow)
    names = [f"v1_{str(row['question_id']).removeprefix('v1_')}" for row in rows]
    each_once((f"{table.where} row {number}", name) for number, name in enumerate(names))
    entries: dict[str, Entry] = {}
    for name, image, row in zip(names, table.row_images(), rows, strict=True):
        needed = row["capability"]
        capabilities = tuple(word.strip() for word in (needed.split(",") if isinstance(needed, str) else needed))
        entries[name] = Entry(image, row["question"], row["question"], row["answer"], capabilities)
    return table.contents(ask(entries), entries, COLUMNS)


# -- the judge -------------------------------------------------------------------------------------------------------

# Official judge settings: a first try at temperature 0, and up to four more with a hint at 0, 0.5, 1 and 1.5.
TRIES = 5
STEP = 0.5
HINT = "\nPredict the correctness of the answer (digit): "


def judge_with(entries: Entries) -> Judging:
    """How MM-Vet's script uses its judge."""
    official = prompts()["mm_vet"]

    def needed(asked: Sequence[str]) -> dict[str, list[str]]:
        return {name: list(entries[name].capabilities) for name in asked}

    def request(name: str, text: str) -> Request:
        truth = entries[name].answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = " | ".join([entries[name].question, truth, text, ""])
        content = f"{official['few_shot_prompt']}\n{row}"
        return Request(name, ({"role": "user", "content": content},), 0.0, official["max_tokens"])

    def parse(name: str, reply: str) -> Verdict | None:
        return None if (value := parse_score(reply)) is None else {"score": [value]}

    def match_score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        """The same means of a word match, which no paper reports."""
        correct = {name: match(texts[name], entries[name].answer) for name in asked}
        note = "score_match is the share of reference elements found word for word: no published metric"
        value = 100 * statistics.fmean(correct.values())
        return Score({"score_match": value}, groups(needed(asked), correct), correct, (note,), "score_match", POINTS)

    return Judging(
        benchmark="mmvet",
        official=official["judge_model"],
        main="score",
        requests=lambda asked, texts: [request(name, texts[name]) for name in asked],
        parse=parse,
        # The grade file of the official script: id -> model, content and score, each a list over its runs.
        read=lambda path: {name: dict(grade) for name, grade in check_map(path, Grade).items()},
        score=lambda asked, verdicts: evaluate(needed(asked), {name: verdicts[name]["score"] for name in asked}),
        match=match_score,
        tries=TRIES,
        again=hinted,
        failed={"score": [0.0]},
    )


def hinted(request: Request, failures: int) -> Request:
    """After an unreadable reply: with a hint, at temperature 0, then 0.5 more each time."""
    content = request.messages[0]["content"] + HINT
    return Request(request.id, ({"role": "user", "content": content},), STEP * (failures - 1), request.max_tokens)


# -- the metric ------------------------------------------------------------------------------------------------------

# Out of 100, but no percentages.
POINTS = frozenset({"score", "std", "score_match", "capability", "combination"})
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def parse_score(reply: str) -> float | None:
    """A judge's score: what stands before the first space; None unless that is a number from 0 to 1."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def evaluate(capabilities: Mapping[str, Collection[str]], scores: Mapping[str, Sequence[float]]) -> Score:
    """The official numbers, in points from 0 to 100.

    Args:
        capabilities: question id -> what it needs, of every question that was asked.
        scores: question id -> its score in each run of the judge. The shortest list says how many runs count.
    """
    runs = min(len(scores[name]) for name in capabilities)
    correct = {name: statistics.fmean(scores[name][:runs]) for name in capabilities}
    values: dict[str, float | None] = {"score": 100 * statistics.fmean(correct.values())}
    notes = []
    if runs > 1:
        totals = [100 * statistics.fmean(scores[name][run] for name in capabilities) for run in range(runs)]
        values["std"] = statistics.pstdev(totals)
        notes.append(f"mean over {runs} runs of the judge, with their population standard deviation")
    if any(len(scores[name]) > runs for name in capabilities):
        notes.append(f"some questions were judged more than {runs} times; the first {runs} count")
    return Score(values, groups(capabilities, correct), correct, tuple(notes), "score", POINTS)


def groups(
    capabilities: Mapping[str, Collection[str]], correct: Mapping[str, float]
) -> dict[str, dict[str, tuple[float, int]]]:
    """Means per capability, a question counting for each of its own, and per combination; the most frequent first."""
    single = {name: list(needed) for name, needed in capabilities.items()}
    joined = {name: "_".join(one for one in CAPABILITIES if one in needed) for name, needed in capabilities.items()}
    tables = {"capability": grouped(correct, single), "combination": grouped(correct, joined)}
    return {kind: dict(sorted(table.items(), key=lambda item: -item[1][1])) for kind, table in tables.items()}


def match(text: str, answer: str) -> float:
    """Share of the elements, separated by <AND>, that occur in the text; the best of the choices around <OR>."""
    said = words(text)
    choices = [[words(element) for element in choice.split("<AND>")] for choice in answer.split("<OR>")]
    return max(sum(contains(said, element) for element in elements) / len(elements) for elements in choices)


BENCHMARK = listed("mmvet", load, ("test",), mirror=MIRROR)
