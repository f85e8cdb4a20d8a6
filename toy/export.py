"""Write what a stage trained as a checkpoint of the transformers layout, measure it, and fill in its model card.

    python -m toy.export language --folder runs/tiny --output assets/tinyllava
    python -m toy.export next --folder runs/next --output assets/tinyllava_next

The last checkpoint of a stage that is not finished is exported too. The CLIP text tower lies beside the checkpoint.

The shipped toy benchmarks measure it: accuracy by question family with all visual tokens, beside references: a lookup
that sees no image (the text-only baseline), and for tiles and frames the same model with less to see. For `instruct`
also accuracy by answer format. The tables are printed, and replace those of README.md in the model's folder where there
is one.
"""

import argparse
import itertools
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PretrainedConfig,
)

from eval.answers.jsonl import read_json
from eval.command import exit_on_user_error
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.tables.page import insert, markdown
from llava.errors import UserError
from llava.processing.image import ImageProcessor, pad_to_square
from llava.processing.video import read_video
from toy.benchmarks.gqa_and_videos import draw_large, draw_scene
from toy.clip import MEAN, STD, load_clip
from toy.data.corpus import PINPOINTS, arrange, crops, run_sources, tower_states
from toy.data.formats import FORMATS, INSTRUCT_WORDS, WITHOUT_IMAGE
from toy.data.questions import FAMILIES, PlainQuestion, ask
from toy.data.scenes import SIDE, Thing, scene
from toy.data.videos import FAMILIES as VIDEO_FAMILIES
from toy.data.videos import SEEN, STATIC, VIDEO_SIDE, ask_video, plan_video
from toy.data.vocabulary import BOS, EOS, NEXT_WORDS, PAD, TOY_WORDS, VIDEO_WORDS, Vocabulary
from toy.llava import (
    Trainee,
    build_instruct,
    build_llava,
    build_next,
    build_video_llava,
    instruct_table,
    load_parts,
    load_toy,
)
from toy.packing import Visuals, forward, pack, predict, question_line, right_answers, whole
from toy.stages import format_lines

PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "video_llava": "VideoLlavaProcessor"}


def write_processor_config(config: PretrainedConfig, folder: Path) -> None:
    """The file of a processor that turns each `<image>` into as many image tokens as the model has visual tokens."""
    fields = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes off again
        "patch_size": config.vision_config.patch_size,
        "processor_class": PROCESSORS[config.model_type],
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if config.model_type == "video_llava":
        fields["video_token"] = "<video>"
    (folder / "processor_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


TEXT_TABLE = "text_model.embeddings.token_embedding.weight"


def trained_weights(folder: Path, stage: str) -> Mapping[str, Tensor]:
    """The weights that a stage left in `folder`, or those of its last checkpoint."""
    done, checkpoint = folder / f"{stage}.pt", folder / f"{stage}.checkpoint.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    if checkpoint.exists():
        return torch.load(checkpoint, weights_only=True)["optimizer"]["masters"]
    raise UserError(f"{folder} has neither {done.name} nor {checkpoint.name}; train the stage {stage!r} there first.")


def untrained_language(folder: Path) -> LlavaForConditionalGeneration:
    """A new toy LLaVA with the tower of a training folder."""
    clip = load_clip(folder)
    llava = build_llava(clip.config.vision_config)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=True)
    return llava


@torch.no_grad()
def load_trained(stage: str, folder: Path, model: Path) -> nn.Module:
    """The model that a stage trained in `folder`, float32.

    Args:
        model: the toy model that it was fine-tuned from.
    """
    saved, trained = trained_weights(folder, stage), EXPORTS[stage].build(folder, model)
    load_parts(trained, saved)
    if "newline" in saved:
        trained.model.image_newline.copy_(saved["newline"])
    return trained.eval()


def write_text_tower(clip: CLIPModel, output: Path) -> None:
    """The parts of the CLIP model that a LLaVA checkpoint leaves out, under their CLIPModel names, and its config."""
    keep = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    weights = {name: w.half().contiguous() for name, w in clip.state_dict().items() if name.startswith(keep)}
    # Patches were trained to lie near the phrases that name them, see toy/clip.py.
    write_tower_files(weights, clip.config.to_diff_dict() | {"patch_similarity": "plain"}, output)


