"""The four zero-shot video sets of Video-LLaVA's layout, from the questions of the toy video benchmark.

Every set asks about other videos of assets/eval_video/video_qa. Types are those of the official files: the tasks of
TGIF-QA, the question word for MSVD and MSRVTT, a number for ActivityNet-QA.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toy.benchmarks.files import fresh, link, write_json

ROOT_NAME = "GPT_Zero_Shot_QA"
SETS = ("TGIF", "MSVD", "MSRVTT", "Activitynet")
# Where the official scripts look for videos.
FOLDERS = {"TGIF": "mp4", "MSVD": "videos", "MSRVTT": "videos/all", "Activitynet": "all_test"}
PREFIX = "v_"  # of ActivityNet's files
VIDEOS = 40  # of every set but the last, whose videos are linked one by one
ACTIVITYNET_VIDEOS = 8

# Sets whose types are question words, and the words that they and our questions share.
WORDED = ("MSVD", "MSRVTT")
WORDS = ("what", "how", "where")

TGIF_TYPES = {
    "color": "frame",
    "exist": "frame",
    "times": "count",
    "count": "count",
    "appear": "action",
    "mover": "action",
    "move": "action",
    "direction": "action",
    "order": "transition",
    "change": "transition",
}
# ActivityNet-QA: 0 motion, 2 temporal relationship, 3 yes or no, 4 colour, 5 object, 6 location, 7 number.
ACTIVITYNET_TYPES = {"move": 3, "exist": 3, "color": 4, "appear": 5, "direction": 6, "count": 7, "times": 7}
ACTIVITYNET_TYPES |= {"mover": 0, "order": 2, "change": 2}


def write(root: Path, source: Path) -> None:
    """Everything below ROOT/GPT_Zero_Shot_QA; `source` is assets/eval_video/video_qa."""
    asked = json.loads((source / "test_q.json").read_text())
    answers = {row["question_id"]: row for row in json.loads((source / "test_a.json").read_text())}
    videos = list(dict.fromkeys(row["video_name"] for row in asked))
    base = fresh(root / ROOT_NAME)
    for place, name in enumerate(SETS):
        count = ACTIVITYNET_VIDEOS if name == "Activitynet" else VIDEOS
        own = set(videos[VIDEOS * place : VIDEOS * place + count])
        rows = [(row, answers[row["question_id"]]) for row in asked if row["video_name"] in own]
        if name in WORDED:
            rows = [pair for pair in rows if _first_word(*_texts(pair)) in WORDS]
        write_set(base / f"{name}_Zero_Shot_QA", name, rows)
        folder = base / f"{name}_Zero_Shot_QA" / FOLDERS[name]
        if name != "Activitynet":
            link(folder, source / "videos")
            continue
        for video in sorted(own):
            link(folder / f"{PREFIX}{video}.mp4", source / "videos" / f"{video}.mp4")


Pair = tuple[dict[str, Any], dict[str, Any]]


def write_set(folder: Path, name: str, rows: list[Pair]) -> None:
    """Questions and answers of a set, in the same order."""
    asked: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for question, answer in rows:
        video, kind = question["video_name"], TYPES[name](*_texts((question, answer)))
        identity: str | int = len(asked)
        if name == "Activitynet":
            identity = f"{PREFIX}{video}_{sum(row['video_name'] == video for row in asked) + 1}"
        asked.append({"video_name": video, "question": question["question"], "question_id": identity})
        answers.append({"answer": answer["answer"], "type": kind, "question_id": identity})
    write_json(folder / "test_q.json", asked)
    write_json(folder / "test_a.json", answers)


def _texts(pair: Pair) -> tuple[str, str]:
    """Text and family of a question."""
    return pair[0]["question"], pair[1]["type"]


def _first_word(question: str, family: str) -> str:
    return question.split()[0].lower()


TYPES: dict[str, Callable[[str, str], str | int]] = {
    "TGIF": lambda question, family: TGIF_TYPES[family],
    "MSVD": _first_word,
    "MSRVTT": _first_word,
    "Activitynet": lambda question, family: ACTIVITYNET_TYPES[family],
}
