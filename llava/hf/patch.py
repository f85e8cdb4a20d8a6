"""The context that `reduce` returns: it patches a Hugging Face model so that it runs with a reduction method.

    with reduce(model, "visiondrop", budget=64) as reduced:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    reduced.accounting[0].tokens_per_layer  # visual tokens that entered each decoder layer

Inside the context, a call of the model with pixels runs the pipeline's forward: dropped tokens are neither computed nor
cached. A call without pixels runs the model's own forward. Only attributes of this one model object are patched
(`ReductionContext` lists them); its class and all other objects stay as they are. The model is restored when the
context exits, also after an error. What cannot be done with a reduced prompt is refused with a UserError.

Read: transformers 5.23.0, cache_utils.py, generation/utils.py and the models of llava, llava_next, video_llava
Differs from it: a prefill returns the logits of the last token only; padding on the right gives the same results as
padding on the left; a prompt is prefilled once for all its beams or samples.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from llava.errors import UserError
from llava.hf.models import (
    COPIES,
    HFWrapper,
    ModelCalls,
    by_name,
    device_hooks,
    has_pixels,
    refuse_arguments,
    refuse_embeddings,
    refuse_training,
    samples,
    state_of,
)
from llava.pipeline.accounting import Record, TokenAccounting
from llava.pipeline.decoder import Prefilled, Segment, forget_last, step
from llava.pipeline.generate import prefill
from llava.reduction.merging import Trace
from llava.reduction.reducer import Reducer
from llava.transformers_names import (
    CACHE,
    CANDIDATES,
    CAPTURING,
    EXPAND,
    PREPARE_POSITIONS,
    CausalLMOutputWithPast,
    cache_of,
)
from llava.versions import advice

MISSING = object()
# The `with reduce(...)` blocks that this thread or task has entered. A thread that is started with a copy of this
# context has entered them as well.
ENTERED: ContextVar[frozenset[object]] = ContextVar("ENTERED", default=frozenset())
COUNTS = "counts_of_reduced_prompts"  # attribute of a cache: accounting, traces and kv_bytes of its prompts


# The cache


class ReducedCache(DynamicCache):
    """Key/value cache whose layers differ in length.

    Attributes:
        segments: for layers that share them, the mask of valid keys and the position of the next token.
        ids: [B, L] the tokens that the cache stands for, with those that were dropped; None for families that run their
            own forward. `generate` feeds what follows them.
        running: True while the model's own forward runs with the masks and positions of `segments`.
    """

    segments: list[Segment]
    ids: Tensor | None = None
    running: bool = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens that the cache stands for, which `generate` leaves out of the ids that it feeds."""
        return super().get_seq_length(layer_idx) if self.ids is None else self.ids.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # a LongTensor is a Tensor of integers
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        forget_last(self.layers, self.segments, -tokens_to_remove)
        if self.ids is not None:
            self.ids = self.ids[:, : self.ids.shape[1] + tokens_to_remove]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Refuse to serve a model's own forward, which calls this but does not know the masks of `segments`."""
        if self.running:
            return super().get_mask_sizes(query_length, layer_idx)
        raise UserError(
            "This cache holds reduced prompts; continue it inside the `with reduce(...)` block that made it, or start "
            "again with the whole prompt and no cache."
        )

    def _change(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Reorder or repeat the rows of masks, positions and ids."""
        self.ids = None if self.ids is None else rows(self.ids)
        for segment in self.segments:
            segment.next_position = rows(segment.next_position)
            if segment.valid is not None:
                segment.valid = rows(segment.valid)


# The context


class ReductionContext:
    """The context that `reduce` returns: entering it patches the model, leaving it restores the model.

    These attributes of the one model object are patched:
        model.forward: calls with pixels, and calls that continue them, run the pipeline's forward.
        model.model.forward: refuses pixels, because the logits and the cache of a reduced prompt come from `model`.
        model._expand_inputs_for_generation: repeats prompts for beams and samples after the prefill, not before.
        model._prepare_position_ids_for_generation: makes none for prompts with pixels and for later turns. Position ids
            that reach forward are then the caller's own, and are refused.
        model._get_candidate_generator: refuses assisted decoding of prompts with pixels.
        model.generate: checks that a later turn continues the conversation of its cache. Ends its streamer after an
            error, so that a loop over the streamer ends too.

    The block belongs to the thread or asyncio task that entered it. In other threads and tasks, calls with pixels are
    refused, because they may be meant for the plain model. To stream, start the thread with a copy of the context:
    `Thread(target=copy_context().run, args=(model.generate,), kwargs=dict(**inputs, streamer=streamer))`.
    `asyncio.to_thread` makes this copy by itself. An error in a streaming thread is raised when the block is left.

    The counts below are of the prompts of the last call: those that it started, or those in the cache that it
    continued. They are empty or 0 if these prompts were not counted, for example after a refused call. A prompt without
    images counts as having no visual tokens in any layer.

    Attributes:
        reducer: the method.
        questions: the question of each prompt; replace it before a call with other prompts.
        accounting: the token accounting of each prompt.
        traces: for each prompt, the reductions that were applied, in order.
        kv_bytes: bytes of all keys and values after the prefill, with padding.
        record, segments: what the last prefill recorded.
    """

    def __init__(self, runtime: ModelCalls, reducer: Reducer, questions: Sequence[str] | None = None):
        self.reducer, self.questions = reducer, questions
        self.accounting: list[TokenAccounting] = []
        self.traces: list[Trace] = []
        self.kv_bytes = 0
        self.record, self.segments = Record([], []), list[Segment]()
        # Any, because PreTrainedModel does not declare the attributes by which modules of the model are found.
        self._model: Any = runtime.hf_model
        self._runtime, self._state = runtime, state_of(self._model)
        self._overrides: list[Override] = []

    def __enter__(self) -> "ReductionContext":
        model = self._model
        inner = getattr(model, "model", model)
        if isinstance(model.forward, Override) or isinstance(inner.forward, Override):
            raise UserError("This model is being reduced already; leave the other `with reduce(...)` block first.")
        if missing := [name for name in (EXPAND, PREPARE_POSITIONS, CANDIDATES) if not hasattr(model, name)]:
            raise UserError(
                f"{type(model).__name__} has no {', '.join(missing)} in transformers {transformers.__version__}, which "
                f"reduce() overrides; {advice('transformers')}."
            )
        self._key, self._thread = object(), threading.get_ident()
        self._unseen: Exception | None = None
        self._inner, self._rope_deltas = inner, getattr(inner, "rope_deltas", None)
        self._signature, self._inner_signature = map(inspect.signature, (model.forward, inner.forward))
        # generate() encodes images itself if forward takes "mm_encoder_outputs", but methods need the pixels.
        shown = [known for name, known in self._signature.parameters.items() if name != "mm_encoder_outputs"]
        self._overrides = [
            Override(model, "forward", self._forward, self._signature.replace(parameters=shown)),
            Override(model, EXPAND, self._expand),
            Override(model, PREPARE_POSITIONS, self._prepare_positions),
            Override(model, CANDIDATES, self._candidate_generator),
            Override(model, "generate", self._generate),
        ]
        if inner is not model:
            self._overrides.append(Override(inner, "forward", self._forward_inner))
        # In a model on several devices, each part returns its results on the device of its inputs, so that methods see
        # only one device. Parts that run in sequence, such as decoder layers, pass results on as usual.
        listed = {part for parts in model.modules() if isinstance(parts, nn.ModuleList) for part in parts}
        hooks = [hook for part in model.modules() if part not in listed for hook in device_hooks(part)]
        self._returning = [hook for hook in hooks if not hook.io_same_device]
        for hook in self._returning:
            hook.io_same_device = True
        ENTERED.set(ENTERED.get() | {self._key})
        return self

    def __exit__(self, *error: object) -> None:
        ENTERED.set(ENTERED.get() - {self._key})
        for override in self._overrides:
            override.restore()
        for hook in self._returning:
            hook.io_same_device = False
        if hasattr(self._inner, "rope_deltas"):
            # generate() stores the position offsets of its last prompts on the model. Later calls must not use them.
            self._inner.rope_deltas = self._rope_deltas
        if self._unseen is not None and error[:1] in ((), (None,)):
            raise self._unseen

    # What runs in place of the model's own methods

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self._signature, args, kwargs)
        cache, owned = given[CACHE], self._key in ENTERED.get()
        continued = cache if isinstance(cache, ReducedCache) and cache.get_seq_length() else None
        if owned:  # show the counts of the prompts that the cache holds; a new cache has none
            self.accounting, self.traces, self.kv_bytes = getattr(cache, COUNTS, ([], [], 0))
        if continued is None and not has_pixels(given) and not given.get("mm_encoder_outputs"):
            if not owned:
                return original(*args, **kwargs)
            refuse_embeddings(given)
            output = original(*args, **kwargs)
            self._count_text(given, output)
            return output
        if not owned:
            raise UserError(
                "Another thread or task reduces this model. To stream inside its block, start the thread with "
                "threading.Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...); for "
                "other calls enter `with reduce(...)` in the thread that calls the model, and give each thread a model "
                "of its own (copy.deepcopy before the block)."
            )
        refuse_training(self._model)
        refuse_arguments(given, self._model.config, self._runtime.used)
        if continued is None:
            # Parts that torch.compile has compiled run eagerly, because methods read values and intermediate results.
            with torch.compiler.set_stance("force_eager"):
                output = self._prefill(given, cache)
        else:
            output = self._continue(given, continued)
        as_dict = given.get("return_dict")
        if as_dict is None:
            as_dict = getattr(self._model.config, "return_dict", True)
        return output if as_dict else output.to_tuple()

    def _forward_inner(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self._inner_signature, args, kwargs)
        if self._key in ENTERED.get():
            refuse_embeddings(given)
        if has_pixels(given):
            raise UserError(
                f"Inside `with reduce(...)`, call the {type(self._model).__name__} itself: its inner `.model` gives "
                "hidden states of every token, which a reduced prompt does not have."
            )
        return original(*args, **kwargs)

    def _expand(
        self,
        original: Callable[..., Any],
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat rows for beams and samples, but not images, because the prefill runs once per prompt.

        Position ids, which are None here, are not repeated either: Qwen models of transformers 5.17 expect a tensor.
        """
        if expand_size == 1 or not has_pixels(kwargs):
            return original(expand_size, is_encoder_decoder, input_ids, **kwargs)
        images = {name: kwargs.pop(name) for name in (*self._runtime.per_image, "position_ids") if name in kwargs}
        ids, rest = original(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**rest, **images, COPIES: expand_size}

    def _prepare_positions(self, original: Callable[..., Any], ids: Tensor, given: dict[str, Any]) -> Tensor | None:
        return None if has_pixels(given) or isinstance(given.get(CACHE), ReducedCache) else original(ids, given)

    def _candidate_generator(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(inspect.signature(original), args, kwargs)
        if has_pixels(given["model_kwargs"]):
            raise UserError(
                "A reduced prompt cannot be decoded with an assistant model or prompt lookup: they need the logits of "
                "several tokens at once; leave out assistant_model and prompt_lookup_num_tokens."
            )
        return original(*args, **kwargs)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(inspect.signature(original), args, kwargs)
        try:
            if self._key in ENTERED.get():
                self.accounting, self.traces, self.kv_bytes = [], [], 0
                refuse_embeddings(given)
                refuse_other_conversation(given)
            return original(*args, **kwargs)
        except Exception as error:
            streamer = given.get("streamer")
            if streamer is not None:
                # A loop over the streamer in the block's thread would otherwise wait forever and see no error.
                if threading.get_ident() != self._thread:
                    self._unseen = error
                streamer.end()
            raise

    # What is counted

    def _count(self, record: Record, state: Prefilled) -> None:
        """Count what a prefill computed, and store the numbers with its cache."""
        self.accounting, self.traces, self.kv_bytes = record.accounting(state), record.steps, state.kv_bytes_held
        # Decoding changes the masks and positions of segments, but not their lengths.
        self.record, self.segments = record, state.segments
        setattr(state.cache, COUNTS, (self.accounting, self.traces, self.kv_bytes))

    def _count_text(self, given: Mapping[str, Any], output: Any) -> None:
        """Count prompts without images, which the model's own forward has run, if a cache now holds all of them."""
        ids, mask, cache = given.get("input_ids"), given.get("attention_mask"), cache_of(output)
        if ids is None or type(cache) is not DynamicCache or cache.get_seq_length() != ids.shape[1]:
            return
        mask = torch.ones_like(ids) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return
        lengths, layers = mask.sum(1).tolist(), self._runtime.llm.layers
        segment = Segment(range(len(layers)), tuple(lengths), (0,) * len(ids), None, ids[:, :0])
        self._count(Record([[] for _ in ids], [[] for _ in ids]), held_by(output.logits, cache, [segment]))

    # The pipeline's forward

    def _prefill(self, given: Mapping[str, Any], cache: Any) -> CausalLMOutputWithPast:
        """Reduce and run whole prompts: the logits [B, 1, V] of each prompt's last token, and the cache."""
        modules = list(self._model.modules())[1:]
        self._check_prefill(given, cache, modules)
        if state_of(self._model) != self._state:
            raise UserError(
                "The model was changed after reduce(...): a module, a setting or its device; leave the block and call "
                "reduce() again."
            )
        runtime, copies = cast(HFWrapper, self._runtime), given.get(COPIES, 1)
        ids, mask = given["input_ids"][::copies], given.get("attention_mask")
        mask = None if mask is None else mask[::copies]
        batch = samples(ids, mask, runtime.ready(given), self.questions, runtime.tokenizer, runtime.marks)
        with hooks_must_run(self._model, modules):
            state, record = prefill(runtime, batch, self.reducer)
            # The caller's own cache is filled. Its class is changed, because a DynamicCache would not reorder masks and
            # positions.
            held: Any = state.cache if cache is None else cache
            held.__class__ = ReducedCache
            held.layers, held.layer_class_to_replicate = state.cache.layers, None
            held.segments, held.ids = state.segments, ids.to(runtime.device)
            if copies > 1:
                held.batch_repeat_interleave(copies)
            output = self._output(state.hidden.repeat_interleave(copies, 0), held)
        state.cache = held
        self._count(record, state)
        return output

    def _check_prefill(self, given: Mapping[str, Any], cache: Any, modules: Sequence[nn.Module]) -> None:
        """Raise UserError unless these are whole prompts, the cache is empty and the model is in evaluation mode."""
        if given.get("input_ids") is None:
            raise UserError("A prompt with images needs input_ids; take them from the model's own processor.")
        if given.get("use_cache") is False:
            raise UserError("Reduced prompts are continued from their cache; leave use_cache on.")
        keep = given.get("logits_to_keep")
        if isinstance(keep, Tensor) or (keep or 0) > 1:
            raise UserError("A reduced prompt gives the logits of its last token only; leave out logits_to_keep.")
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.offloading or cache.get_seq_length()):
            raise UserError(
                "A prompt with images is reduced from its beginning, into a cache of its own; give the whole prompt, "
                f"and leave out cache_implementation and {CACHE} (got a {type(cache).__name__})."
            )
        refuse_training(*modules)

    def _continue(self, given: Mapping[str, Any], cache: ReducedCache) -> CausalLMOutputWithPast:
        """Run a token per prompt, or the next turn of one prompt: the last token's logits [B, 1, V], and the cache."""
        self._refuse_continuation(given, cache)
        ids = given["input_ids"].to(self._runtime.device)
        llm = self._model.model.language_model
        with torch.inference_mode(), hooks_must_run(self._model, (self._model.model, llm)):
            tokens = llm.embed_tokens(ids)
            hidden = step(llm, Prefilled(tokens, cache, cache.segments, [], 0), tokens)
        assert cache.ids is not None  # of this forward
        cache.ids = torch.cat([cache.ids, ids], 1)
        return self._output(hidden[:, -1:], cache)

    def _refuse_continuation(self, given: Mapping[str, Any], cache: ReducedCache) -> None:
        """Raise UserError for anything but one token per prompt of the cache, or text for a cache of one prompt."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        again = f"give the whole conversation and all its images, without {CACHE}."
        if has_pixels(given) or ids is None:
            raise UserError(
                "A reduced prompt is continued by input_ids alone, because its images are in the cache: leave pixels "
                f"out; for another image {again}"
            )
        rows, count = len(cache.segments[0].next_position), ids.shape[1]  # beams and samples among them
        if len(ids) != rows:
            raise UserError(
                f"The cache holds {rows} reduced prompts, got input_ids for {len(ids)}; give one token each. For "
                f"several answers to a later turn {again}"
            )
        if count == 1:
            return
        if cache.ids is None or rows > 1 or not count:
            raise UserError(
                f"After a reduced prompt, input_ids must be one token per prompt, got {count}. Another turn runs on "
                f"the cache of one conversation with LLaVA, LLaVA-NeXT or Video-LLaVA; otherwise {again}"
            )
        config = self._model.config
        slots = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        if any(slot is not None and bool((ids == slot).any()) for slot in slots):
            raise UserError(f"Another turn cannot show another image; {again}")
        if isinstance(mask, Tensor) and not bool(mask[:, -count:].all()):
            raise UserError("Another turn has no padding; give one conversation, and attention_mask without zeros.")

    def _output(self, hidden: Tensor, cache: ReducedCache) -> CausalLMOutputWithPast:
        llm, head = self._model.model.language_model, self._model.lm_head
        # Prompts as they entered layer 0, whose cache may have been cut since.
        first: Any = cache.layers[0]
        length = max(first.get_seq_length(), *cache.segments[0].lengths)
        window = getattr(llm.config, "sliding_window", None)
        if window is not None and length > window:
            raise UserError(
                f"This model attends within a sliding window of {window} tokens, which is not applied to reduced "
                f"prompts; this one has {length} tokens with its answer, so lower the budget or shorten the text."
            )
        with torch.inference_mode():
            logits = head(llm.norm(hidden))
        # Callers often change logits in place. That needs a copy made outside of inference mode.
        logits = logits.to(self._runtime.device, copy=True)
        held: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=logits, **held)


def refuse_other_conversation(given: Mapping[str, Any]) -> None:
    """Raise UserError if the ids of a call of `generate` do not continue the conversation that its cache holds."""
    cache = given.get(CACHE)
    if not isinstance(cache, ReducedCache) or cache.ids is None:
        return
    ids, held = given.get("inputs"), cache.ids
    ids = given.get("input_ids") if ids is None else ids
    length = held.shape[1]
    if ids is None or ids.shape[1] <= length or not torch.equal(ids[:, :length].to(held.device), held):
        raise UserError(
            f"input_ids must begin with the {length} tokens that the cache stands for, image tokens included, and go "
            "on after them: give the ids that the last call returned, followed by those of the new turn, or the whole "
            f"conversation and its images without {CACHE}."
        )


def held_by(hidden: Tensor, cache: Any, segments: list[Segment]) -> Prefilled:
    """The state after a model's own forward has run whole prompts; some layers may have no keys and values."""
    used, held = [0] * len(segments[0].lengths), 0
    for one in segments:
        for layer in (cache.layers[index] for index in one.layers):
            if getattr(layer, "keys", None) is not None:
                total, length = layer.keys.nbytes + layer.values.nbytes, layer.keys.shape[-2]
                held += total
                token = total // (len(used) * length)
                used = [
                    own + min(count, length) * token for own, count in zip(used, one.cached or one.lengths, strict=True)
                ]
    return Prefilled(hidden, cache, segments, used, held)


# Temporary replacements of a module's methods


class Override:
    """A function that replaces one method of one module until `restore` is called.

    Until then, the module cannot be deep-copied or pickled: the copy would keep the override, which runs the weights of
    the original. A shallow copy shares the modules, and an override that it keeps has no effect after `restore`.
    torch.compile does not compile the replacement, because it reads values on the host.

    Args:
        owner: the module.
        name: name of the method.
        function: the replacement. It is called with the original method, followed by the arguments of the call.
        signature: the signature that `inspect.signature` shows; None for the original's.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        function: Callable[..., Any],
        signature: inspect.Signature | None = None,
    ):
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        self.__signature__ = signature or inspect.signature(original)
        self.original, self.active = original, True
        self._owner, self._name, self._function = owner, name, function
        self._attribute = vars(owner).get(name, MISSING)
        setattr(owner, name, self)

    @torch.compiler.disable(reason="A model inside `with reduce(...)` is not compiled as a whole.")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return self._function(self.original, *args, **kwargs)

    def restore(self) -> None:
        self.active = False
        if self._attribute is MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._attribute)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UserError("Copy or pickle the model before or after the `with reduce(...)` block, not inside it.")


@contextmanager
def hooks_must_run(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Raise UserError at the end of the context if a module that has forward hooks was not called in it.

    A module with a replaced `forward` counts as hooked too. accelerate's hooks for several devices and for offloaded
    weights do not count, because they are on modules with weights of their own, and all of these are called.

    Args:
        model: used to name the modules in the error.
        modules: the modules to check.
    """
    ids = set()
    for module in modules:
        replaced = vars(module).get("forward")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        has_own = any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)
        if has_own or not (replaced is None or isinstance(replaced, Override) or device_hooks(module)):
            ids.add(id(module))
    hooked = {name: module for name, module in model.named_modules() if id(module) in ids} if ids else {}
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name, module in hooked.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    skipped = sorted(set(hooked) - called)
    if skipped:
        raise UserError(
            f"The forward hook (or replaced forward) of {', '.join(skipped)} has no effect in reduce(), which does not "
            "call this module as a whole; remove it, or hook the decoder layers or the model itself."
        )
