"""Calls of a Hugging Face model, translated for the pipeline: arguments, images, and prompts in token ids.

The processor has already resized, cropped and normalised the images. The wrappers around the models use these pixels as
they are and find only the token layout: which visual tokens an image becomes, in which order.

An argument that would have no effect on a reduced prompt is refused, never ignored.

A processor writes the image token once per visual token. Here each run of image tokens becomes one placeholder again.
As the number of visual tokens of each image is known, this works for images side by side too. Padding is removed. A
question is found in its prompt by comparing decoded text.

Read: transformers 5.23.0, processing and modeling of llava, llava_next and video_llava
"""

import hashlib
import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.checkpoint.config import QWEN, Family, identify, refuse_feature_layer
from llava.model.checkpoint.load import HF_CLASSES, Checkpoint
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.video_llava import VideoLlava
from llava.processing.image import ImageProcessor
from llava.processing.prompt import Prompt, Sample
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import Canvas, ModelSpec, TokenLayout, frames, single, spec_of
from llava.transformers_names import CACHE, CACHE_NAMES, HOOK, KERNEL

ONE_CALL = "take input_ids and pixels from one call of the model's own processor."

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Arguments with one entry per image, not one row per prompt.
VISUAL = (*PIXELS, "image_sizes", "second_per_grid_ts")
COPIES = "rows_per_prompt"  # our argument: how often `generate` has repeated every prompt, for beams or samples

USED = frozenset(
    {
        *VISUAL,
        COPIES,
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        *CACHE_NAMES,
        "use_cache",
        "logits_to_keep",
        "return_dict",
    }
)
# Arguments whose value is taken from the model's configuration; another value in a call is refused.
CONFIGURED = ("vision_feature_layer", "vision_feature_select_strategy")
# Arguments that cannot be used, and why.
REFUSED = {
    "labels": "gives no loss: its tokens are not those of the labels",
    "output_hidden_states": "gives no hidden states: each layer has a length of its own",
    "output_attentions": "gives no attention maps: each layer has a length of its own",
    "inputs_embeds": "needs input_ids, which show where the images are",
    "mm_encoder_outputs": "needs pixels: methods read the vision tower",
    "position_ids": "gets its position ids from the method",
    "cache_position": "has a cache with a length of its own in each layer",
}


# Arguments


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including those that were given by position; the cache has the name CACHE."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for known in signature.parameters.values():
        if known.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(known.name, {}))
    for name in CACHE_NAMES:
        if given.get(CACHE) is None:
            given[CACHE] = given.get(name)
    return given


def has_pixels(given: Mapping[str, Any]) -> bool:
    """Whether there are images or videos. Processors may return an empty tensor for prompts without any."""
    return any(given.get(name) is not None and len(given[name]) for name in PIXELS)


def refuse_arguments(given: Mapping[str, Any], config: PretrainedConfig, used: frozenset[str]) -> None:
    """Raise UserError for an argument that has no effect on a reduced prompt or on a token after it."""
    for name in ("output_hidden_states", "output_attentions"):
        if given.get(name) is None and getattr(config, name, False):
            raise UserError(
                f"{name} is set in the model's config and must be off here: a reduced prompt {REFUSED[name]}."
            )
    for name, value in given.items():
        configured = getattr(config, name, None)
        if value is None or value is False or name in used or (name in CONFIGURED and value == configured):
            continue
        if name in CONFIGURED:
            raise UserError(
                f"{name} must be that of the model's config here, {configured!r}, got {value!r}; leave it out of the "
                "call."
            )
        if name in REFUSED:
            raise UserError(f"{name} cannot be used here: a reduced prompt {REFUSED[name]}.")
        raise UserError(f"{name} has no effect on a reduced prompt; leave it out.")


