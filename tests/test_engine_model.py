"""Benchmarks through vLLM: a fake that answers by the pipeline's own parts, and once the real engine."""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from eval.__main__ import main
from eval.answers.jsonl import read_json, read_jsonl
from eval.config import DEFAULT_MODEL, ROOT, RunConfig, build_reducer
from eval.efficiency.measure import Measurements
from eval.efficiency.shapes import narrow
from eval.run import load_model, run
from lab.bench import serving
from llava.errors import MethodError, UserError
from llava.model.builder import load
from llava.pipeline import decoder
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import generate, run_decoder, until_decoder
from llava.pipeline.sequence import PromptBatch
from llava.processing.prompt import Prompt, Sample
from llava.reduction.registry import build
from tests.conftest import samples


class FakeLLM:
    """Greedy answers, one prompt after the other; `method` stands for the plug-in."""

    def __init__(self, **given):
        self.given, self.asked, self.stop_at = given, [], None
        self.model = load(given["model"], device="cpu")
        settings = given.get("hf_overrides", {}).get("vtr")
        self.method = settings and build(settings["method"], settings["budget"], settings["options"])
        cache = SimpleNamespace(block_size=16, num_gpu_blocks=100)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def generate(self, prompts, sampling, use_tqdm):
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(prompts)
        return [self.one(prompt, sampling) for prompt in prompts]

    def one(self, prompt, sampling):
        if (hidden := prompt.get("prompt_embeds")) is None:
            model, slot = copy.copy(self.model), self.model.hf_model.config.image_token_id
            ids = tuple(-200 if token == slot else token for token in prompt["prompt_token_ids"])
            model.prompt = lambda sample: Prompt(ids, (1, 1), (1, 1), "")
            sample = Sample("0", "", image=tuple(prompt.get("multi_modal_data", {}).get("image", ())))
            hidden = until_decoder(model, [sample], self.method, Timer(model.device)).start.hidden[0]
        llm, length = self.model.llm, len(hidden)
        span = ((0, 1),)
        sequence = PromptBatch(hidden[None], torch.arange(length)[None], (length,), ((),), span, span, span)
        state, ids = run_decoder(llm, sequence, (), None), []
        last = state.hidden
        while True:
            ids.append(int(self.model.logits(last).argmax()))
            if ids[-1] in sampling.stop_token_ids or len(ids) == sampling.max_tokens:
                break
            last = decoder.step(llm, state, llm.embed_tokens(torch.tensor([[ids[-1]]])))
        made = SimpleNamespace(token_ids=ids, cumulative_logprob=-1.0)
        return SimpleNamespace(outputs=[made], prompt_token_ids=[0] * length)


@pytest.fixture
def vllm(monkeypatch):
    """The fake; `engines` are those that were started."""
    fake = SimpleNamespace(__version__="0.1", engines=[], SamplingParams=SimpleNamespace, registered={})
    fake.ModelRegistry = SimpleNamespace(register_model=fake.registered.__setitem__)

    def start(**given):
        fake.engines.append(FakeLLM(**given))
        return fake.engines[-1]

    fake.LLM = start
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


def config(method="divprune", model=DEFAULT_MODEL, budget=8, **more) -> RunConfig:
    size = None if method == "full" else budget
    given = {"engine": "vllm", "device": "cpu", "batch_size": 4, "wandb": "disabled"} | more
    return RunConfig(method, size, model=str(model), **given)


def stored(folder: Path) -> dict[str, tuple[str, object]]:
    """Text and accounting by question, without tokens on padding, which are not known where vLLM chose them."""
    rows = [row for _, row in read_jsonl(folder / "answers.jsonl")]
    for row in rows:
        row["metadata"]["accounting"]["on_padding"] = None
    return {row["question_id"]: (row["text"], row["metadata"]) for row in rows}


@pytest.mark.parametrize(
    "method, route, options",
    [
        ("divprune", "pixels", {}),
        ("visionzip", "pixels", {"retention_ratio": "0.5"}),
        ("full", "pixels", {}),
        ("random", "embeds", {}),
        ("tome", "embeds", {}),
        ("consensusdrop", "embeds", {"probe_layer": "2", "probe": "contextual"}),
    ],
)
def test_answers_and_accounting_are_those_of_the_pipeline(vllm, tiny, tiny_path, method, route, options):
    asked = config(method, tiny_path, None if "retention_ratio" in options else 8, options=options)
    model, reducer = load_model(asked), build_reducer(asked, tiny.visual_tokens)
    expected, found = (generate(one, samples(), reducer, 6) for one in (tiny, model))
    assert model.engine.settings == {"name": "vLLM", "version": "0.1", "route": route}
    (engine,) = vllm.engines
    assert "LlavaForConditionalGeneration" in vllm.registered, "an older egg-info can hide the entry point"
    assert ("hf_overrides" in engine.given) == (route == "pixels")
    assert ("enable_prompt_embeds" in engine.given) == (route == "embeds")
    assert model.llm.layers[-1].__class__.__name__ == "Identity", "the decoder is there twice"
    for ours, theirs in zip(expected.answers, found.answers, strict=True):
        assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
        inside = {"merged": 0, "on_padding": None} if route == "pixels" else {}  # not known
        assert vars(ours.accounting) | inside == vars(theirs.accounting) | inside
        kept = [[step.reduction.kept.tolist() for step in one.trace] for one in (ours, theirs)]
        assert (kept[0], ours.runs) == (kept[1], theirs.runs) if route == "embeds" else theirs.runs == ()
    held = sum(one.accounting.kv_bytes for one in found.answers)
    assert held < found.kv_bytes <= found.kv_bytes_allocated and found.timing.decode > 0


