"""Bytes and operations of a batch, from the shapes of a model: weights, key/value cache, activations.

Weights and cache are exact: formulas give what the loaded model and the run hold. Activations are the tensors that are
alive together at the peak of each stage, including those of the method. To find them, one prefill of the batch runs on
the meta device, which computes shapes only, and a `Meter` counts its tensors. Workspaces of kernels, the CUDA context
and fragmentation of the allocator are not counted.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.efficiency.counts import MarkedTimer
from eval.efficiency.oracle import flat_oracle
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import qwen_vl
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.pipeline.decoder import BLOCK
from llava.pipeline.generate import prefill
from llava.processing.image import Grid
from llava.processing.prompt import Prompt, Sample
from llava.reduction.budget import bounds, planned
from llava.reduction.modules import layer_flops, linear_flops, prefill_flops, tower_flops
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import TokenLayout, frames, single, spec_of

# Bytes per weight of a quantised linear layer. bitsandbytes adds a float32 scale per output row in 8 bits (`weights`
# counts these), and in 4 bits (NF4) a byte per 64 weights and a float32 per 256 of these bytes.
BITS_8, BITS_4 = 1.0, 0.5 + 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4
# Part of a weight's name -> what the weight belongs to. All other weights are the decoder's.
PARTS = {
    "multi_modal_projector": "projector",
    "visual.merger": "projector",
    "visual.": "vision tower",
    "vision_tower": "vision tower",
    "image_tower": "vision tower",
    "video_tower": "vision tower",
    "lm_head": "head",
}
# Linear layers that tensor parallelism splits by input. Every rank holds their whole bias, which is added after the sum
# over ranks.
CUT_BY_INPUT = ("o_proj", "down_proj", "lm_head")
GROUP = 64  # DeepSpeed splits layers without heads into groups of this many rows or columns
GIB = 2**30
META = torch.device("meta")


@dataclass(frozen=True)
class QuestionShape:
    """The sizes of a question that memory and time depend on.

    Attributes:
        text: number of text tokens in the prompt.
        images: token layout of every image or video.
        names: identifies the images. Questions of a batch with equal names share one pass of the tower.
    """

    text: int
    images: tuple[TokenLayout, ...]
    names: str = ""


def layout_of(model: Llava, size: tuple[int, int] | None = None, video: bool = False) -> TokenLayout:
    """The token layout that `model.views` gives an image of this size.

    Args:
        size: (width, height) in pixels; None for the largest image that the model takes.
        video: the input is a video, which only Video-LLaVA lays out differently.
    """
    grid = model.layout
    if isinstance(model, VideoLlava) and video:
        return frames(model.frames, grid.rows, grid.columns).with_cls
    if isinstance(model, QwenVL) and size is not None:
        _, rows, columns = model.image_processor.grid(size)
        merge = model.image_processor.merge
        return single(rows // merge, columns // merge)
    if isinstance(model, LlavaNext):
        return model.anyres.arrange(size) if size is not None else model.largest
    return single(grid.rows, grid.columns)


def visual_plan(model: Llava, reducer: Reducer, image: TokenLayout, most: bool = False) -> tuple[int, ...]:
    """Visual tokens of one image that enter each decoder layer.

    Args:
        most: if the number depends on the content of the image, the most that the method may keep stands in, in place
            of the budget.
    """
    own = spec_of(model.spec, image)
    if (plan := _plan(model, reducer, image)) is not None:
        return plan
    tokens = ceil(bounds(reducer, own)[1]) if most else reducer.for_image(own).budget
    return (min(tokens, own.visual_tokens),) * own.layers


def _plan(model: Llava, reducer: Reducer, image: TokenLayout) -> tuple[int, ...] | None:
    """Like `visual_plan`, but None if the number depends on the content of the image."""
    own = spec_of(model.spec, image)
    if own.crops or own.newlines:
        return planned(reducer, own)
    method = reducer.for_image(own)
    return method.with_budget(min(method.budget, own.visual_tokens)).tokens_per_layer(own)


def by_image(model: Llava, reducer: Reducer, questions: Iterable[QuestionShape]) -> bool:
    """Whether the content of an image decides how many of its tokens are kept."""
    return any(_plan(model, reducer, image) is None for question in questions for image in question.images)


def lengths(model: Llava, reducer: Reducer, question: QuestionShape, most: bool = False) -> tuple[int, ...]:
    """Tokens of a prompt that enter each decoder layer, text included; `most` as in `visual_plan`."""
    plans = [visual_plan(model, reducer, image, most) for image in question.images]
    layers = range(model.spec.layers)
    return tuple(question.text + sum(plan[layer] for plan in plans) for layer in layers)


# Weights


@dataclass(frozen=True)
class Weights:
    """Bytes of one rank's weights by part: "vision tower", "projector", "decoder", "head", and "text tower" if used.

    Attributes:
        device: on the rank's device. "gathered" holds the layers that ZeRO-Inference fetches while they compute.
        host: in the machine's memory or in files, under ZeRO-Inference.
    """

    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.device.values())


def weights(model: Llava, itemsize: int, quantization: str | None = None, split: int = 1) -> Weights:
    """Bytes of the weights of one rank. If ranks hold unequal parts, this is the largest.

    Args:
        itemsize: bytes of a weight that is not quantised.
        quantization: "8bit" or "4bit" for the linear layers of the decoder.
        split: ranks over which the linear layers of the decoder and the head are split (tensor parallelism).
    """
    held, heads = {"vision tower": 0, "projector": 0, "decoder": 0, "head": 0}, _heads(model)
    if "clip" in vars(model):  # a CLIP text tower that a method reads, in float32
        held["text tower"] = sum(weight.numel() for weight in model.clip.parameters()) * FLOAT32
    # A head tied to the embeddings takes no memory of its own. Under tensor parallelism its part is a copy.
    for name, weight in model.hf_model.named_parameters(remove_duplicate=split == 1):
        part = next((part for word, part in PARTS.items() if word in name), "decoder")
        count, linear = weight.numel(), part == "decoder" and "_proj." in name
        if linear and name.endswith("weight") and quantization == "8bit":
            held[part] += int(count * BITS_8) + len(weight) * FLOAT32
        elif linear and name.endswith("weight") and quantization == "4bit":
            held[part] += int(count * BITS_4)
        else:
            cut = linear or part == "head"
            held[part] += (prod(largest_part(name, weight, split, heads)) if cut else count) * itemsize
    return Weights(held, {})


def largest_part(name: str, weight: Tensor, ranks: int, heads: int) -> tuple[int, ...]:
    """Under tensor parallelism, the shape of a weight or bias on the rank that holds most of it.

    Attention is split by key/value heads, other layers in groups of 64. The last rank also takes the remainder.

    Args:
        name: of the weight, or of its layer.
        weight: the whole weight or bias of a linear layer.
        heads: key/value heads of the decoder.
    """
    shape, by_input = list(weight.shape), any(layer in name for layer in CUT_BY_INPUT)
    if not (by_input and weight.dim() == 1):
        size = shape[by_input]
        unit = size // heads if "self_attn" in name else GROUP if size >= GROUP else 1
        count, rest = divmod(size, unit)
        shape[by_input] = unit * ceil(count / ranks) + (rest if count % ranks == 0 else 0)
    return tuple(shape)


def partitioned(model: Llava, itemsize: int, whole: Weights, place: str, ranks: int = 1) -> Weights:
    """The weights of one rank under ZeRO-Inference.

    Args:
        whole: the weights without ZeRO-Inference.
        place: where the matrices of the decoder and the head are kept: "cpu", or "none" for the device itself.
        ranks: number of ranks, each of which keeps one part of these matrices.
    """
    llm: Any = model.llm
    matrices = [weight.numel() for layer in llm.layers for weight in layer.parameters() if weight.dim() > 1]
    head = whole.device["head"]
    outside = {"decoder": sum(matrices) * itemsize, "head": head}
    own = {part: -(-size // ranks) for part, size in outside.items()}
    layer = sum(weight.numel() for weight in llm.layers[0].parameters())
    # At most two layers and the largest matrix are gathered at once, see llava/model/parallel.py.
    gathered = (2 * layer + max([*matrices, head // itemsize])) * itemsize
    stays = own if place == "none" else {}
    kept = {part: size - outside.get(part, 0) + stays.get(part, 0) for part, size in whole.device.items()}
    return Weights(kept | {"gathered": gathered}, {} if place == "none" else own)


# Key/value cache


def kv_bytes(model: Llava, prompts: Sequence[Sequence[int]], itemsize: int, new_tokens: int = 0, split: int = 1) -> int:
    """Bytes of the keys and values of a batch on the rank with most heads, with padding and allocated room.

    Args:
        prompts: for every prompt, its tokens in each decoder layer.
        new_tokens: tokens decoded after the prompt; 0 gives the cache after prefill, which has no room yet.
        split: ranks of tensor parallelism.
    """
    llm: Any = model.llm
    block = BLOCK + 1  # a token that finds no room allocates its own column and BLOCK more
    longest = [max(layer) + -(-new_tokens // block) * block for layer in zip(*prompts, strict=True)]
    attentions = [layer.self_attn for layer in llm.layers]
    widths = [one.k_proj.out_features + one.v_proj.out_features for one in attentions]  # numbers of a token
    rows = sum(length * width for length, width in zip(longest, widths, strict=True))
    heads = _heads(model)
    held: int = len(prompts) * rows * itemsize * ceil(heads / split) // heads
    return held


def _heads(model: Llava) -> int:
    llm: Any = model.llm
    heads: int = llm.config.num_key_value_heads
    return heads


# Activations


@dataclass(frozen=True)
class Activations:
    """Peak bytes of each stage, besides the weights.

    Attributes:
        vision: the tower on all images of the batch.
        prefill: token selection and the decoder on the prompts, without the cache.
        decode: the head, and a second copy of the largest layer's cache while that grows; otherwise without the cache.
        prefill_with_cache: prefill and the keys and values that exist at that moment. Both need not peak together, so
            this is at most their sum.
    """

    vision: int
    prefill: int
    decode: int
    prefill_with_cache: int

    def peak(self, kv_bytes: int) -> int:
        """Peak bytes besides the weights, where `kv_bytes` is the cache of the whole answer."""
        return max(self.vision, self.prefill_with_cache, self.decode + kv_bytes)


@lru_cache(maxsize=256)
def activations(
    model: Llava,
    reducer: Reducer,
    questions: tuple[QuestionShape, ...],
    itemsize: int,
    split: int = 1,
    on_host: bool = True,
) -> Activations:
    """Bytes of the tensors that are alive together at the peak of each stage, from one prefill on the meta device.

    Tensors there have shapes but no values; code that reads a value gets 1. For a method whose number of tokens depends
    on the content of the image, as many evenly spaced tokens as it may keep stand in.

    Args:
        split: ranks over which the linear layers of the decoder are split.
        on_host: the run is on the CPU, so its pixels count from the start.
    """
    asked = outlined(model, torch.float32 if itemsize == FLOAT32 else torch.bfloat16, split, on_host)
    if reducer.needs_text_tower:
        _ = asked.clip  # makes its weights before the meter starts
    samples = []
    for number, question in enumerate(questions):  # their images are token layouts, which `outlined` reads
        words = " ".join(["word"] * question.text)
        ids = tuple(f"{question.names} {place}" for place in range(len(question.images))) if question.names else ()
        samples.append(Sample(str(number), words, "", question.images or None, ids))  # type: ignore[arg-type]
    if by_image(model, reducer, questions):
        images = [image for question in questions for image in question.images]
        reducer = flat_oracle(max(visual_plan(model, reducer, image, most=True)[0] for image in images))

    ends = [("", 0)]  # name of each stage, and the number of the meter's events at its end

    def mark(stage: str) -> None:
        meter.update()
        ends.append((stage, len(meter.events)))

    with torch.inference_mode(), Ones(), Meter(META) as meter:  # type: ignore[no-untyped-call]  # torch's
        state, _ = prefill(asked, samples, reducer, MarkedTimer(META, mark))
        asked.logits(state.hidden).argmax(-1)
        mark("head")
        cache: Any = state.cache.layers
        held = meter.numbers(tensor for layer in cache for tensor in (layer.keys, layer.values))

    def peak(stages: Sequence[str], without: Iterable[int] = ()) -> int:
        spans = [(start, end) for (_, start), (stage, end) in pairwise(ends) if stage in stages]
        most: int = max(meter.peak(start, end, without) for start, end in spans)
        return most

    before_decoding = ("selection", "prefill", "head")
    return Activations(
        vision=peak(("preprocess", "vision")),
        prefill=peak(before_decoding, held),
        decode=peak(("head",), held) + max(layer.keys.nbytes + layer.values.nbytes for layer in cache),
        prefill_with_cache=peak(before_decoding),
    )


class Ones(TorchDispatchMode):
    """Copies of meta tensors to the host are filled with ones, and meta tensors that are compared are equal."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device)]
        if function.overloadpacket is torch.ops.aten.to and given == [torch.device("cpu")] and args[0].is_meta:
            args = (torch.ones_like(args[0], device="cpu"), *args[1:])
        if function.overloadpacket is torch.ops.aten.equal and args[0].is_meta:
            return True
        if function.overloadpacket is torch.ops.aten.copy_ and args[1].is_meta and not args[0].is_meta:
            args = (args[0], torch.ones_like(args[1], device="cpu"))
        return function(*args, **kwargs)


