"""What each rank computes in the tests of tensor parallelism and ZeRO-Inference: answers of methods of every kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline import decoder
from llava.pipeline.accounting import TokenAccounting
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.registry import build
from tests.conftest import QUESTIONS, picture
from tests.tiny_checkpoints import save_transformers_layout
from tests.tiny_checkpoints_families import save_next_transformers, save_qwen_transformers

# One method of each kind, and its options: nothing reduced; in the tower; before the projector; before layer 0 by the
# attention of layers that are run for it; between layers by the next layer's attention, by that and the keys of the
# layer before, and by attention among visual tokens, which also merges.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "tome": {},
    "fastervlm": {},
    "visionzip": {},
    "consensusdrop": {"probe": "contextual", "probe_layer": 2, "rope": True},
    "fastv": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "dart": {},
    "visiondrop": {},
}
NEXT: dict[str, dict[str, Any]] = {name: {} for name in ("visionzip", "consensusdrop", "fastv", "visiondrop")}
# Qwen's tower has no class token.
QWEN: dict[str, dict[str, Any]] = {
    "divprune": {},
    "fastv": {},
    "dart": {},
    "visiondrop": {"encoder_score": "received", "keep_cls": False},
}


@dataclass
class Answered:
    """One method's answers to a batch.

    Attributes:
        logits: [2, B, V] of the first token and of one more step.
        kept: kept indices of every reduction of every sample.
        accounts: token accounting of every sample.
        operations: by part.
    """

    texts: list[str]
    tokens: list[tuple[int, ...]]
    logits: torch.Tensor
    kept: list[list[list[list[int]]]]
    accounts: list[TokenAccounting]
    operations: dict[str, int]
    kv_bytes_held: int


def answer(model: Llava, name: str, budget: int, options: dict[str, Any]) -> Answered:
    reducer = build(name, budget, options)
    asked = [
        Sample(id=f"q{number}", question=question, image=picture(number, (330, 260)))
        for number, question in enumerate(QUESTIONS[:2])
    ]
    with torch.inference_mode():
        state, _ = prefill(model, asked, reducer)
        first = model.logits(state.hidden)
        hidden = decoder.step(model.llm, state, model.llm.embed_tokens(first.argmax(-1)[:, None]))
        logits = torch.stack([first, model.logits(hidden)]).clone()
    batch = generate(model, asked, reducer, max_new_tokens=4)
    return Answered(
        texts=[one.text for one in batch.answers],
        tokens=[one.token_ids for one in batch.answers],
        logits=logits,
        kept=[[step.reduction.kept.tolist() for step in one.trace] for one in batch.answers],
        accounts=[one.accounting for one in batch.answers],
        operations=dict(batch.flops_alone),
        kv_bytes_held=batch.kv_bytes,
    )


def answers(model: Llava, methods: dict[str, dict[str, Any]], budget: int) -> dict[str, Answered]:
    budgets = {name: model.visual_tokens if name == "full" else budget for name in methods}
    return {name: answer(model, name, budgets[name], options) for name, options in methods.items()}


FAMILIES = {"llava": (METHODS, 10), "next": (NEXT, 40), "qwen": (QWEN, 24)}


def save_families(folder: Path) -> None:
    """One tiny checkpoint per family, all with grouped-query heads."""
    save_transformers_layout(folder / "llava")
    save_next_transformers(folder / "next")
    save_qwen_transformers(folder / "qwen")


def of_families(folder: Path, **spread: Any) -> dict[str, dict[str, Answered]]:
    found = {}
    for family, (methods, budget) in FAMILIES.items():
        model = load(folder / family, device="cpu", **spread)
        found[family] = {"fingerprint": model.fingerprint, **answers(model, methods, budget)}
    return found


def split_families(folder: Path):
    return of_families(folder, tensor_parallel=2)


def zero_families(folder: Path):
    return of_families(folder, zero="none")


def zero_cpu_families(folder: Path):
    return of_families(folder, zero="cpu")
