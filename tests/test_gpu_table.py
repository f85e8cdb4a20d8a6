"""The two calls of scripts/bench/gpu_table.sh on a pretended CUDA device: deadlines, kept turns, and wrong answers."""

import hashlib
import json
import os
import subprocess
import time

import pytest
import torch

from eval.config import ROOT
from eval.efficiency import latency
from eval.efficiency import measure as measuring
from eval.efficiency.shapes import SHAPES, narrow
from lab.bench import selfcheck
from llava.errors import UserError
from llava.reduction import ranking
from tests.pretended import pretended

pytestmark = pytest.mark.lab

PREFILL = ["--method", "consensusdrop,attnmix", "--shape", "llava-1.5-7b", "--budget", "4,8", "--lengths", "0"]
CALL = ["--repeats", "2", "--no-counts", "--device", "cuda"]


@pytest.fixture
def turns(monkeypatch):
    """The turns that are measured, (method and budget, questions); a clock of turns in place of seconds."""
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", narrow("llava-1.5-7b", 64, 2, 2, side=56))
    taken: list[tuple[str, int]] = []
    plain = measuring.measure_round

    def noted(model, reducer, batch, *rest):
        taken.append((f"{reducer.name} {reducer.budget}", len(batch)))
        return plain(model, reducer, batch, *rest)

    monkeypatch.setattr(measuring, "measure_round", noted)
    for module in (measuring, latency):
        ticks = type("Ticks", (), {"monotonic": lambda: float(len(taken)), "perf_counter": time.perf_counter})
        monkeypatch.setattr(module, "time", ticks)
    return taken


@pytest.mark.slow
def test_the_calls_end_in_time_and_the_second_goes_on_where_the_first_ended(turns, tmp_path, capsys):
    """Nine rows: full, and at each of two budgets two methods and their oracles; a clock that counts turns."""
    kept, files = tmp_path / "kept.jsonl", ["--measurements", str(tmp_path / "kept.jsonl")]
    with pretended():
        assert latency.main([*PREFILL, *CALL, *files, "--batch-size", "1", "--deadline", "3"]) == 2
        assert "Nothing was measured twice" in capsys.readouterr().err and len(turns) == 3
        turns.clear()
        plot = ["--plot", str(tmp_path / "plot.png")]
        assert latency.main([*PREFILL, *CALL, *files, "--batch-size", "1,2", "--deadline", "24", *plot]) == 0
        first, said = len(turns), capsys.readouterr().out
        assert first == 24 and turns[-3:] == [("full 16", 2), ("consensusdrop 4", 2), ("attnmix 4", 2)]
        assert (tmp_path / "plot.png").exists() and "oracle of consensusdrop, oracle of attnmix." in said
        assert "### Budget 4" in said and "Pretended GPU" in said and "Batches of 2 questions" in said
        assert "A deadline ended the measurement" in said and "| turns |" in said
        before = kept.read_text().splitlines()
        with kept.open("a") as file:
            file.write('{"round": 2, "meth')  # stopped in the middle of a line
        turns.clear()
        assert latency.main([*PREFILL, *CALL, *files, "--batch-size", "1,2"]) == 0
        assert "A deadline" not in capsys.readouterr().out
    lines = kept.read_text().splitlines()
    assert lines[: len(before)] == before
    keys = [(row["round"], row["method"], row["batch"]) for row in map(json.loads, lines[1:])]
    assert len(keys) == len(set(keys)) == 9 * 3 * 2, "no turn twice"
    with pytest.raises(UserError, match="Pretended GPU there, another here"):
        measuring.Measurements(kept, {**json.loads(lines[0]), "hardware": "another"})
    assert latency.main([*PREFILL, *files, "--layers", "1", "--pages"]) == 2
    assert "layers 2 there, 1 here" in capsys.readouterr().err
    assert latency.main([*PREFILL, *files, "--repeats", "2", "--batch-size", "1,2", "--pages"]) == 0
    said = capsys.readouterr().out
    assert "Pretended GPU" in said and "GFLOP" in said and said.count("Counted, one question") == 2


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_a_loop_that_returns_an_earlier_choice_is_seen(stale, tiny_path, tmp_path, monkeypatch, capsys):
    """Found without a GPU: a graph captured on another device than the current one replayed an earlier image."""
    (tmp_path / "tinyllava").symlink_to(tiny_path)
    monkeypatch.setattr(selfcheck, "ASSETS", tmp_path)
    monkeypatch.setitem(selfcheck.FAMILIES, "tinyllava", "consensusdrop")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    plain, first = ranking.farthest_from, {}

    def farthest_from(*arguments):
        found = plain(*arguments)
        return first.setdefault(found.shape, found) if stale and found.device.type == "cuda" else found

    monkeypatch.setattr(ranking, "farthest_from", farthest_from)
    with pretended():
        assert selfcheck.main(["--device", "cuda", "--markdown", str(tmp_path / "check.md")]) == stale
    said = (tmp_path / "check.md").read_text()
    assert "Not here: tinyllava_next, tinyllava_video." in said and said.strip() in capsys.readouterr().out
    assert ("; farthest_from on input 2 of 4; " in said) == stale != ("Nothing is wrong" in said)


def test_the_inputs_of_the_loops_have_no_near_ties():
    """On a first input that had one, the check called an H100 wrong that only added in another order."""
    for number in range(selfcheck.INPUTS):
        tokens, weight = selfcheck.loop_input(number)
        for name, loop in selfcheck.LOOPS.items():
            chosen = loop(tokens, weight).sort(1).values
            for seed in range(10):
                channels = torch.randperm(selfcheck.CHANNELS, generator=torch.Generator().manual_seed(seed))
                assert torch.equal(loop(tokens[..., channels], weight).sort(1).values, chosen), f"{name}, {number}"


def test_a_method_that_fails_on_a_device_is_named_and_the_others_are_asked(tiny_path, tmp_path, monkeypatch):
    plain = selfcheck.answers_of

    def answers_of(model, asked, reducer):
        if reducer.name == "attnmix" and next(model.hf_model.parameters()).dtype == torch.bfloat16:
            raise NotImplementedError("no kernel for BFloat16")
        return plain(model, asked, reducer)

    (tmp_path / "tinyllava").symlink_to(tiny_path)
    monkeypatch.setattr(selfcheck, "answers_of", answers_of)
    rows, wrong = selfcheck.compare_with_cpu(tmp_path / "tinyllava", "cpu")
    assert wrong == ["attnmix on tinyllava in bfloat16: NotImplementedError: no kernel for BFloat16"]
    assert [row[-1] for row in rows if row[1] == "attnmix"] == ["fails"] and len(rows) > 15


@pytest.mark.process
@pytest.mark.parametrize(("call", "check", "measured"), [("first", 1, 0), ("first", 0, 2), ("second", 1, 4)])
def test_the_script_times_nothing_after_a_failed_check(call, check, measured, tmp_path):
    """With a Python that writes down what it is asked."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$*" in *selfcheck*) exit {check} ;; esac\necho a table\n'
    )
    python.chmod(0o755)
    stamp = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    (tmp_path / "venv" / "requirements.sha256").write_text(stamp + "\n")
    started = ["bash", "scripts/bench/gpu_table.sh", call, "--layers", "1"]
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(started, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    asked = [line for line in (tmp_path / "asked").read_text().splitlines() if "latency" in line]
    assert len(asked) == measured and done.returncode == (check if call == "first" else 0), done.stderr
    assert all(line.endswith("--layers 1") and "--deadline" in line for line in asked)
    assert (tmp_path / "out" / "README.md").read_text().count("a table") == measured
