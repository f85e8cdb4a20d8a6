"""Measure the toy model of a stage on the toy benchmarks and fill in its model card.

    python -m toy.report language --folder runs/tiny
    python -m toy.report next --folder runs/next

Accuracy by question family with all visual tokens, beside references: a lookup that sees no image (the text-only
baseline), and for tiles and frames the same model with less to see. For `instruct` also accuracy by answer format.
The tables are printed, and replace those of README.md in the model's folder where there is one.
"""

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    VideoLlavaForConditionalGeneration,
)

from eval.answers.jsonl import read_json
from eval.command import exit_on_user_error
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.sweep import CachingLlava, Setting, sweep
from eval.tables.page import insert, markdown
from llava.model.builder import load
from llava.processing.image import ImageProcessor, pad_to_square
from llava.processing.video import read_video
from toy.benchmarks.gqa import draw_large
from toy.data.corpus import Corpus, arrange, crops, run_sources, tower_states
from toy.data.formats import FORMATS, INSTRUCT_WORDS, WITHOUT_IMAGE
from toy.data.questions import FAMILIES, PlainQuestion, ask
from toy.data.scenes import SIDE
from toy.data.videos import FAMILIES as VIDEO_FAMILIES
from toy.data.videos import SEEN, STATIC, ask_video, plan_video
from toy.data.vocabulary import ASSISTANT, SHORT_ANSWER, TOY_WORDS, VIDEO_WORDS, Vocabulary
from toy.llava import Trainee
from toy.packing import (
    READ_AT,
    Visuals,
    answer_logits,
    ask_lines,
    forward,
    pack,
    predictions,
    right_answers,
    whole,
)
from toy.stages import QUESTION_LENGTH
from toy.stages.video import QUESTION_LENGTH as VIDEO_QUESTION_LENGTH

HARD = 20.0  # points above the text-only baseline below which a family is marked
# Validation scenes of the formats, after those that training watches.
FIRST, SCENES, AT_ONCE = 100, 300, 10
# Training scenes, pictures and videos whose questions the text-only baseline counts.
COUNTED = {"language": 6000, "next": 3000, "video": 6000}
MODELS = {
    "language": Path(DEFAULT_MODEL),
    "next": ROOT / "assets" / "tinyllava_next",
    "video": ROOT / "assets" / "tinyllava_video",
    "instruct": ROOT / "assets" / "tinyllava_instruct",
}

Credits = Mapping[str, float]  # question id -> 1 where the answer is right, else 0
Tables = dict[str, str]  # name of a marked part of the model card -> its table


def report_language(args: argparse.Namespace) -> Tables:
    """The toy model on the toy GQA, all scenes and by kind of scene."""
    credits = gqa_credits(args.model, args)
    records = gqa_records(args.data or DEFAULT_DATA, credits)
    counted = min(COUNTED["language"], args.limit or COUNTED["language"])
    lookup = TextOnly(training_questions(Corpus(args.folder / "train"), counted))
    kinds = {
        kind: {name: credits[name] for name, record in records.items() if record["groups"]["global"] == kind}
        for kind in ("natural", "dense")
    }
    columns = {"576 tokens": credits, **{f"{kind} scenes": part for kind, part in kinds.items()}}
    columns["text only"] = blind(records, lookup)
    groups = by_family(records) | {"**all**": list(records)}
    stages = [stage for stage in ("vision", "language") if log_of(args.folder, stage).exists()]
    return {"families": family_table(groups, columns), "training": training_table(args.folder, stages, False)}


