"""What SEED-Bench and its image part have in common: reading, wording, scoring and the files to upload."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.answers.jsonl import Row, is_file
from eval.answers.reading import read_rows
from eval.benchmarks.base import Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import Table, letters, official_file, open_table, option_lines, unique_ids
from eval.benchmarks.llava_files import Prompt, read_prompts
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.prompts import LETTER
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.benchmarks.seed import metric as seed
from eval.metrics import Score
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/SEED-Bench", "lmms-lab/SEED-Bench")
KINDS = ("image", "video")
# Some choices are numbers.
Choice = str | int | float
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
COLUMNS = ("question_id", "question", *CHOICES, "answer", "data_type")
LICENCE = "CC BY-NC 4.0"
ZIP = "LLaVA's eval.zip (docs/Evaluation.md)"
NEEDS = (
    Need("seed_bench/SEED-Bench.json", "https://huggingface.co/datasets/AILab-CVC/SEED-Bench (19,242 questions)"),
    Need("seed_bench/SEED-Bench-image", "https://huggingface.co/datasets/AILab-CVC/SEED-Bench, SEED-Bench-image.zip"),
    Need("seed_bench/llava-seed-bench.jsonl", ZIP, optional=True),
)
NEED_FRAMES = Need(
    "seed_bench/SEED-Bench-video-image",
    "the middle frame of each video, cut from the sources that SEED-Bench's DATASET.md names",
    count=5009,
)


class Record(TypedDict):
    """A question of SEED-Bench.json or a row of the mirror."""

    question_id: Id
    question: Filled
    choice_a: Choice
    choice_b: Choice
    choice_c: Choice
    choice_d: Choice
    answer: Literal["A", "B", "C", "D"]
    data_type: Literal["image", "video"]
    data_id: NotRequired[Id | None]
    question_type_id: NotRequired[int | None]


@dataclass(frozen=True)
class Found:
    """All questions of a source, in its order, with what scoring needs of them."""

    source: str
    questions: tuple[Question, ...]
    items: Mapping[str, seed.Item]
    pictures: Pictures
    mark: str


def load(main: str, data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the benchmark; everything that can be wrong with its files is said here, images excepted.

    Args:
        main: "accuracy" for all questions, "image_accuracy" for those about images alone.
    """
    folder, lmms, images_only = data / "seed_bench", profile == "lmms", main == "image_accuracy"
    title = "SEED-Bench image part" if images_only else "SEED-Bench"
    official = official_file(data, source, "SEED-Bench", [folder / "SEED-Bench.json"], MIRROR)
    found = (
        from_official(folder, official)
        if official is not None
        else from_mirror(open_table(data, MIRROR, None, split, source == "mirror"), lmms)
    )
    items = found.items
    questions = tuple(q for q in found.questions if not images_only or items[q.id].kind == "image")
    rule: seed.Rule = seed.first_character if lmms else seed.exact

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return seed.score({name: items[name] for name in asked}, texts, rule, main)

    def sample_score(question: Question, text: str) -> float:
        return rule(text, question.answer)

    kinds = [item.kind for item in items.values()]
    return Dataset(
        title,
        questions,
        found.pictures,
        found.mark,
        score,
        sample_score,
        upload_lmms(items) if lmms else upload(items),
        # lmms-eval's task names no length; its LLaVA then generates up to 1,024 tokens.
        max_new_tokens=1024 if lmms else 128,
        facts={
            "source": found.source,
            "profile": profile,
            "questions": len(questions),
            **{f"{kind} questions": kinds.count(kind) for kind in KINDS},
            "videos": "all frames of the data set" if lmms and official is None else "the middle frame",
        },
        # An answer file over all questions holds the answers to those about images.
        accepts=frozenset(items.keys() - {question.id for question in questions}),
        read=shared_ids_reader(found.questions),
    )


def shared_ids_reader(questions: Sequence[Question]) -> Callable[[Path], list[Row] | None]:
    """Reader of answer files in which the prompts do not tell questions with a shared id apart.

    The first answer to such an id belongs to its first question, as the official files are in the same order.
    """
    asked: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        asked[question.official].append(question.question)
    shared = {name: len(set(texts)) < len(texts) for name, texts in asked.items() if len(texts) > 1}

    def read(path: Path) -> list[Row] | None:
        try:
            rows, _ = read_rows(path)
        except UserError:  # said again by the common reader, which knows whether a torn file is welcome
            return None
        seen: Counter[str] = Counter()
        renamed = []
        for row in rows:
            if row.id in shared and row.number is None and (row.prompt is None or shared[row.id]):
                seen[row.id] += 1
                row = dataclasses.replace(row, id=f"{row.id}#{seen[row.id]}")
            renamed.append(row)
        return renamed if seen else None

    return read