def outlined(model: Llava, dtype: torch.dtype, split: int, on_host: bool) -> Llava:
    """A copy of a model on the meta device that takes token layouts as images and one token per word of a question.

    Args:
        dtype: of its weights.
        split, on_host: see `activations`.
    """
    found: Llava = object.__new__(type("Outlined", (_Outlined, type(model)), {"pixels_on": META if on_host else "cpu"}))
    found.__dict__.update(vars(model))
    found.hf_model = _without_numbers(model.hf_model, dtype)
    found.llm, found.head, found.device = found.hf_model.model.language_model, found.hf_model.lm_head, META
    if isinstance(model, QwenVL):
        # Blocks of windows need the same memory, and a kernel for every window: one of them stands for all.
        visual = found.hf_model.model.visual
        whole = getattr(visual.config, "fullatt_block_indexes", range(len(visual.blocks)))
        windowed = [index for index in range(len(visual.blocks)) if index not in whole]
        for index in windowed[1:]:
            visual.blocks[index] = _Unchanged()
    found._read_tower()
    found.layout = model.layout
    if model.newline is not None:
        found.newline = found.hf_model.model.image_newline
    if "clip" in vars(model):
        vars(found)["clip"] = _without_numbers(model.clip, torch.float32)
        found.clip._post_layernorm = (found.tower.post_layernorm,)
    llm: Any = found.llm
    for name, linear in llm.layers.named_modules() if split > 1 else ():
        if isinstance(linear, nn.Linear):
            for kind, weight in list(linear.named_parameters()):
                part = weight.new_empty(largest_part(name, weight, split, _heads(model)))
                setattr(linear, kind, nn.Parameter(part, requires_grad=False))
    return found


