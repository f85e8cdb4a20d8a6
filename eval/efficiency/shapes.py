"""Models in the shapes of official ones, with random weights or none, and questions about noise to ask them.

random_llava("llava-1.5-7b")    computes what the official model computes; its answers are meaningless
official("LLaVA-1.5-7B")        the sizes alone, on the meta device
noise_batches(model, 8, True)   batches of questions that any model can be measured with
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

from eval.yaml_files import read_yaml
from llava.model.builder import DTYPES, FAMILIES, parse
from llava.model.checkpoint.config import CLIP_L_336, Family
from llava.model.checkpoint.load import HF_CLASSES, Checkpoint, hf_class
from llava.model.fused import fuse
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.clip_text_encoder import ClipText
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.image import ImageProcessor, QwenImageProcessor
from llava.processing.prompt import Sample
from llava.processing.video import FRAMES, Video
from llava.transformers_names import local_torch_dtype, no_init_weights, set_kernel

# Name -> family, and the fields of config.json's parts "text" and "vision" (without "vision": that of LLaVA-1.5).
SHAPES: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("shapes.yaml"))["models"]
# The official models in the tables of memory and costs; SHAPES has their names in lower case.
MODELS = (
    "LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-7B", "LLaVA-NeXT-13B", "LLaVA-NeXT-34B", "Video-LLaVA-7B",
    "Qwen2.5-VL-7B",
)  # fmt: skip
NEXT_READING = {"merge": "spatial", "force": "672x672"}


def narrow(shape: str, width: int, layers: int, blocks: int = 3, side: int = 336) -> dict[str, Any]:
    """A shape of LLaVA at a fraction of its width, with few weights and as many tokens and layers as wanted.

    Costs grow with the number of tokens as in the real model, and a CPU needs seconds instead of minutes.

    Args:
        shape: a name of SHAPES.
        width: channels of decoder and tower, a multiple of the 64 channels of an attention head. The MLPs shrink in
            proportion.
        layers: number of decoder layers.
        blocks: number of tower blocks.
        side: side of an image or tile in pixels, a multiple of 14.
    """
    text, heads = SHAPES[shape]["text"], width // 64
    return {
        **SHAPES[shape],
        "text": {
            **text,
            "hidden_size": width,
            "intermediate_size": width * text["intermediate_size"] // text["hidden_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            # More position ids than the official model has, for longer prompts.
            "max_position_embeddings": 1 << 15,
        },
        "vision": {
            **SHAPES[shape].get("vision", CLIP_L_336),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
            "image_size": side,
        },
    }


def reading_of(shape: str, texts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The image options of a shape: those given as `texts`, or else the shape's own.

    LLaVA-NeXT's own are those of papers' tables, with 2,880 visual tokens per image; other shapes have none.
    """
    of_next = SHAPES[shape]["family"] == "llava_next"
    return {key: parse(key, text) for key, text in (texts or (NEXT_READING if of_next else {})).items()}


@cache
def official(name: str) -> Llava:
    """An official model on the meta device, for its sizes.

    LLaVA-NeXT takes 2,880 visual tokens per image, as in papers' tables; Qwen takes at most 1,280.

    Args:
        name: one of MODELS.
    """
    shape, meta = name.lower(), torch.device("meta")
    return random_llava(shape, None, "float32", device=meta, name=name, text_tower=None, **reading_of(shape))


def random_llava(
    shape: str | Mapping[str, Any],
    distinct: int | None = None,
    dtype: str = "bfloat16",
    layers: int | None = None,
    device: torch.device | None = None,
    name: str = "",
    text_tower: str | None = "random weights",
    **conventions: Any,
) -> Llava:
    """A model of a known shape with random weights.

    Args:
        shape: a name of SHAPES, or what `narrow` returns.
        distinct: number of decoder layers with their own weights; the other layers reuse them in turn, so that a model
            of full depth needs little memory and computes the same number of operations. None gives each its own.
        layers: number of decoder layers; None for the full depth.
        device: None for the CPU.
        name: of the model; "" for "random" and the shape.
        text_tower: description of the CLIP text tower; None for a model without one.
        conventions: image options of llava.model.llava_next.LlavaNext.
    """
    device = device or torch.device("cpu")
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    family: Family = sizes["family"]
    layers = layers or sizes["text"]["num_hidden_layers"]
    text = {**sizes["text"], "num_hidden_layers": min(distinct or layers, layers)}
    model = hf_model(family, text, sizes.get("vision", CLIP_L_336), DTYPES[dtype], device)
    fuse(model, DTYPES[dtype], device)
    share_layers(model.model.language_model, layers)
    video, qwen = family == "video_llava", family == "qwen2_5_vl"
    side = None if qwen else model.config.vision_config.image_size
    # One unknown token per word: about as many tokens as a real prompt has.
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    checkpoint = Checkpoint(
        model=model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
        image_processor=QwenImageProcessor() if side is None else ImageProcessor(side, side),
        conversation="qwen2_vl" if qwen else "vicuna_v1",
        layout="original",
        name=name or f"random {shape if isinstance(shape, str) else family}",
        notes=(),
        family=family,
        frames=FRAMES if video else 0,
        temporal=video,
        text_tower=None if qwen else text_tower,
        vocabulary=sizes["text"]["vocab_size"] // 1000 * 1000,  # the head has padding rows
    )
    runtime = FAMILIES[family] if qwen else type("Random", (RandomClip, FAMILIES[family]), {})
    made: Llava = runtime(checkpoint, device, **conventions)
    return made


