"""LLaVA-Bench-in-the-Wild, read from DATA/llava-bench-in-the-wild or from lmms-eval's mirror.

    questions.jsonl       question_id, image, text, category (conv, detail, complex)
    context.jsonl         image, caption: what the judge knows of the image
    answers_gpt4.jsonl    question_id, text: the reference answers
    images/

Answers are judged, see eval/judging/. The official script pairs questions and answers by position, this one by id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint, no_submission
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_bench import metric as llava_bench
from eval.benchmarks.llava_files import need_file
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Number, Texts, TypedDict, check_lines
from eval.judging import Judging, Request, Verdict, prompts
from eval.judging.choice import unjudged
from eval.metrics import Score
from llava.errors import UserError

FOLDER = "llava-bench-in-the-wild"
MIRROR = ("lmms-lab-encoder/llava-bench-in-the-wild", "lmms-lab/llava-bench-in-the-wild")
COLUMNS = ("question", "caption", "gpt_answer", "category")
COUNT = 60
SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
# model_vqa.py's generate call. lmms-eval allows 32,768, which no answer comes near to.
MAX_NEW_TOKENS = 1024
Kind = Literal["complex", "conv", "detail"]
NOTE = "relative_score_match is the F1 of an answer's words with the reference's: no published metric"


class Line(TypedDict):
    """A line of questions.jsonl."""

    question_id: Id
    image: Filled
    text: Filled
    category: Kind


class Context(TypedDict):
    """A line of context.jsonl."""

    image: Filled
    caption: Filled | Texts


class Reference(TypedDict):
    """A line of answers_gpt4.jsonl."""

    question_id: Id
    text: Filled


class MirrorRow(TypedDict):
    """A row of the mirror."""

    question: Filled
    caption: Filled | Texts
    gpt_answer: Filled
    category: Kind
    question_id: NotRequired[Id]


@dataclass(frozen=True)
class Entry:
    """One question with what the judge is told."""

    id: str
    image: str
    question: str
    category: str
    caption: str
    reference: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The 60 questions; both profiles ask them as they are."""
    official = official_file(data, source, "LLaVA-Bench-in-the-Wild", [data / FOLDER / "questions.jsonl"], MIRROR)
    if official is None:
        entries, pictures, hashed, where = read_mirror(data, download=source == "mirror")
    else:
        entries, hashed = read_official(official.parent)
        pictures, where = Folder(official.parent / "images"), "official"
    judging = judge_with(entries)
    facts = {
        "source": where,
        "profile": profile,
        "questions": len(entries),
        "official judge": judging.official,
        **({} if len(entries) == COUNT else {"size": f"{len(entries):,} questions, the published set has {COUNT}"}),
    }
    questions = (Question(e.id, e.question, "", (e.image,), e.reference) for e in entries.values())
    return Dataset(
        "LLaVA-Bench-in-the-Wild",
        tuple(questions),
        pictures,
        hashed,
        unjudged(judging),
        None,
        # The official script reads answers.jsonl as it is.
        no_submission,
        MAX_NEW_TOKENS,
        facts,
        judging=judging,
    )