def grow_text_tower(source: Path, output: Path) -> None:
    """The toy model's text tower with rows for the new words: a like word's, or the mean of all. Not trained."""
    weights = load_file(source / "model.safetensors")
    weights[TEXT_TABLE] = instruct_table(weights[TEXT_TABLE].float(), 0.0).half()
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"vocab_size": len(INSTRUCT_WORDS), "eos_token_id": INSTRUCT_WORDS.ids[EOS]}
    write_tower_files(weights, config, output)


def write_tower_files(weights: dict[str, Tensor], config: dict, output: Path) -> None:
    """Weights and config of a text tower."""
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def no_text_tower(source: Path, output: Path) -> None:
    """Video-LLaVA's towers are no CLIP towers, so there is no text half that fits."""


def copy_text_tower(source: Path, output: Path) -> None:
    """The tower is the toy model's, so its text half fits."""
    shutil.copytree(source, output, dirs_exist_ok=True)


def image_processor(side: int, tiled: bool = False) -> CLIPImageProcessorPil | LlavaNextImageProcessorPil:
    """Resize and crop to `side` pixels, normalise as CLIP; the same for the tiles of a large picture."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if tiled:
        pinpoints = [list(pair) for pair in PINPOINTS]
        return LlavaNextImageProcessorPil(**sizes, image_mean=MEAN, image_std=STD, image_grid_pinpoints=pinpoints)
    return CLIPImageProcessorPil(**sizes, image_mean=MEAN, image_std=STD)


@dataclass(frozen=True)
class Export:
    """How the checkpoint of a stage is made.

    Attributes:
        build: (training folder, toy model) -> the model whose trained parts are then loaded.
        text_tower: (text tower of the toy model, output folder); None to take it from the training folder.
    """

    build: Callable[[Path, Path], nn.Module]
    words: Vocabulary
    text_tower: Callable[[Path, Path], object] | None
    side: int = SIDE  # of the pictures that the tower sees
    tiled: bool = False


EXPORTS = {
    "language": Export(lambda folder, model: untrained_language(folder), TOY_WORDS, None),
    "next": Export(lambda folder, model: build_next(load_toy(model)), NEXT_WORDS, copy_text_tower, tiled=True),
    "video": Export(lambda folder, model: build_video_llava(load_toy(model)), VIDEO_WORDS, no_text_tower, VIDEO_SIDE),
    "instruct": Export(lambda folder, model: build_instruct(model), INSTRUCT_WORDS, grow_text_tower),
}


def export(stage: str, folder: Path, model: Path, output: Path) -> None:
    """Write the checkpoint of a stage: float16 weights, configs, tokenizer, processors, text tower."""
    how = EXPORTS[stage]
    trained, ids = load_trained(stage, folder, model), how.words.ids
    trained.generation_config = GenerationConfig(
        bos_token_id=ids[BOS], eos_token_id=ids[EOS], pad_token_id=ids[PAD], do_sample=False
    )
    trained.half().save_pretrained(output)
    write_processor_config(trained.config, output)
    how.words.tokenizer.save_pretrained(output)
    image_processor(how.side, how.tiled).save_pretrained(output)
    if how.text_tower is None:
        write_text_tower(load_clip(folder), output / "text_tower")
    else:
        how.text_tower(model / "text_tower", output / "text_tower")


# The model card.

HARD = 20.0  # points above the text-only baseline below which a family is marked
# Validation scenes of the formats, after those that training watches.
FIRST, SCENES, AT_ONCE = 100, 300, 10

Credits = Mapping[str, float]  # question id -> 1 where the answer is right, else 0
Tables = dict[str, str]  # name of a marked part of the model card -> its table
Look = Callable[[str], Visuals]  # name of a picture or video -> the visual tokens that a model is given


@dataclass(frozen=True)
class Record(PlainQuestion):
    """A question of a toy benchmark. `shown`: its picture or video."""

    shown: str
    dense: bool = False


def scene_records(data: Path, limit: int | None) -> dict[str, Record]:
    """The test questions of the toy GQA."""
    records = read_json(data / "gqa" / "data" / "testdev_balanced_questions.json")
    return {
        name: Record(r["types"]["detailed"], r["question"], r["answer"], r["imageId"], r["groups"]["global"] == "dense")
        for name, r in itertools.islice(records.items(), limit)
    }


def report_language(folder: Path, model: Path, limit: int | None) -> Tables:
    """The toy model on the toy GQA, all scenes and by kind of scene."""
    records = scene_records(DEFAULT_DATA, limit)
    seen = scene_credits(records, model, TOY_WORDS)
    columns = {"576 tokens": seen}
    for kind, dense in (("natural", False), ("dense", True)):
        columns[f"{kind} scenes"] = {name: seen[name] for name, record in records.items() if record.dense == dense}
    columns["text only"] = text_only(records, training_questions(draw_scene, 6000, limit))
    groups = by_family(records) | {"**all**": list(records)}
    training = training_table(folder, [s for s in ("vision", "language") if log_of(folder, s).exists()], accuracy=False)
    return {"families": family_table(groups, columns), "training": training}


def report_next(folder: Path, model: Path, limit: int | None) -> Tables:
    """The toy LLaVA-NeXT on large pictures; without tiles; and the toy model, which sees 192 x 192 pixels."""
    data = ROOT / "assets" / "eval_next"
    records, after, before = scene_records(data, limit), load_float(model), load_float(DEFAULT_MODEL)
    tower, pixels = after.model.vision_tower, image_reader(data)  # the tower is the same in both
    columns = {
        "all tokens": credits(records, after, NEXT_WORDS, lambda name: tiled(pixels(name), tower)),
        "thumbnail only": credits(records, after, NEXT_WORDS, lambda name: one_crop(crops(pixels(name))[0], tower)),
        "toy model": credits(records, before, TOY_WORDS, lambda name: one_crop(padded(pixels(name)), tower)),
        "text only": text_only(records, training_questions(draw_large, 3000, limit)),
    }
    groups = dict(sorted(by_family(records).items()))
    for kind, dense in (("natural", False), ("dense", True)):
        groups[f"*{kind} scenes*"] = [name for name, record in records.items() if record.dense == dense]
    groups["**all**"] = list(records)
    return {"families": family_table(groups, columns), "training": training_table(folder, ["next"])}


def report_video(folder: Path, model: Path, limit: int | None) -> Tables:
    """The toy Video-LLaVA with all eight frames, and with one frame shown eight times."""
    home = ROOT / "assets" / "eval_video" / "video_qa"
    answers = {row["question_id"]: row for row in read_json(home / "test_a.json")}
    rows = [(row, answers[row["question_id"]]) for row in read_json(home / "test_q.json")][:limit]
    records = {
        asked["question_id"]: Record(said["type"], asked["question"], said["answer"], asked["video_name"])
        for asked, said in rows
    }
    llava = load_float(model)

    def looking_at(*shown: int) -> Look:
        """How the model sees a video when it is given these of the eight frames, in its eight places."""

        def look(name: str) -> Visuals:
            frames = [np.asarray(frame) for frame in read_video(home / "videos" / f"{name}.mp4", SEEN).frames]
            return all_frames(np.stack([frames[number] for number in shown]), llava.model.video_tower)

        return look

    views = {"eight frames": range(SEEN), "first frame": [0] * SEEN, "last frame": [SEEN - 1] * SEEN}
    columns = {name: credits(records, llava, VIDEO_WORDS, looking_at(*shown)) for name, shown in views.items()}
    rng, plans = np.random.default_rng(0), (plan_video("train", row) for row in range(min(6000, limit or 6000)))
    asked = (ask_video(plan, family, rng, tries=12) for plan in plans for family in VIDEO_FAMILIES)
    columns["text only"] = text_only(records, filter(None, asked))
    families = by_family(records)
    groups = {family: families[family] for family in VIDEO_FAMILIES if family in families}
    groups["*asking for change*"] = [name for name, record in records.items() if record.family not in STATIC]
    groups["**all**"] = list(records)
    return {"families": family_table(groups, columns), "training": training_table(folder, ["video"])}


def report_instruct(folder: Path, model: Path, limit: int | None) -> Tables:
    """The model of all answer formats by format, and beside the toy model on the toy GQA."""
    records = scene_records(DEFAULT_DATA, limit)
    columns = {
        "this model": scene_credits(records, model, INSTRUCT_WORDS),
        "toy model": scene_credits(records, Path(DEFAULT_MODEL), TOY_WORDS),
    }
    families = family_table(by_family(records) | {"**all**": list(records)}, columns, hard=False)
    formats = format_table(*format_credits(load_float(model), min(SCENES, limit or SCENES)))
    return {"training": training_table(folder, ["instruct"]), "formats": formats, "families": families}


REPORTS = {"language": report_language, "next": report_next, "video": report_video, "instruct": report_instruct}


def load_float(folder: str | Path) -> nn.Module:
    """A checkpoint in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def image_reader(data: Path) -> Callable[[str], np.ndarray]:
    """Name of a picture of a toy GQA -> its pixels."""
    return lambda name: np.asarray(Image.open(data / "gqa" / "data" / "images" / f"{name}.jpg"))


