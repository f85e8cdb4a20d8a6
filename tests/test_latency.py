"""The efficiency protocol on the tiny random model, and what a run says of its time and operations."""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eval.efficiency import latency
from eval.efficiency import measure as measuring
from eval.efficiency.latency import gate, main, parser
from eval.efficiency.latency_table import page, runs, spanned
from eval.efficiency.measure import Measured, Measurements, StageTimer, measure
from eval.efficiency.oracle import chosen_options, oracles
from eval.results import cost, report
from llava.errors import UserError
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import generate, prefill
from llava.reduction import registry
from llava.reduction.merging import Reduction
from tests import contract
from tests.conftest import drawn_image, samples

# -- what is timed -------------------------------------------------------------------------------------------------


def slow_apply(monkeypatch, clock):
    """Every reduction takes 0.25 s to apply, and nothing else takes any time."""
    plain = Reduction.apply

    def apply(reduction, tokens):
        clock.wait(0.25)
        return plain(reduction, tokens)

    monkeypatch.setattr(Reduction, "apply", apply)


@pytest.mark.parametrize(
    ("method", "slow", "fast"),
    [("visionzip", "merging", "selection"), ("fastervlm", "selection", "merging"), ("tome", "merging", "vision")],
)
def test_merging_is_timed_apart(tiny, monkeypatch, clock, method, slow, fast):
    """Averages of tokens are merging, in the tower too; gathering is selection. The sum is a plain timer's."""
    slow_apply(monkeypatch, clock)
    timer = StageTimer(tiny.device)
    with timer.merging():
        prefill(tiny, samples(1), registry.build(method, 7), timer)
    spent = timer.seconds
    assert spent[slow] >= 0.25 and spent.get(fast, 0) == 0 and sum(spent.values()) == clock.now


def test_answers_of_the_protocol_have_their_full_length(tiny, monkeypatch):
    """An end token in the middle of an answer would make a method look faster."""
    reducer = registry.build("consensusdrop", 7)
    tokens = generate(tiny, samples(1), reducer, 6, ignore_eos=True).answers[0].token_ids
    monkeypatch.setitem(vars(tiny), "end_ids", frozenset({tokens[2]}))
    assert len(generate(tiny, samples(1), reducer, 6).answers[0].token_ids) <= 2
    whole = generate(tiny, samples(1), reducer, 6, ignore_eos=True)
    assert whole.answers[0].token_ids == tokens and len(tokens) == 6 and whole.decode_steps == 5


def test_methods_take_turns_and_every_turn_asks_its_own_question(tiny, monkeypatch):
    asked = []

    def noted(model, reducer, batch, lengths, clock):
        asked.append((batch[0].id, reducer.name))
        return {"seconds": {"prefill": 1.0}, "kv_bytes": 1, "flops": 1, "peak_bytes": 1}

    monkeypatch.setattr(measuring, "measure_round", noted)
    reducers = {"full": registry.build("full", 16), "uniform": registry.build("uniform", 4)}
    found = measure(tiny, reducers, lambda turn: [samples(3)[turn]], repeats=2)
    asked_first = [("q0", "uniform"), ("q0", "full"), ("q1", "full"), ("q1", "uniform")]
    assert asked == [*asked_first, ("q2", "uniform"), ("q2", "full")], "every second turn in reverse"
    assert found["uniform"].ttfts == (1.0, 1.0), "without the warm-up"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_batch_that_does_not_fit_is_said_and_not_tried_again(tiny, monkeypatch, tmp_path, error):
    """That cuBLAS found no memory ended the table."""
    tried = []

    def too_large(model, reducer, batch, lengths, clock):
        tried.append(reducer.name)
        raise error

    monkeypatch.setattr(measuring, "measure_round", too_large)
    reducers, path = {"full": registry.build("full", 16)}, tmp_path / "kept.jsonl"
    for _ in range(2):
        assert measure(tiny, reducers, lambda turn: samples(1), 2, Measurements(path, {}), batch=4) == {"full": None}
    assert tried == ["full"]


