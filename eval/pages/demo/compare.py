"""One question answered twice, with all visual tokens and with a method; needs no web page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from PIL import Image

from eval.config import FULL
from eval.figures.overlay_tiles import draw_answer
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline.answer import Answer
from llava.pipeline.generate import generate
from llava.processing.sample import Sample
from llava.reduction import registry
from llava.reduction.crop_budget import require
from llava.reduction.reducer import Reducer

REPEATS = 3
MAX_NEW_TOKENS = 128
# LLaVA's instruction for short answers, which the toy models were trained with.
SHORT = "Answer the question using a single word or phrase."
LONGEST_QUESTION = 2_000


@dataclass(frozen=True)
class Side:
    """One of the two answers.

    Attributes:
        name: of the method.
        tokens_per_layer: visual tokens that entered each decoder layer.
        mean: of `tokens_per_layer`.
        ttft_ms: every measured time to the first token, in milliseconds.
        kv_bytes: bytes of the key/value cache after prefill.
        gflop: operations up to the first token.
        overlay: the image with its kept, merged and dropped patches.
    """

    name: str
    text: str
    tokens_per_layer: tuple[int, ...]
    mean: float
    ttft_ms: tuple[float, ...]
    kv_bytes: int
    gflop: float
    overlay: Image.Image

    @property
    def ttft(self) -> float:
        """Median time to the first token, milliseconds."""
        return median(self.ttft_ms)


@dataclass(frozen=True)
class Comparison:
    full: Side
    reduced: Side


def answer_beside_full(
    model: Llava,
    image: Image.Image,
    question: str,
    method: str,
    budget: int,
    options: Mapping[str, str] | None = None,
    short: bool = True,
    repeats: int = REPEATS,
) -> Comparison:
    """Ask one question with all visual tokens and with a method.

    Both answer once, which is also the warm-up. Then they take turns, `repeats` times each, and the time to the first
    token is measured: vision, selection and prefill, from prepared pixels and token ids.

    Args:
        budget: visual tokens to keep, as the mean over decoder layers.
        options: of the method, as text; `vtr show methods NAME` lists them.
        short: ask for a single word or phrase.

    Raises:
        UserError: no question, an unknown method, a budget that the method cannot meet, or too little memory.
    """
    sample = Sample("demo", checked(question), SHORT if short else "", image)
    reducers = [reducer_of(model, FULL, model.visual_tokens), reducer_of(model, method, budget, options)]
    try:
        batches = [generate(model, [sample], reducer, MAX_NEW_TOKENS) for reducer in reducers]
        times: list[list[float]] = [[] for _ in reducers]
        for _ in range(repeats):
            for measured, reducer in zip(times, reducers, strict=True):
                measured.append(1000 * generate(model, [sample], reducer, max_new_tokens=1).timing.ttft)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The question does not fit into the accelerator's memory; take a smaller image, or start the demo with "
            "a smaller model or --dtype float16."
        ) from error
    sides = [
        side(sample, reducer, batch.answers[0], batch.flops, measured)
        for reducer, batch, measured in zip(reducers, batches, times, strict=True)
    ]
    return Comparison(*sides)


def checked(question: str) -> str:
    """The question without white space around it; UserError if nothing is left or it is too long."""
    question = question.strip()
    if not question:
        raise UserError("There is no question; write one.")
    if len(question) > LONGEST_QUESTION:
        raise UserError(
            f"A question may have {LONGEST_QUESTION:,} characters, this one has {len(question):,}; shorten it."
        )
    return question


def reducer_of(model: Llava, method: str, budget: int, options: Mapping[str, str] | None = None) -> Reducer:
    """The method at the budget, refused here if the model cannot run it."""
    if budget > model.visual_tokens:
        raise UserError(
            f"The budget must be 1 to {model.visual_tokens:,} (this model's visual tokens), got {budget:,}."
        )
    reducer = registry.build(method, budget, dict(options or {}))
    require(reducer, model.spec)
    return reducer


def side(sample: Sample, reducer: Reducer, answer: Answer, flops: int, measured: Sequence[float]) -> Side:
    """What the page shows of an answer."""
    counted = answer.accounting
    (overlay,) = draw_answer(sample, answer)
    return Side(
        name=reducer.name,
        text=answer.text,
        tokens_per_layer=counted.tokens_per_layer,
        mean=counted.mean,
        ttft_ms=tuple(measured),
        kv_bytes=counted.kv_bytes,
        gflop=flops / 1e9,
        overlay=overlay,
    )


def warm_up(model: Llava) -> None:
    """Answer one question about a grey image, so that nothing is loaded or compiled while the first one is timed."""
    sample = Sample("warm-up", "What is this?", SHORT, Image.new("RGB", (64, 64), "grey"))
    generate(model, [sample], reducer_of(model, FULL, model.visual_tokens), max_new_tokens=2)


def methods() -> list[tuple[str, str]]:
    """Name and one-line summary of every method that reduces."""
    return [(entry["name"], entry["summary"]) for entry in registry.describe() if entry["name"] != FULL]
