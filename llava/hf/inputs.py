"""What a call of a Hugging Face model gives: the arguments a reduced prompt can use, and the prompts in its token ids.

An argument that would have no effect is refused, never ignored.

A processor writes the image token once per visual token. The number of visual tokens of each image is known, so each
run of image tokens becomes one placeholder again, also where two images stand side by side. Padding is removed. A
question is found in its prompt by comparing decoded text.

Read: transformers 5.23.0, processing and modeling of llava, llava_next, video_llava, qwen2_vl and qwen2_5_vl
"""

import hashlib
import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.errors import UserError
from llava.hf.models import ONE_CALL, PreparedImage
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Prompt, Sample

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Arguments with one entry per image, not one row per prompt.
VISUAL = (*PIXELS, "image_sizes", "image_grid_thw")
COPIES = "rows_per_prompt"  # how often `generate` has repeated every prompt, for beams or samples

USED = frozenset(
    {
        *VISUAL,
        COPIES,
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "video_grid_thw",  # videos are refused with their pixels, see llava.hf.models.WrappedQwen
        "second_per_grid_ts",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
    }
)
# Used as the model's configuration says; another value in a call is refused.
CONFIGURED = ("vision_feature_layer", "vision_feature_select_strategy")
# Not used, and why.
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
    """Arguments by name, whether given by place or by name."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for known in signature.parameters.values():
        if known.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(known.name, {}))
    return given


def has_pixels(given: Mapping[str, Any]) -> bool:
    """Whether there are images or videos; processors may give an empty tensor for prompts without any."""
    return any(given.get(name) is not None and len(given[name]) for name in PIXELS)


def refuse_arguments(given: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Raise UserError for an argument that a reduced prompt, or a token after it, does not use."""
    for name in ("output_hidden_states", "output_attentions"):
        if given.get(name) is None and getattr(config, name, False):
            raise UserError(
                f"{name} is set in the model's config and must be off here: a reduced prompt {REFUSED[name]}."
            )
    for name, value in given.items():
        if value is None or value is False or name in USED:
            continue
        if name in CONFIGURED:
            if value != getattr(config, name, None):
                raise UserError(
                    f"{name} must be that of the model's config here, {getattr(config, name, None)!r}, got {value!r}; "
                    "leave it out of the call."
                )
            continue
        if name in REFUSED:
            raise UserError(f"{name} cannot be used here: a reduced prompt {REFUSED[name]}.")
        raise UserError(f"{name} has no effect on a reduced prompt; leave it out.")


def refuse_prefill_arguments(given: Mapping[str, Any]) -> None:
    """Raise UserError if a prompt with images cannot be prefilled from these arguments."""
    if given.get("input_ids") is None:
        raise UserError("A prompt with images needs input_ids; take them from the model's own processor.")
    if given.get("use_cache") is False:
        raise UserError("Reduced prompts are continued from their cache; leave use_cache on.")
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor) or (keep or 0) > 1:
        raise UserError("A reduced prompt gives the logits of its last token only; leave out logits_to_keep.")


# Prompts


@dataclass(frozen=True)
class StockSample(Sample):
    """A question whose prompt is tokenized and whose images are prepared."""

    image: tuple[PreparedImage, ...] | None = None  # type: ignore[assignment]  # prepared, in place of a PIL image
    prompt: Prompt | None = None