def test_weights_beyond_the_free_memory_of_a_cpu_are_not_made(monkeypatch, capsys):
    """32 layers of their own in float32 are 26 GB."""
    monkeypatch.setattr(latency, "free_memory", lambda device: 20 << 30)
    flags = ["--method", "uniform", "--budget", "64", "--shape", "llava-1.5-7b", "--distinct", "32"]
    assert main([*flags, "--device", "cpu"]) == 2
    assert "llava-1.5-7b need 26.3 GiB, and 20.0 GiB" in capsys.readouterr().err


def test_the_cpu_clock_does_not_run_while_the_process_waits(tiny, monkeypatch):
    monkeypatch.setattr(measuring, "generate", lambda *_, **__: time.sleep(0.3) or SimpleNamespace(decode_steps=0))
    reducers = {"full": registry.build("full", 16)}
    wall, cpu = (
        measure(tiny, reducers, lambda turn: samples(1), 1, lengths=(1,), clock=clock)["full"].end_to_end[1][0]
        for clock in ("wall", "cpu")
    )
    assert wall >= 0.3 > cpu


# -- ratios --------------------------------------------------------------------------------------------------------


def measured(vision, selection, merging, prefill_seconds, flops=1500, **more):
    seconds = {"vision": vision, "selection": selection, "merging": merging, "prefill": prefill_seconds}
    return Measured(seconds, 400, flops, 7, **{"ttfts": (sum(seconds.values()),) * 2} | more)


def test_ratios_to_full_and_to_the_oracle():
    full, ours = measured(1.0, 0.0, 0.0, 8.0), measured(1.5, 0.25, 0.25, 2.0, 300)
    found = ratios(full, ours, oracle=measured(1.0, 0.0, 0.0, 2.2))
    assert found.ttft == 9 / 4 and found.flops == 5 and found.realised == pytest.approx(9 / 4 / 5)
    assert found.over_oracle == pytest.approx(4 / 3.2 - 1) and found.calm
    assert not ratios(full, measured(1.0, 0.0, 0.0, 3.0, ttfts=(3.0, 4.0))).calm


def ratios(*measurements, **more):
    return SimpleNamespace(**measuring.ratios(*measurements, **more))


def in_turns(*seconds):
    return measured(0.0, 0.0, 0.0, 1.0, ttfts=seconds)


def test_times_are_divided_turn_by_turn():
    """The medians are 10, 6 and 5 seconds, of three different turns: their ratios are 1.67 and 1.2."""
    full, ours, oracle = in_turns(9, 10, 18), in_turns(3, 10, 6), in_turns(2, 5, 6)
    found = ratios(full, ours, oracle=oracle)
    assert found.ttft == 3 and found.ttft_interval == (1, 3)
    assert found.over_oracle == 0.5 and found.over_oracle_interval == (0, 1)
    drift = [1.3**turn for turn in range(7)]
    steady = ratios(in_turns(*(9 * slow for slow in drift)), in_turns(*(3 * slow for slow in drift)))
    assert steady.ttft == pytest.approx(3) and steady.ttft_interval == pytest.approx((3, 3)) and not steady.calm
    assert ratios(in_turns(4, 4), in_turns(1, 2, 9)).ttft == 3, "the turns that both have before a deadline"


def test_methods_with_the_same_tokens_at_the_same_stages_share_an_oracle(tiny):
    names = ("fastervlm", "divprune", "consensusdrop", "fastv", "full")
    reducers = {name: registry.build(name, 16 if name == "full" else 8) for name in names}
    found, named = oracles(reducers, tiny.spec)
    assert named["fastervlm"] == "oracle of fastervlm" and "full" not in named
    assert named["consensusdrop"] != named["fastervlm"], "it acts with the text, after the projector"
    assert len(set(named.values())) == len(found) and named["fastv"] == "oracle of fastv"


