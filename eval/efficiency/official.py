"""The official models by their sizes: modules without weights, for tables of what they need."""

from functools import cache
from typing import Any

import torch

from eval.efficiency.shapes import QWEN_25_7B, QWEN_25_VISION, VICUNA_7B, VICUNA_13B, YI_34B
from llava.model.builder import FAMILIES
from llava.model.checkpoint.hf_model import HF_CLASSES
from llava.model.checkpoint.identify import Family, Kind
from llava.model.checkpoint.load import Checkpoint
from llava.model.checkpoint.original_layout import CLIP_L_336, LANGUAGEBIND
from llava.model.checkpoint.outline import empty_model
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.languagebind import VIDEO_FRAMES
from llava.processing.anyres import parse_pinpoints
from llava.processing.clip_image import ImageProcessor
from llava.processing.qwen_image import QwenImageProcessor

# Family, and the parts of config.json that decide sizes, from the official files.
MODELS: dict[str, tuple[Family, dict[str, Any]]] = {
    "LLaVA-1.5-7B": ("llava", {"text_config": VICUNA_7B, "vision_config": CLIP_L_336}),
    "LLaVA-1.5-13B": ("llava", {"text_config": VICUNA_13B, "vision_config": CLIP_L_336}),
    "LLaVA-NeXT-7B": ("llava_next", {"text_config": VICUNA_7B, "vision_config": CLIP_L_336}),
    "LLaVA-NeXT-13B": ("llava_next", {"text_config": VICUNA_13B, "vision_config": CLIP_L_336}),
    "LLaVA-NeXT-34B": ("llava_next", {"text_config": YI_34B, "vision_config": CLIP_L_336}),
    "Video-LLaVA-7B": ("video_llava", {"text_config": VICUNA_7B, "vision_config": LANGUAGEBIND}),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", {"text_config": QWEN_25_7B, "vision_config": QWEN_25_VISION}),
}


@cache
def official(name: str) -> Llava:
    """An official model on the meta device, without tokenizer. LLaVA-NeXT reads images as the tables of papers do, with
    2,880 visual tokens for each; Qwen takes images of at most 1,280 visual tokens."""
    family, fields = MODELS[name]
    config_class: Any = HF_CLASSES[family].config_class
    config = config_class(**fields)
    video = family == "video_llava"
    qwen = family == "qwen2_5_vl"
    size = None if qwen else config.vision_config.image_size
    tiled = family == "llava_next"
    checkpoint = Checkpoint(
        model=empty_model(config, Kind(family, "original", "llama"), VIDEO_FRAMES if video else None),
        tokenizer=None,  # type: ignore[arg-type]
        image_processor=QwenImageProcessor() if size is None else ImageProcessor(size, size),
        conversation="qwen2_vl" if qwen else "vicuna_v1",
        name=name,
        layout="original",
        vision_tower_source="no weights",
        text_tower=None,
        notes=(),
        vocabulary=config.get_text_config().vocab_size,
        family=family,
        pinpoints=parse_pinpoints(config.image_grid_pinpoints, size) if tiled and size is not None else (),
        aspect="anyres" if tiled else "pad",
        merge="spatial" if tiled else None,
        video_conversation="llava_v1" if video else None,
        frames=VIDEO_FRAMES if video else 0,
        temporal=video,
    )
    options: dict[str, Any] = {"force": (2 * size, 2 * size)} if tiled and size is not None else {}
    return FAMILIES[family](checkpoint, torch.device("meta"), **options)
