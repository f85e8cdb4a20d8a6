"""Write the trained model as a checkpoint of the transformers `llava` layout, with its CLIP text tower beside it.

python -m tinyllava.export --folder runs/tiny --output assets/tinyllava
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, GenerationConfig

from tinyllava import vision
from tinyllava.language import build_llava
from tinyllava.processor_config import write_processor_config
from tinyllava.scenes import SIDE
from tinyllava.vocabulary import BOS, EOS, PAD, ids, tokenizer


def load_trained(folder: Path):
    """The CLIP model and the LLaVA of a training folder, float32."""
    clip = vision.load_clip(folder)
    llava = build_llava(clip.config.vision_config)
    saved = torch.load(folder / "language.pt", weights_only=True)
    parts = {
        "language_model": llava.model.language_model,
        "projector": llava.model.multi_modal_projector,
    }
    for prefix, part in parts.items():
        weights = {n.removeprefix(f"{prefix}."): w for n, w in saved.items() if n.startswith(f"{prefix}.")}
        part.load_state_dict(weights, strict=True)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=True)
    llava.tie_weights()
    return clip, llava.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    clip, llava = load_trained(args.folder)
    llava.generation_config = GenerationConfig(
        bos_token_id=ids()[BOS], eos_token_id=ids()[EOS], pad_token_id=ids()[PAD], do_sample=False
    )
    llava.half().save_pretrained(args.output)
    write_processor_config(llava.config, args.output)
    tokenizer().save_pretrained(args.output)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=vision.MEAN,
        image_std=vision.STD,
    ).save_pretrained(args.output)
    write_text_tower(clip, args.output / "text_tower")
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


def write_text_tower(clip, folder: Path) -> None:
    """The parts of the CLIP model that a LLaVA checkpoint leaves out, under their CLIPModel names, and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    weights = {name: w.half().contiguous() for name, w in clip.state_dict().items() if name.startswith(keep)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Patches were trained to lie near the phrases that name them, see tinyllava/vision.py.
    config = clip.config.to_diff_dict() | {"patch_similarity": "plain"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