# -- the gate ------------------------------------------------------------------------------------------------------


def test_the_gate_asks_the_first_questions_and_marks_what_falls_below(monkeypatch):
    """Each "method" here is how many of the questions 0, 1, 2, ... it answers rightly."""

    def answers(model, asked, right, length):
        return SimpleNamespace(answers=[SimpleNamespace(text="yes" if number < right else "no") for number in asked])

    questions = SimpleNamespace(
        title="GQA", questions=range(40), sample=int, max_new_tokens=1, sample_score=lambda one, text: text == "yes"
    )
    monkeypatch.setattr(latency, "open_dataset", lambda *_: questions)
    monkeypatch.setattr(latency, "generate", answers)
    found = gate(None, {"full": 20, "good": 18, "bad": 17}, None, 20)
    assert found["questions"] == 20 and found["accuracy"] == {"full": 1.0, "good": 0.9, "bad": 0.85}
    assert found["passes"] == {"full": True, "good": True, "bad": False}


# -- one run, from the flags to the tables -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tiny_path):
    flags = ["--method", "consensusdrop", "--budget", "4", "--model", str(tiny_path), "--device", "cpu"]
    flags += ["--batch-size", "1,2", "--repeats", "2", "--lengths", "1,3", "--scenario", "offline"]
    return latency.run(parser().parse_args(flags))[0]


@pytest.mark.table
def test_latency_measures_and_counts_beside_full_and_the_oracle(result):
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 2]
    rows = result["batches"][1]["methods"]
    assert set(rows) == {"full", "consensusdrop", "oracle of consensusdrop"}
    # Per layer 4 of 16 visual tokens; both hold the same text.
    text = rows["full"]["kv_bytes"] - rows["consensusdrop"]["kv_bytes"]
    assert text == 2 * 4 * 12 * 2 * 2 * 16 * 4, (
        "samples x layers x dropped tokens x (keys, values) x heads x width x bytes"
    )
    assert rows["consensusdrop"]["flops"] < rows["full"]["flops"]
    assert rows["consensusdrop"]["throughput"]["3"] > 0
    rows = result["batches"][0]["methods"]
    ours, oracle = rows["consensusdrop"]["counts"], rows["oracle of consensusdrop"]["counts"]
    assert ours["tokens_per_layer"] == oracle["tokens_per_layer"] == (4, 4, 4, 4)
    assert ours["operations"] > oracle["operations"] > 0
    assert sum(ours["kv_bytes_per_layer"]) == rows["consensusdrop"]["kv_bytes"]
    kernels = {row["attention"] for row in rows.values()}
    assert kernels == {("scaled_dot_product_flash_attention_for_cpu",)}, "the dense baseline runs the same"


@pytest.mark.table
def test_the_page_says_everything_and_json_can_hold_it(result):
    text = page([result])
    columns = ("over oracle", "realised", "beside oracle", "decode ms/token", "largest batch")
    assert not [part for part in (*columns, "Batches of 2 questions", "methods in turns") if part not in text]
    assert "all turns: too few for 95 %" in text
    json.dumps(result)
    assert spanned(2.064, (1.98, 2.111), "{:.2f}") == "2.06 (1.98 to 2.11)"
    assert spanned(1.0, (1.0, 1.0), "{:.2f}") == "1.00" and spanned(None, None, "{:.2f}") == "n/a"
    assert runs([576, 576, 64]) == "576 x2, 64 x1" and runs([64, 64]) == "64"