def report_next(args: argparse.Namespace) -> Tables:
    """The toy LLaVA-NeXT on large pictures; without tiles; and the toy model, which sees 192 x 192 pixels."""
    data = args.data or ROOT / "assets" / "eval_next"
    records = dict(itertools.islice(gqa_records(data).items(), args.limit))
    after = LlavaNextForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    before = LlavaForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    tower, images = after.model.vision_tower, data / "gqa" / "data" / "images"  # the tower is the same in both

    class Drawn:
        """Training pictures, of which the text-only baseline needs the things."""

        def __len__(self) -> int:
            return min(COUNTED["next"], args.limit or COUNTED["next"])

        def list_things(self, row: int):
            return draw_large("train", row, row % 2 == 1)[1]

    asking = Asking("imageId", TOY_WORDS, (SHORT_ANSWER, ASSISTANT), QUESTION_LENGTH)

    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(images / f"{name}.jpg"))

    columns = {
        "all tokens": asking.credits(records, after, lambda name: tiled(pixels(name), tower)),
        "thumbnail only": asking.credits(records, after, lambda name: one_crop(crops(pixels(name))[0], tower)),
        "toy model": asking.credits(records, before, lambda name: one_crop(padded(pixels(name)), tower)),
        "text only": blind(records, TextOnly(training_questions(Drawn(), COUNTED["next"]))),
    }
    groups = dict(sorted(by_family(records).items()))
    for kind in ("natural", "dense"):
        groups[f"*{kind} scenes*"] = [n for n, record in records.items() if record["groups"]["global"] == kind]
    groups["**all**"] = list(records)
    return {"families": family_table(groups, columns), "training": training_table(args.folder, ["next"])}


def report_video(args: argparse.Namespace) -> Tables:
    """The toy Video-LLaVA with all eight frames, and with one frame shown eight times."""
    folder = (args.data or ROOT / "assets" / "eval_video") / "video_qa"
    answers = {row["question_id"]: row for row in read_json(folder / "test_a.json")}
    rows = [row | answers[row["question_id"]] for row in read_json(folder / "test_q.json")][: args.limit]
    records = {row["question_id"]: row for row in rows}
    model = VideoLlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    rng, pairs = np.random.default_rng(0), []
    for row in range(min(COUNTED["video"], args.limit or COUNTED["video"])):
        plan = plan_video("train", row)
        asked = (ask_video(plan, family, rng, tries=12) for family in VIDEO_FAMILIES)
        pairs += [(q.family, q.text, q.answer) for q in asked if q is not None]
    lookup = TextOnly(pairs)
    asking = Asking("video_name", VIDEO_WORDS, (ASSISTANT,), VIDEO_QUESTION_LENGTH)

    def looking_at(*shown: int) -> Callable[[str], Visuals]:
        """How the model sees a video when it is given these of the eight frames, in its eight places."""

        def look(name: str) -> Visuals:
            frames = [np.asarray(frame) for frame in read_video(folder / "videos" / f"{name}.mp4", SEEN).frames]
            return all_frames(np.stack([frames[number] for number in shown]), model.model.video_tower)

        return look

    columns = {
        "eight frames": asking.credits(records, model, looking_at(*range(SEEN))),
        "first frame": asking.credits(records, model, looking_at(*[0] * SEEN)),
        "last frame": asking.credits(records, model, looking_at(*[SEEN - 1] * SEEN)),
        "text only": blind(records, lookup),
    }
    families = by_family(records)
    groups = {family: families[family] for family in VIDEO_FAMILIES if family in families}
    groups["*asking for change*"] = [name for name, record in records.items() if record["type"] not in STATIC]
    groups["**all**"] = list(records)
    return {"families": family_table(groups, columns), "training": training_table(args.folder, ["video"])}


def report_instruct(args: argparse.Namespace) -> Tables:
    """The model of all answer formats by format, and beside the toy model on the toy GQA."""
    count = min(SCENES, args.limit or SCENES)
    scenes = Corpus(args.folder / "val")
    formats = format_table(*format_credits(args.model, scenes, min(FIRST, len(scenes) - count), count))
    columns = {"this model": gqa_credits(args.model, args), "toy model": gqa_credits(Path(DEFAULT_MODEL), args)}
    records = gqa_records(DEFAULT_DATA, columns["this model"])
    groups = by_family(records) | {"**all**": list(records)}
    families = family_table(groups, columns, hard=False)
    return {"training": training_table(args.folder, ["instruct"]), "formats": formats, "families": families}


REPORTS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "language": report_language,
    "next": report_next,
    "video": report_video,
    "instruct": report_instruct,
}


def gqa_credits(folder: Path, args: argparse.Namespace) -> Credits:
    """Credit of each question of the toy GQA; the answers of each model are kept in a folder of its own."""
    bundled = folder.resolve() == Path(DEFAULT_MODEL).resolve()
    output = args.output if bundled else args.output / folder.name
    model = CachingLlava(load(DEFAULT_MODEL if bundled else str(folder)))
    return sweep([Setting("full", None)], model, args.data or DEFAULT_DATA, "testdev", output, limit=args.limit)[0]


