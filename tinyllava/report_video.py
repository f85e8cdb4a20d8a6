"""Measure the fine-tuned Video-LLaVA on the small videos and fill in its model card.

    python -m tinyllava.report_video --folder runs/video

Accuracy by family with all eight frames; with one frame shown eight times; and of a lookup that sees no video.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import VideoLlavaForConditionalGeneration

from eval.answers.jsonl import read_json
from eval.config import ROOT
from eval.tables.page import insert, markdown
from llava.processing.video import read_video
from tinyllava.longer import Visuals, forward
from tinyllava.packed import Asked, pack
from tinyllava.report_next import HARD, run, training_table
from tinyllava.text_only import TextOnly
from tinyllava.video_batches import QUESTION_LENGTH
from tinyllava.video_corpus import encode_frames
from tinyllava.video_questions import FAMILIES, STATIC, ask_video
from tinyllava.video_scenes import SEEN, plan_video
from tinyllava.video_vocabulary import encode, ids, prefix_ids
from tinyllava.vocabulary import ASSISTANT, PAD

MODEL, DATA = ROOT / "assets" / "tinyllava_video", ROOT / "assets" / "eval_video"
LOOKUP_VIDEOS = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    folder = args.data / "video_qa"
    answers = {row["question_id"]: row for row in read_json(folder / "test_a.json")}
    records = [row | answers[row["question_id"]] for row in read_json(folder / "test_q.json")]
    model = VideoLlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    columns = {
        "eight frames": credits(records, folder / "videos", model, range(SEEN)),
        "first frame": credits(records, folder / "videos", model, [0] * SEEN),
        "last frame": credits(records, folder / "videos", model, [SEEN - 1] * SEEN),
        "text only": blind(records),
    }
    card = args.model / "README.md"
    insert(card, "families", family_table(records, columns))
    insert(card, "training", training_table(args.folder / "video.log.jsonl"))


def credits(records: list[dict], videos: Path, model: torch.nn.Module, shown: Sequence[int]) -> list[float]:
    """1 for every question whose answer word the model puts first, 0 for the others.

    Args:
        shown: which of the eight frames the model is given, in its eight places.
    """
    parts = SimpleNamespace(
        language_model=model.model.language_model, projector=model.model.multi_modal_projector, newline=None
    )
    right: list[float] = []
    for name, group in tqdm(itertools.groupby(records, key=lambda r: r["video_name"]), desc="questions by video"):
        lines = [Asked(r["type"], encode(r["question"]), encode(r["answer"])[0]) for r in group]
        questions = pack([lines], [ids()[ASSISTANT]], QUESTION_LENGTH, ids()[PAD])
        frames = [np.asarray(frame) for frame in read_video(videos / f"{name}.mp4", SEEN).frames]
        with torch.inference_mode():
            seen = look(np.stack([frames[number] for number in shown]), model.model.video_tower)
            logits, _ = forward(parts, prefix_ids(), seen, questions)
        right += (logits[0, :, 0].argmax(-1) == questions.answer[0]).float().tolist()
    return right


def look(frames: np.ndarray, tower: torch.nn.Module) -> Visuals:
    """[8, 128, 128, 3] uint8 -> the whole run, 257 tokens per frame."""
    features = encode_frames(frames, tower).flatten(0, 1)
    return run(features, torch.zeros(len(features), dtype=torch.bool))


def blind(records: list[dict]) -> list[float]:
    """The same for a lookup of the commonest answer to the same question in training videos."""
    rng, pairs = np.random.default_rng(0), []
    for row in range(LOOKUP_VIDEOS):
        plan = plan_video("train", row)
        found = (ask_video(plan, family, rng, tries=12) for family in FAMILIES)
        pairs += [(q.family, q.text, q.answer) for q in found if q is not None]
    lookup = TextOnly(pairs)
    return [float(lookup.answer(r["type"], r["question"]) == r["answer"]) for r in records]


def family_table(records: list[dict], columns: dict[str, list[float]]) -> str:
    """Percent right by family; a family near its text-only baseline is marked hard."""

    def percents(rows: list[int]) -> list[float]:
        return [100 * sum(column[row] for row in rows) / len(rows) for column in columns.values()]

    lines = []
    for family in FAMILIES:
        rows = [row for row, record in enumerate(records) if record["type"] == family]
        values = percents(rows)
        label = f"{family} (hard)" if values[0] - values[-1] < HARD else family
        lines.append([label, f"{len(rows):,}", *(f"{value:.1f}" for value in values)])
    over_time = [row for row, record in enumerate(records) if record["type"] not in STATIC]
    everything = list(range(len(records)))
    for label, rows in (("*asking for change*", over_time), ("**all**", everything)):
        lines.append([label, f"{len(rows):,}", *(f"{value:.1f}" for value in percents(rows))])
    return markdown(["family", "questions", *columns], lines)


if __name__ == "__main__":
    main()
