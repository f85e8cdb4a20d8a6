"""This repository beside another code: the lines of a worker, the order of the turns, the ratios."""

import json
import sys
from itertools import product

import pytest
import torch

from eval.efficiency.measure import interval_rank
from eval.efficiency.shapes import narrow, random_llava
from lab.bench import peers
from lab.bench.peers import compare
from llava.errors import UserError
from llava.pipeline.generate import prefill
from llava.reduction import registry

pytestmark = pytest.mark.lab

FAKE = """
import json, pathlib, sys
name, factor, folder = sys.argv[1], float(sys.argv[2]), pathlib.Path(sys.argv[3])
print("loading", flush=True)
print(json.dumps({"ready": name}), flush=True)
for request in sys.stdin:
    # The machine slows down: every turn takes 10 % longer than the one before, whoever's it is.
    turn = len((folder / "log").read_text()) if (folder / "log").exists() else 0
    with (folder / "log").open("a") as log:
        log.write(name)
    print("measuring", flush=True)
    print(json.dumps({"seconds": {name: factor * 1.1 ** turn}}), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    """(name, factor) -> the command line of a worker that claims `factor` seconds and notes when it was asked."""
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda name, factor: f"{sys.executable} -S {tmp_path}/fake.py {name} {factor} {tmp_path}"


def line(words: str) -> str:
    """A worker that runs one line of Python."""
    return f'{sys.executable} -S -c "{words}"'


def test_workers_take_turns_forwards_and_backwards_and_a_drift_cancels(fake, tmp_path):
    result = compare("two", [fake("a", 2), fake("b", 3)], 4, 1)
    assert (tmp_path / "log").read_text() == "ab" + "abba" * 2, "a warm-up of each, then rounds"
    assert [list(row) for row in result["rounds"]] == [["a", "b"]] * 4
    assert [worker["ready"] for worker in result["workers"]] == ["a", "b"]
    first, second, *_ = (row["b"] / row["a"] for row in result["rounds"])
    assert first == pytest.approx(1.5 * 1.1) and second == pytest.approx(1.5 / 1.1)


READY = "print('{\\\"ready\\\": 1}', flush=True); input(); "


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("raise SystemExit(5)", "ended with exit code 5"),
        ("print('{}')", "not JSON with 'ready'"),
        (READY + 'print(\'{\\"seconds\\": {\\"a\\": 0}}\')', "not seconds above 0"),
        (READY + 'print(\'{\\"seconds\\": {\\"a\\": NaN}}\')', "not seconds above 0"),
        ("print('{\\\"ready\\\": 1}')", "ended with exit code 0"),
    ],
)
def test_a_worker_that_fails_ends_in_a_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        compare("broken", [line(words)], 1, 1)
    with pytest.raises(UserError, match="cannot be started"):
        compare("nothing", ["no-such-command --at-all"], 1, 1)


def test_two_workers_with_one_name_are_refused(fake):
    with pytest.raises(UserError, match="a name may occur once"):
        compare("same", [fake("a", 2), fake("a", 3)], 1, 1)


@pytest.mark.parametrize("rounds", range(1, 13))
def test_the_interval_spans_the_median_as_often_as_it_says(rounds):
    """By counting: each ratio is below or above the median, all patterns are equally likely."""
    rank = interval_rank(rounds)

    def covered(left_out: int) -> float:
        below = [sum(pattern) for pattern in product((0, 1), repeat=rounds)]
        return sum(left_out < number < rounds - left_out for number in below) / 2**rounds

    assert covered(rank) >= 0.95 or rank == 0
    assert 2 * rank + 2 > rounds - 1 or covered(rank + 1) < 0.95, "a smaller interval would do"
    if rounds >= 6:
        assert covered(rank) >= 0.95


def test_workers_with_models_of_different_depth_are_refused():
    """`peers.sh dense full 576 --layers 8` gave the flag to our worker alone: 8 layers beside 32."""
    workers = [line(f'print(\'{{\\"ready\\": 1, \\"layers\\": {layers}}}\')') for layers in (8, 32)]
    with pytest.raises(UserError, match="layers 8, 32"):
        compare("unequal", workers, 1, 1)


def test_the_command_writes_a_result_that_it_reads_again(fake, tmp_path, capsys):
    path = tmp_path / "new" / "pair.json"
    words = ["measure", "--name", "pair", "--rounds", "3", "--threads", "1", "--json", str(path)]
    assert peers.main([*words, "--worker", fake("a", 2), "--worker", fake("b", 3)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(path.read_text())["commands"] == [fake("a", 2), fake("b", 3)]
    assert peers.main(["table", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert "| pair |" in printed and "| b |" in printed


@pytest.fixture
def worker(tiny, monkeypatch, capsys):
    """Run a worker on the tiny model with so many requests; returns what it says of itself, and its measurements."""
    monkeypatch.setattr(peers, "build", lambda args: tiny)

    def run(*words, requests=1):
        monkeypatch.setattr("sys.stdin", ["measure\n"] * requests)
        assert peers.main(list(words)) == 0
        ready, *measured = map(json.loads, capsys.readouterr().out.splitlines())
        return ready, *(row["seconds"] for row in measured)

    return run


def test_our_worker_measures_methods_and_their_oracles_on_new_images(worker, monkeypatch):
    asked, real = [], peers.ttft

    def ttft(model, reducer, batch):
        asked.append((reducer.name, batch[0].id))
        return real(model, reducer, batch)

    monkeypatch.setattr(peers, "ttft", ttft)
    words = ["ours", "--method", "full,fastv", "--budget", "8", "--set", "fastv.schedule=kept", "--oracle"]
    ready, first, second = worker(*words, requests=2)
    assert list(first) == list(second) == ["full", "fastv", "oracle of fastv"]
    assert all(value > 0 for value in (first | second).values())
    turn = ["full", "fastv", "oracle"]
    assert asked == [(name, "s0") for name in turn] + [(name, "s1") for name in reversed(turn)]
    assert ready["visual tokens per layer"] == {"full": [16] * 4, "fastv": [16, 8, 8, 8]}


def test_stock_with_attentions_gives_the_same_token_and_the_maps_of_all_layers(tiny):
    """Layers that share weights stayed on SDPA, which gives no maps and takes less time. SDPA is back afterwards."""
    for model in (tiny, random_llava(narrow("llava-1.5-7b", 64, 3, blocks=2), 1, "float32")):
        hf, inputs = model.hf_model, peers.inputs(model, 0)
        token, maps = peers.attentive(hf, *inputs)
        assert token.tolist() == peers.dense(hf, *inputs).tolist() and len(maps) == model.spec.layers
        assert all(torch.allclose(one.sum(-1), torch.ones(())) for one in maps)
        assert hf.model.language_model.config._attn_implementation == "sdpa"


def test_stock_dense_gives_our_first_token(tiny):
    for turn in range(4):
        token = peers.dense(tiny.hf_model, *peers.inputs(tiny, turn))
        full = registry.build("full", tiny.visual_tokens)
        state, _ = prefill(tiny, peers.noise_batches(tiny, 1, differ=True)(turn), full)
        assert token.tolist() == tiny.logits(state.hidden).argmax(-1).tolist()
