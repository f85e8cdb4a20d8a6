"""LLaVA-Bench-in-the-Wild, read from DATA/llava-bench-in-the-wild or from lmms-eval's mirror.

    questions.jsonl       question_id, image, text, category (conv, detail, complex)
    context.jsonl         image, caption: what the judge knows of the picture
    answers_gpt4.jsonl    question_id, text: the reference answers
    images/

Answers are judged, see eval/judging/. The official script pairs questions and answers by position, this one by id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Need, Question, fingerprint
from eval.hub import open_table
from eval.jsonl import read_jsonl
from eval.judging import Judging, Request, Verdict, prompts
from eval.judging.choice import unjudged
from eval.metrics import Score, llava_bench
from eval.pictures import Folder, Pictures, image_name
from eval.question_file import need_file
from eval.sources import official_file
from llava.errors import UserError

FOLDER = "llava-bench-in-the-wild"
MIRROR = ("lmms-lab-encoder/llava-bench-in-the-wild", "lmms-lab/llava-bench-in-the-wild")
COLUMNS = ("question", "caption", "gpt_answer", "category")
COUNT = 60
SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
# model_vqa.py's generate call. lmms-eval allows 32,768, which no answer comes near to.
MAX_NEW_TOKENS = 1024
NOTE = "relative_score_match is the F1 of an answer's words with the reference's: no published metric"


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
        lambda texts: {},
        MAX_NEW_TOKENS,
        facts,
        judging=judging,
    )


def read_official(folder: Path) -> tuple[dict[str, Entry], str]:
    """Entries in file order, and the hash of the three files."""
    paths = [folder / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")]
    for path in paths:
        need_file(path, "LLaVA-Bench-in-the-Wild", SOURCE)
    captions = {str(row["image"]): caption_text(row["caption"]) for row in rows(paths[1], ("image", "caption"))}
    references = {str(row["question_id"]): str(row["text"]) for row in rows(paths[2], ("question_id", "text"))}
    entries: dict[str, Entry] = {}
    for row in rows(paths[0], ("question_id", "image", "text", "category")):
        name, image = str(row["question_id"]), image_name(str(row["image"]), str(paths[0]))
        if name in entries:
            raise UserError(f"{paths[0]} asks question {name} a second time.")
        if image not in captions:
            raise UserError(f"{paths[1]} has no caption for {image}, which question {name} is about.")
        if name not in references:
            raise UserError(f"{paths[2]} has no answer to question {name}.")
        kind = category(str(row["category"]), paths[0])
        entries[name] = Entry(name, image, str(row["text"]), kind, captions[image], references[name])
    return entries, fingerprint(paths)


def rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a file, all with `fields`."""
    found = []
    for number, row in read_jsonl(path):
        if lost := [field for field in fields if field not in row]:
            raise UserError(f"{path} line {number} has no {' and no '.join(lost)}.")
        found.append(row)
    if not found:
        raise UserError(f"{path} is empty.")
    return found


def caption_text(caption: Any) -> str:
    """Captions of one picture, a line each."""
    return "\n".join(map(str, caption)) if isinstance(caption, list) else str(caption)


def category(name: str, where: Path | str) -> str:
    """One of the three that the judge has a rule for."""
    if name not in llava_bench.KINDS:
        raise UserError(f"{where} has a question of category {name!r}; known are {', '.join(llava_bench.KINDS)}.")
    return name


def read_mirror(data: Path, download: bool) -> tuple[dict[str, Entry], Pictures, str, str]:
    """Entries, pictures, hash and place of the table; its rows are numbered where it has no ids."""
    table = open_table(data, MIRROR, None, "train", download)
    entries: dict[str, Entry] = {}
    for number, row in enumerate(table.records(COLUMNS, optional=("question_id",))):
        name = str(row.get("question_id", number))
        kind = category(str(row["category"]), table.where)
        captions, reference = caption_text(row["caption"]), str(row["gpt_answer"])
        entries[name] = Entry(name, f"{number}/image", str(row["question"]), kind, captions, reference)
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


def read_reviews(path: Path) -> dict[str, Verdict]:
    """The review file of the official script: question_id, content and the pair read from it."""
    found: dict[str, Verdict] = {}
    for row in rows(path, ("question_id", "tuple")):
        name, pair = str(row["question_id"]), row["tuple"]
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(score, int | float) for score in pair):
            raise UserError(f"{path}: the review of question {name} should have a pair of scores, got {pair!r}.")
        if name in found:
            raise UserError(f"{path} reviews question {name} twice.")
        found[name] = {"tuple": pair}
    return found


BENCHMARK = Benchmark(
    name="llava_bench",
    summary="Conversations, descriptions and reasoning about pictures from the wild; judged by GPT-4.",
    splits=("test",),
    load=load,
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
