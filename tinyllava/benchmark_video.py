"""Write the embedded video benchmark in the layout of Video-LLaVA's zero-shot sets (MSVD-QA, MSRVTT-QA).

    python -m tinyllava.benchmark_video --output assets/eval_video

`video_qa/{split}_q.json` holds video_name, question and question_id; `{split}_a.json` answer, question_id and, as type,
the family of the question; `videos/` the files.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyllava.video_file import encode_video
from tinyllava.video_questions import FAMILIES, VideoQuestion, ask_video
from tinyllava.video_scenes import Plan, draw_video, plan_video

# Name of the split -> first video and number of videos; validation lies behind what training watches.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for split, part in SPLITS.items():
        print(f"{split}: {write_split(args.output / 'video_qa', split, *part)} questions")
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
