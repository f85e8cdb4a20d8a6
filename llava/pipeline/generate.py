"""Answer a batch of questions: prefill the prompts, then decode greedily.

Read this file from top to bottom. `generate` answers a batch. It first calls `prefill`, which computes the hidden state
that predicts the first token, in two parts: `until_decoder` encodes the images and puts their tokens into the prompts,
and `run_decoder` runs the decoder layers. The method may reduce the visual tokens in both parts. How it is asked to do
so is in llava/pipeline/stages.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.model.parallel import require_agreement
from llava.pipeline import decoder, positions
from llava.pipeline.accounting import Answer, Batch, Record, Timer, Timing
from llava.pipeline.decoder import PreallocatedLayer, Prefilled, Segment
from llava.pipeline.sequence import ImageKey, PromptBatch, Rotary, on_device
from llava.pipeline.stages import Stages, embed
from llava.processing.prompt import Sample
from llava.reduction.budget import require
from llava.reduction.modules import prefill_flops
from llava.reduction.reducer import Reducer

NOT_FINITE = -1  # takes the place of a token id if the logits are NaN or infinite

# (prompts, next layer, the prompts as they entered the layer before it, cache and segments of all layers so far) ->
# shorter prompts
ReduceAt = Callable[[PromptBatch, int, PromptBatch, Sequence[Any], list[Segment]], PromptBatch]


@torch.inference_mode()
def generate(
    model: Llava,
    samples: Sequence[Sample],
    reducer: Reducer,
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
    clock: Callable[[], float] | None = None,
) -> Batch:
    """Answer a batch of questions with a reduction method.

    Batching does not change an answer: padding is masked, each sample is reduced separately, and tokens generated after
    an answer ends are discarded. Exception: sums are rounded differently in batches of another size. In half precision
    this can change an answer whose two best tokens have nearly equal logits.

    Args:
        ignore_eos: ignore end tokens and the stop string, so that every answer has `max_new_tokens` tokens.
        clock: returns seconds; it times the stages unless the model is on a CUDA device. None for the monotonic clock.

    Raises:
        UserError: there is no question, the method cannot run on this model at its budget, the logits are not finite,
            or the ranks that share the decoder disagree.
    """
    if not samples or max_new_tokens < 1:
        raise UserError(f"Needs a question and max_new_tokens of at least 1, got {len(samples)} and {max_new_tokens}.")
    for image in (image for sample in samples for image in sample.images):
        if not model.takes_videos and not isinstance(image, Image.Image):
            kind = type(image).__name__.lower()
            raise UserError(f"{model.name} takes images only, got a {kind}; choose a Video-LLaVA or a Qwen-VL.")
    timer = Timer(model.device, clock)
    # A family of llava/hf/families.py and a serving engine have a forward of their own, which answers the whole batch.
    if model.answers is not None:
        return model.answers(samples, reducer, max_new_tokens, ignore_eos, timer)
    require(reducer, model.spec)
    state, record = prefill(model, samples, reducer, timer)
    written, steps = decode(model, state, [sample.id for sample in samples], max_new_tokens, ignore_eos, timer)

    # The answers. Everything that was recorded on the way is counted and copied to the host only here.
    accounts = record.accounting(state)
    answers = tuple(
        Answer(
            sample.id,
            text_of(model, ids, ignore_eos),
            tuple(ids),
            account,
            trace,
            tuple(image.layout for image in images),
            tuple(image.canvas for image in images),
        )
        for sample, ids, account, trace, images in zip(
            samples, written, accounts, record.steps, record.images, strict=True
        )
    )
    # Ranks that share the decoder have computed the same batch; they must have kept and written the same tokens.
    if model.spread:
        for answer in answers:
            kept = [step.reduction.kept.tolist() for step in answer.trace]
            require_agreement(f"question {answer.id}", (answer.token_ids, kept), model.device)

    # The cost of the batch. Keys and values have space for new tokens; if their heads are split over ranks, this rank's
    # memory is scaled to all heads.
    seconds = timer.seconds
    timing = Timing(**{known.name: seconds.get(known.name, 0.0) for known in fields(Timing)})
    images = sum(map(len, record.images))
    layers: list[Any] = state.cache.layers
    room = sum(part.untyped_storage().nbytes() for layer in layers for part in (layer.keys, layer.values))
    room = room * model.llm.config.num_key_value_heads // layers[0].keys.shape[1]
    return Batch(answers, timing, state.kv_bytes_held, record.operations, steps, images=images, kv_bytes_allocated=room)


def decode(
    model: Llava, state: Prefilled, names: Sequence[str], max_new_tokens: int, ignore_eos: bool, timer: Timer
) -> tuple[list[list[int]], int]:
    """Decode greedily after a prefill: the token ids of each answer, without the end token, and the number of steps.

    Args:
        state: its cache then also holds the first `steps` tokens of every answer.
        names: of the questions, for errors.
        timer: gets the time of the first token as "prefill" and of the others as "decode".
    """
    end_ids, stop = (frozenset(), None) if ignore_eos else (model.end_ids, model.stop)
    written: list[list[int]] = [[] for _ in names]

    @cache
    def may_end_stop(token: int) -> bool:
        """Whether the stop string can end in this token. Only then is the answer decoded, to look for the string."""
        last = (stop or "")[-1:]
        return last.isspace() or last in model.decode([token], special=True)

    # One token per sample and round, the first of them from the prefill, until all answers have ended. The samples stay
    # together to the last round; tokens of answers that have ended are not written down.
    running = set(range(len(names)))
    hidden, steps = state.hidden, 0
    while True:
        logits = model.logits(hidden)
        token = logits.argmax(-1)
        # A sum is finite only if all its terms are, so one kernel checks all logits of a sample.
        checked = token.where(logits.sum(-1).isfinite(), NOT_FINITE)
        if not steps:
            timer.mark("prefill")
        # The only transfer of a step: the host must see which answers end, and whether the logits are finite.
        for sample, value in enumerate(checked.tolist()):
            if sample not in running:
                continue
            if value == NOT_FINITE:
                raise UserError(
                    f"The logits for question {names[sample]} are not finite: the weights or the configuration of "
                    f"{model.name} hold NaN or infinite values, or the dtype is too narrow for them; check the "
                    "checkpoint, or use another --dtype."
                )
            if value in end_ids:
                running.discard(sample)
                continue
            written[sample].append(value)
            if stop and may_end_stop(value) and stop in model.decode(written[sample], special=True):
                running.discard(sample)
        if not running or steps + 1 == max_new_tokens:
            break
        hidden = decoder.step(model.llm, state, model.llm.embed_tokens(token[:, None]))
        steps += 1
    timer.mark("decode")
    return written, steps


def text_of(model: Llava, ids: Sequence[int], ignore_eos: bool = False) -> str:
    """The text of an answer, up to the stop string."""
    text = model.decode(ids)
    return (text.split(model.stop, 1)[0] if model.stop and not ignore_eos else text).strip()


@torch.inference_mode()
def prefill(
    model: Llava, samples: Sequence[Sample], reducer: Reducer, timer: Timer | None = None
) -> tuple[Prefilled, Record]:
    """Run a batch up to the hidden state that predicts the first token.

    Args:
        timer: gets the time of "preprocess" (tokenizing prompts, resizing images on the CPU), "vision" (tower and
            projector), "selection" (the method's own functions, and applying the reductions that they return) and
            "prefill" (embedding and assembling prompts, running the decoder).

    Returns:
        The state that decoding continues, and the record of images, reductions and operations.
    """
    timer = timer or Timer(model.device)
    stages = until_decoder(model, samples, reducer, timer)
    # A method that acts in the decoder names the layers before which it reduces; text alone is never reduced.
    record, layers = stages.record, tuple[int, ...]()
    if stages.images and "decoder" in reducer.acts_in:
        layers = reducer.decoder_layers(len(model.llm.layers))
    prefilled = run_decoder(model.llm, stages.start, layers, stages.reduce_between_layers)
    timer.mark("prefill")
    # The operations of a sample depend on its length in each layer, without padding.
    for sample in range(len(samples)):
        lengths = tuple(segment.lengths[sample] for segment in prefilled.segments for _ in segment.layers)
        record.operations.add("prefill", prefill_flops, model.llm.layers, lengths, model.head)
    return prefilled, record


def until_decoder(model: Llava, samples: Sequence[Sample], reducer: Reducer, timer: Timer) -> Stages:
    """Encode and reduce the images of a batch, and make the prompts that enter decoder layer 0.

    Returns:
        The stages of the batch; their `start` holds the prompts.
    """
    prompts = [model.prompt(sample) for sample in samples]
    stages = Stages(model, reducer, samples, Record([[] for _ in samples], [[] for _ in samples]), timer)
    # The distinct images, and the name of each sample's images; an image without an id is taken for a new one.
    images: dict[object, Any] = {}
    names: dict[ImageKey, object] = {}
    for sample, asked in enumerate(samples):
        for number, image in enumerate(asked.images):
            name = names[sample, number] = asked.image_ids[number] if asked.image_ids else object()
            images.setdefault(name, image)
    # Inside the tower, or between tower and projector, a method reduces the features of an image without its text.
    if reducer.blind:
        prompts = [prompt.without_images() for prompt in prompts]
        layouts = {name: model.layout_of(image) for name, image in images.items()}
        stages.leave_out({key: (layouts[name], model.canvas(images[name])) for key, name in names.items()})
        timer.mark("preprocess")
    elif images:
        # Questions about the same image share one pass of the tower, but each would need it if asked alone.
        passes = model.encode_images(list(images.values()), list(images), reducer, timer)
        encoded, users = dict(zip(images, passes, strict=True)), Counter(names.values())
        for name, one in encoded.items():
            model.count_tower(stages.record.operations, one, users[name])
        canvases = {key: model.canvas(images[name]) for key, name in names.items()}
        stages.take_images({key: encoded[name] for key, name in names.items()}, canvases)
    else:
        timer.mark("preprocess")
    # With the images in their prompts, a method can choose tokens by the question.
    stages.start = embed(model, reducer, prompts, stages.images)
    if stages.images and "prompt" in reducer.acts_in:
        timer.mark("prefill")
        stages.start = stages.reduce_prompt(stages.start)
        timer.mark("selection")
    return stages


def run_decoder(
    llm: Any,
    sequence: PromptBatch,
    stages: tuple[int, ...],
    reduce_at: ReduceAt | None,
) -> Prefilled:
    """Run all decoder layers on the prompts, which `reduce_at` shortens before some of them.

    Args:
        llm: a LlamaModel, or another decoder with `layers` and `rotary_emb`.
        stages: layers before which `reduce_at` is called; layer 0 is ignored.
    """
    # Each layer of the cache has its own length. The cache does not get the decoder's configuration, because that could
    # set a sliding window, which is not applied here (see the notes in llava/model/checkpoint/load.py).
    cache, before, depth = DynamicCache(), sequence, len(llm.layers)
    cache.layer_class_to_replicate = PreallocatedLayer
    held_by: list[Any] = cache.layers  # grows by one with every layer that runs
    # With these kinds of rotary embedding, the angles at a position depend on the length of the prompt.
    follows_length = getattr(llm.rotary_emb, "rope_type", "default") in ("dynamic", "longrope")
    # Between two reductions, all layers share lengths, mask and positions: they form one segment.
    segments: list[Segment] = []
    for first, last in pairwise((0, *sorted({stage for stage in stages if 0 < stage < depth}), depth)):
        if first and reduce_at is not None:
            sequence = reduce_at(sequence, first, before, held_by, segments)
        # Rotary angles are computed for the first segment; shorter prompts can often reuse the first ones of them.
        if sequence.rotary is not None:
            rotary = sequence.rotary.cos, sequence.rotary.sin
        else:
            rotary = decoder.rotary_angles(llm, sequence.hidden, sequence.position)
            if sequence.position.dim() == 2 and not follows_length:
                sequence = replace(sequence, rotary=Rotary(*rotary))
        # What decoding must know about the segment: its lengths, its mask, and the position of the next token.
        lengths, width = sequence.lengths, sequence.hidden.shape[1]
        counts = tuple(sum(stop - start for start, stop in spans) for spans in sequence.visual)
        valid = sequence.valid() if min(lengths) < width else None
        if sequence.contiguous:
            following = on_device(lengths, sequence.position.device)[:, None]
        else:
            following = positions.next_position(sequence.position)
        segments.append(Segment(range(first, last), lengths, counts, valid, following))
        # Run the layers. Some methods read the last of them again, so the states that entered it are kept as well.
        hidden, entered = decoder.run_segment(llm, sequence, range(first, last), rotary, cache)
        before, sequence = replace(sequence, hidden=entered), replace(sequence, hidden=hidden)
    # The cache is measured now, because decoding makes it longer. Heads that other ranks hold are counted as well.
    held, used = 0, [0] * len(sequence.lengths)
    for segment in segments:
        for layer in (held_by[index] for index in segment.layers):
            size = (layer.keys.nbytes + layer.values.nbytes) * llm.config.num_key_value_heads // layer.keys.shape[1]
            token = size // (len(used) * layer.keys.shape[-2])
            held += size
            used = [
                total + length * token for total, length in zip(used, segment.cached or segment.lengths, strict=True)
            ]
    return Prefilled(sequence.hidden[:, -1:], cache, segments, used, held)