def read_official(folder: Path) -> tuple[dict[str, Entry], str]:
    """Entries in file order, and the hash of the three files."""
    paths = [folder / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")]
    for path in paths:
        need_file(path, "LLaVA-Bench-in-the-Wild", SOURCE)
    captions = {row["image"]: caption_text(row["caption"]) for _, row in check_lines(paths[1], Context)}
    references = {str(row["question_id"]): row["text"] for _, row in check_lines(paths[2], Reference)}
    entries: dict[str, Entry] = {}
    for where, row in check_lines(paths[0], Line):
        name, image = str(row["question_id"]), image_name(row["image"], where)
        if name in entries:
            raise UserError(f"{where} asks question {name} a second time.")
        if image not in captions:
            raise UserError(f"{paths[1]} has no caption for {image}, which question {name} is about.")
        if name not in references:
            raise UserError(f"{paths[2]} has no answer to question {name}.")
        entries[name] = Entry(name, image, row["text"], row["category"], captions[image], references[name])
    return entries, fingerprint(paths)


def caption_text(caption: str | Sequence[str]) -> str:
    """Captions of one image, a line each."""
    return caption if isinstance(caption, str) else "\n".join(caption)


def read_mirror(data: Path, download: bool) -> tuple[dict[str, Entry], Pictures, str, str]:
    """Entries, images, hash and place of the table; its rows are numbered where it has no ids."""
    table = open_table(data, MIRROR, None, "train", download)
    entries: dict[str, Entry] = {}
    for number, row in enumerate(table.records(MirrorRow)):
        name, captions = str(row.get("question_id", number)), caption_text(row["caption"])
        if name in entries:
            raise UserError(f"{table.where} row {number} asks question {name} a second time.")
        entries[name] = Entry(name, f"{number}/image", row["question"], row["category"], captions, row["gpt_answer"])
    return entries, table.pictures(), table.fingerprint(COLUMNS), table.where


def judge_with(entries: Mapping[str, Entry]) -> Judging:
    """How LLaVA's script uses its judge: one try, and what cannot be read stays in the mean."""
    official = prompts()["llava_bench"]

    def request(name: str, text: str) -> Request:
        system = {"role": "system", "content": official["system"]}
        user = {"role": "user", "content": message(entries[name], text)}
        return Request(name, (system, user), official["temperature"], official["max_tokens"])

    def kinds(asked: Sequence[str]) -> dict[str, str]:
        return {name: entries[name].category for name in asked}

    images = {name: entry.image for name, entry in entries.items()}

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        pairs = llava_bench.match_pairs({name: entries[name].reference for name in asked}, texts)
        return llava_bench.score(kinds(asked), pairs, images, "_match", NOTE)

    return Judging(
        benchmark="llava_bench",
        official=official["judge_model"],
        main="relative_score",
        requests=lambda asked, texts: [request(name, texts[name]) for name in asked],
        parse=lambda name, reply: {"tuple": list(llava_bench.parse(reply))},
        read=read_reviews,
        score=lambda asked, found: llava_bench.score(
            kinds(asked), {name: tuple(found[name]["tuple"]) for name in asked}, images
        ),
        match=match,
    )


def message(entry: Entry, text: str) -> str:
    """What the judge reads: captions, question, both answers and the rule of the question's category."""
    rule = prompts()["llava_bench"]["rules"][f"llava_bench_{entry.category}"]
    role = rule["role"]
    answers = [
        f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n"
        for number, answer in enumerate((entry.reference, text), start=1)
    ]
    context = f"[Context]\n{entry.caption}\n\n[Question]\n{entry.question}\n\n"
    return f"{context}{''.join(answers)}[System]\n{rule['prompt']}\n\n"


class Review(TypedDict):
    """A line of the official script's review file."""

    question_id: Id
    tuple: Annotated[list[Number], Field(min_length=2, max_length=2)]


def read_reviews(path: Path) -> dict[str, Verdict]:
    """The review file of the official script: question_id, content and the pair read from it."""
    found: dict[str, Verdict] = {}
    for where, row in check_lines(path, Review):
        name = str(row["question_id"])
        if name in found:
            raise UserError(f"{where} reviews question {name} a second time.")
        found[name] = {"tuple": row["tuple"]}
    return found


BENCHMARK = Benchmark(
    name="llava_bench",
    summary="Conversations, descriptions and reasoning about images from the wild; judged by GPT-4.",
    splits=("test",),
    read=load,
    published="65.4 relative score",
    published_by="LLaVA-1.5-7B, LLaVA's model zoo, judged by gpt-4-0314",
    needs=(
        Need(f"{FOLDER}/questions.jsonl", SOURCE),
        Need(f"{FOLDER}/context.jsonl", SOURCE),
        Need(f"{FOLDER}/answers_gpt4.jsonl", SOURCE),
        Need(f"{FOLDER}/images", SOURCE, count=24),
    ),
    mirror=MIRROR,
    licence="not stated on its page",
)
