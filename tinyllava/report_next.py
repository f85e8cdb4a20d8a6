"""Measure the fine-tuned LLaVA-NeXT on the large pictures and fill in its model card.

    python -m tinyllava.report_next --folder runs/next

Accuracy by family with all visual tokens; without the tiles; of the embedded model it was trained from, which sees the
whole picture in 192 x 192 pixels; and of a lookup that sees no picture.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from eval.answers.jsonl import read_json
from eval.config import DEFAULT_MODEL, ROOT
from eval.tables.page import insert, markdown
from llava.processing.clip_image import ImageProcessor, pad_to_square
from tinyllava.benchmark_next import draw_large
from tinyllava.language import QUESTION_LENGTH, prefix_ids
from tinyllava.longer import Visuals, forward
from tinyllava.packed import Asked, pack
from tinyllava.paint import Thing
from tinyllava.report import family_of
from tinyllava.scenes import SIDE
from tinyllava.text_only import TextOnly, training_questions
from tinyllava.tiles import PATCHES, arrange, crops, run_sources
from tinyllava.vision import patchify, vision_states
from tinyllava.vocabulary import ASSISTANT, PAD, SHORT_ANSWER, encode, ids

MODEL, DATA = ROOT / "assets" / "tinyllava_next", ROOT / "assets" / "eval_next"
LOOKUP_PICTURES = 3000
HARD = 20.0  # points above the text-only baseline below which a family is marked

Look = Callable[[np.ndarray], Visuals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    data = args.data / "gqa" / "data"
    records = read_json(data / "testdev_balanced_questions.json")
    after = LlavaNextForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    before = LlavaForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    tower = after.model.vision_tower  # the same in both
    columns = {
        "all tokens": credits(records, data, after, lambda image: tiled(image, tower)),
        "thumbnail only": credits(records, data, after, lambda image: one_crop(thumbnail(image), tower)),
        "embedded model": credits(records, data, before, lambda image: one_crop(padded(image), tower)),
        "text only": blind(records),
    }
    card = args.model / "README.md"
    insert(card, "families", family_table(records, columns))
    insert(card, "training", training_table(args.folder / "next.log.jsonl"))


class Drawn:
    """Training pictures for the lookup, of which only the things are needed."""

    def __len__(self) -> int:
        return LOOKUP_PICTURES

    def list_things(self, row: int) -> tuple[Thing, ...]:
        return draw_large("train", row, row % 2 == 1)[1]


def blind(records: dict) -> dict[str, float]:
    """The same for a lookup of the commonest answer to the same question about training pictures."""
    lookup = TextOnly(training_questions(Drawn(), LOOKUP_PICTURES))
    return {name: float(lookup.answer(family_of(r), r["question"]) == r["answer"]) for name, r in records.items()}


def credits(records: dict, data: Path, model: torch.nn.Module, look: Look) -> dict[str, float]:
    """1 for every question whose answer word the model puts first, 0 for the others."""
    parts = SimpleNamespace(
        language_model=model.model.language_model,
        projector=model.model.multi_modal_projector,
        newline=getattr(model.model, "image_newline", None),
    )
    tail, right = [ids()[SHORT_ANSWER], ids()[ASSISTANT]], {}
    by_picture = itertools.groupby(records.items(), key=lambda item: item[1]["imageId"])
    for image, group in tqdm(by_picture, desc="questions by picture"):
        names, asked = zip(*group, strict=True)
        lines = [Asked(family_of(r), encode(r["question"]), encode(r["answer"])[0]) for r in asked]
        questions = pack([lines], tail, QUESTION_LENGTH, ids()[PAD])
        with torch.inference_mode():
            picture = np.asarray(Image.open(data / "images" / f"{image}.jpg"))
            logits, _ = forward(parts, prefix_ids(), look(picture), questions)
        said = logits[0, :, 0].argmax(-1) == questions.answer[0]
        right |= dict(zip(names, said.float().tolist(), strict=True))
    return right


def tiled(image: np.ndarray, tower: torch.nn.Module) -> Visuals:
    """The whole run of a picture: thumbnail, tiles, newlines."""
    features = states(crops(image), tower).flatten(0, 1)
    sources = torch.from_numpy(run_sources(arrange((image.shape[1], image.shape[0]))))
    return run(features[sources.clamp(min=0)], sources < 0)


def one_crop(image: np.ndarray, tower: torch.nn.Module) -> Visuals:
    """The 576 tokens of [192, 192, 3] pixels."""
    return run(states(image[None], tower)[0], torch.zeros(PATCHES, dtype=torch.bool))


def states(images: np.ndarray, tower: torch.nn.Module) -> Tensor:
    return vision_states(SimpleNamespace(vision_model=tower), patchify(images), last=False)[0][:, 1:]


def run(features: Tensor, newline: Tensor) -> Visuals:
    count = len(features)
    everything = torch.ones(1, count, dtype=torch.bool)
    return Visuals(features[None], newline[None], torch.arange(count)[None], torch.tensor([count]), everything)


def thumbnail(image: np.ndarray) -> np.ndarray:
    return crops(image)[0]


def padded(image: np.ndarray) -> np.ndarray:
    """What a LLaVA-1.5 makes of the picture."""
    colour = ImageProcessor(SIDE, SIDE).padding_colour
    return np.asarray(pad_to_square(Image.fromarray(image), colour, SIDE))


def family_table(records: dict, columns: dict[str, dict[str, float]]) -> str:
    """Percent right by family; a family near its text-only baseline is marked hard."""

    def percents(names: list[str]) -> list[float]:
        return [100 * sum(column[name] for name in names) / len(names) for column in columns.values()]

    rows = []
    for family in sorted({family_of(r) for r in records.values()}):
        names = [name for name, record in records.items() if family_of(record) == family]
        values = percents(names)
        label = f"{family} (hard)" if values[0] - values[-1] < HARD else family
        rows.append([label, f"{len(names):,}", *(f"{value:.1f}" for value in values)])
    for kind in ("natural", "dense"):
        names = [name for name, record in records.items() if record["groups"]["global"] == kind]
        rows.append([f"*{kind} scenes*", f"{len(names):,}", *(f"{value:.1f}" for value in percents(names))])
    rows.append(["**all**", f"{len(records):,}", *(f"{value:.1f}" for value in percents(list(records)))])
    return markdown(["family", "questions", *columns], rows)


def training_table(log: Path) -> str:
    """Steps and what the log says at the end."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = lines[-1]
    row = [f"{last['step']:,}", f"{last['seconds'] / 60:.0f}", f"{last['loss']:.3f}", f"{100 * last['all']:.1f}"]
    return markdown(["steps", "minutes", "running loss at the end", "running accuracy at the end"], [row])


if __name__ == "__main__":
    main()
