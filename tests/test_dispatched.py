"""Operations that a prefill dispatches beside its oracle, and waits of the host, held to limits."""

import json
from contextlib import suppress

import pytest
import torch
from torch import nn

from eval.efficiency.counts import Call, OperationCounter, PythonWaits, calls_of
from llava.model.builder import load
from llava.reduction import registry
from tests.golden import BUDGET, COPIES, LIMITS, above_oracle, disturbed, method, question

LIMITS_OF = json.loads(LIMITS.read_text())
WRITE = "run python -m tests.golden"


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def shapes():
    """The model without its weights, on the device that computes shapes alone."""
    model = load(device="cpu")
    model.hf_model.to("meta")
    model.device = torch.device("meta")
    return model


def waits_of(shapes, reducer) -> list[Call]:
    """Waits of one prefill between the copy of the pixels to the device and the choice of the first token."""
    waits = [call for call in calls_of(shapes, reducer, question()) if call.waits]
    pixels = bool(waits) and waits[0].line.endswith(" encode_images")
    return waits[pixels:]


@pytest.mark.parametrize("name", registry.names())
def test_no_more_operations_above_the_oracle_than_its_limit(name, toy):
    assert name in LIMITS_OF, f"{name} has no limit yet; {WRITE} {name}"
    above = above_oracle(toy, name)
    assert above <= LIMITS_OF[name], (
        f"{name} dispatches {above} operations more than its oracle; if that is intended, {WRITE} {name}"
    )


def test_every_limit_is_one_of_a_method():
    assert set(LIMITS_OF) == set(registry.names()), WRITE


@pytest.mark.parametrize("name", ["cdpruner", "scope"])
def test_a_limit_does_not_depend_on_the_processor(name):
    """SCOPE dispatched 44 operations on one processor and 47 on another: near ties, which the last bits decide."""
    assert above_oracle(disturbed(COPIES), name) <= LIMITS_OF[name]


@pytest.mark.parametrize("name", registry.names())
def test_the_host_never_waits_after_the_pixels(name, shapes):
    """Shapes are known on the host, and what it sends to the device it sends without waiting."""
    waits = waits_of(shapes, method(name, shapes.visual_tokens))
    assert not waits, "\n".join(f"{call.part} {call.line} ({call.name})" for call in waits)


def test_the_exception_is_seen(shapes):
    """With `official`, PruMerge keeps as many tokens as there are outliers: the host must learn their number."""
    waits = waits_of(shapes, registry.build("prumerge", BUDGET, {"official": "true"}))
    assert waits and {call.line.split(":")[0] for call in waits} == {"baselines/prumerge.py"}


def counted(run, device: str = "cpu") -> list[Call]:
    counter = OperationCounter()
    failures = suppress(NotImplementedError, RuntimeError, TypeError)
    with failures, torch.inference_mode(), PythonWaits(counter), counter:
        run(torch.ones(3, 4, device=device))
    counter.mark("prefill")
    return counter.calls


def test_counts_operations_kernels_and_lines():
    found = counted(lambda x: nn.functional.relu(x.transpose(0, 1)) + 1)
    assert [(call.name, call.kernel) for call in found] == [
        ("ones", True),
        ("transpose", False),
        ("relu", True),
        ("add", True),
    ]
    assert all(call.line.startswith("tests/test_dispatched.py:") for call in found)


READINGS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
}


@pytest.mark.parametrize("run", READINGS.values(), ids=READINGS)
def test_sees_what_makes_the_host_wait(run):
    """On the host itself nothing waits."""
    assert [call.waits for call in counted(run, "meta")].count(True) == 1
    assert not any(call.waits for call in counted(run))


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda x: torch.tensor([1, 2], device=x.device), 1),
        (lambda x: torch.tensor([1, 2]).to(x.device), 1),
        (lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True), 0),
        (lambda x: torch.arange(3, device=x.device) + x[:, 0], 0),
        (lambda x: x[torch.tensor([0, 1])], 1),
    ],
)
def test_sees_copies_that_block(run, waits):
    assert sum(call.waits for call in counted(run, "meta")) == waits
