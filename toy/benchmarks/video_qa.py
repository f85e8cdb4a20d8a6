"""The toy video benchmark in the layout of Video-LLaVA's zero-shot sets (MSVD-QA, MSRVTT-QA).

`video_qa/{split}_q.json` holds video_name, question and question_id; `{split}_a.json` answer, question_id and, as type,
the family of the question; `videos/` the files.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toy.data.video_questions import FAMILIES, VideoQuestion, ask_video
from toy.data.video_scenes import Plan, draw_video, encode_video, plan_video

# Name of the split -> first video and number of videos; validation comes after what training watches.
SPLITS = {"test": (0, 200), "val": (1000, 60)}


def video_questions(split: str, index: int, plan: Plan) -> list[VideoQuestion]:
    """At most one question of each family, no text twice."""
    rng = np.random.default_rng([index, {"test": 1, "val": 2}[split], 3])
    found: dict[str, VideoQuestion] = {}
    for family in FAMILIES:
        question = ask_video(plan, family, rng)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def write(root: Path) -> None:
    """Everything below ROOT/video_qa."""
    for split, part in SPLITS.items():
        write_split(root / "video_qa", split, *part)


def write_split(root: Path, split: str, first: int, count: int) -> int:
    """Write one split; returns the number of its questions."""
    videos = root / "videos"
    videos.mkdir(parents=True, exist_ok=True)
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
    return len(asked)