def test_an_interrupted_run_goes_on_and_no_engine_continues_another(vllm, tmp_path, monkeypatch):
    asked = config(limit=12, output=tmp_path / "o")
    model = load_model(asked)
    assert not vllm.engines, "started before a question is asked"
    model.engine.llm.stop_at = 2
    with pytest.raises(KeyboardInterrupt, match="8 of 12 answers"):
        run(asked, model=model)
    result = run(asked)
    assert [sum(map(len, engine.asked)) for engine in vllm.engines] == [8, 4]
    assert result["settings"]["engine"]["route"] == "pixels" and result["timing"]["ttft"] is None
    assert result["sentence"].endswith("TTFT n/a, by vLLM 0.1.")
    assert "llava/serving/plugin.py" in result["settings"]["code"]
    own = run(config(limit=12, output=tmp_path / "own", engine="own"))
    assert stored(tmp_path / "o") == stored(tmp_path / "own") and own["metrics"] == result["metrics"]
    for other in (config(limit=12, output=tmp_path / "o", engine="own"), config(limit=12, output=tmp_path / "own")):
        with pytest.raises(UserError, match="engine"):
            run(other)
    vllm.__version__ = "0.2"
    with pytest.raises(UserError, match=r"engine.version: 0\.1"):
        run(asked)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"method": "fastv"}, "reduces between decoder layers"),
        ({"options": {"positions": "original"}}, "positions=original"),
        ({"model": ROOT / "assets" / "tinyllava_video"}, "is VideoLlavaForConditionalGeneration; use --engine own"),
        ({"engine": "vlm"}, "Did you mean 'vllm'"),
        ({"tensor_parallel": 2, "zero": "cpu"}, "--tensor-parallel and --zero"),
        ({"vllm": None}, "scripts/serve_setup.sh"),
    ],
)
def test_what_no_engine_can_do_is_one_sentence(vllm, monkeypatch, changes, why):
    if "vllm" in changes:
        monkeypatch.setitem(sys.modules, "vllm", changes.pop("vllm"))
    with pytest.raises(UserError, match=why):
        load_model(config(**changes))
    assert not vllm.engines


def test_flags(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr("eval.run.run", lambda config: taken.append(config) or {})
    words = ["--method", "divprune", "--budget", "8"]
    for more in ([], ["--engine", "vllm"], ["--engine", "vllm", "--batch-size", "8"]):
        assert main([*words, *more]) == 0
    assert [(one.engine, one.batch_size) for one in taken] == [("own", 8), ("vllm", 64), ("vllm", 8)]
    monkeypatch.setenv("RANKS", "2")
    assert main([*words, "--engine", "vllm"]) == 2 and "runs in one process" in capsys.readouterr().err
    monkeypatch.delenv("RANKS")
    assert main(["--method", "divprune,full", *words[2:], "--engine", "vllm"]) == 2


def test_faults_of_the_engine_end_the_run(vllm, tiny_path, monkeypatch):
    model = load_model(config(model=tiny_path))
    reducer = model.engine.reducer
    model.engine.llm.method = build("full", 16)  # an engine without the plug-in
    with pytest.raises(MethodError, match="plug-in"):
        generate(model, samples(), reducer, 2)
    made = SimpleNamespace(token_ids=[5], cumulative_logprob=float("nan"))
    output = SimpleNamespace(outputs=[made], prompt_token_ids=[])
    model.engine.llm.generate = lambda *_, **__: [output]
    with pytest.raises(UserError, match="logits for question q0 are not finite"):
        generate(model, samples(1), reducer, 2)
    monkeypatch.setattr(vllm, "LLM", lambda **_: 1 / 0)
    with pytest.raises(MethodError, match="vLLM does not start: division by zero"):
        generate(load_model(config(model=tiny_path)), samples(), reducer, 2)


@pytest.mark.lab
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_a_closed_loop_keeps_as_many_requests_in_flight_and_asks_each_once(at_once):
    flying, most, asked, held = 0, [], [], []

    async def ask(number, sample):
        nonlocal flying
        flying += 1
        most.append(flying)
        asked.append(sample)
        await asyncio.sleep(0.001 * (number % 3))
        flying -= 1
        return serving.Answered(0.0, 1.0, float(number))

    done = asyncio.run(serving.closed_loop(ask, [*"abcdefghij"], at_once, lambda: held.append(len(asked))))
    assert max(most) == at_once and asked == [*"abcdefghij"] and len(held) == 1
    assert [one.last for one in done] == sorted(one.last for one in done) and len(done) == 10


@pytest.mark.lab
def test_the_requests_at_the_start_and_the_end_of_a_loop_do_not_count():
    slow = [serving.Answered(0, 9, 10), *(serving.Answered(9 + n, 10 + n, 11 + n) for n in range(4))]
    found = serving.summary([*slow, serving.Answered(13, 99, 100)], 1, 2)
    assert found == {"seconds": 1, "ttft": 1, "ttft_99": 1, "token": 1, "requests": 4}
    assert serving.summary([serving.Answered(0, 1, 4), serving.Answered(0, 3, 8)], 1, 5)["seconds"] == 4


def measured(seconds, **more):
    given = {"ttft": 0.25, "ttft_99": 0.5, "token": 0.01, "blocks": 2.0, "block": 16, "cache": 9, "preempted": 0}
    return given | {"seconds": seconds, "selection": 0.5, "prefix": [1, 4], "pictures": [0, 0], "grown": 1.0} | more


@pytest.mark.lab
def test_the_benchmark_divides_times_of_the_same_round():
    settings = {"model": "m", "budget": 4, "dtype": "float32", "threads": 1, "device": "cpu", "hardware": "h"}
    kept = Measurements(None, settings | {"per_slot": 2, "videos": 0.0, "caches": "on", "versions": {}})
    for number, slow in ((1, 1.0), (2, 3.0), (3, 5.0)):
        for row in list(serving.ROWS)[: None if number < 3 else 2]:  # the third round is not complete
            kept.add(number, serving.named(row, 16), 8, measured(slow * (4.0 if row == "full" else 2.0)))
    args = serving.parser().parse_args(["--at-once", "8,64", "--repeats", "3"])
    header, _, full, uniform, *_ = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in serving.page(kept, args).splitlines()
        if line.startswith("|")
    )
    found = dict(zip(header, uniform, strict=True))
    assert (found["times full"], found["requests/s"], full[5]) == ("2.00 (2.00 to 2.00)", "0.25", "")
    assert (found["TTFT ms, p50"], found["p99"], found["prefix hits"], found["picture hits"]) == (
        "250", "500", "25 %", "off"
    )  # fmt: skip
    with pytest.raises(UserError, match="No round is complete"):
        serving.page(Measurements(None, settings), args)


