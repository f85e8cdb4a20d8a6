"""The random LLaVA-1.5 on which official code was run, rebuilt from names alone: no weight is stored.

CLIP with 24 blocks and 24 x 24 patches, Llama with 32 layers, both 64 wide: the depths and the patch grid that
official codes have written into them, small enough for a CPU. Every number comes from NumPy's PCG64, seeded by a name,
which is the same in every version; the golden data under tests/data/parity/ were recorded with exactly these weights
and cases.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, INNER = 64, 4, 128
BLOCKS, LAYERS, IMAGE, PATCH, PATCHES = 24, 32, 336, 14, 576
WORDS = 512
TEXT_BLOCKS, CLIP_WORDS, CLIP_LENGTH = 2, 512, 77

# What multiplies a unit normal, by the end of a name. Queries and keys are large enough for peaked attention: with flat
# attention every ranking would hang on the last bit.
GAIN = {"q_proj.weight": 2.5, "k_proj.weight": 2.5}
SMALL = 0.05  # biases, and deviations of norm scales from 1


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Unit normal numbers that depend on the name alone, float32."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _weight(name: str, *shape: int) -> Tensor:
    noise = draw(name, shape)
    if "norm" in name or "layrnorm" in name:
        return 1 + SMALL * noise if name.endswith("weight") else SMALL * noise
    if len(shape) == 1:
        return SMALL * noise
    if "embed" in name and "patch" not in name:
        return noise if name.endswith("embed_tokens.weight") else 0.3 * noise
    gain = next((gain for end, gain in GAIN.items() if name.endswith(end)), 1.0)
    return gain * noise / float(np.prod(shape[1:])) ** 0.5


def _weights_of(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Of every weight of a model, which is built without memory to learn their names and shapes."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in build().named_parameters()}
    return {name: _weight(name, *shape) for name, shape in shapes.items()}


def _clip_weights() -> dict[str, Tensor]:
    config = CLIPConfig(text_config=CLIP_TEXT_CONFIG, vision_config=VISION_CONFIG, projection_dim=WIDTH)
    return _weights_of(lambda: CLIPModel(config))


def vision_weights() -> dict[str, Tensor]:
    """The tower under the names of a CLIPModel (`vision_model.`...)."""
    return {name: weight for name, weight in _clip_weights().items() if name.startswith("vision_model.")}


def text_tower_weights() -> dict[str, Tensor]:
    """Text half of the CLIP model and both projections, under the names of a CLIPModel."""
    rest = {name: weight for name, weight in _clip_weights().items() if not name.startswith("vision_model.")}
    return rest | {"logit_scale": torch.tensor(2.6592)}


def language_weights() -> dict[str, Tensor]:
    """Projector, decoder and head under the names of the original layout (liuhaotian/llava-v1.5-7b)."""
    found = _weights_of(lambda: LlamaForCausalLM(LlamaConfig(**LANGUAGE_CONFIG)))
    for name in ("model.mm_projector.0", "model.mm_projector.2"):
        found[f"{name}.weight"] = _weight(f"{name}.weight", WIDTH, WIDTH)
        found[f"{name}.bias"] = _weight(f"{name}.bias", WIDTH)
    return found


VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_TEXT_CONFIG = {
    "model_type": "clip_text_model",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": TEXT_BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CLIP_LENGTH,
    "vocab_size": CLIP_WORDS,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    # The pooled token: the first that equals this id (transformers pools at the highest id only where this is 2).
    "bos_token_id": 1,
    "eos_token_id": CLIP_WORDS - 1,
    "pad_token_id": 0,
}
LANGUAGE_CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

BEFORE = 35  # tokens in front of the image, as in the vicuna_v1 prompt; official codes have it written into them


@dataclass(frozen=True)
class Case:
    """One random question.

    Attributes:
        pixels: [3, 336, 336] as they enter the tower.
        before: ids in front of the image, BOS first.
        after: ids behind it.
        clip: ids for the CLIP text tower, with its BOS and EOS.
    """

    pixels: Tensor
    before: list[int]
    after: list[int]
    clip: list[int]


def case(number: int) -> Case:
    """Case `number`: blobs of colour under noise, a prompt of random words."""
    rng = np.random.default_rng([2026, number])
    coarse = torch.from_numpy(rng.standard_normal((1, 3, 12, 12)).astype(np.float32))
    # Nearest neighbour on purpose: interpolation may differ in the last bit between versions of torch.
    blobs = coarse.repeat_interleave(IMAGE // 12, 2).repeat_interleave(IMAGE // 12, 3)[0]
    noise = torch.from_numpy(rng.standard_normal((3, IMAGE, IMAGE)).astype(np.float32))
    words = lambda count: [int(i) for i in rng.integers(3, WORDS, count)]  # noqa: E731
    before, after = [1, *words(BEFORE - 1)], words(int(rng.integers(8, 40)))
    clip = [1, *(int(i) for i in rng.integers(3, CLIP_WORDS - 1, rng.integers(4, 30))), CLIP_WORDS - 1]
    return Case(blobs + 0.5 * noise, before, after, clip)
