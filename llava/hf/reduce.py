"""Reduce visual tokens of a model object of transformers, without any script of this repository.

    with reduce(model, "visiondrop", budget=64) as reduced:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    reduced.audits[0].entering  # visual tokens that entered each decoder layer

Inside the block a call with pixels goes through the staged forward: dropped tokens are neither computed nor cached.
Calls without pixels go to the model's own forward. Behind the block the model is what it was, also after an error.

Read: transformers 5.23.0, generation/utils.py and the models of llava, llava_next, video_llava, qwen2_vl, qwen2_5_vl
Differs from it: a prefill gives the logits of the last token only; prompts padded on the right are answered like
others; a prompt is prefilled once however many beams or answers are asked for.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast
from transformers.models.video_llava.modeling_video_llava import VideoLlavaCausalLMOutputWithPast
from transformers.utils import ModelOutput

from llava.errors import UserError
from llava.hf.cache import ReducedCache
from llava.hf.inputs import samples
from llava.hf.models import Stock, family_of, stock_runtime
from llava.model.checkpoint.identify import QWEN, Family
from llava.pipeline.accounting import Audit
from llava.pipeline.prefill import prefill
from llava.reduction.crop_budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.reduction import Trace
from llava.reduction.registry import build

OUTPUTS: dict[Family, type[ModelOutput]] = {
    "llava": LlavaCausalLMOutputWithPast,
    "llava_next": LlavaNextCausalLMOutputWithPast,
    "video_llava": VideoLlavaCausalLMOutputWithPast,
    "qwen2_5_vl": CausalLMOutputWithPast,
    "qwen2_vl": CausalLMOutputWithPast,
}
# Methods of the model that are replaced inside the block.
REPLACED = ("forward", "_expand_inputs_for_generation")

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Arguments that come in one piece per picture and not in one row per prompt.
VISUAL = (*PIXELS, "image_sizes", "image_grid_thw")
COPIES = "rows_per_prompt"  # how `generate` tells forward that it has repeated every prompt

# Arguments that a reduced prompt cannot serve.
REFUSED = {
    "labels": "gives no loss: its tokens are not those of the labels",
    "output_hidden_states": "gives no hidden states: every layer has a length of its own",
    "output_attentions": "gives no attention maps: every layer has a length of its own",
    "inputs_embeds": "needs input_ids, in which the places of pictures are found",
    "mm_encoder_outputs": "needs pixels: methods look into the vision tower",
}


def reduce(
    model: PreTrainedModel,
    method: str,
    budget: int | None = None,
    *,
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
    **options: Any,
) -> "Reduced":
    """A context in which a model of transformers runs under a method.

    Args:
        model: a Llava-, LlavaNext-, VideoLlava-, Qwen2VL- or Qwen2_5_VLForConditionalGeneration in evaluation mode.
        method: a name of `llava.reduction.registry.names`.
        budget: visual tokens per picture or video, mean over decoder layers; None for as many as there are.
        questions: the bare question of each prompt of the calls inside, for methods that look at it; without them all
            text behind the last picture is taken for it, template and all.
        tokenizer: the model's tokenizer or processor, needed with `questions`.
        text_tower: folder or hub id of the CLIP that the vision tower comes from, for methods that need its text half.
        options: of the method, as `official=True`.

    Raises:
        UserError: the model, the method, an option or the budget cannot be had.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if questions is not None and (isinstance(questions, str) or tokenizer is None):
        raise UserError("`questions` is a list with one string per prompt, and needs `tokenizer` (or the processor).")
    runtime = stock_runtime(model, tokenizer, text_tower)
    reducer = build(method, runtime.visual_tokens if budget is None else budget, options)
    if reducer.needs_text_tower and family_of(model) in QWEN:
        raise UserError(f"{method} needs the CLIP that the vision tower comes from; that of {runtime.name} is no CLIP.")
    if reducer.needs_text_tower and (text_tower is None or questions is None):
        raise UserError(
            f"{method} compares questions with pictures in CLIP's space: give reduce() `questions`, `tokenizer`, and "
            "`text_tower`, the folder or hub id of the CLIP that the vision tower comes from."
        )
    _require(runtime, reducer)
    return Reduced(model, runtime, reducer, questions)


