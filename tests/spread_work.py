"""What each rank computes in the tests of tensor parallelism and ZeRO-Inference: answers of methods of every kind."""

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.config import ROOT
from llava.errors import UserError
from llava.model import parallel
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline import decoder
from llava.pipeline.accounting import TokenAccounting
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import Sample
from llava.reduction.registry import build
from tests.conftest import QUESTIONS, drawn_image
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_original,
    save_next_transformers,
    save_qwen_transformers,
    save_video_original,
)

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
QWEN: dict[str, dict[str, Any]] = {name: {} for name in ("consensusdrop", "fastv", "dart", "visiondrop")}


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
        Sample(id=f"q{number}", question=question, image=drawn_image(number, (330, 260)))
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
        operations=batch.operations.alone,
        kv_bytes_held=batch.kv_bytes,
    )


def answers(model: Llava, methods: dict[str, dict[str, Any]], budget: int) -> dict[str, Answered]:
    budgets = {name: model.visual_tokens if name == "full" else budget for name in methods}
    return {name: answer(model, name, budgets[name], options) for name, options in methods.items()}


KINDS = ("fastervlm", "consensusdrop", "fastv", "visiondrop")
ONE: dict[str, dict[str, Any]] = {"fastv": {}}
FAMILIES = {
    "llava": (METHODS, 10),
    "next": (NEXT, 40),
    "qwen": (QWEN, 24),
    "mistral": (ONE, 60),  # over two ranks 6 and 4 query heads, over three 4, 4 and 2
    "toy": ({"consensusdrop": {}, "sparsevlm": {}}, 128),  # five heads
    "video": ({"fastervlm": {}}, 12),
    "tied": (ONE, 30),
}


def save_families(folder: Path) -> None:
    """One tiny checkpoint per family, with grouped-query heads, and a bundled one."""
    save_transformers_layout(folder / "llava")
    save_next_transformers(folder / "next", make_tiny_next("yi"))
    save_qwen_transformers(folder / "qwen")
    save_next_original(
        folder / "mistral",
        make_tiny_next("mistral", hidden_size=80, num_attention_heads=10, num_key_value_heads=5, intermediate_size=96),
    )
    (folder / "toy").symlink_to(ROOT / "assets" / "tinyllava")
    save_video_original(folder / "video")
    save_qwen_transformers(folder / "tied", make_tiny_qwen("2", tied=True))


def of_families(
    folder: Path, families: Sequence[str] = tuple(FAMILIES), only: Sequence[str] = (), **spread: Any
) -> dict[str, Any]:
    """Fingerprint, answers by method, and `weights` of models that are loaded in the given way.

    Args:
        only: methods; none for all of the family.
    """
    found = {}
    for family in families:
        methods, budget = FAMILIES[family]
        methods = {name: options for name, options in methods.items() if not only or name in only}
        model = load(folder / family, device="cpu", **spread)
        held = weights(model.hf_model)
        found[family] = model.fingerprint, answers(model, methods, budget), held
    return found


def weights(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights that this process holds, whole or cut, and of its partitions of ZeRO."""
    parts = sum(weight.ds_tensor.nbytes for weight in model.parameters() if hasattr(weight, "ds_tensor"))
    return sum(weight.nbytes for weight in model.parameters()), parts


def shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    """Of every weight that this process holds, 0 elements for one that is partitioned."""
    return {name: tuple(weight.shape) for name, weight in model.hf_model.named_parameters()}


# Anonymous memory of this process: what it owns beside mapped files.

MB = 2**20


@dataclass
class Grown:
    """Bytes of anonymous memory beyond those at the start: the most at a time, and at the end."""

    peak: int = 0
    end: int = 0


def anonymous() -> int:
    """Bytes of this process that belong to no file, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon")


@contextmanager
def watched_memory() -> Iterator[Grown]:
    """Read the anonymous memory every millisecond while the body runs."""
    gc.collect()
    grown, before, stop = Grown(), anonymous(), threading.Event()

    def read() -> None:
        while not stop.wait(0.001):
            grown.peak = max(grown.peak, anonymous() - before)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield grown
    finally:
        stop.set()
        reader.join()
        gc.collect()
        grown.end = anonymous() - before
        grown.peak = max(grown.peak, grown.end)


# 8 layers of 14 MB and a head of 0.3 MB in bfloat16.
HIDDEN, LAYERS = 768, 8
LAYOUTS = {
    "transformers": lambda path, model: save_transformers_layout(path, model),
    "transformers bin": lambda path, model: save_transformers_layout(path, model, safetensors=False),
    "original": lambda path, model: save_original_layout(path, model),
    "original safetensors": lambda path, model: save_original_layout(path, model, safetensors=True),
}


UNEVEN = ("mistral", "toy")
ZERO_FAMILIES, ZERO_LAYOUTS = ("llava", "next", "qwen", "tied"), ("transformers", "original")


def save_large(folder: Path) -> None:
    """The same bfloat16 weights in both layouts and both kinds of file."""
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 2048}
    model = make_tiny_llava(**sizes, num_attention_heads=12, num_key_value_heads=12).bfloat16()
    for name, save in LAYOUTS.items():
        save(folder / name, model)


