"""The sets that the toy models are trained for, toy GQA and toy video QA, and the zero-shot video sets made of it.

GQA's official files, for the scenes of the toy model and for the large pictures of the toy LLaVA-NeXT:
`gqa/llava_gqa_{split}_balanced.jsonl` (LLaVA's question file), `gqa/data/{split}_balanced_questions.json` (GQA's
annotations), `gqa/data/images/`. The family of a question is its `types.detailed`, and whether its scene is natural or
dense its `groups.global`.

Video-LLaVA's layouts: `video_qa/{split}_q.json` holds video_name, question and question_id; `{split}_a.json` answer,
question_id and, as type, the family of the question; `videos/` the files. Every zero-shot set asks about other videos
of it. Types are those of the official files: the tasks of TGIF-QA, the question word for MSVD and MSRVTT, a number for
ActivityNet-QA.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lab.toy.benchmarks import NAMES, fresh, link, prompt, write_file, write_json
from lab.toy.data.questions import FAMILIES, PlainQuestion, Question, ask
from lab.toy.data.scenes import Scene, centred, scene
from lab.toy.data.videos import FAMILIES as VIDEO_FAMILIES
from lab.toy.data.videos import Plan, ask_video, draw_video, encode_video, plan_video
from lab.toy.data.vocabulary import SHORT_ANSWER

PART = {"test": 1, "val": 2}  # in the seeds of the questions


def distinct(questions: Iterable[PlainQuestion | None]) -> list[Any]:
    """The questions that there are, no text twice."""
    by_text: dict[str, PlainQuestion] = {}
    for question in questions:
        if question is not None:
            by_text.setdefault(question.text, question)
    return list(by_text.values())


# GQA.

# GQA's split name -> our seed range, first scene of each kind, scenes of each kind. The validation scenes come after
# those that training watches.
SPLITS = {"testdev": ("test", 0, 150), "val": ("val", 1000, 75)}
LARGE_SPLITS = {"testdev": ("test", 0, 75), "val": ("val", 1000, 30)}


def annotation(question: Question, identity: str, image: str, dense: bool) -> dict:
    """One entry of GQA's questions file."""
    program = [
        {"operation": operation, "dependencies": [step - 1] if step else [], "argument": argument}
        for step, (operation, argument) in enumerate(question.program)
    ]
    return {
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": question.answer,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "dense" if dense else "natural", "local": question.family},
        "entailed": [],
        "equivalent": [identity],
        "types": {"structural": question.structural, "semantic": question.semantic, "detailed": question.family},
        "semantic": program,
        "semanticStr": "->".join(f"{operation}: {argument}" for operation, argument in question.program),
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }


Splits = dict[str, tuple[str, int, int]]
Draw = Callable[[str, int, bool], Scene]


def write_gqa(root: Path, splits: Splits = SPLITS, draw: Draw = scene) -> None:
    """Everything below ROOT/gqa, with the splits of a toy GQA and what draws its pictures."""
    root = root / "gqa"
    for name, (split, first, count) in splits.items():
        annotations, lines = {}, []
        for row in tqdm(range(2 * count), desc=f"gqa {name}"):
            index, dense = first + row // 2, row % 2 == 1
            drawn = draw(split, index, dense)
            things = centred(drawn.things, *drawn.image.shape[1::-1])
            image = f"{split}{index:05d}{'d' if dense else 'n'}"
            write_file(root / "data" / "images" / f"{image}.jpg", drawn.jpeg)
            rng = np.random.default_rng([index, dense, PART[split]])
            for question in distinct(ask(things, family, rng) for family in FAMILIES):
                identity = f"{2 if split == 'test' else 1}{len(lines):07d}"
                annotations[identity] = annotation(question, identity, image, dense)
                lines.append(prompt(identity, f"{image}.jpg", f"{question.text}\n{SHORT_ANSWER}"))
        write_json(root / "data" / f"{name}_balanced_questions.json", annotations)
        write_file(root / f"llava_gqa_{name}_balanced.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# Videos.

# Name of the split -> first video and number of videos; validation comes after what training watches.
VIDEO_SPLITS = {"test": (0, 200), "val": (1000, 60)}


def video_questions(split: str, index: int, plan: Plan) -> list[PlainQuestion]:
    """At most one question of each family."""
    rng = np.random.default_rng([index, PART[split], 3])
    return distinct(ask_video(plan, family, rng) for family in VIDEO_FAMILIES)


def write_video_qa(root: Path) -> None:
    """Everything below ROOT/video_qa."""
    home = root / "video_qa"
    for split, (first, count) in VIDEO_SPLITS.items():
        asked, answers = [], []
        for index in tqdm(range(first, first + count), desc=f"video {split}"):
            plan, name = plan_video(split, index), f"{split}{index:05d}"
            write_file(home / "videos" / f"{name}.mp4", encode_video(draw_video(plan)[0]))
            for question in video_questions(split, index, plan):
                identity = f"{split}_{len(asked)}"
                asked.append({"video_name": name, "question": question.text, "question_id": identity})
                answers.append({"answer": question.answer, "question_id": identity, "type": question.family})
        for letter, rows in (("q", asked), ("a", answers)):
            write_file(home / f"{split}_{letter}.json", json.dumps(rows, indent=0) + "\n")


# The zero-shot sets.

ROOT_NAME = "GPT_Zero_Shot_QA"
# Set -> where the official scripts look for videos.
SETS = {"TGIF": "mp4", "MSVD": "videos", "MSRVTT": "videos/all", "Activitynet": "all_test"}
PREFIX = "v_"  # of ActivityNet's files
VIDEOS = 40  # of every set but the last, whose videos are linked one by one
ACTIVITYNET_VIDEOS = 8
# Sets whose types are question words, and the words that they and our questions share.
WORDED = ("MSVD", "MSRVTT")
WORDS = ("what", "how", "where")


def write_zero_shot_sets(root: Path, source: Path) -> None:
    """Everything below ROOT/GPT_Zero_Shot_QA; `source` is assets/eval_video/video_qa."""
    told = {row["question_id"]: row for row in json.loads((source / "test_a.json").read_text())}
    rows = [(row, told[row["question_id"]]) for row in json.loads((source / "test_q.json").read_text())]
    videos = list(dict.fromkeys(question["video_name"] for question, _ in rows))
    base = fresh(root / ROOT_NAME)
    for place, (name, subfolder) in enumerate(SETS.items()):
        numbered = name == "Activitynet"
        own = videos[VIDEOS * place :][: ACTIVITYNET_VIDEOS if numbered else VIDEOS]
        asked: list[dict[str, Any]] = []
        answers: list[dict[str, Any]] = []
        for question, answer in rows:
            text, video = question["question"], question["video_name"]
            kind = text.split()[0].lower() if name in WORDED else NAMES[name.lower()][answer["type"]]
            if video not in own or (name in WORDED and kind not in WORDS):
                continue
            identity: str | int = len(asked)
            if numbered:
                identity = f"{PREFIX}{video}_{sum(row['video_name'] == video for row in asked) + 1}"
            asked.append({"video_name": video, "question": text, "question_id": identity})
            answers.append({"answer": answer["answer"], "type": kind, "question_id": identity})
        folder = base / f"{name}_Zero_Shot_QA"
        write_json(folder / "test_q.json", asked)
        write_json(folder / "test_a.json", answers)
        if not numbered:
            link(folder / subfolder, source / "videos")
        for video in own if numbered else ():
            link(folder / subfolder / f"{PREFIX}{video}.mp4", source / "videos" / f"{video}.mp4")
