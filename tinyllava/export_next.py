"""Write the fine-tuned model as a checkpoint of the transformers `llava_next` layout.

python -m tinyllava.export_next --folder runs/next --output assets/tinyllava_next
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
)

from eval.config import DEFAULT_MODEL
from tinyllava.longer import load_embedded
from tinyllava.processor_config import write_processor_config
from tinyllava.scenes import SIDE
from tinyllava.tiles import PINPOINTS
from tinyllava.vocabulary import BOS, EOS, PAD, ids, tokenizer

LONGEST = 4096  # tokens: 2,928 visual ones and room for text


def next_config(config: LlavaConfig) -> LlavaNextConfig:
    """The embedded model's configuration, with tiles."""
    text = type(config.text_config).from_dict(config.text_config.to_dict() | {"max_position_embeddings": LONGEST})
    return LlavaNextConfig(
        vision_config=config.vision_config,
        text_config=text,
        image_token_index=config.image_token_index,
        image_seq_length=config.image_seq_length,
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        projector_hidden_act=config.projector_hidden_act,
        tie_word_embeddings=True,
    )


def load_trained(folder: Path, model: Path) -> LlavaNextForConditionalGeneration:
    """The LLaVA-NeXT that `tinyllava.train_next` left in `folder`, float32; towers from the embedded model."""
    base = load_embedded(model)
    saved = torch.load(folder / "next.pt", weights_only=True)
    trained = LlavaNextForConditionalGeneration(next_config(base.config)).float()
    trained.model.vision_tower.load_state_dict(base.model.vision_tower.state_dict(), strict=True)
    load_parts(trained, saved)
    with torch.no_grad():
        trained.model.image_newline.copy_(saved["newline"])
    return trained.eval()


def load_parts(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Language model and projector of a training's masters into a LLaVA of any kind."""
    parts = {"language_model": model.model.language_model, "projector": model.model.multi_modal_projector}
    for prefix, part in parts.items():
        weights = {n.removeprefix(f"{prefix}."): w for n, w in saved.items() if n.startswith(f"{prefix}.")}
        part.load_state_dict(weights, strict=True)
    model.tie_weights()


def generation_config(end: int) -> GenerationConfig:
    """Greedy, with the end token of the vocabulary."""
    return GenerationConfig(bos_token_id=ids()[BOS], eos_token_id=end, pad_token_id=ids()[PAD], do_sample=False)


def read_arguments(documentation: str | None) -> argparse.Namespace:
    """--folder, --model and --output of the exports of fine-tuned models."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the embedded model it was trained from")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = read_arguments(__doc__)
    trained = load_trained(args.folder, args.model)
    trained.generation_config = generation_config(ids()[EOS])
    trained.half().save_pretrained(args.output)
    write_processor_config(trained.config, args.output)
    tokenizer(longest=LONGEST).save_pretrained(args.output)
    clip = CLIPImageProcessorPil.from_pretrained(args.model)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=clip.image_mean,
        image_std=clip.image_std,
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
    ).save_pretrained(args.output)
    # The tower is the embedded model's, so its text half fits.
    shutil.copytree(Path(args.model) / "text_tower", args.output / "text_tower", dirs_exist_ok=True)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
