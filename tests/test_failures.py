"""Questions that could not be answered: recorded with their reason, ended by an answer, merged once."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from eval.answers import AnswerFiles, Shard
from eval.answers import store as store_module
from eval.answers.jsonl import DurableLines
from llava.errors import UserError
from tests.shard_worker import KNOWN, SETTINGS, describe, line, open_store

ROOT = Path(__file__).resolve().parent.parent


def failure(name: str, reason: str = "the image cannot be read", kind: str = "image", **fields: str) -> dict:
    return {"question_id": name, "reason": reason, "kind": kind, **fields}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()]


# -- failures ------------------------------------------------------------------------------------------------------


def test_the_latest_failure_counts_until_there_is_an_answer(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("q001")], {})
        assert store.failures == {} and not (tmp_path / "failures.jsonl").exists()
        store.fail([failure("q002"), failure("q003", "out of memory", "memory", run="given")])
        store.fail([failure("q002", "division by zero", "error")])
        assert {name: (row["reason"], row["kind"], row["run"]) for name, row in store.failures.items()} == {
            "q002": ("division by zero", "error", "start single 0"),
            "q003": ("out of memory", "memory", "given"),
        }
        store.add([line("q003")], {})
        assert list(store.failures) == ["q002"]
    with open_store(tmp_path) as store:
        assert list(store.failures) == ["q002"] and store.failures["q002"]["reason"] == "division by zero"
        # A failure adds no answer, so places and processes of answers are as without it.
        assert list(store.answers) == ["q001", "q003"]
        assert [(run["run"], count) for run, count in store.origins(KNOWN)] == [("start single 0", 2)]
    assert len(lines_of(tmp_path / "failures.jsonl")) == 3


@pytest.mark.parametrize(
    "lines", [[failure("900")], [failure("q001")], [failure("q002", kind="other")], [{"question_id": "q002"}]]
)
def test_a_failure_of_an_unknown_or_answered_question_is_an_error_of_the_caller(tmp_path, lines):
    with open_store(tmp_path) as store:
        store.add([line("q001")], {})
        with pytest.raises(AssertionError):
            store.fail(lines)
        assert store.failures == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (failure("900"), "line 2 is about question 900, which this benchmark does not have"),
        (failure("q001", kind="other"), "line 2 needs question_id and reason, both strings, and a kind"),
        ({"question_id": "q001", "kind": "image"}, "line 2 needs question_id and reason"),
    ],
)
@pytest.mark.parametrize("where", [".", "shards/a-rank0"])
def test_lines_that_do_not_belong_are_refused(tmp_path, where, extra, message):
    with open_store(tmp_path) as store, Shard(tmp_path, "a", 0, describe("a")) as shard:
        store.fail([failure("q002")])
        shard.fail([failure("q003")])
    with open(tmp_path / where / "failures.jsonl", "a") as file:
        file.write(json.dumps(extra) + "\n")
    with pytest.raises(UserError, match=message):
        open_store(tmp_path)


def test_failures_of_ranks_are_merged_once(tmp_path):
    with open_store(tmp_path) as store:
        store.fail([failure("q001"), failure("q002")])
        for rank in range(2):
            with Shard(tmp_path, "a", rank, describe("a", rank)) as shard:
                shard.fail([failure(f"q01{rank}")])
                if rank:
                    shard.add([line("q002")], {})
                    # Dealt again, to a process that could not answer it.
                    shard.fail([failure("q002", "again")])
        assert store.merge() == 1
        assert sorted(store.failures) == ["q001", "q010", "q011"]
        assert store.failures["q010"]["run"] == "start a 0"
        # Only failures: nothing but their lines changes.
        with Shard(tmp_path, "b", 0, describe("b")) as shard:
            shard.fail([failure("q001", "later")])
        assert store.merge() == 0 and store.failures["q001"]["reason"] == "later"
        assert store.merge() == 0
    with open_store(tmp_path) as store:
        assert sorted(store.failures) == ["q001", "q010", "q011"]
        assert store.failures["q001"]["reason"] == "later"
    assert len(lines_of(tmp_path / "failures.jsonl")) == 6 and not (tmp_path / "shards").exists()


def test_failures_are_those_of_their_settings(tmp_path):
    """A question that failed under other settings may well be answered under these."""
    with open_store(tmp_path) as store:
        store.fail([failure("q001")])
    with pytest.raises(UserError, match="other settings"):
        open_store(tmp_path, settings=SETTINGS | {"model": "other"})
    with open_store(tmp_path, settings=SETTINGS | {"model": "other"}, restart=True) as store:
        assert store.failures == {}
    assert len(lines_of(tmp_path / "replaced-1" / "failures.jsonl")) == 1


# -- one writer ----------------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_names_host_and_process_of_the_first(tmp_path):
    """Also when it tries twice."""
    script = "import sys; from pathlib import Path; from eval.answers import *; AnswerStore(Path(sys.argv[1]), {}, [])"
    with open_store(tmp_path):
        for _ in range(2):
            other = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
            )
            owner = f"(process {os.getpid()} on host {os.uname().nodename})"
            assert f"{tmp_path} is in use by another run {owner}; wait for it" in other.stderr
        with pytest.raises(UserError, match="in use by another run"):
            open_store(tmp_path, restart=True)
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match=r"another run; wait"):
            open_store(tmp_path)


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    """The store went on without a word. Temporary files stay: nobody knows whose they are."""
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    (tmp_path / ".result.json.4194305").write_text("half")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_store(tmp_path) as store:
            store.add([line("q001")], {})
            assert len(store.remarks) == 1 and "has no locks" in store.remarks[0]
    monkeypatch.undo()
    assert (tmp_path / ".result.json.4194305").exists()
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["q001"] and store.remarks == []
    assert not (tmp_path / ".result.json.4194305").exists()
    assert FileLock(tmp_path / "lock", timeout=0).acquire()


# -- durability ----------------------------------------------------------------------------------------------------


def test_syncs_take_a_small_part_of_the_time(tmp_path, monkeypatch):
    """A slow disk made every batch wait for it twice. The clock moves by batches and syncs alone."""
    clock, waits = SimpleNamespace(now=0.0), []

    def slow(descriptor: int) -> None:
        waits.append(0.004)
        clock.now += waits[-1]

    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", slow)
        for name in KNOWN:
            clock.now += 0.4
            store.add([line(name)], {})
        unsynced = [file for file in store._files.values() if file._synced < file._end]
        syncs, total = len(waits), sum(waits)
    # All syncs but the last, which is of three files at most, have been paid for by the time of the batches.
    assert total - 3 * 0.004 <= store_module.SYNC_SHARE * clock.now
    assert syncs > 3 and unsynced and all(file._synced == file._end for file in store._files.values())


def test_every_slow_batch_is_on_the_disk_at_once(tmp_path):
    with open_store(tmp_path) as store:
        for name in KNOWN[:3]:
            store._next_sync = 0.0  # as after a batch that took seconds
            store.add([line(name)], {})
            assert all(file._synced == file._end for file in store._files.values())


def test_timing_that_a_power_failure_kept_without_its_answers_does_not_count(tmp_path):
    """Files reach the disk in any order between two syncs."""
    with open_store(tmp_path) as store:
        store.add([line("q000"), line("q001")], {})
        store.add([line("q002")], {})
    whole = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(whole[:2]) + bytes(300))
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write(json.dumps(describe("lost")) + "\n")
    with open_store(tmp_path, "later") as store:
        assert list(store.answers) == ["q000", "q001"]
        assert [t["question_ids"] for t in store.timing] == [["q000", "q001"]]
        store.add([line("q003"), line("q002")], {})
        assert [t["question_ids"] for t in store.timing] == [["q000", "q001"], ["q003", "q002"]]
        assert [(run["run"], n) for run, n in store.origins(KNOWN)] == [("start single 0", 2), ("start later 0", 2)]


def test_a_sync_that_fails_is_a_sentence_and_keeps_what_was_synced(tmp_path, monkeypatch):
    """Network file systems report a full disk when they are asked to sync."""
    lines = DurableLines(tmp_path / "x.jsonl")
    lines.append([line("q000")])
    lines.append([line("q001")], sync=False)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the lines since the last sync are lost"):
        lines.sync()
    monkeypatch.undo()
    lines.append([line("q002")])
    lines.close()
    assert [row["question_id"] for row in DurableLines(tmp_path / "x.jsonl").rows] == ["q000", "q002"]


def test_a_closed_store_writes_nothing_without_its_lock(tmp_path):
    files = AnswerFiles(tmp_path)
    files.close()
    with pytest.raises(AssertionError, match="is closed"):
        files.fail([failure("q001")])
