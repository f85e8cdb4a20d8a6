"""MM-Vet, read from DATA/mm-vet (LLaVA's scripts) or DATA/mmvet (LLaVA's documentation), or from lmms-eval's mirror.

    mm-vet.json            official questions: "v1_0" -> imagename, question, answer, capability
    llava-mm-vet.jsonl     LLaVA's question file, optional: question_id, image, text
    images/

Answers are judged, see eval/judging/. In both profiles the judge is asked as MM-Vet's own script asks it; lmms-eval
words the head of its table a little differently and allows longer replies.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Need, Question, fingerprint
from eval.hub import open_table
from eval.jsonl import read_json, read_jsonl
from eval.judging import Judging, Request, Verdict, prompts
from eval.judging.choice import unjudged
from eval.metrics import Score, mmvet
from eval.pictures import Folder, Pictures, image_name
from eval.sources import official_file
from llava.errors import UserError

FOLDERS = ("mm-vet", "mmvet")
MIRROR = ("lmms-lab-encoder/MMVet", "lmms-lab/MMVet")
FIELDS = ("imagename", "question", "answer", "capability")
COLUMNS = ("question_id", "question", "answer", "capability")
COUNT = 218
SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

# lmms-eval asks so. It stands before the question, where a prompt has no part of its own for it.
STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
# model_vqa.py's generate call, and lmms-eval's mmvet.yaml.
MAX_NEW_TOKENS = 1024

Records = dict[str, dict[str, Any]]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The 218 questions."""
    official = official_file(data, source, "MM-Vet", [data / name / "mm-vet.json" for name in FOLDERS], MIRROR)
    if official is None:
        records, pictures, hashed, where = read_mirror(data, download=source == "mirror")
    else:
        records, hashed = read_official(official)
        pictures, where = Folder(official.parent / "images"), "official"
    questions = {name: question(name, record, profile) for name, record in records.items()}
    judging = judge_with(records, questions)
    facts = {
        "source": where,
        "profile": profile,
        "questions": len(records),
        "official judge": judging.official,
        **({} if len(records) == COUNT else {"size": f"{len(records):,} questions, the published set has {COUNT}"}),
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


def question(name: str, record: Mapping[str, Any], profile: str) -> Question:
    """As the profile asks it. LLaVA's files number questions, MM-Vet's name them "v1_" and that number."""
    text = record["text"] if profile == "llava" else STEP_BY_STEP + record["question"]
    return Question(name, text, "", (record["imagename"],), record["answer"], name.removeprefix("v1_"))


def submission(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The input of MM-Vet's evaluator, as LLaVA's convert_mmvet_for_eval.py writes it."""
    return {"mmvet_results.json": dict(texts)}


def read_official(official: Path) -> tuple[Records, str]:
    """Records in the order of LLaVA's file, or of the official one, and the hash of what was read."""
    prompts_file = official.with_name("llava-mm-vet.jsonl")
    content = read_json(official)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{official} should map question ids to questions and hold at least one.")
    records = {name: checked(name, record, official) for name, record in content.items()}
    if not prompts_file.is_file():
        return records, fingerprint([official])
    ordered: Records = {}
    for number, row in read_jsonl(prompts_file):
        name, where = f"v1_{row.get('question_id')}", f"{prompts_file} line {number}"
        if name not in records:
            raise UserError(f"{where} asks question {row.get('question_id')}, which is not in {official}.")
        image = image_name(str(row.get("image", "")), where)
        ordered[name] = records[name] | {"text": str(row.get("text", "")), "imagename": image}
    if lost := [name for name in records if name not in ordered]:
        raise UserError(f"{prompts_file} lacks {len(lost):,} of the questions in {official}, the first is {lost[0]}.")
    return ordered, fingerprint([prompts_file, official])


def checked(name: str, record: Any, path: Path) -> dict[str, Any]:
    """A record with all its fields."""
    lost = [field for field in FIELDS if not isinstance(record, dict) or field not in record]
    if lost:
        raise UserError(f"Question {name} in {path} has no {', '.join(lost)}.")
    image = image_name(str(record["imagename"]), f"{path}, question {name},")
    return {**record, "imagename": image, "text": str(record["question"])}


def read_mirror(data: Path, download: bool) -> tuple[Records, Pictures, str, str]:
    """Records, pictures, hash and place of the table."""
    table = open_table(data, MIRROR, None, "test", download)
    records: Records = {}
    for number, row in enumerate(table.records(COLUMNS)):
        needed = row["capability"]
        needed = needed.split(",") if isinstance(needed, str) else list(needed)
        name = str(row["question_id"])
        records[name if name.startswith("v1_") else f"v1_{name}"] = {
            "imagename": f"{number}/image",
            "question": str(row["question"]),
            "text": str(row["question"]),
            "answer": str(row["answer"]),
            "capability": [word.strip() for word in needed],
        }
    return records, table.pictures(), table.fingerprint(COLUMNS), table.where


def judge_with(records: Records, questions: Mapping[str, Question]) -> Judging:
    """How MM-Vet's script uses its judge."""
    official = prompts()["mm_vet"]

    def needed(asked: Sequence[str]) -> dict[str, list[str]]:
        return {name: list(records[name]["capability"]) for name in asked}

    def request(name: str, text: str) -> Request:
        record = records[name]
        truth = str(record["answer"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = " | ".join([str(record["question"]), truth, text, ""])
        content = f"{official['few_shot_prompt']}\n{row}"
        return Request(name, ({"role": "user", "content": content},), 0.0, official["max_tokens"])

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return mmvet.match_score(needed(asked), {name: questions[name].answer for name in asked}, texts)

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
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} should be a grade file of mm-vet_evaluator.py, which maps question ids to scores.")
    for name, grade in content.items():
        scores = grade.get("score") if isinstance(grade, dict) else None
        if not isinstance(scores, list) or not scores or not all(isinstance(score, int | float) for score in scores):
            raise UserError(f"{path} entry {name} should have a list of scores, one for each run of the judge.")
    return content


BENCHMARK = Benchmark(
    name="mmvet",
    summary="Open questions that need several capabilities at once; judged by GPT-4.",
    splits=("test",),
    load=load,
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