@pytest.mark.slow
@pytest.mark.lab
def test_the_benchmark_loads_real_engines_and_goes_on_after_ctrl_c(tmp_path, vllm_python):
    serving.save_random(narrow("llava-1.5-7b", 64, 2, 3, 56), tmp_path / "model", "float32")
    words = ["--model", str(tmp_path / "model"), "--budget", "4", "--at-once", "2", "--repeats", "1"]
    words += ["--measurements", str(kept := tmp_path / "kept.jsonl"), "--new-tokens", "3", "--caches", "on"]
    given = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}

    def bench() -> subprocess.Popen[str]:
        run = [vllm_python, "-m", "lab.bench.serving", *words]
        return subprocess.Popen(run, cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True)

    def engines(of: subprocess.Popen[str]) -> list[psutil.Process]:
        return [one for one in psutil.Process(of.pid).children() if "EngineCore" in "".join(one.cmdline())]

    for sent, code, due in (
        (signal.SIGTERM, 143, engines),  # vLLM drops KeyboardInterrupt here, and waited on
        (signal.SIGINT, 130, lambda of: len(kept.read_text().splitlines()) == 3),
    ):
        stopped = bench()
        while not due(stopped):
            assert stopped.poll() is None
            time.sleep(0.05)
        started = engines(stopped)
        stopped.send_signal(sent)
        assert stopped.wait(60) == code and started
        assert psutil.wait_procs(started, timeout=5)[1] == []
    before = kept.read_text()
    whole = (again := bench()).communicate()[0]
    assert again.returncode == 0 and kept.read_text().startswith(before)
    rows = {row["method"]: row for row in map(json.loads, kept.read_text().splitlines()[1:])}
    assert [*rows] == [serving.named(row, 3) for row in serving.ROWS]
    assert [row["blocks"] for row in rows.values()] == pytest.approx([1.0] * 5)
    assert all(row["selection"] > 0 for row in rows.values())
    assert whole.count("| pixels |") == 4


@pytest.mark.slow
@pytest.mark.parametrize("method, route", [("divprune", "pixels"), ("consensusdrop", "embeds")])
def test_the_real_engine_answers_as_the_pipeline(tmp_path, vllm_python, method, route):
    words = ["--method", method, "--budget", "64", "--limit", "40", "--output", str(tmp_path / "o"), "--engine", "vllm"]
    given = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "WANDB_MODE": "disabled"}
    subprocess.run([vllm_python, "-m", "eval", *words, "--wandb", "disabled"], cwd=ROOT, env=given, check=True)
    assert read_json(tmp_path / "o" / "limit40" / "result.json")["settings"]["engine"]["route"] == route
    run(config(method, budget=64, limit=40, engine="own", output=tmp_path / "own"))
    assert stored(tmp_path / "o") == stored(tmp_path / "own")