def gqa_records(data: Path, only: Credits | None = None) -> dict[str, dict]:
    """Annotations of the test questions, or of some of them."""
    records = read_json(data / "gqa" / "data" / "testdev_balanced_questions.json")
    return {name: record for name, record in records.items() if only is None or name in only}


def family_of(record: Mapping[str, Any]) -> str:
    """Question family of an annotation of GQA's or of the video set's layout."""
    return record["type"] if "type" in record else record["types"]["detailed"]


def by_family(records: Mapping[str, dict]) -> dict[str, list[str]]:
    """Question ids by family, in the order in which the families first occur."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        groups[family_of(record)].append(name)
    return dict(groups)


class TextOnly:
    """The text-only baseline: the commonest training answer to the same question, else to its family."""

    def __init__(self, pairs: Iterable[tuple[str, str, str]]):
        """`pairs` are (family, question, answer)."""
        questions: dict[str, Counter] = defaultdict(Counter)
        families: dict[str, Counter] = defaultdict(Counter)
        for family, question, answer in pairs:
            questions[question][answer] += 1
            families[family][answer] += 1
        self._question = {text: _commonest(counts) for text, counts in questions.items()}
        self._family = {family: _commonest(counts) for family, counts in families.items()}

    def answer(self, family: str, question: str) -> str:
        """The answer that was seen most often."""
        return self._question.get(question, self._family[family])


def _commonest(counts: Mapping[str, int]) -> str:
    """Ties go to the first in the alphabet, not to the order of counting."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def training_questions(corpus: Corpus, scenes: int, seed: int = 0) -> Iterable[tuple[str, str, str]]:
    """Two questions of every family about each of the first `scenes` training scenes."""
    rng = np.random.default_rng(seed)
    for row in range(min(scenes, len(corpus))):
        things = corpus.list_things(row)
        for family in (*FAMILIES, *FAMILIES):
            question = ask(things, family, rng, tries=12)
            if question is not None:
                yield family, question.text, question.answer


def blind(records: Mapping[str, dict], lookup: TextOnly) -> Credits:
    """Credits of the text-only baseline."""
    return {name: float(lookup.answer(family_of(r), r["question"]) == r["answer"]) for name, r in records.items()}


def trained_parts(llava: nn.Module) -> Trainee:
    """Language model, projector and newline vector of a loaded checkpoint."""
    parts = Trainee(llava)
    parts.newline = getattr(llava.model, "image_newline", None)
    return parts


@dataclass(frozen=True)
class Asking:
    """How a model is asked about pictures or videos.

    Attributes:
        shown: the field of a record that names the picture or video.
        tail: the tokens between a question and its answer.
        length: of the longest question, in tokens, with suffix, role and answer.
    """

    shown: str
    words: Vocabulary
    tail: tuple[str, ...]
    length: int

    @torch.inference_mode()
    def credits(self, records: Mapping[str, dict], model: nn.Module, look: Callable[[str], Visuals]) -> Credits:
        """1 for every question whose answer word the model puts first, 0 for the others.

        Args:
            look: name of a picture or video -> the visual tokens that the model is given.
        """
        parts, credits = trained_parts(model), {}
        by_name = itertools.groupby(records.items(), key=lambda item: item[1][self.shown])
        for name, group in tqdm(by_name, desc=f"questions by {self.shown}"):
            identities, asked = zip(*group, strict=True)
            line = [PlainQuestion(family_of(r), r["question"], r["answer"]) for r in asked]
            questions = pack([line], self.words, self.tail, self.length)
            decoded = forward(parts, self.words.prefix, look(name), questions.text)
            said = answer_logits(parts, decoded, questions)[0, :, 0].argmax(-1)
            credits |= dict(zip(identities, (said == questions.answer[0]).float().tolist(), strict=True))
        return credits


def tiled(image: np.ndarray, tower: nn.Module) -> Visuals:
    """All visual tokens of a picture: thumbnail, tiles, newlines."""
    features = tower_states(tower, crops(image))[:, 1:].flatten(0, 1)
    sources = torch.from_numpy(run_sources(arrange((image.shape[1], image.shape[0]))))
    return whole(features[sources.clamp(min=0)][None], sources[None] < 0)


