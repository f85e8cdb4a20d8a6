"""processor_config.json: what `AutoProcessor` of transformers needs beside the tokenizer and preprocessor_config.json.

python -m toy.processor_config assets/tinyllava assets/tinyllava_next

writes it into checkpoints that exist; the exports write it into new ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "video_llava": "VideoLlavaProcessor"}


def processor_config(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a processor that turns each `<image>` into as many image tokens as the model has visual tokens."""
    video = {"video_token": "<video>"} if config.model_type == "video_llava" else {}
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes off again
        "patch_size": config.vision_config.patch_size,
        "processor_class": PROCESSORS[config.model_type],
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        **video,
    }


def write_processor_config(config: PretrainedConfig, folder: Path) -> None:
    """Write the file into a checkpoint folder."""
    text = json.dumps(processor_config(config), indent=2, sort_keys=True)
    (folder / "processor_config.json").write_text(text + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        write_processor_config(AutoConfig.from_pretrained(folder), folder)


if __name__ == "__main__":
    main()
