"""Operations that a prefill dispatches beside its oracle, and waits of the host, held to limits."""

import json
from contextlib import suppress

import pytest
import torch
from torch import nn

from eval.efficiency.counts import (
    HEAD,
    Beside,
    Call,
    OperationCounter,
    PythonWaits,
    line_of,
    main,
    on_meta,
    question,
    waits_of,
)
from llava.model.builder import load
from llava.reduction import registry
from tests.golden import BUDGET, COPIES, LIMITS, above_oracle, disturbed, method

LIMITS_OF = json.loads(LIMITS.read_text())
WRITE = "run python -m tests.golden"


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def shapes():
    return on_meta(load(device="cpu"))


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
    waits = waits_of(shapes, method(name, shapes.visual_tokens), question())
    assert not waits, "\n".join(f"{call.part} {call.line} ({call.name})" for call in waits)


def test_the_exception_is_seen(shapes):
    """With `official`, PruMerge keeps as many tokens as there are outliers: the host must learn their number."""
    waits = waits_of(shapes, registry.build("prumerge", BUDGET, {"official": "true"}), question())
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


def test_operations_and_kernels_are_both_given_over_the_oracles():
    """Only operations were, of which most can be views that cost a GPU nothing."""
    view, kernel = Call("selection", "", "view"), Call("selection", "", "add", kernel=True)
    found = Beside([view] * 5 + [kernel] * 7, [view, kernel], [view] * 4 + [kernel] * 6, [])
    row = dict(zip(HEAD, found.cells(), strict=True))
    assert (row["operations"], row["over flat"], row["over same"]) == (12, "+10", "+2")
    assert (row["kernels"], row["kernels over flat"], row["kernels over same"]) == (7, "+6", "+1")
    without = dict(zip(HEAD, Beside([view], [kernel], None, []).cells(), strict=True))
    assert (without["over flat"], without["kernels over flat"]) == ("+0", "-1")
    assert without["over same"] == without["kernels over same"] == "-"
    head, line = line_of("", HEAD), line_of("some", found.cells())
    assert len(head) == len(line) and line.index("+6") + 2 == head.index("kernels over flat") + len("kernels over flat")


@pytest.mark.table
def test_the_command_prints_a_row_and_its_lines(capsys):
    assert main(["fastervlm", "64", "--list"]) == 0
    head, row, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["operations", "kernels"] and row.split()[0] == "fastervlm" and row.split()[-1] == "0"
    assert sum(int(line.split()[0]) for line in lines) == int(row.split()[1])
