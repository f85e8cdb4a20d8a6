"""A model with the interface of llava.model.llava_arch.Llava that answers at once, and a small GQA to ask it.

Its answers, accounts, traces and timings depend on the question's id alone, so that two runs can be compared.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

import eval.ask
from llava.pipeline.accounting import Answer, Batch, Timing, TokenAccounting
from llava.processing.prompt import Sample
from llava.reduction import Reduction, Step
from llava.reduction.token_layout import ModelSpec, PatchGrid, single

SUFFIX = "Answer the question using a single word or phrase."
WORDS = ("yes", "no", "red", "blue")
LAYERS = 3


@dataclass(frozen=True)
class FakeReducer:
    """Keeps the first patches."""

    budget: int = 16
    alpha: float = 0.5
    name = "first"
    rounding = 0.5
    retention_ratio = 0.0

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        return (self.budget,) * spec.layers

    def deviates(self, kind: str) -> str:
        return ""

    def without_cls(self, spec: ModelSpec) -> str:
        return ""


class FakeLlava:
    """64 visual tokens; `before_answer` is called with the number of the batch, to interrupt or break a run."""

    name = "fake"
    conversation = "vicuna_v1"
    fingerprint = "0123abcd"
    visual_tokens = 64
    device = "cpu"

    def __init__(
        self,
        before_answer: Callable[[int], None] = lambda number: None,
        mean_error: int = 0,
        planned: bool = True,
    ):
        self.before_answer = before_answer
        self.mean_error, self.planned = mean_error, planned
        self.batches = 0
        self.asked: list[str] = []

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.visual_tokens, LAYERS, PatchGrid(8, 8), tower_blocks=2)

    def answer(self, samples: Sequence[Sample], reducer: FakeReducer, max_new_tokens: int = 128) -> Batch:
        if max_new_tokens > 1:  # the pass that times the first token asks nothing
            self.before_answer(self.batches)
            self.batches += 1
            self.asked += [sample.id for sample in samples]
        kept = reducer.budget + self.mean_error
        answers = []
        for sample in samples:
            step = Step("prompt", Reduction(torch.arange(kept)[None], self.visual_tokens))
            budget = float(reducer.budget)
            plan = budget if self.planned else None
            accounting = TokenAccounting((kept,) * LAYERS, self.visual_tokens, 0, 1000 * kept, 1, plan, asked=budget)
            runs = (single(8, 8),) * len(sample.images)
            nowhere = (None,) * len(runs)
            answers.append(Answer(sample.id, fake_text(sample.id), (1,), accounting, (step,), runs, nowhere))
        count = len(samples)
        timing = Timing(0.001 * count, 0.0005 * count, 0.002 * count, 0.004 * count, preprocess=0.003 * count)
        images = sum(len(sample.images) for sample in samples)
        alone = {"tower": 7 * 10**8 * images, "projector": 10**8 * count, "prefill": 2 * 10**8 * count}
        return Batch(
            tuple(answers),
            timing,
            kv_bytes=1100 * kept * count,
            operations=SimpleNamespace(total=9 * 10**8 * count, alone=alone),
            decode_steps=1,
            images=images,
        )


def generate(model: Any, *arguments: Any, **options: Any) -> Batch:
    """In place of the real function in eval.ask: the fake model answers by itself."""
    own = isinstance(model, FakeLlava)
    return model.answer(*arguments, **options) if own else real_generate(model, *arguments, **options)


real_generate, eval.ask.generate = eval.ask.generate, generate


def fake_text(name: str) -> str:
    """The fake model's answer to a question."""
    return WORDS[zlib.crc32(name.encode()) % len(WORDS)].capitalize() + "."


def write_gqa(folder: Path, count: int = 40, images: int = 5, split: str = "testdev") -> Path:
    """`count` questions in the official layout, every second one answered right by the fake model.

    The images hold different shares of right answers, so that scores vary between resamples.
    """
    data = folder / "gqa" / "data"
    (data / "images").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        Image.new("RGB", (32, 32), (40 * number, 100, 200)).save(data / "images" / f"n{number}.jpg")
    records, lines = {}, []
    for number in range(count):
        name = f"{1000 + number}"
        right = fake_text(name).rstrip(".").lower()
        records[name] = {
            "question": f"Is thing {number} there?",
            "answer": right if number % 2 == 0 else "something else",
            "imageId": f"n{number % 7 % images}",
            "isBalanced": True,
            "types": {"structural": "query" if number % 3 else "verify", "semantic": "obj", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "thing (1)"}],
            "groups": {"global": None},
            "entailed": [],
        }
        text = f"{records[name]['question']}\n{SUFFIX}"
        lines.append({"question_id": name, "image": f"n{number % 7 % images}.jpg", "text": text, "category": "default"})
    (data / f"{split}_balanced_questions.json").write_text(json.dumps(records))
    jsonl = folder / "gqa" / f"llava_gqa_{split}_balanced.jsonl"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
