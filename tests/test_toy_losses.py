"""The one trainer reproduces the losses of the five trainers that it replaced, to the last bit."""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.config import DEFAULT_MODEL
from toy.stages import STAGES
from toy.stages.base import Settings
from toy.train import train

RECORD = json.loads((Path(__file__).parent / "data" / "toy_losses.json").read_text())


def processor() -> str:
    """Architecture and vector instructions, as far as torch's kernels depend on them."""
    info = Path("/proc/cpuinfo")
    bfloat16 = info.exists() and "avx512_bf16" in info.read_text()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' avx512_bf16' if bfloat16 else ''}"


# Kernels of other processors and other versions of torch round differently.
EXACT = (torch.__version__, processor()) == (RECORD["torch"], RECORD["cpu"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each training; vision and language share one, as in scripts/train/tiny.sh."""
    root, threads = tmp_path_factory.mktemp("losses"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: root / ("tiny" if name in ("vision", "language") else name) for name in STAGES}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", STAGES)
def test_losses_of_a_short_run_are_those_recorded(name, folders, monkeypatch):
    """Draw, train a few steps through every part of a stage's schedule, validate."""
    expected, folder = RECORD["stages"][name], folders[name]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    stage = STAGES[name](folder, Settings(**expected["settings"]), DEFAULT_MODEL)
    losses, loss_of = [], stage.loss

    def recorded(step, rng):
        loss, numbers = loss_of(step, rng)
        losses.append(loss.item())
        return loss, numbers

    monkeypatch.setattr(stage, "loss", recorded)
    masters = train(stage, folder).masters
    torch.save(masters, folder / f"{name}.pt")  # the vision stage's is what the language stage starts from
    numbers = stage.evaluate(expected["settings"]["final"])
    if not EXACT:
        np.testing.assert_allclose(losses, expected["losses"], rtol=0.05)
        return
    assert losses == expected["losses"]
    assert {key: value for key, value in numbers.items() if value == value} == expected["validation"]
    digest = hashlib.sha256()
    for key in sorted(masters):
        digest.update(key.encode() + masters[key].numpy().tobytes())
    assert digest.hexdigest() == expected["weights"]
