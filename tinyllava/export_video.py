"""Write the fine-tuned model as a checkpoint of the transformers `video_llava` layout.

python -m tinyllava.export_video --folder runs/video --output assets/tinyllava_video
"""

from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, VideoLlavaForConditionalGeneration

from tinyllava.export_next import generation_config, load_parts, read_arguments
from tinyllava.longer import load_embedded
from tinyllava.processor_config import write_processor_config
from tinyllava.video_model import build_video_llava
from tinyllava.video_scenes import SIDE
from tinyllava.video_vocabulary import ids, tokenizer
from tinyllava.vocabulary import EOS


def load_trained(folder: Path, model: Path) -> VideoLlavaForConditionalGeneration:
    """The Video-LLaVA that `tinyllava.train_video` left in `folder`, float32."""
    trained = build_video_llava(load_embedded(model))
    load_parts(trained, torch.load(folder / "video.pt", weights_only=True))
    return trained.eval()


def main() -> None:
    args = read_arguments(__doc__)
    trained = load_trained(args.folder, args.model)
    trained.generation_config = generation_config(ids()[EOS])
    trained.half().save_pretrained(args.output)
    write_processor_config(trained.config, args.output)
    tokenizer().save_pretrained(args.output)
    clip = CLIPImageProcessorPil.from_pretrained(args.model)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=clip.image_mean,
        image_std=clip.image_std,
    ).save_pretrained(args.output)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
