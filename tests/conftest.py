"""Shared fixtures: a tiny random LLaVA on disk, loaded the way a user loads a real one, and a clock."""

import gc
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from eval.config import ROOT
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline import accounting
from llava.processing.prompt import Sample
from tests.tiny_checkpoints import save_transformers_layout

# A shell that starts the tests in the background ignores Ctrl-C for them and for every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """What the cache of the hub on this machine happens to hold is nothing to the tests, nor to their processes."""
    os.environ["HF_HUB_CACHE"] = constants.HF_HUB_CACHE = str(ROOT / "no-hub-cache")


def pytest_collection_finish() -> None:
    """Modules and tests live to the end, but each collection of garbage looked through all of them for 0.6 s."""
    gc.collect()
    gc.freeze()


SHORT = "Answer the question using a single word or phrase."
QUESTIONS = (
    "what color is the small cat on the left of the tree?",
    "is there a star?",
    "how many dog are in the image and which number?",
    "where is it",
    "what is above the red car?",
)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    save_transformers_layout(path, text_tower=True)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path) -> Llava:
    """16 visual tokens (4 x 4), 4 decoder layers with grouped-query heads, float32."""
    return load(tiny_path, device="cpu")


def drawn_image(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def samples(count: int = 5, text_only: tuple[int, ...] = (3,)) -> list[Sample]:
    """Different questions about different images; some without one."""
    return [
        Sample(
            id=f"q{i}",
            question=QUESTIONS[i % len(QUESTIONS)],
            suffix=SHORT if i % 2 == 0 else "",
            image=None if i in text_only else drawn_image(i),
        )
        for i in range(count)
    ]


@pytest.fixture
def vllm_python() -> Path:
    """Python of the environment that scripts/serve_setup.sh makes; without one, the test is skipped."""
    python = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm") / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with vLLM: source scripts/serve_setup.sh makes .venv-vllm")
    return python


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of stages: it moves by `wait(seconds)` alone, however busy the machine is."""
    clock = SimpleNamespace(now=0.0)
    clock.wait = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(accounting, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
