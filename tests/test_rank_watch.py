"""What the parent process makes of its ranks' reports, with its clock in the test's hand."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed
from torch.distributed import DistError

from eval.parallel import launch
from eval.parallel import ranks as control_module
from eval.parallel.ranks import ASKING, FAILED, FINISHED, LOADING, SCORING, STOPPED, WAITING, Control, Rank
from llava.errors import UserError


@pytest.fixture
def control() -> Control:
    return Control.serve()


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """time.monotonic and time.sleep of the watch; `events` are called when their second has come."""
    clock = SimpleNamespace(now=0.0, events={})

    def sleep(seconds: float) -> None:
        clock.now += seconds
        for second in [second for second in clock.events if second <= clock.now]:
            clock.events.pop(second)()

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def ends_at(clock, second: float) -> SimpleNamespace:
    """A launcher that ends by itself."""
    return SimpleNamespace(poll=lambda: 0 if clock.now >= second else None)


def ranks(control: Control, count: int = 2) -> list[Rank]:
    return [Rank(number, count, name="x", control=control) for number in range(count)]


def see(control, clock, seconds: float = 10_000, timeout: float = 60, **options) -> str:
    """The sentence of the problem; empty if there is none until the launcher ends."""
    try:
        launch.watch(ends_at(clock, seconds), control, 2, timeout, **options)
    except launch.Problem as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("phase", [LOADING, ASKING])
def test_time_without_a_report_ends_in_a_sentence(control, clock, phase):
    first, second = ranks(control)
    first.report(WAITING)
    second.report(phase, ["7"] if phase == ASKING else [])
    doing = "asking question 7" if phase == ASKING else "loading"
    assert f"Rank 1 of 2 ({os.uname().nodename}, process {os.getpid()}) hung while it was {doing} for 60 s" in see(
        control, clock
    )
    assert 60 < clock.now < 62


@pytest.mark.parametrize("phase", [WAITING, SCORING, FINISHED])
def test_waiting_and_scoring_may_take_long(control, clock, phase):
    for rank in ranks(control):
        rank.report(phase)
    assert see(control, clock, 200) == ""


def test_a_report_starts_the_time_again(control, clock):
    first, second = ranks(control)
    first.report(WAITING)
    second.report(ASKING, ["1"])
    clock.events = {50.0: lambda: second.report(ASKING, ["1"])}
    assert "hung" in see(control, clock)
    assert 110 < clock.now < 112


@pytest.mark.process
def test_a_start_may_take_ten_minutes(control, clock):
    ranks(control)[0].report(WAITING)
    assert see(control, clock, timeout=5).startswith("Rank 1 of 2 has not started within 600 s")
    clock.now = 0.0
    assert "within 900 s" in see(control, clock, timeout=900)


def test_a_rank_on_another_machine_that_is_silent_is_lost(control, clock):
    """pdsh says nothing about a machine as long as another one works."""
    first, second = ranks(control)
    first.report(WAITING)
    second.report(ASKING, ["7"])
    clock.events = {float(second): lambda: control.count("beat0") for second in range(1, 400)}
    assert "Rank 1 of 2" in (sentence := see(control, clock, timeout=10_000, remote=True)) and "was lost" in sentence
    assert 120 < clock.now < 122


def test_a_rank_that_is_gone_is_named_before_its_launcher_ends(control, clock):
    first, second = ranks(control)
    first.report(WAITING)
    second.report(ASKING, ["7"])
    child = subprocess.Popen(["true"])
    control.put("rank1", control.peek("rank1") | {"process": child.pid})
    sentence = f"process {child.pid}) died while it was asking question 7, so all ranks were stopped."
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, however slow the machine is
    assert see(control, clock).endswith(sentence)
    assert clock.now < 1
    child.wait()
    assert see(control, clock).endswith(sentence)


def test_a_stopped_parent_does_not_count_its_own_absence(control, clock):
    """After Ctrl-Z and an hour, no rank has reported anything: they waited for the store."""
    first, second = ranks(control)
    first.report(WAITING)
    second.report(ASKING, ["7"])

    def an_hour_later() -> None:
        clock.now += 3600

    clock.events = {5.0: an_hour_later, 3610.0: lambda: second.report(FINISHED, code=0)}
    assert see(control, clock, 3700) == ""


@pytest.mark.parametrize("phase", [FAILED, STOPPED])
def test_the_end_of_one_rank_ends_the_watch(control, clock, phase):
    for rank, now in zip(ranks(control), (ASKING, phase), strict=True):
        rank.report(now)
    assert see(control, clock) == "" and clock.now < 1


def test_the_first_failure_is_the_one_that_is_told(control):
    first, second = ranks(control)
    second.report(FAILED, reason="The second.", code=2)
    first.report(FAILED, reason="The first.", code=1)
    with pytest.raises(launch.Problem, match=r"The second\.") as caught:
        launch.outcome(control, 2)
    assert caught.value.code == 2


def test_the_worst_exit_code_counts(control):
    for rank, code in zip(ranks(control), (3, 0), strict=True):
        rank.report(FINISHED, code=code)
    assert launch.outcome(control, 2) == 3


def test_long_batches_name_three_questions(control):
    rank = ranks(control)[0]
    rank.report(ASKING, list("abcde"))
    assert launch.describe(0, 2, control.peek("rank0")).endswith("asking questions a, b, c and 2 more")


def test_nobody_serves_the_store(monkeypatch):
    """Said at once: the store itself would try again for two minutes."""
    monkeypatch.setattr(torch.distributed, "TCPStore", pytest.fail)
    with pytest.raises(UserError, match=r"does not answer at 127\.0\.0\.1:9;"):
        Control.connect("127.0.0.1:9")


def test_a_rank_whose_parent_ends_while_it_connects_gives_up_soon(monkeypatch):
    """Killed between the rank's two connections, the command left ranks behind that tried to connect for two minutes,
    deaf to SIGTERM. The clock moves by the store's time-outs alone.
    """
    listening, clock = socket.create_server(("127.0.0.1", 0)), SimpleNamespace(now=0.0)

    def parent_has_ended(*address, timeout, **options):
        listening.close()
        clock.now += timeout.total_seconds()
        raise DistError("timed out")

    monkeypatch.setattr(control_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(torch.distributed, "TCPStore", parent_has_ended)
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(UserError, match=address):
        Control.connect(address)
    assert 0 < clock.now <= 10


def test_a_rank_that_is_stopped_before_it_has_its_place_says_nothing():
    """Ranks that were ended while they connected printed empty lines above the sentence of the command."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-m", "eval.parallel.worker", f"127.0.0.1:{listening.getsockname()[1]}"]
        rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        listening.accept()[0].close()
        rank.terminate()
    # Nobody listens any more, so a rank that goes on ends by itself.
    assert rank.communicate(timeout=120) == (b"", None)
    assert rank.returncode == -signal.SIGTERM


def test_ranks_of_a_replica_claim_the_same(control):
    first, follower, other = (Rank(number, 4, 2, "x", control) for number in (0, 1, 2))
    assert [first.claim("b"), other.claim("b"), first.claim("b")] == [0, 1, 2]
    assert [follower.claim("b"), follower.claim("b")] == [0, 2]
    assert [Rank().claim("b")] == [0]
    alone = Rank()
    assert [alone.claim("b"), alone.claim("b"), alone.count("n"), alone.count("n")] == [0, 1, 1, 2]