class Reduced:
    """What `reduce` returns: enter it to switch the method on.

    Attributes:
        reducer: the method.
        questions: may be set anew in front of a call with other prompts.
        audits: one per prompt of the last prefill.
        traces: the reductions that were applied to each of these prompts, in order.
    """

    def __init__(
        self, model: PreTrainedModel, runtime: Stock, reducer: Reducer, questions: Sequence[str] | None = None
    ):
        self.reducer, self.questions = reducer, questions
        self.audits: list[Audit] = []
        self.traces: list[Trace] = []
        self._model, self._runtime, self._family = model, runtime, family_of(model)
        self._before: dict[str, Any] = {}

    def __enter__(self) -> "Reduced":
        model = self._model
        if hasattr(model.forward, "reduced"):
            raise UserError("This model is being reduced already; leave the other `with reduce(...)` block first.")
        self._before = {name: vars(model)[name] for name in REPLACED if name in vars(model)}
        self._rope_deltas = getattr(model.model, "rope_deltas", None)
        model.forward, model._expand_inputs_for_generation = self._forward(), self._expand()
        return self

    def __exit__(self, *_: object) -> None:
        for name in REPLACED:
            delattr(self._model, name)
        for name, value in self._before.items():
            setattr(self._model, name, value)
        if self._family in QWEN:
            # generate leaves the offsets of its last prompts on the model; no later call may find ours.
            self._model.model.rope_deltas = self._rope_deltas

    def _forward(self) -> Callable[..., Any]:
        """The model's forward, with calls that have pixels and what follows on them taken out."""
        original = self._model.forward
        signature = inspect.signature(original)
        # generate encodes pictures itself where forward takes "mm_encoder_outputs"; methods need the pixels.
        shown = [known for name, known in signature.parameters.items() if name != "mm_encoder_outputs"]

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            cache, seen = given.get("past_key_values"), _has_pixels(given)
            if isinstance(cache, ReducedCache) and cache.get_seq_length():
                output = self._continue(given, cache)
            elif seen:
                output = self._prefill(given, cache)
            else:
                return original(*args, **kwargs)
            return output.to_tuple() if given.get("return_dict") is False else output

        forward.__signature__ = signature.replace(parameters=shown)
        forward.reduced = self
        return forward

    def _expand(self) -> Callable[..., Any]:
        """generate's step that repeats prompts for beams: pictures stay as they are, rows are repeated behind them."""
        original = self._model._expand_inputs_for_generation

        @wraps(original)
        def expand(expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **kwargs: Any) -> Any:
            if not _has_pixels(kwargs):
                return original(expand_size, is_encoder_decoder, input_ids, **kwargs)
            apart = {name: kwargs.pop(name) for name in VISUAL if name in kwargs}
            ids, rest = original(expand_size, is_encoder_decoder, input_ids, **kwargs)
            return ids, {**rest, **apart, COPIES: expand_size}

        return expand

    def _prefill(self, given: Mapping[str, Any], cache: Any) -> ModelOutput:
        """[B, 1, V] logits behind the prompts, and the shortened cache."""
        _refuse_arguments(given)
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.offloading or cache.get_seq_length()):
            raise UserError(
                "A prompt with pictures is reduced from its beginning, into a cache of its own; give the whole prompt, "
                f"and leave out cache_implementation and past_key_values (got a {type(cache).__name__})."
            )
        copies, runtime = given.get(COPIES, 1), self._runtime
        ids, mask = (
            None if given.get(name) is None else given[name][::copies] for name in ("input_ids", "attention_mask")
        )
        batch = samples(ids, mask, runtime.ready(given), self.questions, runtime.tokenizer)
        state, record = prefill(runtime, batch, self.reducer)
        self.audits = record.audits(state)
        self.traces = [tuple(steps) for steps in record.steps]
        held = ReducedCache.holding(state, cache)
        if copies > 1:
            held.batch_repeat_interleave(copies)
        return self._output(state.hidden.repeat_interleave(copies, 0), held)

    def _continue(self, given: Mapping[str, Any], cache: ReducedCache) -> ModelOutput:
        ids = given.get("input_ids")
        if _has_pixels(given) or ids is None or ids.shape[1] != 1:
            raise UserError(
                "Behind a reduced prompt input_ids come one by one and without pictures; for another turn give the "
                "whole conversation and all its pictures, without past_key_values."
            )
        llm = self._runtime.llm
        with torch.inference_mode():
            hidden = cache.extend(llm, llm.embed_tokens(ids.to(self._runtime.device)))
        return self._output(hidden, cache)

    def _output(self, hidden: Tensor, cache: ReducedCache) -> ModelOutput:
        llm, length = self._runtime.llm, cache.get_seq_length()
        window = getattr(llm.config, "sliding_window", None)
        if window is not None and length > window:
            raise UserError(
                f"This model attends within a sliding window of {window} tokens, which is not applied to reduced "
                f"prompts; with its answer this one has {length}, so lower the budget or shorten the text."
            )
        with torch.inference_mode():
            logits = self._runtime.head(llm.norm(hidden))
        # A copy made outside of inference mode may be changed in place, as logits often are.
        return OUTPUTS[self._family](logits=logits.clone(), past_key_values=cache)


def _require(runtime: Stock, reducer: Reducer) -> None:
    """Raise UserError if no picture that the model takes can be reduced to the budget."""
    errors = []
    for facts in runtime.candidates(reducer):
        try:
            return require(reducer, facts)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, however they were given."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    return {**given, **given.pop("kwargs", {})}


def _has_pixels(given: Mapping[str, Any]) -> bool:
    """An empty tensor of pixels, as processors may give for prompts without pictures, counts as none."""
    return any(given.get(name) is not None and len(given[name]) for name in PIXELS)


def _refuse_arguments(given: Mapping[str, Any]) -> None:
    for name, reason in REFUSED.items():
        value = given.get(name)
        if value is not None and value is not False:
            raise UserError(f"{name} cannot be used here: a reduced prompt {reason}.")
    if given.get("input_ids") is None:
        raise UserError("A prompt with pictures needs input_ids; take them from the model's own processor.")
    if given.get("use_cache") is False:
        raise UserError("Reduced prompts are continued from their cache; leave use_cache on.")
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep > 1:
        raise UserError(
            "A reduced prompt gives the logits of its last token only; leave logits_to_keep out, and decode without an "
            "assistant or prompt lookup."
        )