def memory(folder: Path, dtype: str, layouts: Sequence[str] = tuple(LAYOUTS), **spread: Any) -> dict[str, Grown]:
    """Anonymous memory that loading takes, by layout."""
    found = {}
    for name in layouts:
        with watched_memory() as found[name]:
            model = load(folder / name, dtype=dtype, device="cpu", **spread)
        del model
    return found


def repeated(folder: Path, rounds: int = 50) -> tuple[list[int], list[bool], list[int]]:
    """Many batches, with methods whose passes visit the layers in different orders.

    Returns:
        After each round: the modules in DeepSpeed's trace; whether it is complete, so that weights are fetched ahead;
        anonymous memory.
    """
    model = load(folder / "llava", device="cpu", zero="cpu")
    coordinator = model.hf_model.zero_engine.optimizer.get_param_coordinator()
    modules, complete, held = [], [], []
    for number in range(rounds):
        name = ("consensusdrop", "fastv", "full")[number % 3]
        asked = [Sample(id="q", question=QUESTIONS[0], image=drawn_image(0))]
        generate(model, asked, build(name, 16 if name == "full" else 10, METHODS[name]), max_new_tokens=3)
        modules.append(len(coordinator._PartitionedParameterCoordinator__submodule_order))
        complete.append(coordinator.is_complete_trace())
        gc.collect()
        held.append(anonymous())
    return modules, complete, held


@dataclass
class Rank:
    """What one rank found in a test session.

    Attributes:
        shapes: of the weights that it holds.
        memory: of loading bfloat16 files, split as float32, partitioned as they are.
        sentence: of the error when the ranks disagree.
    """

    families: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    memory: dict[str, Grown]
    sentence: str = ""
    cpu: dict[str, Any] = field(default_factory=dict)
    repeated: Any = None


def split_session(folder: Path) -> Rank:
    small = shapes(load(folder / "llava", device="cpu", tensor_parallel=2))
    measured = memory(folder, "float32", tensor_parallel=2)
    found = Rank(of_families(folder, tensor_parallel=2), small, measured)
    try:
        parallel.require_agreement("question 7", f"of rank {os.environ['RANK']}", torch.device("cpu"))
    except UserError as error:
        found.sentence = str(error)
    return found


def zero_session(folder: Path) -> Rank:
    model = load(folder / "llava", device="cpu", zero="none")
    for name in ("fastv", "full"):  # a weight that fastv's scores read stayed whole
        answers(model, {name: {}}, 10)
    small = shapes(model)
    # Everything on two ranks; on one, and with the other place of the partitions, one method of each kind.
    if parallel.group_size() > 1:
        none = of_families(folder, ZERO_FAMILIES, zero="none")
        cpu = of_families(folder, ["llava"], KINDS, zero="cpu")
    else:
        none = of_families(folder, ["llava"], KINDS, zero="none")
        cpu = of_families(folder, ["llava"], zero="cpu")
    found = Rank(none, small, memory(folder, "bfloat16", ZERO_LAYOUTS, zero="cpu"), cpu=cpu)
    if parallel.group_size() > 1:
        found.repeated = repeated(folder, rounds=6)
    return found


# What each process does: importing torch takes most of its time.


def two_ranks(folder: Path) -> tuple[Rank, Rank]:
    """Tensor parallelism, and ZeRO-Inference."""
    return split_session(folder), zero_session(folder)


def three_ranks(folder: Path) -> tuple[dict[str, Any], Rank | None]:
    """Tensor parallelism with unequal numbers of heads; then ZeRO-Inference on the last rank alone."""
    found, last = of_families(folder, UNEVEN, tensor_parallel=3), os.environ["RANK"] == "2"
    parallel.leave()
    return found, zero_session(folder) if last else None
