"""What a run says of its time and operations, and the timer behind it."""

from dataclasses import replace

import pytest
import torch

from eval.results import cost, report
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.conftest import picture, samples

# -- the timer -----------------------------------------------------------------------------------------------------


def test_a_timer_adds_up_by_stage(clock):
    timer = Timer(torch.device("cpu"))
    for stage, seconds in (("vision", 1.0), ("prefill", 2.0), ("vision", 0.5)):
        clock.wait(seconds)
        timer.mark(stage)
    assert timer.seconds == {"vision": 1.5, "prefill": 2.0}


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
    """A sleep of 0.25 s while pictures are resized made vision and TTFT 0.26 s longer."""
    views = tiny.views

    def slow(one):
        clock.wait(0.25)
        return views(one)

    monkeypatch.setattr(tiny, "views", slow)
    timing = generate(tiny, samples(1), registry.build("consensusdrop", 7), max_new_tokens=1).timing
    assert (timing.preprocess, timing.vision, timing.ttft) == (0.25, 0, 0)


@pytest.mark.parametrize("method", sorted(set(registry.names())))
def test_operations_per_question_do_not_depend_on_the_batch_size(tiny, method):
    """2.50 GFLOP per question at batch size 1 were 0.79 at 8, because a batch shares the tower's pass over a picture.

    All questions are equally long: scores of shorter ones are computed with padding, which is counted.
    """
    asked = [replace(samples(1)[0], id=f"q{i}", image=picture(0), image_ids=("same",)) for i in range(4)]
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
        "kv_bytes_with_room": 10,
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
    assert timing["ms_per_question"]["vision"] == pytest.approx(1000 * (0.9 + 0.1 + 0.098 + 0.05) / 27)
    spoken = "\n".join(report.time_lines(timing))
    assert "ms of a batch of 8, median of 3: " in spoken and "prefill 100.0" in spoken
    assert report.batch_text(1) == "one question"


def test_nothing_timed_is_no_number():
    timing, flops = cost.summarise_timing([], "a"), cost.summarise_flops([])
    assert timing["batch"] is None and timing["ms_per_question"]["vision"] is None
    assert report.time_lines(timing) == [] and set(flops.values()) == {None}