@pytest.mark.table
def test_single_stream_asks_another_image_each_time(tiny_path, capsys, tmp_path):
    flags = ["--method", "uniform", "--budget", "4", "--model", str(tiny_path), "--scenario", "single-stream"]
    files = ["--json", str(tmp_path / "a" / "r.json"), "--plot", str(tmp_path / "a" / "p.png")]
    more = ["--repeats", "2", "--lengths", "2", "--no-oracle", "--no-counts", "--clock", "cpu"]
    assert main([*flags, *more, *files]) == 0
    said = capsys.readouterr().out
    assert "p90" in said and "oracle of" not in said
    (kept,) = json.loads((tmp_path / "a" / "r.json").read_text())
    assert len(kept["batches"][0]["methods"]["uniform"]["end_to_end"]["2"]) == 2
    assert (tmp_path / "a" / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "nothing"], "invalid choice"),
        (["--gate", "4", "--shape", "llava-1.5-7b"], "Random weights"),
        (["--shape", "llava-1.5-7b", "--device", "cuda"], "no CUDA device"),
        (["--shape", "llava-1.5-7b", "--device", "gpu0"], "got 'gpu0'"),
    ],
)
def test_flags_that_make_no_sense_end_in_a_sentence(tiny_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if "--shape" not in flags or "--gate" in flags:
        monkeypatch.setattr(latency, "models", lambda args: (latency.load(str(tiny_path), device="cpu"), None))
    assert main(["--method", "uniform", "--budget", "4", "--device", "cpu", *flags]) == 2
    assert message in capsys.readouterr().err


# -- what was measured before, options, devices ---------------------------------------------------------------------


def test_measurements_are_kept_and_belong_to_their_settings(tmp_path):
    """An interrupted benchmark continues from its file; a file under other settings is refused and left as it is."""
    path, row = tmp_path / "measured.jsonl", {"seconds": {"prefill": 1.0}}
    Measurements(path, {"budget": 64}).add(0, "full", 8, row)
    assert Measurements(path, {"budget": 64}).rows == {(0, "full", 8): row}
    before = path.read_text()
    with pytest.raises(UserError, match="other settings"):
        Measurements(path, {"budget": 32})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("setting", "methods", "found"),
    [
        ("consensusdrop.alpha=0.5", "all", {"consensusdrop": {"alpha": "0.5"}}),
        ("layer=3", "fastv,dart", {"fastv": {"layer": "3"}, "dart": {"layer": "3"}}),
        ("alpha=1", "all", "names no method"),
        ("visionzip.alpha=1", "consensusdrop", "for method 'visionzip'"),
    ],
)
def test_options_with_and_without_the_method(setting, methods, found):
    """`python -m eval` takes --set METHOD.KEY=VALUE; latency once took KEY=VALUE alone. With --method all, options were
    silently dropped."""
    refused = pytest.raises(UserError, match=found) if isinstance(found, str) else nullcontext()
    with refused:
        assert chosen_options(setting.split(), methods.split(",")) == found


def test_random_weights_are_on_the_device_and_no_more_layers_are_distinct_than_there_are(monkeypatch, tiny, tmp_path):
    """`--shape ... --device cuda` timed the CPU; "1 decoder layers, 32 of them with their own weights"."""
    placed = []
    monkeypatch.setattr(latency, "random_llava", lambda *_, device, **__: placed.append(device.type) or tiny)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    file = tmp_path / "found.json"
    short = ["--method", "full", "--budget", "8", "--repeats", "1", "--lengths", "0", "--json", str(file)]
    assert main([*short, "--shape", "llava-1.5-7b", "--distinct", "32", "--device", "cuda"]) == 0
    (found,) = json.loads(file.read_text())
    assert placed == ["meta", "cuda"] and found["distinct_layers"] == found["layers"] == tiny.spec.layers


# -- the timer -----------------------------------------------------------------------------------------------------


