"""The model of scale: its terms by hand, its constants file, and the page that is written from it."""

import json
from dataclasses import replace

import pytest

from eval.efficiency import scale, scale_constants
from eval.efficiency.scale import seconds_by_term
from eval.efficiency.scale_constants import Constant
from llava.errors import UserError

C = {
    "batch_size": 10,
    "gpus_per_node": 8,
    "start_alone": 4,
    "start_ranks": 20,
    "start_per_node": 0.5,
    "weights": 8e9,
    "read_per_node": 2e9,
    "read_shared": 4e9,
    "preprocess": 0.01,
    "store": 0.001,
    "vision": 0.1,
    "prefill": 0.2,
    "decode": 0.3,
    "store_operation": 0.0001,
    "operations_per_batch": 5,
    "polls_per_rank": 0,
    "merge": 0.0002,
    "scoring": 0.0001,
    "wandb": 3,
}


def test_one_accelerator_by_hand():
    """100 batches of 0.71 s; no ranks are started, nothing is dealt or merged."""
    found = seconds_by_term(C, 1000, 1)
    assert tuple(found) == scale.TERMS
    expected = {
        "launch": 4, "load": 4, "preprocess": 10, "vision": 10, "prefill": 20, "decode": 30, "store": 1,
        "dealing": 0, "skew": 0, "merge": 0, "scoring": 0.1, "W&B": 3,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert scale.questions_per_second(C, 1000, 1) == pytest.approx(1000 / 82.1)


def test_many_accelerators_by_hand():
    """16 on two nodes: 100 batches are 7 rounds for the slowest, and the files are read by both nodes."""
    found = seconds_by_term(C, 1000, 16)
    assert found["launch"] == pytest.approx(20.5) and found["load"] == pytest.approx(4)
    assert seconds_by_term(C, 1000, 64)["load"] == pytest.approx(8 * 8e9 / 4e9), "the shared file system limits"
    batch = 0.71 + 5 * 0.0001
    assert found["dealing"] == pytest.approx(100 / 16 * 5 * 0.0001)
    assert found["skew"] == pytest.approx((7 - 100 / 16) * batch)
    asked = sum(found[term] for term in ("preprocess", "vision", "prefill", "decode", "store", "dealing", "skew"))
    assert asked == pytest.approx(7 * batch)
    assert found["merge"] == pytest.approx(0.2)


def test_more_replicas_than_batches_do_not_help():
    assert seconds_by_term(C, 20, 2)["vision"] == seconds_by_term(C, 20, 8)["vision"] == pytest.approx(0.1)
    assert seconds_by_term(C, 5, 1)["preprocess"] == pytest.approx(0.05), "a batch that is not full"


def test_a_slow_store_limits_many_replicas():
    """When the store is asked more than it can answer, the replicas wait for it, however many they are."""
    slow = C | {"store_operation": 0.02}
    few, many = (seconds_by_term(slow, 100_000, gpus) for gpus in (4, 64))
    assert few["dealing"] == pytest.approx(2500 * 0.1)
    whole = sum(many[term] for term in (*scale.PER_QUESTION, *scale.PER_BATCH, "dealing", "skew"))
    assert whole == pytest.approx(10_000 * 5 * 0.02), "ten thousand batches, one after another"
    asked = C | {"polls_per_rank": 20_000}
    assert seconds_by_term(asked, 1000, 64)["dealing"] > seconds_by_term(C, 1000, 64)["dealing"]


def test_where_a_term_begins_to_limit():
    assert scale.first_limit(C, 1000, "launch", 0.1) == 2
    half = scale.first_limit(C, 1000, "launch", 0.5)
    spent = [seconds_by_term(C, 1000, gpus) for gpus in (half - 1, half)]
    assert [one["launch"] > 0.5 * sum(one.values()) for one in spent] == [False, True]
    assert scale.first_limit(C, 1000, "decode", 0.9) is None


def test_constants_of_the_page_say_where_they_come_from():
    found = scale.read_constants()
    assert set(found) == {"cpu", "gpu"}
    for constants in found.values():
        assert set(scale.NEEDED) <= set(constants)
        assert all(one.unit and one.how and one.value >= 0 for one in constants.values())
    assert all(one.kind != "extrapolated" for one in found["cpu"].values())
    on_the_gpu = ("vision", "prefill", "decode", "start_ranks", "weights", "read_per_node")
    assert all(found["gpu"][name].kind == "extrapolated" for name in on_the_gpu)


def test_constants_without_a_source_are_refused(tmp_path):
    content = json.loads(scale.CONSTANTS.read_text())
    del content["gpu"]["merge"]
    content["gpu"]["vision"]["how"] = ""
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="gpu: missing merge; without a known kind and a source vision"):
        scale.read_constants(path)


def test_page_is_current():
    text, found = scale.PAGE.read_text(), scale.read_constants()
    gpu = scale.values(found["gpu"])
    hint = "run `vtr bench scale page`"
    assert scale.speed_table(gpu) in text and scale.limit_table(gpu) in text, hint
    assert scale.constants_table(found["gpu"]) in text and scale.check_line(scale.values(found["cpu"])) in text, hint


def test_plot_and_page_are_written(tmp_path, monkeypatch):
    page = tmp_path / "cluster.md"
    names = ("scale", "scale limits", "scale constants", "scale check")
    page.write_text("\n".join(f"<!-- begin {name} -->\n<!-- end {name} -->" for name in names))
    monkeypatch.setattr(scale, "PLOT", tmp_path / "scale.png")
    monkeypatch.setattr(scale.plot, "__defaults__", (tmp_path / "scale.png",))
    scale.write_page(page)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert scale.limit_table(scale.values(scale.read_constants()["gpu"])) in page.read_text()


def test_what_does_not_depend_on_the_model_is_measured():
    found = scale_constants.shared_constants(400, "a test")
    assert all(one.kind != "extrapolated" and one.value > 0 for one in found.values())
    assert found["merge"].value < 0.01 and found["store_operation"].value < 0.01


def test_gpu_times_follow_from_operations():
    """By hand: 2 x parameters x tokens of the decoder, over what of the peak is reached."""
    start = Constant(1.0, "s", "measured", "a test")
    found = scale_constants.gpu_constants({"start_alone": start, "start_ranks": replace(start, value=9.0)}, "a test")
    tokens, decoder = 8 * (64 + 64), 6.5e9
    at_least = 2 * tokens * decoder / (scale_constants.OF_PEAK * scale_constants.PEAK)
    assert at_least < found["prefill"].value < 1.1 * at_least
    assert found["weights"].value == pytest.approx(2 * 7.063e9, rel=0.001) and found["start_ranks"].value == 9.0
    reading = scale_constants.STEPS * 13.5e9 / (scale_constants.OF_BANDWIDTH * scale_constants.BANDWIDTH)
    assert found["decode"].value == pytest.approx(reading, rel=0.15)


@pytest.mark.slow
def test_a_run_of_the_toy_model_is_measured():
    """Two real ranks."""
    result, start = scale_constants.run(16, {"OMP_NUM_THREADS": "1", "RANKS": "2"})
    assert len(result["throughput"]["ranks"]) == 2 and start > 0
    assert result["throughput"]["questions"] == 16
