"""Arguments of a call of a Hugging Face model: which of them a reduced prompt can use, and which are refused.

An argument that would have no effect is refused, never ignored.

Read: transformers 5.23.0, modeling of llava, llava_next, video_llava, qwen2_vl and qwen2_5_vl
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llava.errors import UserError

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
