"""Questions about videos in the layout of Video-LLaVA's zero-shot sets (MSVD-QA, MSRVTT-QA), read from DATA/video_qa.

    test_q.json   [{"video_name", "question", "question_id"}, ...], asked in this order
    test_a.json   [{"answer", "question_id", "type"}, ...], the same questions in any order; "type" is optional
    videos/       VIDEO_NAME.mp4, .avi, .mov, .mkv, .webm or .gif

The split `val` has the same names with `val` for `test`. Short answers are compared word for word. The papers' numbers
on the real sets are judged by GPT-3.5 instead and cannot be compared with these.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.media import Videos, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.metrics import Score, exact_match
from llava.errors import UserError

FORMATS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


class Asked(TypedDict):
    """An entry of test_q.json."""

    video_name: Id
    question: Filled
    question_id: Id


class Answered(TypedDict):
    """An entry of test_a.json."""

    question_id: Id
    answer: Filled
    type: NotRequired[Id | None]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, the videos excepted."""
    folder = data / "video_qa"
    asked, answered = folder / f"{split}_q.json", folder / f"{split}_a.json"
    if not is_file(asked):
        raise UserError(f"No video questions at {asked}; --data should be the folder that holds video_qa/.")
    references = check_list(answered, Answered)
    answers = {str(row["question_id"]): row["answer"] for row in references}
    if len(answers) < len(references):
        raise UserError(f"{answered} answers {len(references) - len(answers):,} questions more than once.")
    types = {str(row["question_id"]): str(row["type"]) for row in references if row.get("type") is not None}
    videos = folder / "videos"
    questions: dict[str, Question] = {}
    for row in check_list(asked, Asked):
        name = str(row["question_id"])
        if name in questions:
            raise UserError(f"{asked} asks question {name} a second time.")
        if name not in answers:
            raise UserError(f"{asked} asks question {name}, which has no answer in {answered}.")
        video = find_video(videos, str(row["video_name"]), asked)
        questions[name] = Question(name, row["question"], "", (video,), answers[name])

    def score(names: Sequence[str], texts: Mapping[str, str]) -> Score:
        return exact_match.score({name: answers[name] for name in names}, texts, types)

    sources = [asked, answered]
    return Dataset(
        f"video QA {split}",
        tuple(questions.values()),
        Videos(videos),
        fingerprint(sources),
        score,
        sample_score,
        submission,
    )


def sample_score(question: Question, text: str) -> float:
    """1 if the text is the answer."""
    return exact_match.sample_score(text, question.answer)


def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Predictions by question, with the field names of Video-LLaVA's answer files."""
    return {"predictions.json": [{"id": name, "pred": text.strip()} for name, text in texts.items()]}


def find_video(videos: Path, stem: str, path: Path) -> str:
    """File name of a video, by the first format there is; .mp4 where there is none, for the check that names it."""
    name = image_name(f"{stem}{FORMATS[0]}", str(path))
    found = (f"{stem}{suffix}" for suffix in FORMATS if (videos / f"{stem}{suffix}").is_file())
    return next(found, name)


BENCHMARK = Benchmark(
    name="video_qa",
    summary="Questions about what happens in short videos; exact match with a one-word answer.",
    splits=("test", "val"),
    read=load,
    model="tinyllava_video",
    needs=(
        Need("video_qa/test_q.json", "made by `python -m toy.benchmarks --only video_qa`"),
        Need("video_qa/test_a.json", "made by `python -m toy.benchmarks --only video_qa`"),
        Need("video_qa/videos", "made by `python -m toy.benchmarks --only video_qa`"),
    ),
    licence="Apache-2.0, as this repository",
)