def one_crop(image: np.ndarray, tower: nn.Module) -> Visuals:
    """The 576 tokens of [192, 192, 3] pixels."""
    return whole(tower_states(tower, image[None])[:, 1:])


def padded(image: np.ndarray) -> np.ndarray:
    """What a LLaVA-1.5 makes of the picture."""
    colour = ImageProcessor(SIDE, SIDE).padding_colour
    return np.asarray(pad_to_square(Image.fromarray(image), colour, SIDE))


def all_frames(frames: np.ndarray, tower: nn.Module) -> Visuals:
    """[8, 128, 128, 3] uint8 -> all visual tokens, 257 per frame."""
    return whole(tower_states(tower, frames).flatten(0, 1)[None])


@torch.inference_mode()
def format_credits(
    folder: Path, scenes: Corpus, first: int, count: int
) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """Right or wrong by format, with the whole image and without any; the scenes' pairs are the same."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    parts, rng = trained_parts(llava), np.random.default_rng(7)
    seen: dict[str, list[bool]] = defaultdict(list)
    unseen: dict[str, list[bool]] = defaultdict(list)
    for start in tqdm(range(first, first + count, AT_ONCE), desc="formats"):
        rows = np.arange(start, min(start + AT_ONCE, first + count))
        lines = ask_lines(scenes, rows, [list(FORMATS)] * len(rows), rng)
        features = tower_states(llava.model.vision_tower, scenes.images[rows])[:, 1:]
        for credits, visuals in ((seen, whole(features)), (unseen, whole(features[:, :0]))):
            decoded = forward(parts, INSTRUCT_WORDS.prefix, visuals, lines.text, early_at=READ_AT)
            for name, right in right_answers(predictions(parts, decoded, lines)[0], lines):
                credits[name].append(right)
    return seen, unseen


def format_table(seen: dict[str, list[bool]], unseen: dict[str, list[bool]]) -> str:
    """Accuracy by format; "-" without an image where there never is one."""
    rows = []
    for name in (name for name in FORMATS if name in seen):
        without = "-" if name in WITHOUT_IMAGE else f"{100 * np.mean(unseen[name]):.1f}"
        rows.append([name, f"{len(seen[name]):,}", f"{100 * np.mean(seen[name]):.1f}", without])
    return markdown(["format", "question-answer pairs", "576 tokens", "no picture"], rows)


def family_table(groups: Mapping[str, list[str]], columns: Mapping[str, Credits], hard: bool = True) -> str:
    """Percent right by group of questions; with `hard`, families near the last column, the text-only baseline, are
    marked. A column may hold a part of the questions.
    """
    rows = []
    for label, names in groups.items():
        parts = [[column[name] for name in names if name in column] for column in columns.values()]
        values = [100 * float(np.mean(part)) if part else float("nan") for part in parts]
        near = hard and not label.startswith("*") and values[0] - values[-1] < HARD
        title = f"{label} (hard)" if near else label
        rows.append([title, f"{len(names):,}", *(f"{value:.1f}" for value in values)])
    return markdown(["family", "questions", *columns], rows)


def log_of(folder: Path, stage: str) -> Path:
    """The log of a stage."""
    return folder / f"{stage}.log.jsonl"


def training_table(folder: Path, stages: Sequence[str], accuracy: bool = True) -> str:
    """Steps, wall time and the numbers at the end of each stage, as the logs have them."""
    rows = []
    for stage in stages:
        last = json.loads(log_of(folder, stage).read_text().splitlines()[-1])
        row = [f"{last['step']:,}", f"{last['seconds'] / 60:.0f}", f"{last['loss']:.3f}"]
        rows.append([*row, f"{100 * last['all']:.1f}"] if accuracy else [stage, *row])
    names = ["steps", "minutes", "running loss at the end"]
    return markdown([*names, "running accuracy at the end"] if accuracy else ["stage", *names], rows)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=REPORTS)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, help="the exported checkpoint; default: the shipped one")
    parser.add_argument("--data", type=Path, help="the toy benchmarks; default: the shipped ones")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep", help="where answers are kept")
    parser.add_argument("--limit", type=int, help="measure the first N questions only")
    args = parser.parse_args(arguments)
    args.model = args.model or MODELS[args.stage]
    card = args.model / "README.md"
    for name, table in REPORTS[args.stage](args).items():
        print(f"{name}\n{table}\n")
        if card.exists():
            insert(card, name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