def refuse_embeddings(given: Mapping[str, Any]) -> None:
    """Raise UserError for embeddings: images that are merged into them would keep all their tokens."""
    if given.get("inputs_embeds") is not None:
        raise UserError(
            "inputs_embeds cannot be used here: they do not show where images are, all of whose tokens would be "
            "computed. Give input_ids, with the pixels if there are images."
        )


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image or video, as the processor returned it.

    Attributes:
        pixels: [C, 3, S, S].
        layout: the layout of its visual tokens.
        canvas: tells padding from image; None if that cannot be seen from the arguments.
    """

    pixels: Tensor
    layout: TokenLayout
    canvas: Canvas | None = None


class ModelCalls:
    """What `reduce` knows about a Hugging Face model and the arguments of its calls, for every family.

    Attributes:
        hf_model: the model; it is not changed.
        device: where prompts are assembled.
        tokenizer: the tokenizer; None if no question is searched for in prompts.
        llm: the decoder of the model.
        spec: what methods may know about the model.
        used: the arguments of the model's forward that a reduced prompt uses.
        per_image: those of them that have one entry per image, not one row per prompt.
    """

    hf_model: Any
    device: torch.device
    tokenizer: Any
    text_tower: str | Path | None
    llm: Any
    used: frozenset[str] = USED
    per_image: frozenset[str] = frozenset(VISUAL)

    if TYPE_CHECKING:  # from Llava or FamilyWrapper

        @property
        def spec(self) -> ModelSpec: ...
        @property
        def visual_tokens(self) -> int: ...

    @cached_property
    def marks(self) -> frozenset[int]:
        """Token ids that are not text: placeholders, and those that begin or end prompts and images."""
        config = self.hf_model.config.to_dict()
        parts = (config, *(part for part in config.values() if isinstance(part, dict)))
        named = [part[name] for part in parts for name in part if str(name).endswith(("_token_id", "_token_index"))]
        ids = [one for value in named for one in (value if isinstance(value, list) else [value])]
        special = [] if self.tokenizer is None else self.tokenizer.all_special_ids
        return frozenset(one for one in (*ids, *special) if one is not None)

    def prompt(self, sample: Any) -> Prompt:
        prompt: Prompt = sample.prompt
        return prompt

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        """The model with images of several sizes. A budget is valid if the method accepts it for one of them."""
        return [self.spec]


class HFWrapper(ModelCalls, Llava):
    """A model that runs the pipeline's own forward, on images that the model's processor has prepared.

    This class itself is for LLaVA-1.5: an image is one square of pixels, whether the processor cropped or padded it.
    """

    def views(self, image: PreparedImage) -> tuple[Tensor, TokenLayout]:
        return image.pixels, image.layout

    def canvas(self, image: Any) -> Canvas | None:
        return getattr(image, "canvas", None)

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        """The images of a call, as a dictionary from the id of a placeholder token to its images in order.

        Args:
            given: arguments of the model's forward, by name.

        Raises:
            UserError: the arguments do not look like the output of the model's processor.
        """
        pixels, run = _pixels(given, 4), single(self.layout.rows, self.layout.columns)
        return {self.hf_model.config.image_token_id: [PreparedImage(one[None], run) for one in pixels]}


class WrappedNext(HFWrapper, LlavaNext):
    """LLaVA-NeXT: an image is a base image and tiles, as the processor chose them; `pixel_values` may be padded."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        if given.get("image_sizes") is None:
            raise UserError(f"LLaVA-NeXT needs image_sizes beside pixel_values; {ONE_CALL}")
        sizes = [(width, height) for height, width in torch.as_tensor(given["image_sizes"]).tolist()]
        canvases, tile = [self.anyres.resolution(size) for size in sizes], self.anyres.tile
        counts = [1 + (width // tile) * (height // tile) for width, height in canvases]
        pixels = given["pixel_values"]
        if pixels.dim() == 4 and len(pixels) == sum(counts):
            crops = list(pixels.split(counts))
        elif pixels.dim() == 5 and len(pixels) == len(sizes) and pixels.shape[1] >= max(counts):
            crops = list(pixels)
        else:
            shape = tuple(pixels.shape)
            raise UserError(f"{len(sizes)} images of {counts} tiles do not fit pixel_values of {shape}; {ONE_CALL}")
        runs = [self.anyres.arrange(size) for size in sizes]
        images = [
            PreparedImage(crop[: len(run.crops)], run, self.anyres.canvas(size))
            for crop, run, size in zip(crops, runs, sizes, strict=True)
        ]
        return {self.hf_model.config.image_token_id: images}


class WrappedVideo(HFWrapper, VideoLlava):
    """Video-LLaVA: images, and videos whose frames keep their class tokens."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        config, images = self.hf_model.config, {}
        for name in ("pixel_values", "pixel_values_images"):  # two names of one argument
            if given.get(name) is not None:
                images = super().ready({"pixel_values": given[name]})
        if given.get("pixel_values_videos") is not None:
            videos = _pixels(given, 5, "pixel_values_videos")
            run = frames(videos.shape[1], self.layout.rows, self.layout.columns).with_cls
            images[config.video_token_id] = [PreparedImage(video, run) for video in videos]
        return images

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        image = spec_of(self.spec, single(self.layout.rows, self.layout.columns))
        return [self.spec, image]


def _pixels(given: Mapping[str, Any], axes: int, name: str = "pixel_values") -> Tensor:
    pixels = given[name]
    if not isinstance(pixels, Tensor) or pixels.dim() != axes or not pixels.numel():
        given_as = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"{name} must be a tensor with {axes} axes and no axis of 0 here, got {given_as}; {ONE_CALL}")
    return pixels


WRAPPERS: dict[Family, type[HFWrapper]] = {
    "llava": HFWrapper,
    "llava_next": WrappedNext,
    "video_llava": WrappedVideo,
}


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
) -> HFWrapper:
    """The wrapper around a Hugging Face model.

    Raises:
        UserError: the staged forward does not support the class, a part or the state of the model.
    """
    name = type(model).__name__
    family = next((family for family, container in HF_CLASSES.items() if isinstance(model, container)), None)
    if family is None:
        names = ", ".join(container.__name__ for container in HF_CLASSES.values())
        raise UserError(
            f"reduce() takes a Hugging Face model, one of {names} or of a family that `vtr show models` lists; got "
            f"{name}."
        )
    config = model.config
    identify(config.to_dict(), Path(name))
    if family not in QWEN:
        refuse_feature_layer(config, name)
    refuse_training(*model.modules())
    used = getattr(model.model.language_model.config, KERNEL)
    if not takes_mask(used):
        raise UserError(f"Load the model with attn_implementation='sdpa', 'eager' or FlashAttention, got {used!r}.")
    parts = [part for part in model.modules() if not hasattr(part, HOOK)]
    devices = {weight.device for part in parts for weight in part.parameters(recurse=False)}
    if len(devices) > 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        raise UserError(f"The model is on {places}; put it on one device as a whole, or load it with device_map.")

    vision = config.vision_config
    frames_of_video = 0
    if family == "video_llava":
        frames_of_video = max(1, config.video_seq_length // ((vision.image_size // vision.patch_size) ** 2 + 1))
    checkpoint = Checkpoint(
        model=model,
        tokenizer=tokenizer,  # type: ignore[arg-type]  # None where no question is searched for
        image_processor=ImageProcessor(size=vision.image_size, crop=vision.image_size),
        conversation="",  # the caller writes the prompts
        name=name,
        layout="transformers",
        text_tower=text_tower,
        notes=(),
        vocabulary=config.get_text_config().vocab_size,
        family=family,
        frames=frames_of_video,
    )
    conventions: dict[str, Any] = {"anyres_rule": "transformers"} if family == "llava_next" else {}
    return WRAPPERS[family](checkpoint, device_of(model), **conventions)


def state_of(model: Any) -> tuple[Any, ...]:
    """What a wrapper was built from: modules, device and settings. If it differs later, the model was changed."""
    inner, config = getattr(model, "model", model), model.config
    own = [weight for weight in inner.parameters(recurse=False) if not weight.is_meta]  # offloaded ones come and go
    parts = (inner, *model.children(), *inner.children(), *own)
    features = [getattr(config, name, None) for name in ("vision_feature_layer", "vision_feature_select_strategy")]
    return (*map(id, parts), device_of(model), *features, getattr(config.get_text_config(), KERNEL))


def device_of(model: Any) -> torch.device:
    """The device on which text is embedded and prompts are assembled, also for a model on several devices."""
    embedding = model.get_input_embeddings()
    hooks = device_hooks(embedding)
    return torch.device(hooks[0].execution_device if hooks else embedding.weight.device)


def device_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks with which accelerate places weights and inputs of a module; [] if it has other hooks as well."""
    hook = getattr(module, HOOK, None)
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return list(hooks) if all(isinstance(one, AlignDevicesHook) for one in hooks) else []


def refuse_training(*modules: nn.Module) -> None:
    """Raise UserError for a module in training mode, in which dropout is on."""
    for module in modules:
        if module.training:
            name = type(module).__name__
            raise UserError(f"The model ({name}) is in training mode; call model.eval(), reduction is for inference.")


def takes_mask(attention: str) -> bool:
    """Whether `causal_mask` has a mask for this attention kernel."""
    return attention in ("sdpa", "eager") or "flash" in attention


# Prompts


@dataclass(frozen=True)
class StockSample(Sample):
    """A question whose prompt is tokenized and whose images are prepared."""

    image: tuple[PreparedImage, ...] | None = None  # type: ignore[assignment]  # prepared, in place of a PIL image
    prompt: Prompt | None = None


def samples(
    ids: Tensor,
    mask: Tensor | None,
    ready: Mapping[int, Sequence[Any]],
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    marks: frozenset[int] = frozenset(),
) -> list[StockSample]:
    """One sample for each row of a batch.

    Args:
        ids: [B, L] token ids.
        mask: [B, L], 0 in the padding on either side; None without padding.
        ready: for each placeholder token id, the images of the whole batch in order, with their `layout`.
        questions: for each row, its question without template, for methods that read it; None takes the text that
            `text_span` finds.
        tokenizer: needed with `questions`.
        marks: token ids that are not text.

    Raises:
        UserError: prompts and images do not fit together, or a question is not in its prompt.
    """
    rows = ids.tolist()
    if mask is not None:
        if mask.shape != ids.shape:
            shape, got = tuple(ids.shape), tuple(mask.shape)
            raise UserError(f"attention_mask must have the shape {shape} of input_ids, got {got}.")
        rows = [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]
    if questions is not None and len(questions) != len(rows):
        raise UserError(f"There are {len(rows)} prompts and {len(questions)} questions; give one for each.")
    waiting = {token: iter(images) for token, images in ready.items()}
    cut = [_with_slots(row, waiting) for row in rows]
    used, count = sum(len(images) for _, images in cut), sum(map(len, ready.values()))
    if used < count:
        raise UserError(f"The prompts have image tokens for {used} of {count} images; {ONE_CALL}")
    stock = []
    for number, (row, images) in enumerate(cut):
        question = "" if questions is None else questions[number]
        if questions is not None and tokenizer is not None and images:
            span = question_span(row, question, tokenizer)
        else:
            span = text_span(row, marks)
        # The name seeds random methods. It depends only on the prompt, so their choices do not depend on the batch.
        name = hashlib.blake2b(str(row).encode(), digest_size=8).hexdigest()
        prompt = Prompt(tuple(row), question=span, instruction=span, text="")
        stock.append(StockSample(name, question, image=tuple(images) or None, prompt=prompt))
    return stock


def text_span(ids: Sequence[int], marks: frozenset[int] = frozenset()) -> tuple[int, int]:
    """The span [start, stop) of the last text in a prompt, which ends at an image or at the end of the prompt.

    Without an image it is the whole prompt. It is empty if the prompt has images and no text.

    Args:
        ids: token ids, with IMAGE_TOKEN_INDEX in place of images.
        marks: token ids that are not text on their own, such as the end of an image.
    """
    images = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    for before, stop in reversed([*pairwise((-1, *images, len(ids)))]):
        if not images or not marks.issuperset(ids[before + 1 : stop]):
            return before + 1, stop
    return len(ids), len(ids)


def question_span(ids: Sequence[int], question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The span [start, stop) of the last occurrence of a question in a prompt; white space is not compared.

    Args:
        ids: token ids, with IMAGE_TOKEN_INDEX in place of images.
    """
    # The question is encoded and decoded, so that unknown words look the same as in the decoded prompt.
    wanted = _spelled(tokenizer(question, add_special_tokens=False).input_ids, tokenizer)
    images = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    for before, stop in reversed([*pairwise((-1, *images, len(ids)))]):
        start, run = before + 1, ids[before + 1 : stop]
        at = _spelled(run, tokenizer).rfind(wanted)
        if wanted and at >= 0:
            # A bisection over the decoded lengths of the run's beginnings finds the tokens of these characters.
            length, counts = partial(_spelled_length, run, tokenizer), range(len(run) + 1)
            first, end = bisect_right(counts, at, key=length) - 1, bisect_left(counts, at + len(wanted), key=length)
            return start + first, start + end
    raise UserError(
        f"The question {question!r} is not in its prompt, or has an image inside; give it as it is written there."
    )


def _with_slots(row: list[int], waiting: dict[int, Iterator[PreparedImage]]) -> tuple[list[int], list[PreparedImage]]:
    """A prompt with one placeholder per image, and its images."""
    ids, images, place = [], [], 0
    while place < len(row):
        token = row[place]
        if token not in waiting:
            ids.append(token)
            place += 1
            continue
        image = next(waiting[token], None)
        if image is None:
            raise UserError(f"The prompts have more image tokens than the images have visual tokens; {ONE_CALL}")
        # The image says how many tokens it has, so two images side by side can be told apart.
        count = image.layout.tokens
        if row[place : place + count] != [token] * count:
            room = next((n for n, other in enumerate(row[place:]) if other != token), len(row) - place)
            raise UserError(f"An image has {count} visual tokens, but its prompt {room} image tokens; {ONE_CALL}")
        ids.append(IMAGE_TOKEN_INDEX)
        images.append(image)
        place += count
    return ids, images


def _spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded text without white space."""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return "".join(str(text).split())


def _spelled_length(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, count: int) -> int:
    """Characters of the first `count` tokens without white space."""
    return len(_spelled(ids[:count], tokenizer))