def _without_numbers(module: Any, dtype: torch.dtype) -> Any:
    """A copy of a module on the meta device with weights of this type; buffers keep their own."""
    memo: dict[int, Any] = {id(part): torch.empty_like(part, device=META) for part in module.buffers()}
    for part in module.parameters():
        memo[id(part)] = nn.Parameter(torch.empty_like(part, device=META, dtype=dtype), requires_grad=False)
    return copy.deepcopy(module, memo)


class _Unchanged(nn.Module):
    """A block that does nothing."""

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        return hidden


class _Outlined(Llava):
    """The methods of a model that `outlined` overrides."""

    pixels_on: Any

    def prompt(self, sample: Sample) -> Prompt:
        """As many text tokens as words. The first half stands before the images, the second half is the question."""
        words, slots = len(sample.question.split()), (IMAGE_TOKEN_INDEX,) * len(sample.images)
        start = words // 2 + len(slots)
        ids = ((0,) * (words // 2), slots, (0,) * (words - words // 2))
        question = (start, len(slots) + words)
        return Prompt(tuple(token for part in ids for token in part), question, question, "")

    def views(self, image: Any) -> tuple[Tensor, TokenLayout]:
        tower: Any = self.tower_of(image.temporal)
        side = tower.config.image_size
        return torch.empty(len(image.crops), 3, side, side, device=self.pixels_on), image

    def patches(self, images: Sequence[Any]) -> tuple[Tensor, tuple[Grid, ...]]:
        merge, tower = self.image_processor.merge, cast(Any, self.tower)
        grids = tuple((1, image.grid[0] * merge, image.grid[1] * merge) for image in images)
        numbers = tower.patch_embed.proj.weight[0].numel()
        return torch.empty(sum(rows * columns for _, rows, columns in grids), numbers, device=self.pixels_on), grids


class Meter(TorchDispatchMode):
    """While active, records when the memory of a new tensor is allocated and freed.

    It sees the tensors that operations make, on any device; also on "meta", which allocates nothing. Workspaces of
    kernels, the CUDA context, fragmentation of an allocator and memory of numpy are not counted.

    Tensors that later questions reuse (llava/reduction/ranking.py) are made outside of inference mode and not counted.
    Otherwise the first question of its lengths would seem to need more than the second.

    Args:
        device: only tensors of this device are counted; None counts those of all devices.

    Attributes:
        events: (number of the allocation, its bytes, negative when it is freed), in the order in which they happened.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.device, self._inference = device, torch.is_inference_mode_enabled()
        self.events: list[tuple[int, int]] = []
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.update()
        given = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if not isinstance(one, Tensor) or self.device not in (None, one.device):
                continue
            if torch.is_inference_mode_enabled() != self._inference:
                continue
            storage = one.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._live:
                self._count += 1
                self._live[storage._cdata] = StorageWeakRef(storage), self._count, storage.nbytes()
                self.events.append((self._count, storage.nbytes()))
        return out

    def update(self) -> None:
        """Record what was freed since the last operation."""
        for address, (known, number, size) in list(self._live.items()):
            if known.expired():
                del self._live[address]
                self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers that `events` uses for the memory of these tensors."""
        return {self._live[_address(one)][1] for one in tensors if _address(one) in self._live}

    def peak(self, start: int = 0, stop: int | None = None, without: Iterable[int] = ()) -> int:
        """Most bytes alive at once during `events[start:stop]`.

        Args:
            without: numbers of allocations that are left out.
        """
        left_out, held, most = set(without), 0, 0
        for place, (number, size) in enumerate(self.events[:stop]):
            held += 0 if number in left_out else size
            most = max(most, held) if place >= start else 0
        return most


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


# Operations


@lru_cache(maxsize=4096)
def tower_operations(model: Llava, reducer: Reducer, image: TokenLayout) -> int:
    """Operations of the vision tower on all tiles of one image, without those of a method's scores."""
    if isinstance(model, QwenVL):
        merge = model.image_processor.merge
        rows, columns = image.grid
        return qwen_vl.tower_flops(model.tower, (rows * merge, columns * merge))
    grid = reducer.input_grid(model.layout) or (model.layout.rows, model.layout.columns)
    tokens = grid[0] * grid[1] + 1
    if "tower" in reducer.acts_in:  # tokens merge block by block down to the budget, so this is a lower bound
        tokens = min(tokens, reducer.for_image(spec_of(model.spec, image)).budget // len(image.crops) + 1)
    tower: Any = model.tower_of(image.temporal)
    blocks = model.select_layer % (len(tower.encoder.layers) + 1)
    return len(image.crops) * tower_flops(tower, grid[0] * grid[1], [(tokens, tokens)] * blocks)


def decoder_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of the decoder on one prompt, and of the head on its last token."""
    llm: Any = model.llm
    return prefill_flops(llm.layers, prompt, model.head)


def projector_of(model: Llava) -> Any:
    """What makes visual tokens of the tower's output."""
    tower: Any = model.tower
    return tower.merger if isinstance(model, QwenVL) else model.projector


def step_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of decoding one token after a prompt, the head included."""
    llm: Any = model.llm
    layers = zip(llm.layers, prompt, strict=True)
    return sum(layer_flops(layer, 1, length + 1) for layer, length in layers) + linear_flops(model.head, 1)


# In words


def size_text(size: float) -> str:
    """Bytes in words: "13.1 GiB", "14.5 MiB"."""
    name, unit = ("GiB", GIB) if size >= 0.1 * GIB else ("MiB", GIB / 1024)
    return f"{figures(size / unit)} {name}"


def listed(parts: Mapping[str, int], total: int | None = None) -> str:
    """Parts and their sum (or `total`) in one unit: "13.1 GiB (vision tower 0.57, decoder 12.3)"."""
    total = sum(parts.values()) if total is None else total
    unit = GIB if total >= 0.1 * GIB else GIB / 1024
    inside = ", ".join(f"{name} {figures(size / unit)}" for name, size in parts.items() if size)
    return f"{size_text(total)} ({inside})"


def figures(value: float) -> str:
    """One decimal from 10 on, two from 0.1 on, and two significant figures below that."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds in words: "3.1 ms", "12 s", "5.0 min", "2.1 h"."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
