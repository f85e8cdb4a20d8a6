"""Bytes and operations of a batch, from the shapes of a model: weights, key/value cache, activations.

Weights and cache are exact: they are those of the loaded model and of the run. Activations are the tensors that are
alive together at the peak of the forward pass, from the shapes of each stage. What a kernel needs for itself, the CUDA
context and the fragments of the allocator are not counted, and neither are a method's own tensors, apart from copies
of the visual tokens before layer 0.

Shapes: B questions, L tokens of the longest prompt, D channels, N visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder import qwen_encoder
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.reduction.crop_budget import planned
from llava.reduction.flops import layer_flops, linear_flops, prefill_flops, projector_flops, tower_flops
from llava.reduction.model_spec import spec_of
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import TokenLayout, frames, single

# Bytes of a weight of a quantised linear layer: the values, and their scales (bitsandbytes: a float32 per output row;
# NF4 with a byte per 64 values and a float32 per 256 of these bytes).
BITS_8, BITS_4 = 1.0, 0.5 + 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4
# Methods that act before layer 0 compute in float32. With their normalised, rotated or multiplied copies of the visual
# tokens they were measured to need two to four times the tokens in float32.
FLOAT32_COPIES = 3


@dataclass(frozen=True)
class QuestionShape:
    """What memory and time depend on in a question.

    Attributes:
        text: text tokens of the prompt.
        images: token layout of every image or video.
        names: what tells its images from others; questions of a batch with equal names share a pass of the tower.
    """

    text: int
    images: tuple[TokenLayout, ...]
    names: str = ""


def layout_of(model: Llava, size: tuple[int, int] | None = None, video: bool = False) -> TokenLayout:
    """Visual tokens of an image, as `model.views` makes them.

    Args:
        size: (width, height); None for the largest image that the model takes.
    """
    grid = model.layout
    if isinstance(model, VideoLlava) and video:
        return frames(model.frames, grid.rows, grid.columns).with_cls()
    if isinstance(model, QwenVL) and size is not None:
        _, rows, columns = model.image_processor.grid(size)
        merge = model.image_processor.merge
        return single(rows // merge, columns // merge)
    if isinstance(model, LlavaNext):
        return model.anyres.arrange(size) if size is not None else model.largest
    return single(grid.rows, grid.columns)


def visual_plan(model: Llava, reducer: Reducer, image: TokenLayout) -> tuple[int, ...]:
    """Visual tokens of one image that enter each decoder layer; the budget where a method decides by the image."""
    own = spec_of(model.spec, image)
    if own.crops or own.newlines:
        plan, method = planned(reducer, own), reducer.for_picture(own)
    else:
        method = reducer.for_picture(own)
        method = method.sized(min(method.budget, own.visual_tokens))
        plan = method.tokens_per_layer(own)
    return plan or (min(method.budget, own.visual_tokens),) * own.layers


def lengths(model: Llava, reducer: Reducer, question: QuestionShape) -> tuple[int, ...]:
    """Tokens of a prompt that enter each decoder layer, text included."""
    plans = [visual_plan(model, reducer, image) for image in question.images]
    layers = range(model.spec.layers)
    return tuple(question.text + sum(plan[layer] for plan in plans) for layer in layers)


# Weights


@dataclass(frozen=True)
class Weights:
    """Bytes of weights by part: "vision tower", "projector", "decoder", "head", and "text tower" where it is read.

    Attributes:
        device: held by the device of one rank. "gathered" is what ZeRO-Inference fetches for the layer that computes.
        host: held in the memory of the machine or in files, for one rank (ZeRO-Inference).
    """

    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.device.values())


def weights(
    model: Llava, itemsize: int, quantization: str | None = None, split: int = 1, text_tower: int = 0
) -> Weights:
    """Bytes of the weights of one rank.

    Args:
        itemsize: bytes of a weight that is not quantised.
        quantization: "8bit" or "4bit" for the linear layers of the decoder.
        split: ranks over which the linear layers of the decoder and the head are split (tensor parallelism).
        text_tower: weights of the CLIP text tower if the method reads it, in float32.
    """
    inner: Any = model.hf_model.model
    merger = list(inner.visual.merger.parameters()) if hasattr(inner, "visual") else []
    tower = [inner.visual] if merger else [getattr(inner, name) for name in TOWERS if hasattr(inner, name)]
    sizes = {
        "vision tower": sum(_numbers(part) for part in tower) - sum(p.numel() for p in merger),
        "projector": sum(p.numel() for p in merger) or _numbers(inner.multi_modal_projector),
    }
    found = {part: count * itemsize for part, count in sizes.items()}
    if text_tower:
        found["text tower"] = text_tower * FLOAT32
    found["decoder"] = _decoder_bytes(model, itemsize, quantization, split)
    if hasattr(inner, "image_newline"):
        found["decoder"] += inner.image_newline.numel() * itemsize
    found["head"] = 0 if tied(model) else -(-_numbers(model.head) // split) * itemsize
    return Weights(found, {})


def tied(model: Llava) -> bool:
    """Whether head and embeddings are one weight."""
    llm: Any = model.llm
    return model.head.weight is llm.embed_tokens.weight


def partitioned(model: Llava, itemsize: int, whole: Weights, place: str, ranks: int = 1) -> Weights:
    """The weights of one rank under ZeRO-Inference.

    Args:
        place: "cpu" or "nvme=FOLDER", where the matrices of the decoder and the head are kept, or "none".
        ranks: each keeps a part of them.
    """
    llm: Any = model.llm
    matrices = [weight.numel() for layer in llm.layers for weight in layer.parameters() if weight.dim() > 1]
    head = whole.device["head"]
    outside = {"decoder": sum(matrices) * itemsize, "head": head}
    own = {part: -(-size // ranks) for part, size in outside.items()}
    layer = sum(weight.numel() for weight in llm.layers[0].parameters())
    # Two layers and the largest matrix are gathered at the most, see llava/model/parallel/zero.py.
    gathered = (2 * layer + max([*matrices, head // itemsize])) * itemsize
    stays = own if place == "none" else {}
    kept = {part: size - outside.get(part, 0) + stays.get(part, 0) for part, size in whole.device.items()}
    return Weights(kept | {"gathered": gathered}, {} if place == "none" else own)


# Their biases are added after the sum over ranks, and are whole on each.
CUT_BY_INPUT = ("o_proj", "down_proj")
TOWERS = ("vision_tower", "image_tower", "video_tower")


def _numbers(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _decoder_bytes(model: Llava, itemsize: int, quantization: str | None, split: int) -> int:
    """Bytes of embeddings, norms and layers; the linear layers are quantised or split."""
    llm: Any = model.llm
    total = _numbers(llm) * itemsize
    for name, linear in llm.layers.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        count = linear.weight.numel()
        held = -(-count // split) * itemsize
        if quantization == "8bit":
            held = int(count * BITS_8) + linear.out_features * FLOAT32
        elif quantization == "4bit":
            held = int(count * BITS_4)
        total += held - count * itemsize
        if linear.bias is not None and not name.endswith(CUT_BY_INPUT):
            total -= (linear.out_features - -(-linear.out_features // split)) * itemsize
    return total


# Key/value cache


def kv_bytes(model: Llava, prompts: Sequence[Sequence[int]], itemsize: int, new_tokens: int = 0, split: int = 1) -> int:
    """Bytes of the keys and values of a batch, padding included.

    Args:
        prompts: tokens of every prompt in each decoder layer.
        new_tokens: tokens decoded after the prompt; 0 gives the cache after prefill.
    """
    llm: Any = model.llm
    longest = [max(layer) + new_tokens for layer in zip(*prompts, strict=True)]
    rows = sum(length * _key_value_width(layer) for length, layer in zip(longest, llm.layers, strict=True))
    return len(prompts) * rows * itemsize // split


def _key_value_width(layer: Any) -> int:
    """Numbers that a token leaves in the cache of a layer."""
    return layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features


# Activations


@dataclass(frozen=True)
class Activations:
    """Bytes at the peak of each stage.

    Attributes:
        vision: the tower on all images of the batch.
        prefill: the decoder on the prompts; without the cache.
        decode: one further token per question; without the cache.
        prefill_with_cache: prefill, and the keys and values that exist by then: the longest prompts and the largest
            cache need not meet in one layer.
    """

    vision: int
    prefill: int
    decode: int
    prefill_with_cache: int


def activations(
    model: Llava, reducer: Reducer, questions: Sequence[QuestionShape], itemsize: int, split: int = 1
) -> Activations:
    """Bytes of the tensors that are alive together at the peak of each stage."""
    llm: Any = model.llm
    images = {
        (question.names or str(number), place): image
        for number, question in enumerate(questions)
        for place, image in enumerate(question.images)
    }
    prompts = [lengths(model, reducer, question) for question in questions]
    longest = [max(layer) for layer in zip(*prompts, strict=True)]
    width = llm.embed_tokens.embedding_dim
    # A method that acts before layer 0 finds the prompts assembled with all visual tokens.
    assembled = longest[0]
    if "prompt" in reducer.acts_in:
        assembled = max(question.text + sum(image.tokens for image in question.images) for question in questions)
    # Kept until the prefill ends: the tower's features, the visual tokens made of them, the embedded prompts.
    visual = assembled - min(question.text for question in questions)
    kept = sum(_features(model, image) for image in images.values()) * itemsize
    kept += len(questions) * (assembled + visual) * width * itemsize
    layers = [_layer_peak(model, len(questions), length, itemsize, split) for length in longest]
    cached, with_cache = 0, []
    for layer, length, peak in zip(llm.layers, longest, layers, strict=True):
        cached += len(questions) * length * _key_value_width(layer) * itemsize // split
        with_cache.append(cached + peak)
    # Before layer 0: a method's copies of the visual tokens, or whole prompts through some layers.
    ahead = 0
    if "prompt" in reducer.acts_in:
        ahead = FLOAT32_COPIES * len(questions) * visual * width * FLOAT32
    if getattr(reducer, "probe", None) == "contextual":
        ahead = max(ahead, _layer_peak(model, len(questions), assembled, itemsize, split))
    head = len(questions) * ((width + model.head.out_features) * itemsize + model.vocabulary * FLOAT32)
    return Activations(
        vision=_tower_peak(model, list(images.values()), itemsize),
        prefill=kept + max(*layers, head, ahead),
        decode=max(_layer_peak(model, len(questions), 1, itemsize, split), head),
        prefill_with_cache=kept + max(*with_cache, cached + head, ahead),
    )


def _features(model: Llava, image: TokenLayout) -> int:
    """Numbers in the tower's features of one image."""
    tower: Any = model.tower
    if isinstance(model, QwenVL):
        return image.tokens * model.image_processor.merge**2 * tower.blocks[0].attn.proj.in_features
    grid = model.layout
    return len(image.crops) * (grid.rows * grid.columns + 1) * tower.config.hidden_size


