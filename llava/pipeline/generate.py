"""Answer a batch of questions: from prompts and images to the first token, and greedy decoding after it.

Read it from top to bottom: `generate` is the way of every question, `prefill` its first half, in which `until_decoder`
encodes and reduces images and `run_decoder` runs the layers. What happens inside a stage, where a method shortens the
prompts, is in llava/pipeline/stages.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from llava.errors import UserError
from llava.model.llava_arch import EncodedImage, Llava
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
from llava.reduction.token_layout import Canvas

NOT_FINITE = -1  # in place of a token id

# (prompts, layer, the prompts as they entered the layer before, keys of that layer) -> shorter prompts
ReduceAt = Callable[[PromptBatch, int, PromptBatch, Tensor], PromptBatch]


@torch.inference_mode()
def generate(
    model: Llava,
    samples: Sequence[Sample],
    reducer: Reducer,
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
    clock: Callable[[], float] | None = None,
) -> Batch:
    """Answer a batch of questions under a method.

    The other samples do not change an answer: padding is masked, reductions are per sample, and tokens after the end of
    an answer are dropped. Only the rounding of sums depends on the size of the batch. In half precision it can turn an
    answer whose two best tokens are nearly equal.

    Args:
        ignore_eos: no end token and no stop string ends an answer, so that all have `max_new_tokens`.
        clock: of the seconds of the stages, where no GPU says them; None for the monotonic clock.

    Raises:
        UserError: the method cannot run on this model at its budget, there is nothing to answer, the logits are not
            finite, or the ranks that share the decoder do not agree.
    """
    if not samples or max_new_tokens < 1:
        raise UserError(f"Needs a question and max_new_tokens of at least 1, got {len(samples)} and {max_new_tokens}.")
    for image in (image for sample in samples for image in sample.images):
        if not model.takes_videos and not isinstance(image, Image.Image):
            kind = type(image).__name__.lower()
            raise UserError(f"{model.name} takes images only, got a {kind}; choose a Video-LLaVA for videos.")
    timer = Timer(model.device, clock)
    if model.answers is not None:
        return model.answers(samples, reducer, max_new_tokens, ignore_eos, timer)
    require(reducer, model.spec)
    end_ids, stop = (frozenset(), None) if ignore_eos else (model.end_ids, model.stop)
    state, record = prefill(model, samples, reducer, timer)
    written: list[list[int]] = [[] for _ in samples]

    @cache
    def may_end_stop(token: int) -> bool:
        """Whether the stop string can end in this token; the answer so far is decoded only then, not at every step."""
        last = (stop or "")[-1:]
        return last.isspace() or last in model.decode([token], special=True)

    running = set(range(len(samples)))
    hidden, steps = state.hidden, 0
    while True:
        logits = model.logits(hidden)
        token = logits.argmax(-1)
        # Where logits are NaN or infinite, no token. A sum is finite only if all its terms are: one kernel, not four.
        checked = token.where(logits.sum(-1).isfinite(), NOT_FINITE)
        if not steps:
            timer.mark("prefill")
        # One transfer per step: the host must know which samples have ended, and whether the logits are finite.
        for sample, value in enumerate(checked.tolist()):
            if sample not in running:
                continue
            if value == NOT_FINITE:
                raise UserError(
                    f"The logits for question {samples[sample].id} are not finite: the weights or the configuration of "
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
    texts = [model.decode(ids) for ids in written]
    accounts = record.accounting(state)
    answers = tuple(
        Answer(
            sample.id,
            (text.split(stop, 1)[0] if stop else text).strip(),
            tuple(ids),
            account,
            trace,
            tuple(image.layout for image in images),
            tuple(image.canvas for image in images),
        )
        for sample, text, ids, account, trace, images in zip(
            samples, texts, written, accounts, record.steps, record.images, strict=True
        )
    )
    if model.spread:
        for answer in answers:
            kept = [step.reduction.kept.tolist() for step in answer.trace]
            require_agreement(f"question {answer.id}", (answer.token_ids, kept), model.device)
    timing = Timing(**{known.name: timer.seconds.get(known.name, 0.0) for known in fields(Timing)})
    images = sum(map(len, record.images))
    first: Any = state.cache.layers[0]  # of whose heads this rank may hold a part
    room = state.kv_bytes_allocated * model.llm.config.num_key_value_heads // first.keys.shape[1]
    return Batch(answers, timing, state.kv_bytes_held, record.operations, steps, images=images, kv_bytes_allocated=room)


@torch.inference_mode()
def prefill(
    model: Llava, samples: Sequence[Sample], reducer: Reducer, timer: Timer | None = None
) -> tuple[Prefilled, Record]:
    """Run a batch up to the hidden state that predicts the first token.

    Args:
        timer: marked after "preprocess" (tokenizing prompts, resizing images on the CPU), "vision" (tower and
            projector), "selection" (the method's own functions, and applying what they return) and "prefill"
            (embedding and assembling prompts, running the decoder).
    """
    timer = timer or Timer(model.device)
    stages = until_decoder(model, samples, reducer, timer)
    record, layers = stages.record, tuple[int, ...]()
    if stages.images and "decoder" in reducer.acts_in:
        layers = reducer.decoder_layers(len(model.llm.layers))
    prefilled = run_decoder(model.llm, stages.start, layers, stages.reduce_between_layers)
    timer.mark("prefill")
    for sample in range(len(samples)):
        lengths = tuple(segment.lengths[sample] for segment in prefilled.segments for _ in segment.layers)
        record.operations.add("prefill", prefill_flops, model.llm.layers, lengths, model.head)
    return prefilled, record


def until_decoder(model: Llava, samples: Sequence[Sample], reducer: Reducer, timer: Timer) -> Stages:
    """Encode images and reduce them up to decoder layer 0; the prompts that enter it are the stages' `start`."""
    prompts = [model.prompt(sample) for sample in samples]
    stages = Stages(model, reducer, samples, Record([[] for _ in samples], [[] for _ in samples]), timer)
    if any(sample.images for sample in samples):
        stages.take_images(*encode_images(model, samples, reducer, stages.record, timer))
    else:
        timer.mark("preprocess")
    stages.start = embed(model, reducer, prompts, stages.images)
    if stages.images and "prompt" in reducer.acts_in:
        timer.mark("prefill")
        stages.start = stages.reduce_prompt(stages.start)
        timer.mark("selection")
    return stages


def encode_images(
    model: Llava, samples: Sequence[Sample], reducer: Reducer, record: Record, timer: Timer
) -> tuple[dict[ImageKey, EncodedImage], dict[ImageKey, Canvas | None]]:
    """Run the tower on the images of a batch; questions about the same image share one pass.

    Returns:
        what the tower gave for every image, and where the image lies on what its patches cover.
    """
    images: dict[object, Any] = {}
    names: dict[ImageKey, object] = {}
    for sample, asked in enumerate(samples):
        for number, image in enumerate(asked.images):
            name = names[sample, number] = asked.image_ids[number] if asked.image_ids else object()
            images.setdefault(name, image)
    encoded = dict(zip(images, model.encode_images(list(images.values()), list(images), reducer, timer), strict=True))
    users = Counter(names.values())
    for name, one in encoded.items():
        model.count_tower(record.operations, one, users[name])
    canvases = {key: model.canvas(images[name]) for key, name in names.items()}
    return {key: encoded[name] for key, name in names.items()}, canvases


def run_decoder(
    llm: Any,
    sequence: PromptBatch,
    stages: tuple[int, ...],
    reduce_at: ReduceAt | None,
) -> Prefilled:
    """Run all decoder layers on the prompts, which become shorter before some of them.

    Args:
        llm: layers and rotary_emb (a LlamaModel).
        stages: layers before which `reduce_at` is called; layer 0 is not one of them.
    """
    # Every layer gets its own length and its own space. Without the configuration, which could set a sliding window; it
    # is not applied, see the notes of llava.model.checkpoint.load.
    cache, before, depth = DynamicCache(), sequence, len(llm.layers)
    cache.layer_class_to_replicate = PreallocatedLayer
    held_by: list[Any] = cache.layers  # one more from layer to layer
    # Whether the angle of a position depends on how long the prompt is.
    follows_length = getattr(llm.rotary_emb, "rope_type", "default") in ("dynamic", "longrope")
    segments = []
    for first, last in pairwise((0, *sorted({stage for stage in stages if 0 < stage < depth}), depth)):
        if first and reduce_at is not None:
            sequence = reduce_at(sequence, first, before, held_by[first - 1].keys.to(sequence.hidden.device))
        if sequence.rotary is not None:
            rotary = sequence.rotary.cos, sequence.rotary.sin
        else:
            rotary = decoder.rotary_angles(llm, sequence.hidden, sequence.position)
            if sequence.position.dim() == 2 and not follows_length:
                sequence = replace(sequence, rotary=Rotary(*rotary))
        lengths, width = sequence.lengths, sequence.hidden.shape[1]
        counts = tuple(sum(stop - start for start, stop in spans) for spans in sequence.visual)
        valid = sequence.valid() if min(lengths) < width else None
        if sequence.contiguous:
            following = on_device(lengths, sequence.position.device)[:, None]
        else:
            following = positions.next_position(sequence.position)
        segments.append(Segment(range(first, last), lengths, counts, valid, following))
        hidden, entered = decoder.run_segment(llm, sequence, range(first, last), rotary, cache)
        before, sequence = replace(sequence, hidden=entered), replace(sequence, hidden=hidden)
    # Counted now, because decoding makes the cache longer. Where heads are split over ranks, this one holds some.
    held, used = 0, [0] * len(sequence.lengths)
    for segment in segments:
        for layer in (held_by[index] for index in segment.layers):
            size = (layer.keys.nbytes + layer.values.nbytes) * llm.config.num_key_value_heads // layer.keys.shape[1]
            token = size // (len(used) * layer.keys.shape[-2])
            held += size
            used = [total + length * token for total, length in zip(used, segment.lengths, strict=True)]
    return Prefilled(sequence.hidden[:, -1:], cache, segments, used, held)
