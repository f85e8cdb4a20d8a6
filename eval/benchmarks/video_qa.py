"""Questions about videos in the layout of Video-LLaVA's zero-shot sets (MSVD-QA, MSRVTT-QA), read from DATA/video_qa.

    test_q.json   [{"video_name", "question", "question_id"}, ...], asked in this order
    test_a.json   [{"answer", "question_id", "type"}, ...], the same questions in any order; "type" is optional
    videos/       VIDEO_NAME.mp4, .avi, .mov, .mkv, .webm or .gif

The split `val` has the same names with `val` for `test`. Short answers are compared word for word. The papers' numbers
on the real sets are judged by GPT-3.5 instead and cannot be compared with these.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Need, Question, fingerprint
from eval.jsonl import read_json
from eval.metrics import Score, exact_match
from eval.pictures import Videos, image_name
from llava.errors import UserError

FORMATS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, the videos excepted."""
    folder = data / "video_qa"
    asked, answered = folder / f"{split}_q.json", folder / f"{split}_a.json"
    if not asked.is_file():
        raise UserError(f"No video questions at {asked}; --data should be the folder that holds video_qa/.")
    references = read_rows(answered, ("answer", "question_id"))
    answers = {str(row["question_id"]): str(row["answer"]) for row in references}
    types = {str(row["question_id"]): str(row["type"]) for row in references if "type" in row}
    videos = folder / "videos"
    questions: dict[str, Question] = {}
    for row in read_rows(asked, ("video_name", "question", "question_id")):
        name = str(row["question_id"])
        if name in questions:
            raise UserError(f"{asked} asks question {name} a second time.")
        if name not in answers:
            raise UserError(f"{asked} asks question {name}, which has no answer in {answered}.")
        video = find_video(videos, str(row["video_name"]), asked)
        questions[name] = Question(name, str(row["question"]), "", (video,), answers[name])

    def score(names: Sequence[str], texts: Mapping[str, str]) -> Score:
        return exact_match.score({name: answers[name] for name in names}, texts, types)

    sources = [asked, answered]
    return Dataset(
        f"video QA {split}", tuple(questions.values()), Videos(videos), fingerprint(sources), score, judge, submission
    )


def judge(question: Question, text: str) -> float:
    """1 if the text is the answer."""
    return exact_match.credit(text, question.answer)


def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Predictions by question, with the field names of Video-LLaVA's answer files."""
    return {"predictions.json": [{"id": name, "pred": text.strip()} for name, text in texts.items()]}


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects that all have `fields`."""
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} should be a list of questions and hold at least one.")
    for number, row in enumerate(rows, start=1):
        lost = [field for field in fields if not isinstance(row, dict) or row.get(field) in (None, "")]
        if lost:
            raise UserError(f"{path} entry {number} has no {' and no '.join(lost)}.")
    return rows


def find_video(videos: Path, stem: str, path: Path) -> str:
    """File name of a video, by the first format there is; .mp4 where there is none, for the check that names it."""
    found = (f"{stem}{suffix}" for suffix in FORMATS if (videos / f"{stem}{suffix}").is_file())
    name = image_name(f"{stem}{FORMATS[0]}", str(path))
    return next(found, name)


BENCHMARK = Benchmark(
    name="video_qa",
    summary="Questions about what happens in short videos; exact match with a one-word answer.",
    splits=("test", "val"),
    load=load,
    model="tinyllava_video",
    needs=(
        Need("video_qa/test_q.json", "made by `python -m tinyllava.benchmark_video`"),
        Need("video_qa/test_a.json", "made by `python -m tinyllava.benchmark_video`"),
        Need("video_qa/videos", "made by `python -m tinyllava.benchmark_video`"),
    ),
    licence="Apache-2.0, as this repository",
)