def _tower_peak(model: Llava, images: Sequence[TokenLayout], itemsize: int) -> int:
    """Pixels, the residual stream, and the largest temporaries of one block."""
    tower: Any = model.tower
    if not images:
        return 0
    if isinstance(model, QwenVL):
        patches = sum(image.tokens for image in images) * model.image_processor.merge**2
        block = tower.blocks[0]
        wide, inner = block.attn.proj.in_features, max(p.out_features for p in _linears(block.mlp))
        pixels = tower.patch_embed.proj.weight[0].numel()
        # Queries and keys are turned in float32: both, and the products that make the second.
        turned = patches * (5 * wide * itemsize + 5 * wide * FLOAT32)
        return 2 * patches * pixels * FLOAT32 + max(turned, patches * (2 * wide + 3 * inner) * itemsize)
    config = tower.config
    crops = sum(len(image.crops) for image in images)
    rows = crops * (model.layout.rows * model.layout.columns + 1)
    wide, inner = config.hidden_size, config.intermediate_size
    temporaries = 3 if "quick" in config.hidden_act else 2
    # Stacked from a list of float32 images, then in the dtype of the tower.
    pixels = crops * 3 * config.image_size**2 * (2 * FLOAT32 + itemsize * (itemsize != FLOAT32))
    return pixels + rows * (2 * wide + max(temporaries * inner, 4 * wide)) * itemsize


