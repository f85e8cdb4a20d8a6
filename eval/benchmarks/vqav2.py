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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, scored_by
from eval.benchmarks.hub import official_file, open_table, ungraded
from eval.benchmarks.llava_files import (
    EVAL_ZIP,
    SHORT,
    Answers,
    QuestionRecord,
    as_number,
    by_id,
    need_file,
    people_said,
    read_prompts,
    size,
    unique,
)
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Id, NotRequired, TypedDict, check_list
from eval.metrics import vqa
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
MIRROR_SPLITS = {"testdev": "testdev", "test": "test", "val": "validation"}

PROMPTS = {"testdev": "llava_vqav2_mscoco_test-dev2015.jsonl", "test": "llava_vqav2_mscoco_test2015.jsonl"}
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

PUBLISHED_SIZES = {"testdev": 107_394, "test": 447_793, "val": 214_354}
SERVER = "EvalAI challenge 830 (https://eval.ai/web/challenges/challenge-page/830)"
VQA_SITE = "https://visualqa.org/download.html"


class Official(QuestionRecord):
    """A question of the official file."""

    image_id: Id


class Annotation(TypedDict):
    """The answers to a question of the official file."""

    question_id: Id
    answers: Answers
    question_type: str
    answer_type: str
    multiple_choice_answer: NotRequired[str]


class MirrorRow(QuestionRecord):
    """A row of the mirror, of the splits that only a server can score."""

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
        table = open_table(data, MIRROR, None, MIRROR_SPLITS[split], source)
        records: Sequence[Record] = table.records(MirrorAnswered if split == "val" else MirrorRow)
        columns = ("question_id", "question", *(["answers"] if split == "val" else []))
        contents = table.contents(ask(records, table.row_images(), table.where), by_id(records), columns)
    elif split == "val":
        contents = read_val(official, title)
    else:
        # Nobody but the server knows the answers.
        prompts = (Question(str(p.id), p.question, p.suffix, (p.image,), "") for p in read_prompts(official))
        questions = unique(prompts, str(official))
        contents = Contents("official", questions, {}, Folder(folder / "test2015"), fingerprint([official]))
    names = [question.id for question in contents.questions]
    facts = {"size": size(len(names), PUBLISHED_SIZES[split])}
    # The result file that the official toolkit reads, or the upload with an entry for every test2015 question.
    ids, file = names, "predictions.json"
    if split == "val":
        answers = {name: people_said(record["answers"]) for name, record in contents.references.items()}
        kinds = {
            kind.replace("_", " "): {name: record[kind] for name, record in contents.references.items()}
            for kind in ("answer_type", "question_type")
            if all(kind in record for record in contents.references.values())
        }
        rule = vqa.lmms_vqa if profile == "lmms" else vqa.after_processor(vqa.vqa_eval)
        score, sample_score = scored_by(answers, rule, kinds)
    else:
        whole, file = folder / PROMPTS["test"], "answers_upload.json"
        ids = server_ids(whole, split, names)
        wish = f"; it wants every test2015 question, so put {whole.name} of {EVAL_ZIP} into {whole.parent} first"
        more = "" if split == "test" or is_file(whole) else wish
        score, sample_score = ungraded("accuracy", file, SERVER, more), None
        facts["submission"] = f"{len(ids):,} entries"

    def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
        answered = {name: vqa.process(text) for name, text in texts.items()}
        rows = answered if split == "val" else {name: answered.get(name, "") for name in ids}
        return {file: [{"question_id": as_number(name), "answer": answer} for name, answer in rows.items()]}

    options = {
        "max_new_tokens": 16 if profile == "lmms" else 128,  # LLaVA: model_vqa_loader.py's default
        # An upload answers the whole list, whichever split it is for.
        "accepts": frozenset(ids) - set(names),
        "normalise": vqa.process,
    }
    return contents.dataset(title, profile, score, sample_score, submission, facts, **options)


def read_val(path: Path, title: str) -> Contents[Record]:
    """The official questions of val with their answers and types."""
    annotations = need_file(path.with_name(ANNOTATIONS), title, VQA_SITE)
    answered_rows = check_list(annotations, Annotation, "annotations")
    answered = {row["question_id"]: row for row in answered_rows}
    if len(answered) < len(answered_rows):
        raise UserError(f"{annotations} answers {len(answered_rows) - len(answered):,} questions more than once.")
    asked = check_list(path, Official, "questions")
    if lost := [row["question_id"] for row in asked if row["question_id"] not in answered]:
        raise UserError(f"{annotations} has no answers to {len(lost):,} questions of {path}, such as {lost[0]}.")
    records = [{**answered[row["question_id"]], **row} for row in asked]
    images = [image_name(f"COCO_val2014_{str(row['image_id']).zfill(12)}.jpg", str(path)) for row in asked]
    folder, mark = Folder(path.parent / "val2014"), fingerprint([path, annotations])
    return Contents("official", ask(records, images, str(path)), by_id(records), folder, mark)


def ask(records: Sequence[Record], images: Sequence[str], where: str) -> tuple[Question, ...]:
    """Questions of the official file or the mirror, with the suffix that LLaVA and lmms-eval both use."""
    questions = []
    for record, image in zip(records, images, strict=True):
        name, about = str(record["question_id"]), str(record.get("image_id") or "")
        answer = str(record.get("multiple_choice_answer") or "")
        questions.append(Question(name, record["question"], SHORT, (image,), answer, about=about))
    return unique(questions, where)


def server_ids(whole: Path, split: str, ids: list[str]) -> list[str]:
    """Ids of the upload: every test2015 question where LLaVA's list is there, else those of the split."""
    if split == "test" or not is_file(whole):
        return ids
    wanted = [str(prompt.id) for prompt in read_prompts(whole)]
    if foreign := set(ids).difference(wanted):
        raise UserError(
            f"{len(foreign):,} VQAv2 {split} questions are not in {whole}, such as {min(foreign)}; "
            "the two files are not of one version."
        )
    return wanted


BENCHMARK = listed(
    "vqav2",
    load,
    ("testdev", "test", "val"),
    mirror=MIRROR,
    split_files={"val": f"vqav2/{ANNOTATIONS}", **{split: f"vqav2/{file}" for split, file in PROMPTS.items()}},
)
