"""Answer questions: prefill, then greedy decoding with end token and stop strings."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from PIL import Image

from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.model.parallel import require_agreement
from llava.pipeline import decoder
from llava.pipeline.accounting import Answer, Batch, Timer, Timing
from llava.pipeline.prefill import prefill
from llava.processing.prompt import Sample
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer

NOT_FINITE = -1  # in place of a token id


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
