"""Benchmarks through vLLM: a fake that answers by the pipeline's own parts, and once the real engine."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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


class Steps(SimpleNamespace):
    def step(self):
        return []


class FakeLLM:
    """Greedy answers, one prompt after the other; `method` stands for the plug-in."""

    def __init__(self, **given):
        self.given, self.asked, self.stop_at = given, [], None
        self.model = load(given["model"], device="cpu")
        settings = given.get("hf_overrides", {}).get("vtr")
        self.method = settings and build(settings["method"], settings["budget"], settings["options"])
        cache, self.free = SimpleNamespace(block_size=16, num_gpu_blocks=100), 100
        pool = SimpleNamespace(get_num_free_blocks=lambda: self.free)
        core: object = SimpleNamespace(block_pool=pool)
        for name in ("kv_cache_manager", "scheduler", "engine_core", "engine_core"):
            core = SimpleNamespace(**{name: core})
        self.llm_engine = Steps(vllm_config=SimpleNamespace(cache_config=cache), **vars(core))

    def generate(self, prompts, sampling, use_tqdm):
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(prompts)
        made = [self.one(prompt, sampling) for prompt in prompts]
        self.free -= sum(-(-(len(one.prompt_token_ids) + sampling.max_tokens) // 16) for one in made)
        self.llm_engine.step()
        self.free = 100
        return made

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
        metrics = SimpleNamespace(first_token_ts=time.monotonic())
        return SimpleNamespace(outputs=[made], prompt_token_ids=[0] * length, metrics=metrics)


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
def test_the_benchmark_asks_every_engine_in_turns_about_new_images(vllm, tmp_path, capsys):
    serving.save_random(narrow("llava-1.5-7b", 64, 2, 3, 56), tmp_path / "model", "float32")
    kept = tmp_path / "kept.jsonl"
    words = ["--model", str(tmp_path / "model"), "--budget", "4", "--at-once", "1,2", "--repeats", "1"]
    words += ["--measurements", str(kept), "--device", "cpu"]
    assert serving.main(words) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 | vLLM")]
    assert [(row[2], row[-2], row[-1]) for row in table] == [
        (name, "3", "4 |") for name in ("divprune", "consensusdrop")
    ]
    embeds, *pixels = sorted(vllm.engines, key=lambda one: "hf_overrides" in one.given)
    assert [len(one.asked) for one in (embeds, *pixels)] == [8, 4, 4], "one engine takes embeddings of both methods"
    assert all(serving.ENGINE.items() <= one.given.items() for one in vllm.engines)
    asked = [one["multi_modal_data"]["image"][0] for engine in pixels for batch in engine.asked for one in batch]
    assert len({image.tobytes() for image in asked}) == len(asked) == 12
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]))
    assert serving.main(words) == 0 and len(vllm.engines[-1].asked) == 2, "a warm-up, and what was missing"
    assert serving.main(words) == 0 and len(vllm.engines) == 4, "nothing was missing"
    capsys.readouterr()
    wrong = {"--budget 99": "must be 1 to 16", "--model assets/tinyllava_next": "give --model a LLaVA-1.5"}
    for number, (more, why) in enumerate(wrong.items()):
        other = ["--measurements", str(tmp_path / str(number))]
        assert serving.main([*words, *more.split(), *other]) == 2 and why in capsys.readouterr().err


@pytest.mark.lab
def test_the_benchmark_divides_times_of_the_same_round(monkeypatch):
    settings = {"model": "m", "budget": 4, "dtype": "float32", "threads": 1, "device": "cpu", "hardware": "h"}
    kept = Measurements(None, settings | {"versions": {}})
    for number, slow in ((0, 100.0), (1, 1.0), (2, 3.0)):
        for way, method in serving.PAIRS:
            more = {} if way == "own" else {"blocks": 2.0, "block": 16, "cache": 9}
            for name, seconds in (("full", 4.0), (method, 1.0 if way == "own" else 2.0)):
                kept.add(number, f"{way} {name}", 8, {"seconds": slow * seconds, "ttft": seconds / 8, **more})
    own, pixels = serving.page(kept, [8], 2).splitlines()[4:6]
    assert own.split(" | ")[3:6] == ["4", "1", "4.00 (4.00 to 4.00)"], "the warm-up counts"
    assert pixels.split(" | ")[3:7] == ["2", "1", "2.00 (2.00 to 2.00)", "0.50 (0.50 to 0.50)"]
    assert pixels.split(" | ")[7:9] == ["250", "500"]


@pytest.mark.slow
@pytest.mark.parametrize("method, route", [("divprune", "pixels"), ("consensusdrop", "embeds")])
def test_the_real_engine_answers_as_the_pipeline(tmp_path, vllm_python, method, route):
    words = ["--method", method, "--budget", "64", "--limit", "40", "--output", str(tmp_path / "o"), "--engine", "vllm"]
    given = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "WANDB_MODE": "disabled"}
    subprocess.run([vllm_python, "-m", "eval", *words, "--wandb", "disabled"], cwd=ROOT, env=given, check=True)
    assert read_json(tmp_path / "o" / "limit40" / "result.json")["settings"]["engine"]["route"] == route
    run(config(method, budget=64, limit=40, engine="own", output=tmp_path / "own"))
    assert stored(tmp_path / "o") == stored(tmp_path / "own")
