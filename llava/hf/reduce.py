"""`reduce`: run a Hugging Face vision-language model with a reduction method.

    with reduce(model, "visiondrop", budget=64) as reduced:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    reduced.accounting[0].tokens_per_layer  # visual tokens that entered each decoder layer

LLaVA, LLaVA-NeXT and Video-LLaVA run the pipeline's forward, which also answers benchmarks (patch.py).

The families of `llava.hf.families.FAMILIES` run their own forward on shorter prompts (`FamilyReductionContext`). First,
the method's stages before the decoder run on the model's visual tokens as they do on LLaVA's
(llava/pipeline/stages.py). The model's forward then gets what is left: shorter `input_ids`, the position ids of the
kept tokens, and the kept or merged tokens as `mm_encoder_outputs`. Masks, scales and kernels are the model's own, so
keeping all tokens gives the model's logits bit for bit. Reductions between decoder layers run in hooks before these
layers.

Read: transformers 5.23.0, modeling of the families, generation/utils.py, masking_utils.py, cache_utils.py
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.budget import BLIND, RETENTION_RATIO, WITHOUT_BUDGET
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.hf.families import FAMILIES, MODALITIES, FamilyWrapper, flat, why_not
from llava.hf.models import COPIES, ONE_CALL, HFWrapper, ModelCalls, StockSample, samples, wrap_model
from llava.hf.patch import Override, ReducedCache, ReductionContext, held_by
from llava.pipeline import positions
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.decoder import Segment, causal_mask, rotary_angles
from llava.pipeline.sequence import ImageKey, PromptBatch
from llava.pipeline.stages import Stages, embed
from llava.processing.prompt import Prompt
from llava.reduction.budget import require
from llava.reduction.ranking import gather_tokens
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build, names
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, single, spec_of, stitched
from llava.transformers_names import CACHE, DEEPSTACK, KERNEL, RANKS, CausalLMOutputWithPast, cache_of


def reduce(
    model: PreTrainedModel | HFWrapper,
    method: str,
    budget: int | float | str | None = None,
    *,
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
    **options: Any,
) -> "ReductionContext":
    """A context in which a Hugging Face model runs with a reduction method.

    Args:
        model: a model in evaluation mode, of one of the families above. For LLaVA, LLaVA-NeXT and Video-LLaVA it may
            also be a wrapper that knows tokenizer and text tower.
        method: a name from `llava.reduction.registry.names`.
        budget: visual tokens per image or video, as a mean over decoder layers, or the ratio of each image's tokens to
            keep ("1/9", 0.111). Only `full`, `none` (no visual token), and methods that decide from the image how many
            tokens to keep, need none.
        questions: the question of each prompt in the calls inside, without template, for methods that read it. Without
            `questions`, all text after the last image is taken as the question, template included. If no text follows
            the last image, the text before it is taken. With a chat template that puts the question before the image,
            only words of the template follow the image, so give `questions`. Methods that read the question refuse a
            prompt without text.
        tokenizer: the model's tokenizer or processor, needed with `questions`.
        text_tower: folder or hub id of the CLIP that the vision tower comes from, for methods that need its text tower.
        options: options of the method, for example `official=True`.

    Raises:
        UserError: the model, the method, an option or the budget is not supported, or there is no budget.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if questions is not None and (isinstance(questions, str) or tokenizer is None):
        raise UserError("`questions` is a list with one string per prompt, and needs `tokenizer` (or the processor).")
    runtime: HFWrapper | FamilyWrapper
    if isinstance(model, HFWrapper):
        runtime = model
    elif any(known.__name__ in FAMILIES for known in type(model).__mro__):
        runtime = FamilyWrapper(model, tokenizer)
    else:
        runtime = wrap_model(model, tokenizer, text_tower)
    tokens = runtime.spec.visual_tokens
    has_budget = budget is not None or options.get(RETENTION_RATIO)
    reducer = build(method, budget if has_budget or method == BLIND else tokens, options, tokens)
    if (getattr(runtime.hf_model, RANKS, None) or 1) > 1:
        raise UserError(
            "This model is split by tp_plan, and each rank would rank tokens by its own heads; load it with device_map."
        )
    if isinstance(runtime, FamilyWrapper):
        if why := why_not(runtime.family, runtime.hf_model.config, reducer):
            raise UserError(why)
    elif "tower" in reducer.acts_in and "flash" in getattr(runtime.tower.config, KERNEL):
        raise UserError(
            f"{method} merges inside the tower, whose attention then takes a mask that FlashAttention does not have; "
            "load the model with another attn_implementation for its vision_config, as 'sdpa'."
        )
    if reducer.needs_text_tower and (runtime.text_tower is None or questions is None):
        raise UserError(
            f"{method} compares questions with images in CLIP's space: give reduce() `questions`, `tokenizer`, and "
            "`text_tower`, the folder or hub id of the CLIP that the vision tower comes from."
        )
    if reducer.needs_words and questions is None:
        raise UserError(f"{method} reads the words of the questions: give reduce() `questions` and `tokenizer`.")
    require_any(runtime, reducer)
    # A method that decides from the image needs no budget: it plans no number of tokens and keeps no image because of
    # its size.
    if not (has_budget or method in WITHOUT_BUDGET) and (
        reducer.tokens_per_layer(runtime.spec) is not None or reducer.keeps_all(tokens)
    ):
        raise UserError(
            f"{method} needs a budget: the visual tokens to keep of each image (budget=64), or their ratio "
            '(budget="1/9"). "full" keeps all.'
        )
    if isinstance(runtime, FamilyWrapper):
        return FamilyReductionContext(runtime, reducer, questions)
    return ReductionContext(runtime, reducer, questions)