def upload(items: Mapping[str, seed.Item]) -> Callable[[Mapping[str, str]], dict[str, str]]:
    """The leaderboard's file, as LLaVA's scripts/convert_seed_for_submission.py writes it."""

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        seen = seed.last_by_official(items, texts)
        rows = ({"question_id": items[name].official, "prediction": seen[name]} for name in items if name in seen)
        return {"seed_upload.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}

    return submission


def upload_lmms(items: Mapping[str, seed.Item]) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """lmms-eval's file: the first characters."""

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        rows = [(items[name].official, text.strip()[:1]) for name, text in texts.items()]
        return {"seed_submission.json": [{"question_id": name, "prediction": letter} for name, letter in rows]}

    return submission


def from_official(folder: Path, path: Path) -> Found:
    """SEED-Bench.json, in the order and words of LLaVA's question file if that is there."""
    records = check_list(path, Record, "questions")
    names = unique_ids(record["question_id"] for record in records)
    items = {name: read_item(record) for name, record in zip(names, records, strict=True)}
    prompts = folder / "llava-seed-bench.jsonl"
    if is_file(prompts):
        questions = from_prompts(prompts, dict(zip(names, records, strict=True)), path)
        return Found("official files", questions, items, Folder(folder), fingerprint([prompts, path]))
    questions = tuple(
        ask(name, record, (official_image(record, f"Question {name} in {path}"),))
        for name, record in zip(names, records, strict=True)
    )
    return Found("official files", questions, items, Folder(folder), fingerprint([path]))


def from_prompts(path: Path, records: Mapping[str, Record], official: Path) -> tuple[Question, ...]:
    """Questions as LLaVA's file words and orders them."""
    waiting: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        waiting[str(record["question_id"])].append(name)
    questions = []
    for prompt in read_prompts(path):
        candidates = waiting[str(prompt.id)]
        if not candidates:
            raise UserError(f"{prompt.where} asks question {prompt.id} more often than {official} has it.")
        name = pick(prompt, candidates, records)
        candidates.remove(name)
        record = records[name]
        questions.append(
            Question(name, prompt.question, prompt.suffix, (prompt.image,), record["answer"], str(prompt.id))
        )
    if lost := [name for names in waiting.values() for name in names]:
        raise UserError(f"{path} lacks {len(lost):,} of the questions in {official}, the first is {lost[0]}.")
    return tuple(questions)


def pick(prompt: Prompt, names: Sequence[str], records: Mapping[str, Record]) -> str:
    """Of questions that share an id the one that a prompt asks."""
    return next((name for name in names if prompt.text.startswith(records[name]["question"])), names[0])


def from_mirror(table: Table, every_frame: bool) -> Found:
    """The hub's table, whose images are lists: one image, or frames of a video.

    Args:
        every_frame: show all frames of a video as lmms-eval does, not the middle one as LLaVA.
    """
    records = table.records(Record)
    if not records:
        raise UserError(f"{table.where} has no rows.")
    names = unique_ids(record["question_id"] for record in records)
    items = {name: read_item(record) for name, record in zip(names, records, strict=True)}
    pictures = table.pictures()
    frames: dict[int, list[str]] = defaultdict(list)
    for name in sorted(pictures.names, key=lambda name: [int(part) for part in name.split("/") if part.isdigit()]):
        frames[int(name.split("/")[0])].append(name)
    first: dict[Any, int] = {}
    questions = []
    for row, (name, record) in enumerate(zip(names, records, strict=True)):
        # Rows about one image share its name, as in the official files.
        about = record.get("data_id") if record["data_type"] == "image" else None
        shown = frames[first.setdefault(about, row) if about is not None else row]
        if not shown:
            raise UserError(f"Question {name} in {table.where} has no image; fetch the data set again.")
        questions.append(ask(name, record, shown if every_frame else shown[len(shown) // 2 :][:1]))
    return Found(table.id, tuple(questions), items, pictures, table.fingerprint(COLUMNS))


def read_item(record: Record) -> seed.Item:
    """What scoring needs of a record."""
    return seed.Item(str(record["question_id"]), record["answer"], record["data_type"], record.get("question_type_id"))


def ask(name: str, record: Record, images: Sequence[str]) -> Question:
    """Question and choices as in LLaVA's file; lmms-eval words them alike."""
    choices = (record["choice_a"], record["choice_b"], record["choice_c"], record["choice_d"])
    text = f"{record['question']}\n{option_lines(letters([str(choice) for choice in choices]))}"
    return Question(name, text, LETTER, tuple(images), record["answer"], str(record["question_id"]))


def official_image(record: Record, where: str) -> str:
    """The image's place below seed_bench/, where LLaVA's question file does not say it."""
    kind = record["data_type"]
    needed = "data_id" if kind == "image" else "question_type_id"
    if record.get(needed) is None:
        raise UserError(f"{where} has no {needed}, which names its {kind}.")
    if kind == "image":
        return image_name(f"SEED-Bench-image/{record['data_id']}", where)
    return image_name(f"SEED-Bench-video-image/{record['question_type_id']}_{record['question_id']}.png", where)