def scene_credits(records: Mapping[str, Record], folder: Path, words: Vocabulary) -> Credits:
    """Credits of a model that sees the scenes as they are."""
    llava, pixels = load_float(folder), image_reader(DEFAULT_DATA)
    return credits(records, llava, words, lambda name: one_crop(pixels(name), llava.model.vision_tower))


def trained_parts(llava: nn.Module) -> Trainee:
    """Language model, projector and newline vector of a loaded checkpoint."""
    parts = Trainee(llava)
    parts.newline = getattr(llava.model, "image_newline", None)
    return parts


@torch.inference_mode()
def credits(records: Mapping[str, Record], model: nn.Module, words: Vocabulary, look: Look) -> Credits:
    """1 for every question that the model answers rightly, 0 for the others."""
    parts, found = trained_parts(model), {}
    by_name = itertools.groupby(records.items(), key=lambda item: item[1].shown)
    for name, group in tqdm(by_name, desc="pictures"):
        identities, asked = zip(*group, strict=True)
        lines = pack([[question_line(words, record) for record in asked]])
        decoded = forward(parts, words.prefix, look(name), lines)
        right = right_answers(predict(parts, decoded.states, decoded.start, lines.target), lines)
        found |= {identity: float(is_right) for identity, (_, is_right) in zip(identities, right, strict=True)}
    return found


