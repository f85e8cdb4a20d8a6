"""Evaluations with several ranks that are disturbed: no answer is lost, repeated or mixed up; the result is the same.

Every run has real processes and a real store; the model is fake.
"""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eval_fakes import write_gqa
from tests.forked_ranks import Ended, Evaluation, ForkServer
from tests.rank_starts import start

pytestmark = pytest.mark.process

QUESTIONS, BATCH = 120, 3
PAUSE = 0.04  # seconds of a batch
SEED = 12
# What eval/answers/store.py names, for a run that has ended.
FILES = {"answers.jsonl", "timing.jsonl", "runs.jsonl", "settings.json", "lock", "result.json", "predictions.json"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_gqa(tmp_path_factory.mktemp("data"), QUESTIONS)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def undisturbed(server, data, tmp_path_factory) -> Path:
    """The store of a run in one process; afterwards the server has imported what every rank needs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    assert server.ask(here=flags(data, folder)) == 0
    return folder


@pytest.fixture
def run(server, data, tmp_path) -> Callable[..., Evaluation]:
    """Start a run in the folder "store"."""

    def fork(ranks: int = 2, *more: str, batch: int = BATCH, **fault) -> Evaluation:
        words = flags(data, tmp_path / "store", *more, batch=batch)
        return Evaluation(server, tmp_path / "store", words, ranks, {"pause": PAUSE} | fault)

    return fork


def flags(data: Path, folder: Path, *more: str, batch: int = BATCH) -> list[str]:
    words = ["--method", "uniform", "--budget", "16", "--data", str(data), "--output", str(folder)]
    return [*words, "--batch-size", str(batch), "--wandb", "disabled", *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_whole(folder: Path, undisturbed: Path, files: set[str] = FILES, timed: bool = True) -> None:
    """A store whose run has ended holds what the undisturbed one holds, and nothing else.

    Args:
        timed: False if a disk has failed: then lines about batches and processes may be lost, which the result says.
    """
    for name in ("answers.jsonl", "settings.json", "predictions.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == files
    result, expected = (json.loads((place / "result.json").read_text()) for place in (folder, undisturbed))
    for key in (
        "main",
        "metrics",
        "confidence",
        "groups",
        "asked",
        "failed",
        "settings",
        "accounting",
        "labels",
        "images",
    ):
        assert result[key] == expected[key], key
    if timed:
        check_records(folder)
    else:
        assert result["timing"]["questions"] == QUESTIONS or "of 120 questions" in str(result["remarks"])


def check_records(folder: Path) -> None:
    """Every question has one answer, and every answer the process that gave it."""
    answers = [row["question_id"] for row in rows(folder / "answers.jsonl")]
    assert len(set(answers)) == len(answers)
    timing = rows(folder / "timing.jsonl")
    processes = {(line["run"], line["rank"]) for line in rows(folder / "runs.jsonl")}
    by = {name: (line["run"], line["rank"]) for line in timing for name in line["question_ids"]}
    assert by.keys() >= set(answers) and {by[name] for name in answers} <= processes


def sentence(own: Ended) -> str:
    """What the command says at its end, without the progress bar."""
    last = own.err.splitlines()[-1]
    assert "question/s" not in last, "the sentence follows the progress bar on its line"
    return last


def finish(run, undisturbed: Path, tmp_path: Path, ranks: int, *more: str) -> Ended:
    """Continue without a fault."""
    with run(ranks, *more, pause=0) as last:
        own = last.end()
    assert (own.code, own.orphans) == (0, False), own.err
    check_whole(tmp_path / "store", undisturbed)
    return own


# -- nothing goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 3), (4, 1)])
def test_answers_do_not_depend_on_ranks_and_batches(run, undisturbed, tmp_path, ranks, batch):
    with run(ranks, batch=batch, pause=0.002) as one:
        own = one.end()
    assert (own.code, own.orphans) == (0, False), own.err
    assert f"100%|██████████| {QUESTIONS}/{QUESTIONS}" in own.err
    check_whole(tmp_path / "store", undisturbed)
    result = json.loads((tmp_path / "store" / "result.json").read_text())
    parts = result["throughput"]["ranks"]
    assert len(parts) == ranks and sum(part["questions"] for part in parts) == QUESTIONS
    assert sum(row["questions"] for row in rows(tmp_path / "store" / "timing.jsonl")) == QUESTIONS


# -- kills ---------------------------------------------------------------------------------------------------------


def kill_one(own: Evaluation, draw: random.Random) -> None:
    own.kill(draw.choice(("rank0", "rank1")))


def kill_all(own: Evaluation, draw: random.Random) -> None:
    own.kill_all()


def kill_command(own: Evaluation, draw: random.Random) -> None:
    own.kill("command")


def kill_launcher(own: Evaluation, draw: random.Random) -> None:
    own.kill("launcher")


@pytest.mark.parametrize(("number", "ranks"), list(enumerate((1, 2, 4))))
def test_kills_while_questions_are_asked(run, undisturbed, tmp_path, number, ranks):
    """Four kills in one store, each at a random moment of what the last one has left, then to the end."""
    draw = random.Random(SEED + number)
    print("seed", SEED + number)
    kinds = [kill_one, kill_all, kill_command, kill_launcher]
    draw.shuffle(kinds)
    before: set[bytes] = set()
    for kill in kinds:
        with run(2) as one:
            target = len(before) + draw.randrange(QUESTIONS // 6)
            assert one.until(lambda one=one, target=target: one.answered() >= target and one.pid("rank1"))
            time.sleep(draw.random() * PAUSE)
            kill(one, draw)
            own = one.end()
        assert own.code != 0 and not own.orphans, (kill.__name__, own.err)
        kept = stored(tmp_path / "store")
        assert kept >= before, kill.__name__
        before = kept
    finish(run, undisturbed, tmp_path, ranks)


def stored(folder: Path) -> set[bytes]:
    """All whole lines of answers on the disk."""
    paths = [folder / "answers.jsonl", *folder.glob("shards/*/answers.jsonl")]
    return {
        line for path in paths if path.exists() for line in path.read_bytes().splitlines(True) if line[-1:] == b"\n"
    }


@pytest.mark.parametrize("number", range(6))
def test_kills_of_rank_0_while_it_merges(run, undisturbed, tmp_path, number):
    """It dies in a random system call of the merge, and once more in one of the repair; one question has failed."""
    draw = random.Random(SEED + number)
    calls, store, failing = (draw.randrange(40), draw.randrange(40)), tmp_path / "store", {"broken": ["1060"]}
    print("seed", SEED + number, "calls", calls)
    with run(2, pause=0, rank=0, call=calls[0], during="merge", **failing) as one:
        own = one.end()
    assert own.code == 1 and not own.orphans and "died while it was merging" in sentence(own), own.err
    assert len(stored(store)) == QUESTIONS - 1
    with run(draw.choice((1, 2)), pause=0, rank=0, call=calls[1], during="open") as two:
        two.end()
    assert len(stored(store)) == QUESTIONS - 1
    with run(draw.choice((1, 2, 4)), pause=0) as three:
        own = three.end()
    assert (own.code, own.orphans) == (3, False), own.err
    assert [line["question_id"] for line in rows(store / "failures.jsonl")] == ["1060"]
    with run(draw.choice((1, 2)), "--retry-failed", pause=0) as last:
        assert last.end().code == 0
    check_whole(store, undisturbed, FILES | {"failures.jsonl"})


@pytest.mark.parametrize("call", range(5, 125, 20))
def test_a_process_alone_is_killed_while_it_answers(run, undisturbed, tmp_path, call):
    """It dies in a system call, some of them between the two halves of a line."""
    with run(1, pause=0, call=call, during="open") as one:
        assert one.end().code == -signal.SIGKILL
    before = stored(tmp_path / "store")
    assert not (tmp_path / "store" / "result.json").exists() and len(before) < QUESTIONS
    finish(run, undisturbed, tmp_path, 1)
    assert stored(tmp_path / "store") > before


# Of the calls of a process alone, and of one of several. A process alone has 20 before it asks, and some 75 in all.
ALONE, RANK = range(0, 80, 4), range(0, 110, 16)
# A process dies in each of these calls, or every other one fails with one error and the rest with the other.
ERRORS = {None: slice(None), "EIO": slice(0, None, 2), "ENOSPC": slice(1, None, 2)}


@pytest.mark.parametrize(("ranks", "rank", "during"), [(1, 0, "open"), (2, 0, "open"), (2, 1, "shard")])
@pytest.mark.parametrize("error", ERRORS)
def test_a_disk_that_fails_in_any_call_costs_a_sentence(run, undisturbed, tmp_path, ranks, rank, during, error):
    """Sweeps believed results whose answers were gone, closing failed with a traceback, order depended on ranks.

    A process dies in a system call, or the call fails; the same command then leaves the files of an undisturbed run.
    """
    store = tmp_path / "store"
    for number in (ALONE if ranks == 1 else RANK)[ERRORS[error]]:
        fault = {"call": number, "during": during, "rank": rank} | ({"error": error} if error else {})
        with run(ranks, batch=30, pause=0, **fault) as one:
            own = one.end()
        where = f"call {number}: {own.err}"
        assert "Traceback" not in own.err and not own.orphans, where
        if own.code == 0:
            # Deleting the empty folder of the shards may be what failed.
            left = {"shards"} if error and (store / "shards").is_dir() else set()
            check_whole(store, undisturbed, FILES | left, timed=error is None)
        elif error:
            assert own.code == 2 and str(store) in sentence(own), where
        before = stored(store)
        with run(ranks, batch=30, pause=0) as two:
            own = two.end()
        assert own.code == 0 and stored(store) >= before, f"call {number}: {own.err}"
        check_whole(store, undisturbed, timed=error is None)
        shutil.rmtree(store)


# -- faults in one rank ----------------------------------------------------------------------------------------------

FIVE = ("--timeout", "5")
FULL = ["File too large", "before this batch", "same command"]
HUNG = ["Rank 0 of 2 ", "hung while it was merging for 5 s", f"{QUESTIONS} of {QUESTIONS} answers are kept"]
QUESTION = [" hung while it was asking ", "1050", " for 5 s"]
FAULTS = {
    # tqdm's lock is one of multiprocessing: forked ranks shared it, so one that was killed while it held it stopped
    # every later run of the same fork server for ever. Ranks of a launcher are new programs, with locks of their own.
    "dies with the lock of progress bars": ((), {"locked": "1050"}, 1, [" died while it was asking "]),
    "hangs in a question": (FIVE, {"hang": "1050"}, 1, QUESTION),
    # The other rank waits for it, and must not be named in its place.
    "rank 0 hangs while it loads": (FIVE, {"rank": 0, "hang": "load"}, 1, ["Rank 0 of 2 ", "was loading for 5 s"]),
    "rank 1 hangs while it loads": (FIVE, {"rank": 1, "hang": "load"}, 1, ["Rank 1 of 2 ", "was loading for 5 s"]),
    "hangs in the merge": (FIVE, {"rank": 0, "hang": "merge", "pause": 0}, 1, HUNG),
    "full disk in rank 0": ((), {"rank": 0, "disk": 8_000}, 2, FULL),
    "full disk in rank 1": ((), {"rank": 1, "disk": 8_000}, 2, FULL),
    **{
        f"dies in call {number} of the result": (
            (), {"rank": 0, "call": number, "during": "result", "pause": 0}, 1, ["died while it was scoring"]
        )
        for number in range(3)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_rank_ends_in_a_sentence_and_loses_nothing(run, undisturbed, tmp_path, name):
    more, fault, code, said = FAULTS[name]
    with run(2, *more, **fault) as one:
        own = one.end()
    assert (own.code, own.orphans) == (code, False), own.err
    assert all(own.err.count(words) == 1 or words in sentence(own) for words in said), own.err
    if "disk" in fault:
        assert "Traceback" not in own.err and 0 < len(stored(tmp_path / "store")) < QUESTIONS
        assert sentence(own).count("same command") == own.err.count("File too large") == 1
    finish(run, undisturbed, tmp_path, 2)


def test_the_command_is_killed_while_all_ranks_hang(run, undisturbed, tmp_path):
    """Their main threads will never look whether anybody waits for them."""
    # One question in each of the first four batches: a rank claims its next batch while it asks the first.
    with run(hang="1000 1003 1006 1009") as one:
        assert one.until(lambda: len(list((tmp_path / "store").glob("shards/*/answers.jsonl"))) == 2)
        time.sleep(0.3)
        one.kill("command")
        own = one.end()
    assert (own.code, own.orphans, stored(tmp_path / "store")) == (-signal.SIGKILL, False, set())
    finish(run, undisturbed, tmp_path, 2)


def test_ranks_of_deepspeeds_launcher(run, undisturbed, tmp_path, data):
    """As all the others, but nothing is forked."""
    fault = {"RANKS": "2", "FAULT": json.dumps({"pause": 0.3})}
    words = ["tests.fake_evaluation", *flags(data, tmp_path / "store")]
    with start(tmp_path / "store", *words, environment=fault) as one:
        shards = tmp_path / "store" / "shards"
        assert one.until(lambda: any(file.stat().st_size for file in shards.glob("*-rank1/answers.jsonl")))
        second = one.rank(1)
        second.kill()
        own = one.end()
    assert own.code == 1 and own.left == []
    assert f"process {second.pid}) died while it was asking" in own.err
    assert "Traceback" not in own.err and "frame #" not in own.err and own.out == ""
    finish(run, undisturbed, tmp_path, 2)


# -- signals, disks, and runs beside each other --------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle(run, undisturbed, tmp_path, number, code):
    with run() as one:
        assert one.until(lambda: one.answered() > 20)
        one.send(number)
        own = one.end()
    kept = len(stored(tmp_path / "store"))
    assert (own.code, own.orphans, kept < QUESTIONS) == (code, False, True)
    said = re.fullmatch(rf"Stopped\. (\d+) of {QUESTIONS} .* {tmp_path / 'store'}; .*", sentence(own))
    # A rank may be stopped between a batch's last write and the moment at which it says so.
    assert said and kept - 2 * BATCH <= int(said[1]) <= kept, own.err
    assert "Traceback" not in own.err
    finish(run, undisturbed, tmp_path, 4)


def test_a_full_disk_while_answers_are_merged(run, undisturbed, tmp_path):
    # A shard of one rank fits, the answers of both do not.
    size = (undisturbed / "answers.jsonl").stat().st_size
    with run(4, pause=0.01, rank=0, disk=size * 3 // 4) as one:
        own = one.end()
    assert (own.code, own.orphans) == (2, False), own.err
    assert "Cannot merge " in sentence(own) and "Traceback" not in own.err
    assert len(stored(tmp_path / "store")) == QUESTIONS
    finish(run, undisturbed, tmp_path, 2)
