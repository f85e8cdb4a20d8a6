"""VizWiz VQA in the official layout, read from DATA/vizwiz.

    llava_test.jsonl    LLaVA's question file of split test, ids are row numbers
    test/               official images of split test
    val.json            official questions of split val with ten answers each
    val/                official images of split val

Only a server can score test: answers_upload.json is for it, in the order of the question file. It wants an answer to
every question. The split val is scored here, per answer type too. LLaVA has no question file for it: its questions are
asked in the official order, worded like LLaVA's test file, whose questions begin with a capital letter and go on in
lower case.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, scored_by
from eval.benchmarks.hub import official_file, open_table, ungraded
from eval.benchmarks.llava_files import VIZ, Answers, most_common, people_said, read_prompts, size, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.metrics import vqa

MIRROR = ("lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA")

PUBLISHED_SIZES = {"test": 8_000, "val": 4_319}
SERVER = "EvalAI challenge 2185 (https://eval.ai/web/challenges/challenge-page/2185)"


class Official(TypedDict):
    """A question of the official file of split val."""

    image: Filled
    question: str
    answers: Answers
    answer_type: NotRequired[str | None]


class MirrorRow(TypedDict):
    """A row of the mirror's split test."""

    question_id: Id
    question: str


class MirrorAnswered(MirrorRow):
    """A row of the mirror's split val."""

    answers: Answers
    category: NotRequired[str | None]


Record = Mapping[str, Any]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    title, file = f"VizWiz {split}", data / "vizwiz" / ("val.json" if split == "val" else "llava_test.jsonl")
    official = official_file(data, source, title, [file], MIRROR)
    contents = read_mirror(data, split, source) if official is None else read_official(official, split)
    questions, records, lmms = contents.questions, contents.references, profile == "lmms"
    if split == "val":
        given = {name: people_said(record["answers"]) for name, record in records.items()}
        # The official file and the mirror name it differently.
        kind = {name: str(row.get("answer_type") or row.get("category") or "") for name, row in records.items()}
        rule = vqa.m4c if lmms else vqa.after_processor(vqa.vizwiz)
        score, sample_score = scored_by(given, rule, {"answer type": kind} if all(kind.values()) else {})
    else:
        score, sample_score = ungraded("accuracy", "answers_upload.json", SERVER, whole=len(questions)), None

    def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
        """The server's format: image name and processed answer, in the order of the question file."""
        asked = (question for question in questions if question.id in texts)
        return {"answers_upload.json": [{"image": q.official, "answer": vqa.process(texts[q.id])} for q in asked]}

    facts = {"size": size(len(questions), PUBLISHED_SIZES[split])}
    # LLaVA: model_vqa_loader.py's default. lmms-eval: no limit for this task, its LLaVA then takes 1,024.
    more = {"max_new_tokens": 1024 if lmms else 128, "normalise": vqa.process}
    return contents.dataset(title, profile, score, sample_score, submission, facts, **more)


def read_official(path: Path, split: str) -> Contents[Record]:
    """Val from the official file, whose only ids are the images' names; test from LLaVA's, without answers."""
    records: Sequence[Record] = ()
    if split == "val":
        records = check_list(path, Official)
        images = [image_name(record["image"], f"{path} entry {number}") for number, record in enumerate(records, 1)]
        ids = [PurePosixPath(image).stem for image in images]
        questions = ask(records, ids, images, images, str(path))
    else:
        prompts = (Question(str(p.id), p.question, p.suffix, (p.image,), "", p.image) for p in read_prompts(path))
        questions = unique(prompts, str(path))
    references = {question.id: record for question, record in zip(questions, records, strict=False)}
    return Contents("official", questions, references, Folder(path.parent / split), fingerprint([path]))


def read_mirror(data: Path, split: str, source: str) -> Contents[Record]:
    """A table of the hub, whose question_id is the image's name without its ending."""
    table = open_table(data, MIRROR, None, split, source)
    columns = ("question_id", "question", *(["answers"] if split == "val" else []))
    records: Sequence[Record] = table.records(MirrorAnswered if split == "val" else MirrorRow)
    ids = [str(record["question_id"]) for record in records]
    questions = ask(records, ids, table.row_images(), [f"{name}.jpg" for name in ids], table.where)
    return table.contents(questions, dict(zip(ids, records, strict=True)), columns)


def ask(
    records: Sequence[Record], ids: Sequence[str], images: Sequence[str], files: Sequence[str], where: str
) -> tuple[Question, ...]:
    """Questions of the official file or the mirror; `files` are the names that the server wants."""
    questions = []
    for record, name, image, file in zip(records, ids, images, files, strict=True):
        answer = most_common(people_said(record.get("answers", ())))
        questions.append(Question(name, record["question"].capitalize(), VIZ, (image,), answer, file))
    return unique(questions, where)


BENCHMARK = listed(
    "vizwiz",
    load,
    ("test", "val"),
    mirror=MIRROR,
    split_files={"val": "vizwiz/val.json", "test": "vizwiz/llava_test.jsonl"},
)
