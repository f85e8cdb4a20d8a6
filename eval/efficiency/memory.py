"""Bytes and operations of a batch, from the shapes of a model: weights, key/value cache, activations.

Weights and cache are exact: they are those of the loaded model and of the run. Activations are the tensors that are
alive together at the peak of each stage, a method's own among them: the batch is asked on the meta device, which
computes shapes alone, and metered (`Meter`). What a kernel needs for itself, the CUDA context and the fragments of the
allocator are not counted.
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
from llava.reduction.budget import planned
from llava.reduction.modules import layer_flops, linear_flops, prefill_flops, projector_flops, tower_flops
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import TokenLayout, frames, single, spec_of
from llava.transformers_names import CACHE_NAMES, cache_of, refuse_others

# Bytes of a weight of a quantised linear layer: the values, and their scales (bitsandbytes: a float32 per output row;
# NF4 with a byte per 64 values and a float32 per 256 of these bytes).
BITS_8, BITS_4 = 1.0, 0.5 + 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4
# Part of a name -> what the weight belongs to; all others are the decoder's.
PARTS = {
    "multi_modal_projector": "projector",
    "visual.merger": "projector",
    "visual.": "vision tower",
    "vision_tower": "vision tower",
    "image_tower": "vision tower",
    "video_tower": "vision tower",
    "lm_head": "head",
}
# Linear layers that tensor parallelism cuts by input: their biases are added after the sum over ranks, and are whole on
# each.
CUT_BY_INPUT = ("o_proj", "down_proj", "lm_head")
GROUP = 64  # rows or columns, in which DeepSpeed deals what has no heads
GIB = 2**30
META = torch.device("meta")


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
        return frames(model.frames, grid.rows, grid.columns).with_cls
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
    return _plan(model, reducer, image) or (min(reducer.for_image(own).budget, own.visual_tokens),) * own.layers


def _plan(model: Llava, reducer: Reducer, image: TokenLayout) -> tuple[int, ...] | None:
    """The same; None where a method decides by the image."""
    own = spec_of(model.spec, image)
    if own.crops or own.newlines:
        return planned(reducer, own)
    method = reducer.for_image(own)
    return method.with_budget(min(method.budget, own.visual_tokens)).tokens_per_layer(own)


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


def weights(model: Llava, itemsize: int, quantization: str | None = None, split: int = 1) -> Weights:
    """Bytes of the weights of one rank; at most, where ranks hold unequal parts.

    Args:
        itemsize: bytes of a weight that is not quantised.
        quantization: "8bit" or "4bit" for the linear layers of the decoder.
        split: ranks over which the linear layers of the decoder and the head are split (tensor parallelism).
    """
    held, heads = {"vision tower": 0, "projector": 0, "decoder": 0, "head": 0}, _heads(model)
    if "clip" in vars(model):  # a CLIP text tower that a method reads, in float32
        held["text tower"] = sum(weight.numel() for weight in model.clip.parameters()) * FLOAT32
    # A head that is the embeddings is none of its own, but its part under tensor parallelism is a copy.
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
    """The shape of a linear layer's weight or bias on the rank that holds most of it, under tensor parallelism.

    Attention is dealt by key/value heads, all else in groups of 64; the last rank also takes what is left over.

    Args:
        name: of the weight, or of the layer.
        weight: whole.
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
        place: "cpu", where the matrices of the decoder and the head are kept, or "none".
        ranks: each keeps a part of them.
    """
    llm: Any = model.llm
    matrices = [weight.numel() for layer in llm.layers for weight in layer.parameters() if weight.dim() > 1]
    head = whole.device["head"]
    outside = {"decoder": sum(matrices) * itemsize, "head": head}
    own = {part: -(-size // ranks) for part, size in outside.items()}
    layer = sum(weight.numel() for weight in llm.layers[0].parameters())
    # Two layers and the largest matrix are gathered at the most, see llava/model/parallel.py.
    gathered = (2 * layer + max([*matrices, head // itemsize])) * itemsize
    stays = own if place == "none" else {}
    kept = {part: size - outside.get(part, 0) + stays.get(part, 0) for part, size in whole.device.items()}
    return Weights(kept | {"gathered": gathered}, {} if place == "none" else own)


# Key/value cache


def kv_bytes(model: Llava, prompts: Sequence[Sequence[int]], itemsize: int, new_tokens: int = 0, split: int = 1) -> int:
    """Bytes of the keys and values of a batch, padding and room included, on the rank with most heads.

    Args:
        prompts: tokens of every prompt in each decoder layer.
        new_tokens: tokens decoded after the prompt; 0 gives the cache after prefill, which has no room yet.
    """
    llm: Any = model.llm
    block = BLOCK + 1  # a token that finds no room makes its own column and those of BLOCK others
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
        prefill: selecting tokens, and the decoder on the prompts; without the cache.
        decode: the head, and the largest layer, which is there twice while its cache grows; without the cache.
        prefill_with_cache: prefill, and the keys and values that exist by then: the largest of both need not meet.
    """

    vision: int
    prefill: int
    decode: int
    prefill_with_cache: int

    def peak(self, kv_bytes: int) -> int:
        """Bytes beside the weights at the most, with the cache of the whole answer."""
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
    """Bytes of the tensors that are alive together at the peak of each stage.

    The batch is asked on the meta device, where tensors have shapes and no numbers; whoever reads one finds a one. For
    a method whose number of tokens depends on the image, evenly spaced tokens within its budget stand in.

    Args:
        split: ranks over which the linear layers of the decoder are split.
        on_host: the run is on the CPU, where the pixels are among its tensors from the start.
    """
    asked = outlined(model, torch.float32 if itemsize == FLOAT32 else torch.bfloat16, split, on_host)
    if reducer.needs_text_tower:
        _ = asked.clip  # its weights are made when it is first asked for
    layers: Any = asked.llm.layers
    stages = {0, len(layers), *reducer.decoder_layers(len(layers))}
    for index, layer in enumerate(layers):
        if stages.isdisjoint((index, index + 1)):  # neither the first nor the last one between two reductions
            repeat(layer)
    samples = []
    for number, question in enumerate(questions):  # their images are token layouts, which `outlined` reads
        words = " ".join(["word"] * question.text)
        ids = tuple(f"{question.names} {place}" for place in range(len(question.images))) if question.names else ()
        samples.append(Sample(str(number), words, "", question.images or None, ids))  # type: ignore[arg-type]
    if any(_plan(model, reducer, image) is None for question in questions for image in question.images):
        reducer = flat_oracle(reducer.budget)
    return _ask(asked, reducer, samples)


