"""VQAv2 in the official layout, read from DATA/vqav2.

    llava_vqav2_mscoco_test-dev2015.jsonl             LLaVA's question file of split testdev
    llava_vqav2_mscoco_test2015.jsonl                 of split test, and the list of ids that the server wants
    test2015/                                         COCO test2015 images, of both
    v2_OpenEnded_mscoco_val2014_questions.json        official questions of split val
    v2_mscoco_val2014_annotations.json                and their answers
    val2014/                                          COCO val2014 images

Only a server can score testdev and test: answers_upload.json is for it, one entry per test2015 question, with an empty
answer for those that were not asked. The split val is scored here by the official rule. LLaVA has no question file for
it, its questions are asked in the official order with LLaVA's suffix.

Uploaded and scored is what the EvalAI answer processor makes of a text, as LLaVA's conversion does it. lmms-eval
uploads the raw text, which loses every "Yes" where all people said "yes": that is not imitated.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import Answers, Found, as_number, need_file, people_said, read_prompts, size, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.benchmarks.vqa import metric as vqa
from eval.benchmarks.vqa.evalai import process
from eval.metrics import Score
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
MIRROR_SPLITS = {"testdev": "testdev", "test": "test", "val": "validation"}

PROMPTS = {"testdev": "llava_vqav2_mscoco_test-dev2015.jsonl", "test": "llava_vqav2_mscoco_test2015.jsonl"}
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

PUBLISHED_SIZES = {"testdev": 107_394, "test": 447_793, "val": 214_354}
SERVER = "EvalAI challenge 830 (https://eval.ai/web/challenges/challenge-page/830)"
EVAL_ZIP = "eval.zip of LLaVA's docs/Evaluation.md"
VQA_SITE = "https://visualqa.org/download.html"


class Asked(TypedDict):
    """A question of the official file."""

    question_id: Id
    image_id: Id
    question: Filled


class Annotation(TypedDict):
    """The answers to a question of the official file."""

    question_id: Id
    answers: Answers
    question_type: str
    answer_type: str
    multiple_choice_answer: NotRequired[str]


class MirrorRow(TypedDict):
    """A row of the mirror, of the splits that only a server can score."""

    question_id: Id
    question: Filled
    image_id: NotRequired[Id | None]


class MirrorAnswered(MirrorRow):
    """A row of the mirror's split with answers."""

    answers: Answers
    question_type: NotRequired[str]
    answer_type: NotRequired[str]
    multiple_choice_answer: NotRequired[str | None]


# What is read of a question whatever its source; the annotations of the official file are joined to it.
Record = Mapping[str, Any]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    folder, title = data / "vqav2", f"VQAv2 {split}"
    official = official_file(data, source, title, [folder / PROMPTS.get(split, QUESTIONS)], MIRROR)
    if official is None:
        found = read_mirror(data, split, download=source == "mirror")
    else:
        found = read_official(official, split, title)
    facts = {
        "source": found.source,
        "profile": profile,
        "size": size(len(found.questions), PUBLISHED_SIZES[split]),
    }
    accepts: frozenset[str] = frozenset()
    submission: Callable[[Mapping[str, str]], Mapping[str, Any]]
    if split == "val":
        score, sample_score = val_metric(found, profile)
        submission = val_submission
    else:
        ids = server_ids(folder / PROMPTS["test"], split, found.questions)
        score, sample_score = server_only(folder / PROMPTS["test"], split), None
        submission = server_submission(ids)
        facts["submission"] = f"{len(ids):,} entries"
        # An upload answers the whole list, whichever split it is for.
        accepts = frozenset(map(str, ids)) - {question.id for question in found.questions}
    return Dataset(
        title,
        found.questions,
        found.pictures,
        found.mark,
        score,
        sample_score,
        submission,
        max_new_tokens=16 if profile == "lmms" else 128,  # LLaVA: model_vqa_loader.py's default
        facts=facts,
        accepts=accepts,
        normalise=process,
    )


def read_official(path: Path, split: str, title: str) -> Found:
    """Val from the official files, testdev and test from LLaVA's."""
    folder = path.parent
    if split != "val":
        return Found("official", (), from_prompts(path), Folder(folder / "test2015"), fingerprint([path]))
    annotations = need_file(folder / ANNOTATIONS, title, VQA_SITE)
    records = join_annotations(path, annotations)
    images = [image_name(coco_name(record), str(path)) for record in records]
    questions = from_records(records, images, str(path))
    return Found("official", records, questions, Folder(folder / "val2014"), fingerprint([path, annotations]))


def read_mirror(data: Path, split: str, download: bool) -> Found:
    """A table of the hub."""
    table = open_table(data, MIRROR, None, MIRROR_SPLITS[split], download)
    columns = ("question_id", "question", *(["answers"] if split == "val" else []))
    records: Sequence[Record] = table.records(MirrorAnswered if split == "val" else MirrorRow)
    questions = from_records(records, [f"{row}/image" for row in range(len(records))], table.where)
    return Found(table.id, records, questions, table.pictures(), table.fingerprint(columns))