def text_only(records: Mapping[str, Record], training: Iterable[PlainQuestion]) -> Credits:
    """Credits of the text-only baseline: the commonest training answer to the same question, else to its family."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        counts[question.text][question.answer] += 1
        counts[question.family][question.answer] += 1
    # Ties go to the first in the alphabet, not to the order of counting.
    said = {key: min(seen, key=lambda answer: (-seen[answer], answer)) for key, seen in counts.items()}
    return {name: float(said.get(one.text, said[one.family]) == one.answer) for name, one in records.items()}


def training_questions(
    draw: Callable[[str, int, bool], tuple[bytes, tuple[Thing, ...]]], count: int, limit: int | None
) -> Iterator[PlainQuestion]:
    """Two questions of every family about each of the first `count` training pictures, or `limit` of them."""
    rng = np.random.default_rng(0)
    for row in tqdm(range(min(count, limit or count)), desc="training questions"):
        things = draw("train", row, row % 2 == 1)[1]
        for family in (*FAMILIES, *FAMILIES):
            question = ask(things, family, rng, tries=12)
            if question is not None:
                yield question


def by_family(records: Mapping[str, Record]) -> dict[str, list[str]]:
    """Question ids by family, in the order in which the families first occur."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        groups[record.family].append(name)
    return dict(groups)


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
def format_credits(llava: nn.Module, count: int) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """Right or wrong by format, with the whole image and without any; the scenes' pairs are the same."""
    parts, rng = trained_parts(llava), np.random.default_rng(7)
    seen, unseen = defaultdict(list), defaultdict(list)
    for start in tqdm(range(FIRST, FIRST + count, AT_ONCE), desc="formats"):
        rows = range(start, min(start + AT_ONCE, FIRST + count))
        scenes = [scene("val", row, dense=row % 2 == 1) for row in rows]
        lines = pack([format_lines(drawn.things, list(FORMATS), rng) for drawn in scenes])
        features = tower_states(llava.model.vision_tower, np.stack([drawn.image for drawn in scenes]))[:, 1:]
        for found, visuals in ((seen, whole(features)), (unseen, whole(features[:, :0]))):
            decoded = forward(parts, INSTRUCT_WORDS.prefix, visuals, lines)
            for name, right in right_answers(predict(parts, decoded.states, decoded.start, lines.target), lines):
                found[name].append(right)
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
    parser.add_argument("stage", choices=EXPORTS)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the toy model it was fine-tuned from")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint folder")
    parser.add_argument("--limit", type=int, help="measure the first N questions only")
    args = parser.parse_args(arguments)
    export(args.stage, args.folder, Path(args.model), args.output)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")
    card = args.output / "README.md"
    for name, table in REPORTS[args.stage](args.folder, args.output, args.limit).items():
        print(f"{name}\n{table}\n")
        if card.exists():
            insert(card, name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
