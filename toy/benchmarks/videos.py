"""The toy video benchmark, and the four zero-shot video sets with its questions, in Video-LLaVA's layouts.

`video_qa/{split}_q.json` holds video_name, question and question_id; `{split}_a.json` answer, question_id and, as type,
the family of the question; `videos/` the files. Every zero-shot set asks about other videos of it. Types are those of
the official files: the tasks of TGIF-QA, the question word for MSVD and MSRVTT, a number for ActivityNet-QA.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from toy.benchmarks.files import fresh, link, write_json
from toy.data.questions import PlainQuestion
from toy.data.videos import FAMILIES, Plan, ask_video, draw_video, encode_video, plan_video

# Name of the split -> first video and number of videos; validation comes after what training watches.
SPLITS = {"test": (0, 200), "val": (1000, 60)}


def video_questions(split: str, index: int, plan: Plan) -> list[PlainQuestion]:
    """At most one question of each family, no text twice."""
    rng = np.random.default_rng([index, {"test": 1, "val": 2}[split], 3])
    by_text: dict[str, PlainQuestion] = {}
    for family in FAMILIES:
        question = ask_video(plan, family, rng)
        if question is not None:
            by_text.setdefault(question.text, question)
    return list(by_text.values())


def write_video_qa(root: Path) -> None:
    """Everything below ROOT/video_qa."""
    root /= "video_qa"
    videos = root / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    for split, (first, count) in SPLITS.items():
        asked, answers = [], []
        for index in tqdm(range(first, first + count), desc=f"video {split}"):
            plan, name = plan_video(split, index), f"{split}{index:05d}"
            (videos / f"{name}.mp4").write_bytes(encode_video(draw_video(plan)[0]))
            for question in video_questions(split, index, plan):
                identity = f"{split}_{len(asked)}"
                asked.append({"video_name": name, "question": question.text, "question_id": identity})
                answers.append({"answer": question.answer, "question_id": identity, "type": question.family})
        for letter, rows in (("q", asked), ("a", answers)):
            (root / f"{split}_{letter}.json").write_text(json.dumps(rows, indent=0) + "\n")


# The zero-shot sets.

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


def type_of(name: str, question: str, family: str) -> str | int:
    """The official type of a question of a set."""
    if name in WORDED:
        return question.split()[0].lower()
    return (TGIF_TYPES if name == "TGIF" else ACTIVITYNET_TYPES)[family]


def write_zero_shot_sets(root: Path, source: Path) -> None:
    """Everything below ROOT/GPT_Zero_Shot_QA; `source` is assets/eval_video/video_qa."""
    told = {row["question_id"]: row for row in json.loads((source / "test_a.json").read_text())}
    rows = [(row, told[row["question_id"]]) for row in json.loads((source / "test_q.json").read_text())]
    videos = list(dict.fromkeys(question["video_name"] for question, _ in rows))
    base = fresh(root / ROOT_NAME)
    for place, name in enumerate(SETS):
        count = ACTIVITYNET_VIDEOS if name == "Activitynet" else VIDEOS
        own = videos[VIDEOS * place : VIDEOS * place + count]
        asked: list[dict[str, Any]] = []
        answers: list[dict[str, Any]] = []
        for question, answer in rows:
            video = question["video_name"]
            if video not in own:
                continue
            kind = type_of(name, question["question"], answer["type"])
            if name in WORDED and kind not in WORDS:
                continue
            identity: str | int = len(asked)
            if name == "Activitynet":
                identity = f"{PREFIX}{video}_{sum(row['video_name'] == video for row in asked) + 1}"
            asked.append({"video_name": video, "question": question["question"], "question_id": identity})
            answers.append({"answer": answer["answer"], "type": kind, "question_id": identity})
        folder = base / f"{name}_Zero_Shot_QA"
        write_json(folder / "test_q.json", asked)
        write_json(folder / "test_a.json", answers)
        if name != "Activitynet":
            link(folder / FOLDERS[name], source / "videos")
            continue
        for video in own:
            link(folder / FOLDERS[name] / f"{PREFIX}{video}.mp4", source / "videos" / f"{video}.mp4")
