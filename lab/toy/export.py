"""Write what a stage trained as a checkpoint of the transformers layout.

    python -m lab.toy.export language --folder runs/tiny --output assets/tinyllava
    python -m lab.toy.export next --folder runs/next --output assets/tinyllava_next

The last checkpoint of a stage that is not finished is exported too. The CLIP text tower lies beside the checkpoint.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PROCESSOR_MAPPING,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PretrainedConfig,
)

from eval.command import exit_on_user_error
from lab.toy.clip import MEAN, STD, load_clip
from lab.toy.data.formats import INSTRUCT_WORDS
from lab.toy.data.regions import BOX_WORDS
from lab.toy.data.vocabulary import BOS, EOS, NEXT_WORDS, PAD, TOY_WORDS, VIDEO_WORDS, Vocabulary
from lab.toy.llava import (
    box_table,
    build_boxes,
    build_instruct,
    build_llava,
    build_next,
    build_video_llava,
    instruct_table,
    load_toy,
)
from lab.toy.train import STAGES
from llava.errors import UserError


def write_processor_config(config: PretrainedConfig, folder: Path) -> None:
    """The file of a processor that turns each `<image>` into as many image tokens as the model has visual tokens."""
    fields = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes off again
        "patch_size": config.vision_config.patch_size,
        "processor_class": PROCESSOR_MAPPING[type(config)].__name__,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if config.model_type == "video_llava":
        fields["video_token"] = "<video>"
    (folder / "processor_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def trained_weights(folder: Path, stage: str) -> Mapping[str, Tensor]:
    """The weights that a stage left in `folder`, or those of its last checkpoint."""
    done, checkpoint = folder / f"{stage}.pt", folder / f"{stage}.checkpoint.pt"
    if done.exists():
        return torch.load(done, weights_only=True)
    if checkpoint.exists():
        return torch.load(checkpoint, weights_only=True)["optimizer"]["masters"]
    raise UserError(f"{folder} has neither {done.name} nor {checkpoint.name}; train the stage {stage!r} there first.")


def untrained_language(folder: Path, model: Path) -> LlavaForConditionalGeneration:
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
    parts = {"language_model": trained.model.language_model, "projector": trained.model.multi_modal_projector}
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}."): w for key, w in saved.items() if key.startswith(f"{name}.")}
        part.load_state_dict(own, strict=True)
    trained.tie_weights()
    if "newline" in saved:
        trained.model.image_newline.copy_(saved["newline"])
    return trained.eval()


def write_text_tower(folder: Path, model: Path, output: Path) -> None:
    """The parts of the CLIP model that a LLaVA checkpoint leaves out, under their CLIPModel names, and its config."""
    clip = load_clip(folder)
    keep = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    weights = {name: w.half().contiguous() for name, w in clip.state_dict().items() if name.startswith(keep)}
    # Patches were trained to lie near the phrases that name them, see lab/toy/clip.py.
    write_tower_files(weights, clip.config.to_diff_dict() | {"patch_similarity": "plain"}, output)


def grow_text_tower(words: Vocabulary, grow: Callable[[Tensor, float], Tensor]) -> Callable[[Path, Path, Path], None]:
    """Writes the model's text tower with rows for the new words: a like word's, or the mean of all. Not trained."""

    def write(folder: Path, model: Path, output: Path) -> None:
        source = model / "text_tower"
        weights = load_file(source / "model.safetensors")
        table = "text_model.embeddings.token_embedding.weight"
        weights[table] = grow(weights[table].float(), 0.0).half()
        config = json.loads((source / "config.json").read_text())
        config["text_config"] |= {"vocab_size": len(words), "eos_token_id": words.ids[EOS]}
        write_tower_files(weights, config, output)

    return write


def write_tower_files(weights: dict[str, Tensor], config: dict, output: Path) -> None:
    """Weights and config of a text tower."""
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_text_tower(folder: Path, model: Path, output: Path) -> None:
    """The tower is the toy model's, so its text half fits."""
    shutil.copytree(model / "text_tower", output, dirs_exist_ok=True)


@dataclass(frozen=True)
class Export:
    """How the checkpoint of a stage is made.

    Attributes:
        build: (training folder, toy model) -> the model whose trained parts are then loaded.
        text_tower: (training folder, toy model, output folder), writes it; None where no CLIP text half fits the tower.
    """

    build: Callable[[Path, Path], nn.Module]
    words: Vocabulary
    text_tower: Callable[[Path, Path, Path], None] | None


EXPORTS = {
    "language": Export(untrained_language, TOY_WORDS, write_text_tower),
    "next": Export(lambda folder, model: build_next(load_toy(model)), NEXT_WORDS, copy_text_tower),
    "video": Export(lambda folder, model: build_video_llava(load_toy(model)), VIDEO_WORDS, None),
    "instruct": Export(
        lambda folder, model: build_instruct(model), INSTRUCT_WORDS, grow_text_tower(INSTRUCT_WORDS, instruct_table)
    ),
    "boxes": Export(lambda folder, model: build_boxes(model), BOX_WORDS, grow_text_tower(BOX_WORDS, box_table)),
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
    # Resize and crop, normalise as CLIP; the same for the tiles of a large picture.
    side, pinpoints = trained.config.vision_config.image_size, getattr(trained.config, "image_grid_pinpoints", None)
    kind = LlavaNextImageProcessorPil if pinpoints else CLIPImageProcessorPil
    options = {"image_grid_pinpoints": pinpoints} if pinpoints else {}
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind(**sizes, **options, image_mean=MEAN, image_std=STD).save_pretrained(output)
    if how.text_tower is not None:
        how.text_tower(folder, model, output / "text_tower")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=EXPORTS)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", type=Path, help="the toy model it was fine-tuned from; default: as shipped")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint folder")
    args = parser.parse_args(arguments)
    export(args.stage, args.folder, args.model or STAGES[args.stage].start, args.output)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