@torch.inference_mode()
def _ask(model: Llava, reducer: Reducer, samples: Sequence[Sample]) -> Activations:
    """Ask a batch for its first token."""
    ends = [("", 0)]  # stage, and how many events of the meter there were at its end

    def mark(stage: str) -> None:
        meter.update()
        ends.append((stage, len(meter.events)))

    def peak(names: Sequence[str], without: Iterable[int] = ()) -> int:
        most: int = max(meter.peak(start, end, without) for (_, start), (name, end) in pairwise(ends) if name in names)
        return most

    with Ones(), Meter(META) as meter:  # type: ignore[no-untyped-call]  # torch's
        state, _ = prefill(model, samples, reducer, MarkedTimer(META, mark))
        model.logits(state.hidden).argmax(-1)
        mark("head")
        cache: Any = state.cache.layers
        held = meter.numbers(tensor for layer in cache for tensor in (layer.keys, layer.values))
    before_decoding = ("selection", "prefill", "head")
    return Activations(
        vision=peak(("preprocess", "vision")),
        prefill=peak(before_decoding, held),
        decode=peak(("head",), held) + max(layer.keys.nbytes + layer.values.nbytes for layer in cache),
        prefill_with_cache=peak(before_decoding),
    )


def repeat(layer: Any) -> None:
    """Let a decoder layer put keys and values into the cache and compute nothing, as its equals before it did."""

    def forward(hidden: Tensor, **given: Any) -> Tensor:
        refuse_others(given, ("attention_mask", "position_embeddings", *CACHE_NAMES), "layer that repeats another")
        cache = cache_of(given)
        if cache is not None:
            width, channels = layer.self_attn.k_proj.weight.shape[0], layer.self_attn.head_dim
            shape = (len(hidden), width // channels, hidden.shape[1], channels)
            cache.update(hidden.new_empty(shape), hidden.new_empty(shape), layer.self_attn.layer_idx)
        return hidden

    layer.forward = forward


class Ones(TorchDispatchMode):
    """Whoever copies a tensor of the meta device to the host gets ones."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device)]
        if function.overloadpacket is torch.ops.aten.to and given == [torch.device("cpu")] and args[0].is_meta:
            args = (torch.ones_like(args[0], device="cpu"), *args[1:])
        return function(*args, **kwargs)


def outlined(model: Llava, dtype: torch.dtype, split: int, on_host: bool) -> Llava:
    """A copy of a model on the meta device, whose images are token layouts and whose questions are counts of words.

    Args:
        split, on_host: see `activations`.
    """
    found: Llava = object.__new__(type("Outlined", (_Outlined, type(model)), {"pixels_on": META if on_host else "cpu"}))
    found.__dict__.update(vars(model))
    found.hf_model = _without_numbers(model.hf_model, dtype)
    found.llm, found.head, found.device = found.hf_model.model.language_model, found.hf_model.lm_head, META
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
    """A copy of a module on the meta device, its weights in this type."""
    memo: dict[int, Any] = {id(part): torch.empty_like(part, device=META) for part in module.buffers()}
    for part in module.parameters():
        memo[id(part)] = nn.Parameter(torch.empty_like(part, device=META, dtype=dtype), requires_grad=False)
    return copy.deepcopy(module, memo)


class _Outlined(Llava):
    """What `outlined` overrides of a model."""

    pixels_on: Any

    def prompt(self, sample: Sample) -> Prompt:
        """As many tokens as words; the second half of them is the question."""
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
    """Notes while it is active when the memory of a tensor comes and goes; what was there before is not counted.

    Seen are the tensors that operations make, on any device: the "meta" device allocates nothing and counts. What a
    kernel needs inside of itself, the CUDA context and the fragments of an allocator are not counted, and neither is
    memory of numpy.

    Not counted either are tensors that later questions share (llava/reduction/ranking.py), which are made outside of
    inference mode: else the first question of its lengths would need more than the second.

    Args:
        device: the tensors that are counted; None counts those of all devices.

    Attributes:
        events: (number of the memory, bytes: negative where it was given back), in the order in which they came.
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
        """Note what was given back since the last operation."""
        for address, (known, number, size) in list(self._live.items()):
            if known.expired():
                del self._live[address]
                self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """Of the memory of some tensors, as `events` has them."""
        return {self._live[_address(one)][1] for one in tensors if _address(one) in self._live}

    def peak(self, start: int = 0, stop: int | None = None, without: Iterable[int] = ()) -> int:
        """Most bytes alive at once during `events[start:stop]`.

        Args:
            without: numbers of memory that is left out.
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
    """Operations of the vision tower on one image, all tiles; without a method's scores."""
    if isinstance(model, QwenVL):
        merge = model.image_processor.merge
        rows, columns = image.grid
        return qwen_vl.tower_flops(model.tower, (rows * merge, columns * merge))
    grid = reducer.input_grid(model.layout) or (model.layout.rows, model.layout.columns)
    tokens = grid[0] * grid[1] + 1
    if "tower" in reducer.acts_in:  # merged block by block down to the budget: at least these
        tokens = min(tokens, reducer.for_image(spec_of(model.spec, image)).budget // len(image.crops) + 1)
    tower: Any = model.tower_of(image.temporal)
    blocks = model.select_layer % (len(tower.encoder.layers) + 1)
    return len(image.crops) * tower_flops(tower, grid[0] * grid[1], [(tokens, tokens)] * blocks)


def decoder_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of the decoder on one prompt, and of the head on its last token."""
    llm: Any = model.llm
    return prefill_flops(llm.layers, prompt, model.head)


def projector_operations(model: Llava, tokens: int) -> int:
    tower: Any = model.tower
    return projector_flops(tower.merger if isinstance(model, QwenVL) else model.projector, tokens)


def step_operations(model: Llava, prompt: Sequence[int]) -> int:
    """Operations of one decoded token after a prompt."""
    llm: Any = model.llm
    layers = zip(llm.layers, prompt, strict=True)
    return sum(layer_flops(layer, 1, length + 1) for layer, length in layers) + linear_flops(model.head, 1)


# In words


def size_text(size: float) -> str:
    """Bytes in words: "13.1 GiB", "14.5 MiB"."""
    name, unit = ("GiB", GIB) if size >= 0.1 * GIB else ("MiB", GIB / 1024)
    return f"{figures(size / unit)} {name}"


def listed(parts: Mapping[str, int], total: int | None = None) -> str:
    """The sum (or `total`) and its parts in one unit: "13.1 GiB (vision tower 0.57, decoder 12.3)"."""
    total = sum(parts.values()) if total is None else total
    unit = GIB if total >= 0.1 * GIB else GIB / 1024
    inside = ", ".join(f"{name} {figures(size / unit)}" for name, size in parts.items() if size)
    return f"{size_text(total)} ({inside})"


def figures(value: float) -> str:
    """Three figures, or two of a small number."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds in words: "3.1 ms", "12 s", "5.0 min", "2.1 h"."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
