"""Measure the model of all answer formats on validation scenes and fill in its model card.

    python -m tinyllava.report_instruct --folder runs/instruct

By format: share of exchanges whose whole answer is right, with all visual tokens and with none. By question family: the
embedded GQA test set, beside the embedded model, to see what the new formats cost the old one.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.answers.jsonl import read_json
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.sweep import Remembering, Setting, sweep
from eval.tables.page import insert, markdown
from llava.model.builder import load
from tinyllava.corpus import Corpus
from tinyllava.formats import FORMATS, WITHOUT_IMAGE
from tinyllava.instruct_batches import Lines, ask_lines, forward, right_answers
from tinyllava.instruct_model import as_clip
from tinyllava.language import PATCHES
from tinyllava.report import family_of
from tinyllava.vision import patchify, vision_states

MODEL = ROOT / "assets" / "tinyllava_instruct"
FIRST, SCENES, AT_ONCE = 100, 300, 10  # validation scenes behind those that training watches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep", help="where answers are kept")
    args = parser.parse_args()
    card = args.model / "README.md"
    insert(card, "training", training_table(args.folder))
    insert(card, "formats", format_table(*format_credits(args.model, Corpus(args.folder / "val"))))
    insert(card, "families", family_table(*(gqa_credits(m, args.output) for m in (args.model, Path(DEFAULT_MODEL)))))


def gqa_credits(folder: Path, output: Path) -> dict[str, float]:
    """Credit of each question of the embedded GQA test set; a model's answers are kept in a folder of its own."""
    model = Remembering(load(str(folder)))
    return sweep([Setting("full", None)], model, DEFAULT_DATA, "testdev", output / folder.name)[0]


class Parts:
    """The trained halves of a loaded checkpoint, named as in training."""

    def __init__(self, llava: torch.nn.Module):
        self.language_model, self.projector = (
            llava.model.language_model,
            llava.model.multi_modal_projector,
        )


@torch.inference_mode()
def format_credits(folder: Path, scenes: Corpus) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """Right or wrong by format, with the whole picture and without any; the scenes' exchanges are the same."""
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    clip, parts, rng = as_clip(llava.model.vision_tower), Parts(llava), np.random.default_rng(7)
    seen: dict[str, list[bool]] = defaultdict(list)
    blind: dict[str, list[bool]] = defaultdict(list)
    for start in tqdm(range(FIRST, FIRST + SCENES, AT_ONCE), desc="formats"):
        rows = np.arange(start, start + AT_ONCE)
        lines = ask_lines(scenes, rows, [list(FORMATS)] * AT_ONCE, rng)
        features = vision_states(clip, patchify(scenes.images[rows]), last=False)[0][:, 1:]
        kept = torch.arange(PATCHES).expand(AT_ONCE, -1)
        collect(seen, forward(parts, features, kept, lines)[0], lines)
        collect(blind, forward(parts, features[:, :0], kept[:, :0], lines, True)[0], lines)
    return seen, blind


def collect(credits: dict[str, list[bool]], logits: torch.Tensor, lines: Lines) -> None:
    for name, right in right_answers(logits, lines):
        credits[name].append(right)


def format_table(seen: dict[str, list[bool]], blind: dict[str, list[bool]]) -> str:
    """Accuracy by format; none without a picture where there never is one."""
    rows = []
    for name in FORMATS:
        without = "-" if name in WITHOUT_IMAGE else f"{100 * np.mean(blind[name]):.1f}"
        rows.append([name, f"{len(seen[name]):,}", f"{100 * np.mean(seen[name]):.1f}", without])
    return markdown(["format", "exchanges", "576 tokens", "no picture"], rows)


def family_table(new: dict[str, float], old: dict[str, float]) -> str:
    """Accuracy on the embedded GQA test set by family, of this model and of the one it was trained from."""
    records = read_json(DEFAULT_DATA / "gqa" / "data" / "testdev_balanced_questions.json")
    groups = defaultdict(list)
    for name, record in records.items():
        groups[family_of(record)].append(name)
    groups["**all**"] = list(records)
    rows = [
        [family, f"{len(names):,}", *(f"{100 * np.mean([credits[n] for n in names]):.1f}" for credits in (new, old))]
        for family, names in groups.items()
    ]
    return markdown(["family", "questions", "this model", "embedded model"], rows)


def training_table(folder: Path) -> str:
    """Steps and wall time, as the log has them."""
    last = json.loads((folder / "instruct.log.jsonl").read_text().splitlines()[-1])
    row = [f"{last['step']:,}", f"{last['seconds'] / 60:.0f}", f"{last['loss']:.3f}", f"{100 * last['all']:.1f}"]
    return markdown(["steps", "minutes", "running loss at the end", "running accuracy at the end"], [row])


if __name__ == "__main__":
    main()
