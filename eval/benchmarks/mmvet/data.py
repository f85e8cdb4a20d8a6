"""MM-Vet, read from DATA/mm-vet (LLaVA's scripts) or DATA/mmvet (LLaVA's documentation), or from lmms-eval's mirror.

    mm-vet.json            official questions: "v1_0" -> imagename, question, answer, capability
    llava-mm-vet.jsonl     LLaVA's question file, optional: question_id, image, text
    images/

Answers are judged, see eval/judging/. In both profiles the judge is asked as MM-Vet's own script asks it; lmms-eval
words the head of its table a little differently and allows longer replies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import read_prompts
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.mmvet import metric as mmvet
from eval.benchmarks.records import Filled, Id, NotRequired, Number, Texts, TypedDict, check_map
from eval.judging import Judging, Request, Verdict, prompts
from eval.judging.choice import unjudged
from eval.metrics import Score
from llava.errors import UserError

FOLDERS = ("mm-vet", "mmvet")
MIRROR = ("lmms-lab-encoder/MMVet", "lmms-lab/MMVet")
COLUMNS = ("question_id", "question", "answer", "capability")
COUNT = 218
SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

# lmms-eval asks so. It stands before the question, where a prompt has no part of its own for it.
STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
# model_vqa.py's generate call, and lmms-eval's mmvet.yaml.
MAX_NEW_TOKENS = 1024


class Official(TypedDict):
    """A question of the official file."""

    imagename: Filled
    question: Filled
    answer: Filled
    capability: Texts


class MirrorRow(TypedDict):
    """A row of the mirror, whose capabilities are a list or one text with commas."""

    question_id: Id
    question: Filled
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
        image: its name in the data set's `pictures`.
        text: what LLaVA's profile asks.
        question: as the benchmark words it, which is what the judge sees.
    """

    image: str
    text: str
    question: str
    answer: str
    capabilities: tuple[str, ...]


Entries = dict[str, Entry]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The 218 questions."""
    official = official_file(data, source, "MM-Vet", [data / name / "mm-vet.json" for name in FOLDERS], MIRROR)
    if official is None:
        entries, pictures, hashed, where = read_mirror(data, download=source == "mirror")
    else:
        entries, hashed = read_official(official)
        pictures, where = Folder(official.parent / "images"), "official"
    questions = {name: question(name, entry, profile) for name, entry in entries.items()}
    judging = judge_with(entries)
    facts = {
        "source": where,
        "profile": profile,
        "questions": len(entries),
        "official judge": judging.official,
        **({} if len(entries) == COUNT else {"size": f"{len(entries):,} questions, the published set has {COUNT}"}),
    }
    return Dataset(
        "MM-Vet",
        tuple(questions.values()),
        pictures,
        hashed,
        unjudged(judging),
        None,
        submission,
        MAX_NEW_TOKENS,
        facts,
        judging=judging,
    )


def question(name: str, entry: Entry, profile: str) -> Question:
    """As the profile asks it. LLaVA's files number questions, MM-Vet's name them "v1_" and that number."""
    text = entry.text if profile == "llava" else STEP_BY_STEP + entry.question
    return Question(name, text, "", (entry.image,), entry.answer, name.removeprefix("v1_"))


def submission(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The input of MM-Vet's evaluator, as LLaVA's convert_mmvet_for_eval.py writes it."""
    return {"mmvet_results.json": dict(texts)}


def read_official(official: Path) -> tuple[Entries, str]:
    """Entries in the order of LLaVA's file, or of the official one, and the hash of what was read."""
    prompts_file = official.with_name("llava-mm-vet.jsonl")
    entries = {name: entry(name, record, official) for name, record in check_map(official, Official).items()}
    if not is_file(prompts_file):
        return entries, fingerprint([official])
    ordered: Entries = {}
    for prompt in read_prompts(prompts_file):
        name = f"v1_{prompt.id}"
        if name not in entries:
            raise UserError(f"{prompt.where} asks question {prompt.id}, which is not in {official}.")
        if name in ordered:
            raise UserError(f"{prompt.where} asks question {prompt.id} a second time.")
        ordered[name] = replace(entries[name], text=prompt.text, image=prompt.image)
    if lost := [name for name in entries if name not in ordered]:
        raise UserError(f"{prompts_file} lacks {len(lost):,} of the questions in {official}, the first is {lost[0]}.")
    return ordered, fingerprint([prompts_file, official])


def entry(name: str, record: Official, path: Path) -> Entry:
    """An entry of the official file."""
    image = image_name(record["imagename"], f"{path}, question {name},")
    return Entry(image, record["question"], record["question"], record["answer"], tuple(record["capability"]))


def read_mirror(data: Path, download: bool) -> tuple[Entries, Pictures, str, str]:
    """Entries, images, hash and place of the table."""
    table = open_table(data, MIRROR, None, "test", download)
    entries: Entries = {}
    for number, row in enumerate(table.records(MirrorRow)):
        name, needed = f"v1_{str(row['question_id']).removeprefix('v1_')}", row["capability"]
        if name in entries:
            raise UserError(f"{table.where} row {number} asks question {name} a second time.")
        words = needed.split(",") if isinstance(needed, str) else needed
        capabilities = tuple(word.strip() for word in words)
        entries[name] = Entry(f"{number}/image", row["question"], row["question"], row["answer"], capabilities)
    return entries, table.pictures(), table.fingerprint(COLUMNS), table.where


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

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return mmvet.match_score(needed(asked), {name: entries[name].answer for name in asked}, texts)

    return Judging(
        benchmark="mmvet",
        official=official["judge_model"],
        main="score",
        requests=lambda asked, texts: [request(name, texts[name]) for name in asked],
        parse=parse,
        read=read_grades,
        score=lambda asked, found: mmvet.score(needed(asked), {name: found[name]["score"] for name in asked}),
        match=match,
        tries=mmvet.TRIES,
        again=hinted,
        failed={"score": [0.0]},
    )


def parse(name: str, reply: str) -> Verdict | None:
    """One run's score."""
    found = mmvet.parse(reply)
    return None if found is None else {"score": [found]}


def hinted(request: Request, failures: int) -> Request:
    """After an unreadable reply: with a hint, at temperature 0, then 0.5 more each time."""
    content = request.messages[0]["content"] + mmvet.HINT
    return Request(request.id, ({"role": "user", "content": content},), mmvet.STEP * (failures - 1), request.max_tokens)


def read_grades(path: Path) -> dict[str, Verdict]:
    """The grade file of the official script: id -> model, content and score, each a list over its runs."""
    return {name: dict(grade) for name, grade in check_map(path, Grade).items()}


BENCHMARK = Benchmark(
    name="mmvet",
    summary="Open questions that need several capabilities at once; judged by GPT-4.",
    splits=("test",),
    read=load,
    published="31.1 score",
    published_by="LLaVA-1.5-7B, LLaVA's model zoo, judged by gpt-4-0613",
    needs=(
        Need("mm-vet/mm-vet.json", SOURCE),
        Need("mm-vet/llava-mm-vet.jsonl", "LLaVA's eval.zip, see docs/Evaluation.md there", optional=True),
        Need("mm-vet/images", SOURCE, count=200),
    ),
    mirror=MIRROR,
    licence="CC BY-NC 4.0",
)
