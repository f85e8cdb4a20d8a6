"""Operations that a prefill dispatches beside its oracle, and waits of the host, held to limits."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from eval.efficiency.dispatched import (
    HEAD,
    Beside,
    Call,
    Calls,
    Reads,
    calls_of,
    line_of,
    main,
    on_meta,
    question,
    waits_of,
)
from eval.efficiency.oracle import oracle_of
from llava.model.builder import load
from llava.reduction import registry

BUDGET = 128  # every method meets it on the bundled model
# Operations above the oracle with the same tokens per layer: counted, and room for three.
LIMITS = {
    "attnmix": 62,
    "cdpruner": 154,
    "consensusdrop": 105,
    "dart": 99,
    "divprune": 17,
    "downsample": 0,
    "fastervlm": 21,
    "fastv": 35,
    "full": 0,
    "globalcom2": 26,
    "hired": 21,
    "holov": 100,
    "prumerge": 64,
    "prumerge_plus": 74,
    "pyramiddrop": 120,
    "random": 8,
    "scope": 44,
    "sparsevlm": 357,
    "tome": 337,
    "trim": 93,
    "uniform": 7,
    "visiondrop": 262,
    "visionzip": 57,
    "vispruner": 39,
    "vscan": 127,
}


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def shapes():
    return on_meta(load(device="cpu"))


def built(name: str, model, options=None):
    return registry.build(name, model.visual_tokens if name == "full" else BUDGET, options)


def test_every_method_has_a_limit():
    assert set(LIMITS) == set(registry.names())


@pytest.mark.parametrize("name", LIMITS)
def test_no_more_operations_above_the_oracle_than_its_limit(name, toy):
    reducer = built(name, toy)
    above = len(calls_of(toy, reducer, question())) - len(calls_of(toy, oracle_of(reducer, toy.spec), question()))
    assert above <= LIMITS[name], f"{name} dispatches {above} operations more than its oracle"


@pytest.mark.parametrize("name", registry.names())
def test_the_host_never_waits_after_the_pixels(name, shapes):
    """Shapes are known on the host, and what it sends to the device it sends without waiting."""
    waits = waits_of(shapes, built(name, shapes), question())
    assert not waits, "\n".join(f"{call.part} {call.line} ({call.name})" for call in waits)


def test_the_exception_is_seen(shapes):
    """With `official`, PruMerge keeps as many tokens as there are outliers: the host must learn their number."""
    waits = waits_of(shapes, built("prumerge", shapes, {"official": "true"}), question())
    assert waits and {call.line.split(":")[0] for call in waits} == {"baselines/prumerge.py"}


def counted(run, device: str = "cpu") -> Calls:
    calls = Calls()
    with torch.inference_mode(), Reads(calls), calls, suppress(NotImplementedError, RuntimeError, TypeError):
        run(torch.ones(3, 4, device=device))
    calls.mark("prefill")
    return calls


def test_counts_operations_kernels_and_lines():
    found = counted(lambda x: nn.functional.relu(x.transpose(0, 1)) + 1).found
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
    assert [call.waits for call in counted(run, "meta").found].count(True) == 1
    assert not any(call.waits for call in counted(run).found)


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
    assert sum(call.waits for call in counted(run, "meta").found) == waits


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


def test_the_command_prints_a_row_and_its_lines(capsys):
    assert main(["fastervlm", "64", "--list"]) == 0
    head, row, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["operations", "kernels"] and row.split()[0] == "fastervlm" and row.split()[-1] == "0"
    assert sum(int(line.split()[0]) for line in lines) == int(row.split()[1])