def from_prompts(path: Path) -> tuple[Question, ...]:
    """Questions of LLaVA's files; nobody but the server knows the answers."""
    return unique((Question(str(p.id), p.question, p.suffix, (p.image,), "") for p in read_prompts(path)), str(path))


def from_records(records: Sequence[Record], images: Sequence[str], where: str) -> tuple[Question, ...]:
    """Questions of the official file or the mirror, with the suffix that LLaVA and lmms-eval both use."""
    return unique(
        (
            Question(
                str(record["question_id"]),
                record["question"],
                SHORT,
                (image,),
                str(record.get("multiple_choice_answer") or ""),
                about=str(record.get("image_id") or ""),
            )
            for record, image in zip(records, images, strict=True)
        ),
        where,
    )


def join_annotations(questions: Path, annotations: Path) -> list[Record]:
    """The official questions with their answers and types."""
    found = check_list(annotations, Annotation, "annotations")
    answered = {record["question_id"]: record for record in found}
    if len(answered) < len(found):
        raise UserError(f"{annotations} answers {len(found) - len(answered):,} questions more than once.")
    records = check_list(questions, Asked, "questions")
    lost = [record["question_id"] for record in records if record["question_id"] not in answered]
    if lost:
        raise UserError(f"{annotations} has no answers to {len(lost):,} questions of {questions}, such as {lost[0]}.")
    return [{**answered[record["question_id"]], **record} for record in records]


def coco_name(record: Record) -> str:
    """File name of a question's image in val2014."""
    return f"COCO_val2014_{str(record['image_id']).zfill(12)}.jpg"


def val_metric(
    found: Found, profile: str
) -> tuple[Callable[[Sequence[str], Mapping[str, str]], Score], Callable[[Question, str], float]]:
    """The score of val and the sample score of one answer."""
    records = found.records
    answers = {str(record["question_id"]): people_said(record["answers"]) for record in records}
    kinds = {
        kind.replace("_", " "): {str(r["question_id"]): r[kind] for r in records}
        for kind in ("answer_type", "question_type")
        if all(kind in record for record in records)
    }
    sample_score = vqa.lmms_vqa if profile == "lmms" else vqa.after_processor(vqa.vqa_eval)

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return vqa.score({name: answers[name] for name in asked}, texts, sample_score, kinds)

    return score, lambda question, text: sample_score(text, answers[question.id])


def val_submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The result file that the official toolkit reads."""
    return {
        "predictions.json": [{"question_id": as_number(name), "answer": process(text)} for name, text in texts.items()]
    }


def server_ids(whole: Path, split: str, questions: Sequence[Question]) -> list[str]:
    """Ids of the upload: every test2015 question where LLaVA's list is there, else those of the split."""
    ids = [question.id for question in questions]
    if split == "test" or not is_file(whole):
        return ids
    listed = [str(prompt.id) for prompt in read_prompts(whole)]
    if foreign := set(ids).difference(listed):
        raise UserError(
            f"{len(foreign):,} VQAv2 {split} questions are not in {whole}, such as {min(foreign)}; "
            "the two files are not of one version."
        )
    return listed


def server_only(whole: Path, split: str) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """What testdev and test have instead of a score."""
    note = f"no local score: upload answers_upload.json to {SERVER}"
    if split != "test" and not is_file(whole):
        note += f"; it wants every test2015 question, so put {whole.name} of {EVAL_ZIP} into {whole.parent} first"
    return lambda asked, texts: vqa.unscored(note)


def server_submission(ids: Sequence[str]) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """The server's format: one entry per id, empty where nothing was asked."""

    def convert(texts: Mapping[str, str]) -> dict[str, Any]:
        answers = {name: process(text) for name, text in texts.items()}
        return {"answers_upload.json": [{"question_id": as_number(n), "answer": answers.get(n, "")} for n in ids]}

    return convert


BENCHMARK = Benchmark(
    name="vqav2",
    summary="Short answers about COCO images; accuracy against ten people, from a server but for val.",
    splits=("testdev", "test", "val"),
    read=load,
    published="78.5 accuracy",
    published_by="LLaVA-1.5-7B, LLaVA's model zoo, on testdev",
    needs=(
        Need("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", EVAL_ZIP),
        Need("vqav2/llava_vqav2_mscoco_test2015.jsonl", EVAL_ZIP),
        Need("vqav2/test2015", "http://images.cocodataset.org/zips/test2015.zip", count=81_434),
        Need(f"vqav2/{QUESTIONS}", VQA_SITE, optional=True),
        Need(f"vqav2/{ANNOTATIONS}", VQA_SITE, optional=True),
        Need("vqav2/val2014", "http://images.cocodataset.org/zips/val2014.zip", count=40_504, optional=True),
    ),
    mirror=MIRROR,
    licence="annotations CC BY 4.0; COCO's images under Flickr's terms",
    split_files={"val": f"vqav2/{ANNOTATIONS}", **{split: f"vqav2/{file}" for split, file in PROMPTS.items()}},
)