def require_any(runtime: ModelCalls, reducer: Reducer) -> None:
    """Raise UserError if the model takes no image or video that can be reduced to the budget."""
    errors = []
    for spec in runtime.candidates(reducer):
        try:
            return require(reducer, spec)
        except UserError as error:
            errors.append(error)
    raise errors[0]


# A 7B model of each family that runs the pipeline's forward, with one image and CLIP's text tower.
LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24, has_text_tower=True)
STAGED = {"LLaVA": LLAVA, "LLaVA-NeXT": spec_of(LLAVA, stitched((2, 2), (24, 24))), "Video-LLaVA": LLAVA}


def support() -> dict[str, dict[str, str]]:
    """Family -> method -> why `reduce` refuses the method, or "" if it runs, for models of default configurations."""
    table = {title: {name: _why_staged(name, spec) for name in names()} for title, spec in STAGED.items()}
    for container, family in FAMILIES.items():
        config = getattr(transformers, container).config_class()
        if family.layers:
            config.get_text_config().layer_types = list(family.layers)
        reducers = (build(name, None if name == BLIND else 64) for name in names())
        table[family.title] = {reducer.name: why_not(family, config, reducer) for reducer in reducers}
    return table


def _why_staged(name: str, spec: ModelSpec) -> str:
    """Why the method accepts none of three budgets (a half, a quarter, all of the tokens); "" if it accepts one."""
    why = ""
    for share in (2, 4, 1):
        try:
            require(build(name, None if name == BLIND else spec.visual_tokens // share), spec)
            return ""
        except UserError as error:
            why = str(error)
    return why


# The families' own forward


@dataclass
class Running:
    """A prefill that is running.

    Attributes:
        rows: for each prompt, its token ids without padding, with one image token per visual token, in the order in
            which methods see them.
        types: for each prompt, the mask of image tokens that the family's forward takes; None if it takes none.
        places: for each prompt, the place in `rows` where each of its images begins.
        outputs: for each modality, the output of the model's own encoder.
        sequence: the prompts as they entered the last layer that has run.
        order: for each prompt, the place of each of `rows` in the prompt as it was given (`FamilyWrapper.together`);
            None if nothing was moved.
        segments: the layers that have run so far, see `Prefilled`.
    """

    stages: Stages
    rows: list[Tensor]
    types: list[Tensor] | None
    places: list[list[int]]
    outputs: dict[str, Any]
    sequence: PromptBatch
    order: list[Tensor] | None = None
    segments: list[Segment] = field(default_factory=list)


class FamilyReductionContext(ReductionContext):
    """`ReductionContext` for the families of FAMILIES: the model's own forward runs on shorter prompts.

    Attributes:
        timer: measures the stages; None makes a new timer for each call.
        names: of the prompts of a call, by which methods that draw choose; None for names made of their token ids.
    """

    _runtime: FamilyWrapper

    def __init__(
        self,
        runtime: FamilyWrapper,
        reducer: Reducer,
        questions: Sequence[str] | None = None,
        timer: Timer | None = None,
        names: Sequence[str] | None = None,
    ):
        super().__init__(runtime, reducer, questions)
        self.timer, self.names = timer, names

    # The hooks of layers hold this object, so a copy of the model would keep them. Copying is refused.
    __reduce_ex__ = Override.__reduce_ex__

    def __enter__(self) -> "FamilyReductionContext":
        super().__enter__()
        self._running: Running | None = None
        self._continued: list[Segment] = []
        llm = self._runtime.llm
        self._stops = self.reducer.decoder_layers(len(llm.layers)) if "decoder" in self.reducer.acts_in else ()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(llm.layers if self._stops else ())
        ]
        if self._stops and hasattr(llm, DEEPSTACK):
            self._overrides.append(Override(llm, DEEPSTACK, self._deepstack))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _prefill(self, given: Mapping[str, Any], cache: Any) -> CausalLMOutputWithPast:
        self._check_prefill(given, cache, list(self._model.modules()))
        copies = given.get(COPIES, 1)
        with torch.no_grad():
            running = self._begin(given, copies)
            running.segments.append(self._segment(running.sequence, 0))
            self._running = running
            try:
                arguments = self._arguments(running, running.sequence)
                output = self._model.forward.original(
                    **arguments, **{CACHE: cache}, use_cache=True, logits_to_keep=1, return_dict=True
                )
            finally:
                self._running = None
        cache, segments = cache_of(output), running.segments
        cache.__class__ = ReducedCache
        segments[-1].layers = range(segments[-1].layers.start, len(self._runtime.llm.layers))
        cache.segments = segments
        self._count(running.stages.record, held_by(output.logits, cache, segments))
        if copies > 1:
            cache.reorder_cache(torch.arange(len(running.rows), device=self._runtime.device).repeat_interleave(copies))
        return CausalLMOutputWithPast(logits=output.logits.repeat_interleave(copies, 0), **{CACHE: cache})

    def until_decoder(self, given: Mapping[str, Any]) -> PromptBatch:
        """The prompts as they enter decoder layer 0; `given` are arguments of the model's forward."""
        return self._begin(given, 1).sequence

    def _begin(self, given: Mapping[str, Any], copies: int) -> Running:
        """Encode images, find them in the prompts, and run the method's stages before the decoder."""
        runtime, reducer, family = self._runtime, self.reducer, self._runtime.family
        given = {name: part.to(runtime.device) if isinstance(part, Tensor) else part for name, part in given.items()}
        ids, mask = given["input_ids"][::copies], given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[::copies]
        tokens = {name: runtime.token(name) for name in MODALITIES}
        if family.axes:
            self._refuse_axes(given, ids, tokens, copies)
        if reducer.blind:
            return self._begin_blind(given, ids, mask.bool(), copies)
        ready, outputs, filled, timer = {}, {}, ids, self.timer or Timer(runtime.device)
        order: Tensor | None = None  # columns of the prompts as methods see them
        for name, pixels in MODALITIES.items():
            if given.get(pixels) is not None:
                views, outputs[name] = runtime.views_of(name, given, reducer)
                if name == "video" and "decoder" not in reducer.acts_in:
                    order = runtime.together(views, filled, tokens[name])
                    filled = filled if order is None else filled.gather(1, order)
                ready[tokens[name]], filled = runtime.images(name, views, filled, tokens[name])
        batch: list[StockSample] = samples(filled, mask, ready, self.questions, runtime.tokenizer, runtime.marks)
        if self.names is not None:
            batch = [replace(one, id=name) for one, name in zip(batch, self.names, strict=True)]
        prompts, real = [runtime.prompt(sample) for sample in batch], mask.bool()
        stages = Stages(runtime, reducer, batch, Record([[] for _ in batch], [[] for _ in batch]), timer)
        encoded: dict[ImageKey, Any] = {}
        for row, one in enumerate(batch):
            encoded |= {(row, number): image for number, image in enumerate(one.images)}
        for image in (one for one in encoded.values() if one.encoded.spent):
            stages.record.operations.add("selection", int, len(image.encoded.features) * image.encoded.spent)
        stages.take_images(encoded)
        places = []
        for sample, prompt in enumerate(prompts):
            done, own = 0, list[int]()
            for token in prompt.ids:
                own += [done] * (token == IMAGE_TOKEN_INDEX)
                done += stages.images[sample, len(own) - 1].inputs if token == IMAGE_TOKEN_INDEX else 1
            places.append(own)
        sequence = embed(runtime, reducer, prompts, stages.images)

        def seen(values: Tensor) -> list[Tensor]:
            return unpadded(values if order is None else gather_tokens(values, order), real)

        types = None if given.get(family.types) is None else seen(given[family.types][::copies])
        running = Running(stages, seen(ids), types, places, outputs, sequence)
        if order is not None:
            running.order = seen(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        if family.axes:
            position = seen(self._positions(given, ids, mask, copies))
            kept = [part[columns] for part, columns in zip(position, self._columns(running), strict=True)]
            sequence = replace(sequence, position=left_padded(kept), contiguous=False)
            reduced = any(image.kept is not None for image in stages.images.values())
            if reduced and reducer.positions == "renumber":
                sequence = sequence.renumbered()
        stages.run_layers = partial(self._run_layers, running)
        if "prompt" in reducer.acts_in:
            timer.mark("prefill")
            sequence = stages.reduce_prompt(sequence)
            timer.mark("selection")
        if order is not None and reducer.positions == "renumber":
            # What was numbered above still has its order on each axis, from which the numbers follow.
            sequence = self._renumbered(running, sequence)
        stages.start = running.sequence = sequence
        return running

    def _begin_blind(self, given: Mapping[str, Any], ids: Tensor, real: Tensor, copies: int) -> Running:
        """The prompts without their visual tokens; the encoder does not run. A run of image tokens counts as an image.

        Args:
            ids, real: [B, L] token ids, and where they are not padding.
        """
        runtime, types = self._runtime, given.get(self._runtime.family.types)
        visual = torch.isin(ids, torch.tensor([runtime.token(name) for name in MODALITIES], device=ids.device))
        rows = unpadded(ids, real & ~visual)
        whole = unpadded(ids.masked_fill(visual, IMAGE_TOKEN_INDEX), real)
        prompts = [Prompt(tuple(row.tolist()), (0, 0), (0, 0), "").without_images() for row in whole]
        batch = [StockSample(str(number), "", prompt=prompt) for number, prompt in enumerate(prompts)]
        record, timer = Record([[] for _ in rows], [[] for _ in rows]), self.timer or Timer(runtime.device)
        stages = Stages(runtime, self.reducer, batch, record, timer)
        shown: dict[ImageKey, tuple[TokenLayout, None]] = {}
        for row, own in enumerate(visual.long()):
            edges = F.pad(own, (1, 1)).diff().nonzero().flatten().tolist()
            for number, (start, stop) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
                shown[row, number] = single(1, stop - start), None
        stages.leave_out(shown)
        sequence = embed(runtime, self.reducer, prompts, {})
        if runtime.family.axes:  # text has the same number on all of them
            sequence = replace(sequence, position=sequence.position[..., None].expand(-1, -1, 3), contiguous=False)
        kinds = None if types is None else unpadded(types[::copies], real & ~visual)
        return Running(stages, rows, kinds, [[] for _ in rows], {}, sequence)

    def _refuse_axes(self, given: Mapping[str, Any], ids: Tensor, tokens: Mapping[str, int], copies: int) -> None:
        """Raise UserError if arguments that positions with three axes need are missing or do not fit the prompts.

        The models themselves would silently use text positions then.
        """
        title, types = self._runtime.family.title, given.get("mm_token_type_ids")
        for name, pixels in MODALITIES.items():
            if given.get(pixels) is None:
                continue
            if (grids := given.get(f"{name}_grid_thw")) is None:
                raise UserError(f"{title} needs {name}_grid_thw beside {pixels}; {ONE_CALL}")
            if (count := int(grids.prod(-1).sum())) != (got := len(given[pixels])):
                raise UserError(f"{name}_grid_thw counts {count} patches, got {got}; {ONE_CALL}")
        if types is None:
            raise UserError(f"{title} needs mm_token_type_ids, from which its positions follow; {ONE_CALL}")
        types = types[::copies]
        if types.shape != ids.shape or any(
            not torch.equal(types == kind, ids == token) for kind, token in enumerate(tokens.values(), 1) if token >= 0
        ):
            raise UserError(
                f"mm_token_type_ids must be 1 at the image tokens of input_ids and 2 at video tokens, alone; {ONE_CALL}"
            )

    def _positions(self, given: Mapping[str, Any], ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """Position ids [B, L, 3] of whole prompts, by the family's own rule."""
        rule = self._inner.get_rope_index
        own = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": given["mm_token_type_ids"][::copies]}
        known = inspect.signature(rule).parameters
        rest = {name: value for name, value in given.items() if name in known and name not in own}
        positions_of_all: Tensor = rule(**own, **rest)[0]
        return positions_of_all.permute(1, 2, 0).to(ids.device)

    def _kept(self, running: Running, sample: int, number: int) -> Tensor:
        """For each token of an image that enters the decoder, its index among the image's unreduced tokens, [K]."""
        stages = running.stages
        kept = torch.arange(stages.images[sample, number].inputs, device=self._runtime.device)
        for one in stages.record.reductions[sample]:
            if one.number == number and not one.place.startswith("layer"):
                kept = kept[one.reduction.kept[one.row]]
        return kept

    def _columns(self, running: Running) -> list[Tensor]:
        """For each prompt, the places in `running.rows` of the tokens that enter the decoder."""
        batch, device = [], self._runtime.device
        for sample, (row, places) in enumerate(zip(running.rows, running.places, strict=True)):
            pieces, done = [], 0
            for number, first in enumerate(places):
                pieces += [torch.arange(done, first, device=device), first + self._kept(running, sample, number)]
                done = first + running.stages.images[sample, number].inputs
            batch.append(torch.cat([*pieces, torch.arange(done, len(row), device=device)]))
        return batch

    def _turn(self, running: Running) -> Tensor | None:
        """[B, L] for each column of the decoder's prompts, the column as methods see them; None where they agree."""
        if running.order is None:
            return None
        columns = zip(running.order, self._columns(running), strict=True)
        turns = [order[kept].argsort() for order, kept in columns]
        width = max(map(len, turns))
        padding = [torch.arange(width - len(turn), device=turn.device) for turn in turns]
        return torch.stack([torch.cat([pad, len(pad) + turn]) for pad, turn in zip(padding, turns, strict=True)])

    def _renumbered(self, running: Running, sequence: PromptBatch) -> PromptBatch:
        """Prompts in another order than the decoder's, numbered without gaps in the decoder's order.

        Each frame of a video is numbered as an image.
        """
        turn, spans = self._turn(running), list[tuple[tuple[int, int], ...]]()
        assert turn is not None  # another order
        visual = [self._runtime.token(name) for name in MODALITIES]
        for row, order, kept in zip(running.rows, running.order or [], self._columns(running), strict=True):
            own = torch.isin(row[kept][order[kept].argsort()], torch.tensor(visual, device=row.device)).long()
            edges = F.pad(own, (1, 1)).diff().nonzero().flatten().tolist()
            spans.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
        numbered = positions.renumber(gather_tokens(sequence.position, turn), sequence.lengths, spans)
        return replace(sequence, position=gather_tokens(numbered, turn.argsort(1)), rotary=None)

    def _arguments(self, running: Running, sequence: PromptBatch) -> dict[str, Any]:
        """The arguments with which the model's own forward runs the prompts that enter the decoder."""
        runtime, family, columns = self._runtime, self._runtime.family, self._columns(running)
        ids, turn = (
            left_padded([row[kept] for row, kept in zip(running.rows, columns, strict=True)]),
            self._turn(running),
        )

        def ordered(values: Tensor) -> Tensor:
            return values if turn is None else gather_tokens(values, turn)

        arguments = {
            "input_ids": ordered(ids),
            "attention_mask": sequence.valid().long(),
            "position_ids": self._place(ordered(sequence.position)),
        }
        if running.types is not None:
            types = left_padded([row[kept] for row, kept in zip(running.types, columns, strict=True)])
            arguments[family.types] = ordered(types)
        encoded = {}
        for name, out in running.outputs.items():
            token, new = runtime.token(name), copy.copy(out)
            if family.output == "pooler_output":
                new.pooler_output = like(out.pooler_output, sequence.hidden[ids == token])
            else:
                whole = getattr(out, family.output)
                setattr(new, family.output, like(whole, self._shortened(running, token, whole)))
            levels = getattr(out, "deepstack_features", None)
            if levels is not None:
                new.deepstack_features = [like(level, self._shortened(running, token, level)) for level in levels]
            encoded[name] = new
        return arguments | ({"mm_encoder_outputs": encoded} if encoded else {})

    def _place(self, position: Tensor) -> Tensor:
        """Position ids [B, L] or [B, L, 3], in the form that the model's forward takes."""
        return (position.permute(2, 0, 1) if self._runtime.family.axes else position) + self._runtime.family.first

    def _shortened(self, running: Running, token: int | None, output: Any) -> Tensor:
        """Reduce other values of the visual tokens, such as features of another tower level, like the tokens.

        Args:
            token: the placeholder id of the images or videos that the values belong to; the reductions before the
                decoder are applied. None if the values belong to all tokens that entered the decoder; the reductions
                between its layers are applied.
            output: values of all these tokens, in order.

        Returns:
            [K, D].
        """
        values, done, parts = flat(output).to(self._runtime.device), 0, []
        for (sample, number), image in running.stages.images.items():
            if token is not None and int(running.rows[sample][running.places[sample][number]]) != token:
                continue
            steps = [one for one in running.stages.record.reductions[sample] if one.number == number]
            steps = [one for one in steps if one.place.startswith("layer") == (token is None)]
            count = image.inputs
            if token is None:
                start, stop = running.sequence.visual[sample][number]
                count = steps[0].reduction.inputs if steps else stop - start
            own = values[None, done : done + count]
            done += count
            for one in steps:
                own = one.reduction.only(one.row).apply(own)
            parts.append(own[0])
        return torch.cat(parts)

    # Between decoder layers

    def _segment(self, sequence: PromptBatch, first: int) -> Segment:
        counts = tuple(sum(stop - start for start, stop in spans) for spans in sequence.visual)
        valid = sequence.valid() if sequence.padded else None
        following = positions.next_position(sequence.position)
        return Segment(range(first, len(self._runtime.llm.layers)), sequence.lengths, counts, valid, following)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the layer itself may be compiled
    def _before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A hook that changes a decoder layer's arguments, in a prefill or for one more token.

        In a prefill it reduces the prompts before the layers that the method names. Later layers get the mask and the
        positions of the shorter prompts.
        """
        llm, running = self._runtime.llm, self._running
        hidden = args[0] if args else options["hidden_states"]
        attention = getattr(llm.config, KERNEL)
        if running is not None:
            entered = running.sequence
            now = replace(entered, hidden=hidden)
            if index in self._stops:
                device, segments = entered.position.device, running.segments
                now, entered = (replace(one, hidden=one.hidden.to(device)) for one in (now, entered))
                segments[-1].layers = range(segments[-1].layers.start, index)
                layers = cache_of(options).layers
                now = running.stages.reduce_between_layers(now, index, entered, layers, segments)
                running.segments.append(self._segment(now, index))
            running.sequence, hidden = now, now.hidden
            if len(running.segments) == 1:
                return None
            mask, position = None, now.position
            if now.padded or attention == "eager":
                mask = causal_mask(now.valid(), hidden.shape[1], hidden.dtype, attention)
        else:
            segment = next((one for one in self._continued[1:] if index in one.layers), None)
            if segment is None:
                return None
            mask, position = None, segment.next_position
            if segment.valid is not None:
                mask = causal_mask(segment.valid, 1, hidden.dtype, attention)
        angles = rotary_angles(llm, hidden, position.to(hidden.device))
        changed = {"attention_mask": mask, "position_embeddings": angles}
        if "position_ids" in options:
            changed["position_ids"] = None
        if args:
            return (hidden, *args[1:]), {**options, **changed}
        return args, {**options, **changed, "hidden_states": hidden}

    def _deepstack(self, original: Any, hidden: Tensor, mask: Tensor, embeddings: Tensor) -> Any:
        """Add a tower level's features to the visual tokens, also after a reduction between decoder layers."""
        running = self._running
        if running is not None and len(running.segments) > 1:
            sequence, embeddings = running.sequence, self._shortened(running, None, embeddings).to(hidden.device)
            mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for row, spans in enumerate(sequence.visual):
                for start, stop in sequence.padded_spans(spans, (row,) * len(spans)):
                    mask[row, start:stop] = True
        return original(hidden, mask, embeddings)

    # One more token

    def _continue(self, given: Mapping[str, Any], cache: ReducedCache) -> CausalLMOutputWithPast:
        """Run one more token per prompt: its logits [B, 1, V], and the cache."""
        self._refuse_continuation(given, cache)
        for segment in cache.segments:
            if segment.valid is not None:
                segment.valid = F.pad(segment.valid, (0, 1), value=True)
        first, self._continued = cache.segments[0], cache.segments
        held: dict[str, Any] = {CACHE: cache}
        cache.running = True
        try:
            output = self._model.forward.original(
                input_ids=given["input_ids"].to(self._runtime.device),
                attention_mask=None if first.valid is None else first.valid.long(),
                position_ids=self._place(first.next_position),
                use_cache=True,
                return_dict=True,
                **held,
            )
        finally:
            cache.running, self._continued = False, []
        for segment in cache.segments:
            segment.next_position = segment.next_position + 1
        return CausalLMOutputWithPast(logits=output.logits, **held)

    def _run_layers(self, running: Running, llm: Any, sequence: PromptBatch, count: int) -> Tensor:
        """Hidden states [B, L, D] after the first `count` decoder layers; the model's own forward is left there."""

        def leave(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            raise StopForward(args[0] if args else options["hidden_states"])

        hook = llm.layers[count].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self._model.forward.original(**self._arguments(running, sequence), use_cache=False)
        except StopForward as left:
            hidden: Tensor = left.args[0].to(sequence.hidden.device)
            turn = self._turn(running)
            return hidden if turn is None else gather_tokens(hidden, turn.argsort(1))
        finally:
            hook.remove()
        raise AssertionError("the forward of this family does not call its decoder's layers")


class StopForward(Exception):
    """Leaves a forward; holds the hidden states there."""


def unpadded(rows: Tensor, real: Tensor) -> list[Tensor]:
    """For each row of [B, L, ...], the columns where `real` [B, L] is True."""
    return [row[columns] for row, columns in zip(rows, real, strict=True)]


def left_padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [l, ...] of different lengths as one tensor [B, L, ...], with zeros before shorter rows."""
    width = max(map(len, rows))
    return torch.stack([F.pad(row, (*[0, 0] * (row.dim() - 1), width - len(row), 0)) for row in rows])


def like(original: Any, values: Tensor) -> Any:
    """Values [K, D] in the form of a model's own output: a tensor with two or three axes, or a tuple of one tensor."""
    if isinstance(original, Tensor):
        return values if original.dim() == 2 else values[None]
    return (values,)