def test_a_timer_never_waits_for_the_device_before_it_is_read(monkeypatch):
    """The device was synchronised at the end of every stage, twice per reduced decoder layer."""
    waits, moments = [], iter([0.0, 4.0, 10.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream"
            self.moment = next(moments)

        def synchronize(self):
            waits.append(self.moment)

        def elapsed_time(self, later):
            return 1000 * (later.moment - self.moment)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append("all"))
    timer = Timer(torch.device("cuda"))
    timer.mark("vision")
    timer.mark("prefill")
    assert waits == []
    assert timer.seconds == {"vision": 4.0, "prefill": 6.0} and waits == [10.0]


# -- one batch -----------------------------------------------------------------------------------------------------


def test_preprocessing_is_neither_vision_nor_ttft(tiny, monkeypatch, clock):
    """A sleep of 0.25 s while images are resized made vision and TTFT 0.26 s longer."""
    views = tiny.views

    def slow(one):
        clock.wait(0.25)
        return views(one)

    monkeypatch.setattr(tiny, "views", slow)
    timing = generate(tiny, samples(1), registry.build("consensusdrop", 7), max_new_tokens=1).timing
    assert (timing.preprocess, timing.vision, timing.ttft) == (0.25, 0, 0)


@pytest.mark.parametrize("method", sorted(set(contract.METHODS)))
def test_operations_per_question_do_not_depend_on_the_batch_size(tiny, method):
    """2.50 GFLOP per question at batch size 1 were 0.79 at 8, because a batch shares the tower's pass over an image.

    All questions are equally long: scores of shorter ones are computed with padding, which is counted.
    """
    asked = [replace(samples(1)[0], id=f"q{i}", image=drawn_image(0), image_ids=("same",)) for i in range(4)]
    reducer = registry.build(method, tiny.visual_tokens if method == "full" else 8)

    def lines(size):
        batches = [asked[i : i + size] for i in range(0, 4, size)]
        return [cost.timing_record(generate(tiny, batch, reducer, max_new_tokens=1), {}) for batch in batches]

    alone, together = cost.summarise_flops(lines(1)), cost.summarise_flops(lines(4))
    shared, realised = together.pop("as_batched_per_question"), alone.pop("as_batched_per_question")
    assert together == alone
    assert realised == alone["per_question"] > shared
    difference = alone["per_question"] - alone["language_model_per_question"]
    assert difference == alone["tower_per_image"]  # one image per question


# -- what is said --------------------------------------------------------------------------------------------------


def line(questions: int, seconds: float) -> dict:
    found = {"questions": questions, "images": questions, **dict.fromkeys(cost.STAGES, seconds), "run": "a"}
    found |= {
        "decode_steps": 1,
        "kv_bytes": 10,
        "kv_bytes_allocated": 10,
        "flops": 100,
        "flops_alone": {"tower": 100, "prefill": 20},
    }
    return found


def test_times_of_a_batch_say_its_size():
    """TTFT "per question" was the batch's time divided by its size: 12, 30 and 40 ms on three pages."""
    timing = cost.summarise_timing([line(8, 0.9), line(8, 0.1), line(8, 0.098), line(3, 0.05)], "a")
    assert timing["batch"]["questions"] == 8 and timing["batch"]["batches"] == 3
    assert timing["batch"]["median_ms"]["prefill"] == pytest.approx(100)
    assert "ttft" not in timing["ms_per_question"] and "ttft" not in timing["batch"]["median_ms"]
    spoken = "\n".join(report.time_lines(timing))
    assert "ms of a batch of 8, median of 3 " in spoken and "prefill 100.0 (12.5)" in spoken
    assert report.batch_text(1) == "one question"


def test_times_of_a_question_are_those_of_its_batch():
    """Two lines contradicted each other: a batch was a median, and a question the mean over other batches, with the
    warm-up of the first."""
    timing = cost.summarise_timing([line(8, 0.9), line(8, 0.1), line(8, 0.098), line(3, 0.05)], "a")
    for part in (timing, timing["this_run"]):
        for stage, value in part["batch"]["median_ms"].items():
            assert 8 * part["ms_per_question"][stage] == pytest.approx(value)


def test_nothing_timed_is_no_number():
    timing, flops = cost.summarise_timing([], "a"), cost.summarise_flops([])
    assert timing["batch"] is None and timing["ms_per_question"]["vision"] is None
    assert report.time_lines(timing) == [] and flops.pop("questions") == 0
    assert set(flops.values()) == {None}
