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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import Answers, Found, most_common, people_said, read_prompts, size, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.prompts import VIZ
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.benchmarks.vqa import metric as vqa
from eval.benchmarks.vqa.evalai import process
from eval.metrics import Score

MIRROR = ("lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA")

PUBLISHED_SIZES = {"test": 8_000, "val": 4_319}
SERVER = "EvalAI challenge 2185 (https://eval.ai/web/challenges/challenge-page/2185)"
EVAL_ZIP = "eval.zip of LLaVA's docs/Evaluation.md"


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


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    folder, title = data / "vizwiz", f"VizWiz {split}"
    file = folder / ("val.json" if split == "val" else "llava_test.jsonl")
    official = official_file(data, source, title, [file], MIRROR)
    if official is None:
        found = read_mirror(data, split, download=source == "mirror")
    else:
        found = read_official(official, split)
    questions = found.questions
    score, sample_score = val_metric(found, profile) if split == "val" else (server_only(len(questions)), None)
    return Dataset(
        title,
        questions,
        found.pictures,
        found.mark,
        score,
        sample_score,
        submission(questions),
        # LLaVA: model_vqa_loader.py's default. lmms-eval: no limit for this task, its LLaVA then takes 1,024.
        max_new_tokens=1024 if profile == "lmms" else 128,
        facts={"source": found.source, "profile": profile, "size": size(len(questions), PUBLISHED_SIZES[split])},
        normalise=process,
    )


def read_official(path: Path, split: str) -> Found:
    """Val from the official file, test from LLaVA's."""
    if split == "val":
        records = check_list(path, Official)
        questions = unique(
            (from_annotation(record, f"{path} entry {n}") for n, record in enumerate(records, 1)), str(path)
        )
    else:
        records, questions = [], from_prompts(path)
    return Found("official", records, questions, Folder(path.parent / split), fingerprint([path]))


def read_mirror(data: Path, split: str, download: bool) -> Found:
    """A table of the hub."""
    table = open_table(data, MIRROR, None, split, download)
    columns = ("question_id", "question", *(["answers"] if split == "val" else []))
    records: Sequence[MirrorRow]
    if split == "val":
        answered = table.records(MirrorAnswered)
        records, answers = answered, [most_common(people_said(record["answers"])) for record in answered]
    else:
        records = table.records(MirrorRow)
        answers = [""] * len(records)
    questions = unique(
        (from_mirror(record, row, answers[row]) for row, record in enumerate(records)),
        table.where,
    )
    return Found(table.id, records, questions, table.pictures(), table.fingerprint(columns))


def from_prompts(path: Path) -> tuple[Question, ...]:
    """Questions of LLaVA's file; nobody but the server knows the answers."""
    return unique(
        (Question(str(p.id), p.question, p.suffix, (p.image,), "", p.image) for p in read_prompts(path)), str(path)
    )


def from_annotation(record: Official, where: str) -> Question:
    """A question of the official file, whose only id is the image's name."""
    image = image_name(record["image"], where)
    answer = most_common(people_said(record["answers"]))
    return Question(PurePosixPath(image).stem, record["question"].capitalize(), VIZ, (image,), answer, image)


def from_mirror(record: MirrorRow, row: int, answer: str) -> Question:
    """A row of the mirror, whose question_id is the image's name without its ending."""
    name = str(record["question_id"])
    return Question(name, record["question"].capitalize(), VIZ, (f"{row}/image",), answer, f"{name}.jpg")


def val_metric(
    found: Found, profile: str
) -> tuple[Callable[[Sequence[str], Mapping[str, str]], Score], Callable[[Question, str], float]]:
    """The score of val and the sample score of one answer."""
    by_id = {question.id: record for question, record in zip(found.questions, found.records, strict=True)}
    given = {name: people_said(record["answers"]) for name, record in by_id.items()}
    # The official file and the mirror name it differently.
    kind = {name: str(record.get("answer_type") or record.get("category") or "") for name, record in by_id.items()}
    kinds = {"answer type": kind} if all(kind.values()) else {}
    sample_score = vqa.m4c if profile == "lmms" else vqa.after_processor(vqa.vizwiz)

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return vqa.score({name: given[name] for name in asked}, texts, sample_score, kinds)

    return score, lambda question, text: sample_score(text, given[question.id])


def server_only(total: int) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """What test has instead of a score."""

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        note = f"no local score: upload answers_upload.json to {SERVER}"
        if len(asked) < total:
            note += f"; it refuses this one, which answers {len(asked):,} of {total:,} questions"
        return vqa.unscored(note)

    return score


def submission(questions: Sequence[Question]) -> Callable[[Mapping[str, str]], dict[str, list[dict[str, str]]]]:
    """The server's format: image name and processed answer, in the order of the question file."""

    def convert(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
        asked = (question for question in questions if question.id in texts)
        return {"answers_upload.json": [{"image": q.official, "answer": process(texts[q.id])} for q in asked]}

    return convert


BENCHMARK = Benchmark(
    name="vizwiz",
    summary="Questions of blind people about their images; accuracy against ten people, from a server but for val.",
    splits=("test", "val"),
    read=load,
    published="50.0 accuracy",
    published_by="LLaVA-1.5-7B, LLaVA's model zoo, on test",
    needs=(
        Need("vizwiz/llava_test.jsonl", EVAL_ZIP),
        Need("vizwiz/test", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", count=8_000),
        Need("vizwiz/val.json", "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip", optional=True),
        Need("vizwiz/val", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip", count=4_319, optional=True),
    ),
    mirror=MIRROR,
    licence="CC BY 4.0",
    split_files={"val": "vizwiz/val.json", "test": "vizwiz/llava_test.jsonl"},
)