def samples(
    ids: Tensor,
    mask: Tensor | None,
    ready: Mapping[int, Sequence[PreparedImage]],
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[StockSample]:
    """One sample per row of a batch.

    Args:
        ids: [B, L].
        mask: [B, L], 0 in the padding, on either side; None for no padding.
        ready: images of the whole batch in order, by the id of their placeholder token.
        questions: the question of every row without template, for methods that read it; without `questions`, all text
            after the last image is the question.
        tokenizer: needed with `questions`.

    Raises:
        UserError: prompts and images do not fit, or a question is not in its prompt.
    """
    rows = _without_padding(ids, mask)
    if questions is not None and len(questions) != len(rows):
        raise UserError(f"There are {len(rows)} prompts and {len(questions)} questions; give one for each.")
    waiting = {token: iter(pictures) for token, pictures in ready.items()}
    cut = [_with_slots(row, waiting) for row in rows]
    used, count = sum(len(pictures) for _, pictures in cut), sum(map(len, ready.values()))
    if used < count:
        raise UserError(f"The prompts have image tokens for {used} of {count} images; {ONE_CALL}")
    stock = []
    for number, (row, pictures) in enumerate(cut):
        # All text after the last image; everything without one.
        question, span = "" if questions is None else questions[number], (0, len(row))
        if IMAGE_TOKEN_INDEX in row:
            span = len(row) - row[::-1].index(IMAGE_TOKEN_INDEX), len(row)
        if questions is not None and tokenizer is not None and pictures:
            span = question_span(row, question, tokenizer)
        # The name depends only on the prompt, so that random choices do not change with the batch.
        name = hashlib.blake2b(str(row).encode(), digest_size=8).hexdigest()
        prompt = Prompt(tuple(row), question=span, instruction=span, text="")
        stock.append(StockSample(name, question, image=tuple(pictures) or None, prompt=prompt))
    return stock


def question_span(ids: Sequence[int], question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """[start, stop) of the tokens of a question, at its last occurrence; white space is not compared.

    Args:
        ids: with IMAGE_TOKEN_INDEX in place of images.
    """
    # Encoded and decoded, so that unknown words look the same here and in the prompt.
    wanted = _spelled(tokenizer(question, add_special_tokens=False).input_ids, tokenizer)
    stop = len(ids)
    while wanted and stop > 0:
        start = stop
        while start > 0 and ids[start - 1] != IMAGE_TOKEN_INDEX:
            start -= 1
        span = _find(ids[start:stop], wanted, tokenizer)
        if span is not None:
            return start + span[0], start + span[1]
        stop = start - 1
    raise UserError(
        f"The question {question!r} is not in its prompt, or has an image inside; give it as it is written there."
    )


def _without_padding(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    rows = ids.tolist()
    if mask is None:
        return rows
    if mask.shape != ids.shape:
        raise UserError(f"attention_mask must have the shape {tuple(ids.shape)} of input_ids, got {tuple(mask.shape)}.")
    kept = mask.bool().tolist()
    return [[token for token, keep in zip(*row, strict=True) if keep] for row in zip(rows, kept, strict=True)]


def _with_slots(row: list[int], waiting: dict[int, Iterator[PreparedImage]]) -> tuple[list[int], list[PreparedImage]]:
    """A prompt with one placeholder per image, and its images."""
    ids, pictures, place = [], [], 0
    while place < len(row):
        token = row[place]
        if token not in waiting:
            ids.append(token)
            place += 1
            continue
        picture = next(waiting[token], None)
        if picture is None:
            raise UserError(f"The prompts have more image tokens than the images have visual tokens; {ONE_CALL}")
        # The length of each run is known, so images side by side are told apart.
        count = picture.arrangement.tokens
        if row[place : place + count] != [token] * count:
            room = next((n for n, other in enumerate(row[place:]) if other != token), len(row) - place)
            raise UserError(f"An image has {count} visual tokens, but its prompt {room} image tokens; {ONE_CALL}")
        ids.append(IMAGE_TOKEN_INDEX)
        pictures.append(picture)
        place += count
    return ids, pictures


def _find(ids: Sequence[int], wanted: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """[start, stop) of the tokens of a text without white space, or None; found by bisection over decoded prefixes."""

    def length(count: int) -> int:
        return len(_spelled(ids[:count], tokenizer))

    at, counts = _spelled(ids, tokenizer).rfind(wanted), range(len(ids) + 1)
    if at < 0:
        return None
    return bisect_right(counts, at, key=length) - 1, bisect_left(counts, at + len(wanted), key=length)


def _spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded text without white space."""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return "".join(str(text).split())