def hf_model(
    family: Family, text: Mapping[str, Any], vision: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The HF model of a family with random weights.

    Args:
        text, vision: fields of the two parts of config.json.
    """
    config_class: Any = HF_CLASSES[family].config_class
    config = config_class(text_config=text, vision_config=vision)
    if family == "llava_next":  # the library's default resolutions assume tiles of 336 pixels
        side = config.vision_config.image_size
        config.image_grid_pinpoints = [[side * a, side * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    set_kernel(config, "sdpa")
    build, extra = hf_class(family, FRAMES if family == "video_llava" else None)
    with no_init_weights(), local_torch_dtype(dtype), torch.device(device):
        made: PreTrainedModel = build(config, *extra)
    # One block of noise is repeated, because drawing a billion weights takes a minute.
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 1 and name.endswith("weight"):
                weight.fill_(1.0)
                continue
            for part in weight.view(-1).split(block.numel()):
                part.copy_(block[: part.numel()])
    made.eval()
    return made


class RandomClip(Llava):
    """A LLaVA with a CLIP text tower of CLIP-L's shape and random weights."""

    @cached_property
    def clip(self) -> ClipText:
        def words(text: str) -> list[int]:
            return [1 + place for place, _ in enumerate(text.split())]

        vision: Any = self.tower
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        last = config.vocab_size - 1
        with torch.device(self.device):
            tower = ClipText(config, vision.config.hidden_size, vision.post_layernorm, words, last - 1, last)
        return tower.eval().requires_grad_(False)


def share_layers(llm: LlamaModel, layers: int) -> None:
    """Add layers to a decoder that share the weights of its layers, each with its own index."""
    own = len(llm.layers)
    for index in range(own, layers):
        source: Any = llm.layers[index % own]
        # deepcopy shares what is in the memo and copies the rest. The configuration is shared, because a copy would
        # keep its attention kernel when the model is given another.
        memo: dict[int, Any] = {id(weight): weight for weight in source.parameters()}
        shared = copy.deepcopy(source, memo | {id(llm.config): llm.config})
        shared.self_attn.layer_idx = index
        llm.layers.append(shared)
    llm.config.num_hidden_layers = layers


QUESTION = "What is the color of the small object on the left side of the image?"
SUFFIX = "Answer the question using a single word or phrase."
SIDE = 336


def noise(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image of random pixels. The time of most methods does not depend on the content."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def visual(model: Llava, seed: int) -> Image.Image | Video:
    """An image or a video of noise with `model.visual_tokens` visual tokens."""
    if isinstance(model, VideoLlava):
        return Video(tuple(noise(1000 * seed + frame) for frame in range(model.frames)))
    if isinstance(model, QwenVL):
        # The grid of merge groups that is closest to a square.
        groups, edge = model.visual_tokens, model.image_processor.patch * model.image_processor.merge
        rows = next(rows for rows in range(int(groups**0.5), 0, -1) if groups % rows == 0)
        return noise(seed, groups // rows * edge, rows * edge)
    return noise(seed)


def noise_batches(model: Llava, size: int, differ: bool) -> Callable[[int], list[Sample]]:
    """A function from the number of a turn to its batch: one question about each of `size` images of noise.

    Args:
        differ: every turn has other images; otherwise all turns have the same batch.
    """

    @lru_cache(maxsize=1)
    def batch(first: int) -> list[Sample]:
        return [Sample(f"s{seed}", QUESTION, SUFFIX, visual(model, seed)) for seed in range(first, first + size)]

    return lambda turn: batch(turn * size if differ else 0)
