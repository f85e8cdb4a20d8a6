"""Greedy decoding after a prefill, with end token and stop strings."""

from collections.abc import Sequence as Samples

import torch

from llava.pipeline import decoder
from llava.pipeline.accounting import Clock
from llava.pipeline.prefill import Pipeline
from llava.processing.sample import Answer, Batch, Sample, Timing
from llava.reduction.reducer import Reducer


@torch.inference_mode()
def generate(model, samples: Samples[Sample], reducer: Reducer, max_new_tokens: int, stop: tuple[str, ...]) -> Batch:
    """Answer a batch greedily.

    Every sample gets what it would get alone: padding is masked, reductions are per sample, and a finished sample's
    further tokens are thrown away.
    """
    clock = Clock(model.device)
    pipeline = Pipeline(model, reducer)
    state, record = pipeline.prepare(samples, clock)
    audits, held = pipeline.audits(state, record), state.kv_bytes_held()
    clock.lap("accounts")
    written: list[list[int]] = [[] for _ in samples]
    running = set(range(len(samples)))
    token = model.next_token(state.hidden)
    clock.lap("prefill")
    steps = 0
    for position in range(max_new_tokens):
        # One transfer per step, not per layer: the host must know which samples have ended.
        for sample, value in enumerate(token.tolist()):
            if sample not in running:
                continue
            if value in model.end_ids:
                running.discard(sample)
                continue
            written[sample].append(value)
            if stop and any(mark in model.decode(written[sample], special=True) for mark in stop):
                running.discard(sample)
        if not running or position + 1 == max_new_tokens:
            break
        hidden = decoder.step(model.llm, state, model.llm.embed_tokens(token[:, None]))
        token = model.next_token(hidden)
        steps += 1
    clock.lap("decode")
    answers = tuple(
        Answer(sample.id, _text(model, ids, stop), tuple(ids), audit, tuple(trace), tuple(runs))
        for sample, ids, audit, trace, runs in zip(samples, written, audits, record.steps, record.runs, strict=True)
    )
    seconds = {name: clock.seconds.get(name, 0.0) for name in ("vision", "selection", "prefill", "decode")}
    return Batch(answers, Timing(**seconds), held, record.flops, steps)


def _text(model, ids: list[int], stop: tuple[str, ...]) -> str:
    """Decoded answer up to the first stop string."""
    text = model.decode(ids)
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text.strip()