def _layer_peak(model: Llava, questions: int, length: int, itemsize: int, split: int) -> int:
    """The hidden states and the largest temporaries of one decoder layer."""
    llm: Any = model.llm
    layer, wide = llm.layers[0], llm.embed_tokens.embedding_dim
    inner = layer.mlp.gate_proj.out_features // split
    queries = layer.self_attn.q_proj.out_features // split
    keys = layer.self_attn.k_proj.out_features // split
    rows = questions * length
    mlp = (2 * wide + 3 * inner) * itemsize
    attention = (2 * wide + 2 * queries + keys) * itemsize
    norm = 2 * wide * itemsize + 3 * wide * FLOAT32
    mask = questions * length * length * (1 + itemsize) if questions > 1 and length > 1 else 0
    return rows * max(mlp, attention, norm) + mask


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


# Operations


@lru_cache(maxsize=4096)
def tower_operations(model: Llava, reducer: Reducer, image: TokenLayout) -> int:
    """Operations of the vision tower on one image, all tiles; without a method's scores."""
    if isinstance(model, QwenVL):
        merge = model.image_processor.merge
        rows, columns = image.grid
        return qwen_encoder.tower_flops(model.tower, (1, rows * merge, columns * merge))
    grid = reducer.input_grid(model.layout) or (model.layout.rows, model.layout.columns)
    tokens = grid[0] * grid[1] + 1
    if "tower" in reducer.acts_in:  # merged block by block down to the budget: at least these
        tokens = min(tokens, reducer.for_picture(spec_of(model.spec, image)).budget // len(image.crops) + 1)
    tower: Any = model.tower_of(image.temporal)
    blocks = model.select_layer % (len(tower.encoder.layers) + 1)
    return len(image.crops) * tower_flops(tower, grid[0] * grid[1], [(tokens, tokens)] * blocks)


def decoder_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of the decoder on one prompt, and of the head on its last token."""
    llm: Any = model.llm
    return prefill_flops(llm.layers, prompt, model.head)


def projector_operations(model: Llava, tokens: int) -> int:
    return projector_flops(model.projector, tokens)


def step_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of one decoded token after a prompt."""
    llm: Any = model.llm
    layers = zip(llm.layers, prompt, strict=True)
    return sum(layer_flops(layer, 1, length + 1) for layer, length in layers) + linear_flops(model.head, 1)
