"""The answer store: what is acknowledged stays, what is torn is cut, what does not belong is refused."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from eval.answers import store as store_module
from eval.answers.jsonl import DurableLines, write_json
from eval.answers.store import Shard, answer_id, settings_hash
from eval.config import ROOT, RunConfig
from eval.results import report
from eval.run import run
from eval.tracking import numbers_of
from llava.errors import UserError
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa
from tests.shard_worker import KNOWN, SETTINGS, describe, line, open_store


def rows(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def failing(code: str):
    """A system call that ends in this error."""

    def fail(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    return fail


def failure(name: str, reason: str = "the image cannot be read", kind: str = "image") -> dict:
    return {"question_id": name, "reason": reason, "kind": kind}


# -- one store -----------------------------------------------------------------------------------------------------


def test_opening_a_store_deletes_temporary_files_of_its_own_and_of_no_other_run(tmp_path):
    """That files of other runs were deleted went unseen by the fast tests."""
    own = [tmp_path / ".result.json.ab12.7", tmp_path / "submission" / ".answers.json.ab12.7"]
    own.append(tmp_path / "limit5" / "submission" / ".answers.json.ab12.7")
    kept = [tmp_path / "other" / ".result.json.ab12.7", tmp_path / "notes.txt", tmp_path / ".hidden"]
    kept += [tmp_path / "limit5" / "result.json", tmp_path / "submission" / "answers.json", tmp_path / "other" / "lock"]
    for path in (*own, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    open_store(tmp_path).close()
    assert not [path for path in own if path.exists()] and all(path.exists() for path in kept)


def test_a_store_that_cannot_be_opened_gives_its_folder_back(tmp_path):
    """Otherwise the next run of the same process is told that another one holds the folder."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps(line("q999")) + "\n")
    with pytest.raises(UserError, match="q999") as error:
        open_store(tmp_path)
    answers.unlink()
    open_store(tmp_path).close()
    assert error.value  # its traceback holds the store that was not opened


def test_answers_come_back_in_order(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("q003", "a\u2028b\n"), line("q001")], {})
        store.add([line("q002")], {})
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["q003", "q001", "q002"]
        assert store.answers["q003"]["text"] == "a\u2028b\n"
        assert [t["question_ids"] for t in store.timing_of(store.answers)] == [["q003", "q001"], ["q002"]]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path, cut):
    with open_store(tmp_path) as store:
        store.add([line("q001"), line("q002"), line("q003", "é" * 4)], {})
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    last = len(whole.splitlines()[-1])
    with open_store(tmp_path) as store:
        # Without its newline only, the last answer is whole and stays.
        assert list(store.answers) == (["q001", "q002", "q003"] if cut == 1 else ["q001", "q002"])
        assert cut <= last
    assert path.read_bytes() == (whole if cut == 1 else whole[: -last - 1])


def test_a_broken_line_in_the_middle_is_not_repaired(tmp_path):
    """A crash cannot tear a line that has another one after it: that file was edited, and guessing would lose data."""
    with open_store(tmp_path) as store:
        store.add([line("q001"), line("q002")], {})
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"question_id": "q007", "te\n' + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"answers\.jsonl line 1"):
        open_store(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('{"question_id": "q001", "text": "no"}', "line 2 answers question q001 a second time"),
        ('{"question_id": "900", "text": "no"}', "line 2 answers question 900, which this benchmark does not have"),
        ('{"question_id": 1, "text": "no"}', "line 2 needs question_id and text"),
        ('{"question_id": "q002"}', "line 2 needs"),
        ("[1]", "line 2 should be a JSON object, got list"),
    ],
)
def test_lines_that_do_not_belong_are_refused(tmp_path, extra, message):
    with open_store(tmp_path) as store:
        store.add([line("q001")], {})
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write(extra + "\n")
    with pytest.raises(UserError, match=message):
        open_store(tmp_path)


def test_other_settings_are_refused_by_name_and_value(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("q001")], {})
    other = {"model": "m", "config": {"alpha": 0.7, "beta": 1}, "dtype": "float32"}
    told = r"answers made under other settings \(config\.alpha: 0\.5, now 0\.7; config\.beta: absent, now 1\); choose"
    with pytest.raises(UserError, match=told):
        open_store(tmp_path, settings=other)
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["q001"]


def test_answers_of_another_store_are_refused(tmp_path):
    """A copied answers.jsonl was taken: answer_id was compared for shards only."""
    for folder, settings in ((tmp_path / "a", SETTINGS), (tmp_path / "b", SETTINGS | {"dtype": "float16"})):
        with open_store(folder, settings=settings) as store:
            store.add([line("q001") | {"answer_id": answer_id(settings_hash(settings), "q001")}], {})
    (tmp_path / "b" / "answers.jsonl").write_bytes((tmp_path / "a" / "answers.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"answers\.jsonl holds 1 answers of another store, the first to question q001"):
        open_store(tmp_path / "b", settings=SETTINGS | {"dtype": "float16"})


def test_full_disk_leaves_a_valid_store(tmp_path, monkeypatch):
    """The disk takes half of the batch and then no more."""
    real = os.write

    def half(descriptor: int, data) -> int:
        if len(data) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, bytes(data)[:-60] if b"long" in bytes(data) else data)

    with open_store(tmp_path) as store:
        store.add([line("q001"), line("q002")], {})
        before = (tmp_path / "answers.jsonl").read_bytes()
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(UserError, match="No space left on device; everything before this batch is kept"):
            store.add([line("q003", "long " * 20), line("q004", "long " * 20)], {})
        monkeypatch.undo()
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        assert list(store.answers) == ["q001", "q002"]
        store.add([line("q003")], {})
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["q001", "q002", "q003"]
        assert [t["question_ids"] for t in store.timing_of(store.answers)] == [["q001", "q002"], ["q003"]]


def test_an_unwritable_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot make .*below"):
        open_store(tmp_path / "file" / "below")


def test_settings_are_replaced_in_one_step(tmp_path, monkeypatch):
    """A crash while writing leaves the old file: the new one appears only when it is complete."""
    path = tmp_path / "settings.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", failing("ENOSPC"))
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


# -- failures ------------------------------------------------------------------------------------------------------


def test_the_latest_failure_counts_until_there_is_an_answer(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("q001")], {})
        assert store.failures == {} and not (tmp_path / "failures.jsonl").exists()
        store.fail([failure("q002"), failure("q003", "out of memory", "memory")])
        store.fail([failure("q002", "division by zero", "error")])
        assert {name: (row["reason"], row["kind"], row["run"]) for name, row in store.failures.items()} == {
            "q002": ("division by zero", "error", "start single 0"),
            "q003": ("out of memory", "memory", "start single 0"),
        }
        store.add([line("q003")], {})
        assert list(store.failures) == ["q002"]
    with open_store(tmp_path) as store:
        assert list(store.failures) == ["q002"] and store.failures["q002"]["reason"] == "division by zero"
        # A failure adds no answer, so places and processes of answers are as without it.
        assert list(store.answers) == ["q001", "q003"]
        assert [(run["run"], count) for run, count in store.origins(KNOWN)] == [("start single 0", 2)]
    assert len(rows(tmp_path / "failures.jsonl")) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (failure("900"), "line 2 is about question 900"),
        ({"question_id": "q001", "kind": "image"}, "line 2 needs question_id and reason"),
    ],
)
@pytest.mark.parametrize("where", [".", "shards/a-rank0"])
def test_failures_that_do_not_belong_are_refused(tmp_path, where, extra, message):
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
    assert len(rows(tmp_path / "failures.jsonl")) == 6 and not (tmp_path / "shards").exists()


# -- one writer ----------------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_names_host_and_process_of_the_first(tmp_path):
    """Also when it tries twice."""
    script = "import sys; from eval.answers.store import *; AnswerStore(Path(sys.argv[1]), {}, [])"
    with open_store(tmp_path):
        for _ in range(2):
            other = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
            )
            owner = f"(process {os.getpid()} on host {os.uname().nodename})"
            assert f"{tmp_path} is in use by another run {owner}; wait for it" in other.stderr
        with pytest.raises(UserError, match=f"{tmp_path} is in use"):
            open_store(tmp_path, restart=True)
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match=r"another run; wait"):
            open_store(tmp_path)


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EROFS"])
def test_a_lock_that_fails_is_no_file_system_without_locks(tmp_path, monkeypatch, code):
    """A passing error left the folder open to a second run, and the result said for good that there are no locks."""
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with pytest.raises(UserError, match=f"{tmp_path}.*{os.strerror(getattr(errno, code))}"):
        open_store(tmp_path)


def test_two_processes_that_no_lock_keeps_apart_tear_no_line(tmp_path, monkeypatch):
    """Each wrote to where its own lines ended, over those of the other: the next run refused timing.jsonl."""
    monkeypatch.setattr(fcntl, "flock", failing("ENOLCK"))
    with open_store(tmp_path, "a") as one, open_store(tmp_path, "b") as two:
        for number in range(0, 8, 2):
            for store, room in ((one, "x" * number), (two, "")):
                store.add([line(f"q00{number}"), line(f"q00{number + 1}")], {"device": room})
        for store in (one, two):
            store.put_in_order()
    monkeypatch.undo()
    assert len(rows(tmp_path / "timing.jsonl")) == 8
    with open_store(tmp_path) as store:
        assert list(store.answers) == KNOWN[:8] and len(store.timing_of(KNOWN[:8])) == 4
        store.put_in_order()
    assert [row["question_id"] for row in rows(tmp_path / "answers.jsonl")] == KNOWN[:8]


def test_a_write_that_fails_takes_no_line_of_another_process(tmp_path, monkeypatch):
    """The file was cut where this process thought that it ends."""
    one, two = DurableLines(tmp_path / "x.jsonl"), DurableLines(tmp_path / "x.jsonl")
    one.append([line("q000")])
    two.append([line("q001")])
    real = os.write

    def half(descriptor: int, data) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, bytes(data)[:-30])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(UserError, match="No space left"):
        one.append([line("q002")])
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: half(0, b""))
    one.append([line("q003")], sync=False)
    with pytest.raises(UserError, match="No space left"):
        one.sync()
    assert [row["question_id"] for row in rows(tmp_path / "x.jsonl")] == ["q000", "q001", "q003"]


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP"])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    """The store went on without a word. Temporary files stay: nobody knows whose they are."""
    (tmp_path / ".result.json.4194305").write_text("half")
    monkeypatch.setattr(fcntl, "flock", failing(code))
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


def test_the_store_is_synced_every_ten_seconds_and_at_its_end(tmp_path, monkeypatch):
    """A slow disk made every batch wait for it twice."""
    clock, waits = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", lambda descriptor: waits.append(clock.now))
        for name in KNOWN[:40]:
            store.add([line(name)], {})
            clock.now += 1
        assert sorted(set(waits)) == [0, 10, 20, 30]
    assert waits.count(40) == 2, "the last answers and their timing"


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
        assert [t["question_ids"] for t in store.timing_of(store.answers)] == [["q000", "q001"]]
        store.add([line("q003"), line("q002")], {})
        assert [t["question_ids"] for t in store.timing_of(store.answers)] == [["q000", "q001"], ["q003", "q002"]]
        assert [(run["run"], n) for run, n in store.origins(KNOWN)] == [("start single 0", 2), ("start later 0", 2)]


def test_a_sync_that_fails_is_a_sentence_and_keeps_what_was_synced(tmp_path, monkeypatch):
    """Network file systems report a full disk when they are asked to sync."""
    lines = DurableLines(tmp_path / "x.jsonl")
    lines.append([line("q000")])
    lines.append([line("q001")], sync=False)
    monkeypatch.setattr(os, "fsync", failing("ENOSPC"))
    with pytest.raises(UserError, match="No space left on device; the lines since the last sync are lost"):
        lines.sync()
    monkeypatch.undo()
    lines.append([line("q002")])
    lines.close()
    assert [row["question_id"] for row in DurableLines(tmp_path / "x.jsonl").rows] == ["q000", "q002"]


def test_a_file_that_cannot_be_closed_is_a_sentence(tmp_path, monkeypatch):
    """Network file systems report errors there, too: it was a traceback, and of a rank "failed: OSError"."""
    store, real = open_store(tmp_path), os.close

    def fail(descriptor: int) -> None:
        real(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", fail)
    with pytest.raises(UserError, match=r"\.jsonl: Input/output error"):
        store.close()
    monkeypatch.undo()
    with open_store(tmp_path):
        pass


def test_what_a_killed_process_was_writing_is_deleted_by_the_next(tmp_path):
    """`vtr score --json OUT` left `.OUT.PROCESS` beside its file after a kill, one more each time."""
    path, mine = tmp_path / "out[1].json", tmp_path / ".out[1].json.backup"
    for number in (1, 4194305):
        (tmp_path / f".out[1].json.{number}").write_text("half")
    mine.write_text("the user's own")
    with open(tmp_path / ".out[1].json.1") as other:  # a process that is still writing, perhaps on another machine
        fcntl.flock(other, fcntl.LOCK_EX)
        write_json(path, {"a": 1})
        assert {entry.name for entry in tmp_path.iterdir()} == {path.name, mine.name, ".out[1].json.1"}
    write_json(path, {"a": 2})
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, mine.name}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("timing.jsonl", {"question_ids": 5}),
        ("timing.jsonl", {"question_ids": [["q001"]]}),
        ("timing.jsonl", {"questions": "1"}),
        ("timing.jsonl", {"run": ["a"]}),
        ("runs.jsonl", {"versions": "2.0"}),
        ("runs.jsonl", {"commit": None}),
    ],
)
@pytest.mark.parametrize("where", [".", "shards/a-rank0"])
def test_lines_about_batches_and_processes_that_are_damaged_are_named(tmp_path, name, change, where):
    """They were a traceback, wherever their content was used."""
    with open_store(tmp_path) as store, Shard(tmp_path, "a", 0, describe("a")) as shard:
        store.add([line("q001")], {})
        shard.add([line("q002")], {})
    path = tmp_path / where / name
    path.write_text("".join(json.dumps(row | change) + "\n" for row in rows(path)))
    with pytest.raises(UserError, match=f"{name} line 1 needs .*{next(iter(change))}"):
        open_store(tmp_path)


# -- whole runs ----------------------------------------------------------------------------------------------------


def config(data: Path, output: Path, **changes) -> RunConfig:
    return RunConfig(method="first", budget=16, data=data, output=output, batch_size=4, wandb="disabled", **changes)


def test_growing_the_limit_continues_and_shrinking_it_scores_fewer(tmp_path):
    data = write_gqa(tmp_path / "data")
    first = run(config(data, tmp_path / "o", limit=10), FakeLlava(), FakeReducer())
    assert first["partial"] and first["asked"] == 10
    model = FakeLlava()
    grown = run(config(data, tmp_path / "o", limit=14), model, FakeReducer())
    assert model.asked == [str(1000 + n) for n in range(10, 14)]
    assert grown["asked"] == 14 and len(rows(tmp_path / "o" / "answers.jsonl")) == 14
    shrunk = run(config(data, tmp_path / "o", limit=10), FakeLlava(), FakeReducer())
    assert shrunk["metrics"] == first["metrics"] and len(rows(tmp_path / "o" / "answers.jsonl")) == 14


def test_a_finished_run_asks_nothing_again(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    model = FakeLlava()
    again = run(config(data, tmp_path / "o"), model, FakeReducer())
    assert model.asked == []
    assert again["timing"]["this_run"]["questions"] == 0 and again["timing"]["questions"] == 40


def test_the_batch_size_may_change_between_runs_and_is_reported(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=8), FakeLlava(), FakeReducer())
    other = RunConfig("first", 16, data=data, output=tmp_path / "o", batch_size=16, wandb="disabled")
    result = run(other, FakeLlava(), FakeReducer())
    assert [c["batch_size"] for c in result["timing"]["conditions"]] == [16, 4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model, options: setattr(model, "fingerprint", "ffff"), "model_files: 0123abcd, now ffff"),
        (lambda model, options: setattr(model, "conversation", "plain"), "conversation: vicuna_v1, now plain"),
        (lambda model, options: options.update(reducer=FakeReducer(alpha=0.9)), "config.alpha: 0.5, now 0.9"),
        (lambda model, options: options.update(max_new_tokens=5), "max_new_tokens: 128, now 5"),
        (lambda model, options: options.update(seed=3), "seed: 0, now 3"),
    ],
)
def test_a_run_never_mixes_answers_of_different_settings(tmp_path, change, named):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=4), FakeLlava(), FakeReducer())
    model, options = FakeLlava(), {}
    change(model, options)
    reducer = options.pop("reducer", FakeReducer())
    with pytest.raises(UserError) as error:
        run(config(data, tmp_path / "o", **options), model, reducer)
    assert named in str(error.value)
    assert len(rows(tmp_path / "o" / "answers.jsonl")) == 4


def test_changed_questions_are_other_settings(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=4), FakeLlava(), FakeReducer())
    jsonl = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    jsonl.write_text(jsonl.read_text().replace("Is thing 30", "Was thing 30"))
    with pytest.raises(UserError, match=r"\(questions: "):
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())


def test_answers_stand_in_the_order_of_the_benchmark_once_a_run_has_ended(tmp_path):
    """In one process they stood in the order of asking, under ranks in that of the benchmark, and after a failure or
    a larger limit in another one again: equal runs wrote other files."""

    class Tokens(FakeLlava):
        """Asks the longer texts last."""

        @staticmethod
        def tokenizer(texts, add_special_tokens):
            return SimpleNamespace(input_ids=[[0] * (int(text.split()[2]) % 7) for text in texts])

    data, names = write_gqa(tmp_path / "data"), [str(1000 + number) for number in range(40)]
    model = Tokens()
    run(config(data, tmp_path / "whole"), model, FakeReducer())
    assert model.asked != names
    for limit in (10, 23, None):
        run(config(data, tmp_path / "grown", limit=limit), Tokens(), FakeReducer())
    whole, grown = (tmp_path / folder / "answers.jsonl" for folder in ("whole", "grown"))
    assert [row["question_id"] for row in rows(whole)] == names and grown.read_bytes() == whole.read_bytes()


def test_a_result_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    """It was a traceback."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "limit10").write_text("")
    with pytest.raises(UserError, match="limit10: File exists"):
        run(config(write_gqa(tmp_path / "data"), tmp_path / "o", limit=10), FakeLlava(), FakeReducer())


@pytest.mark.parametrize("value", [[1.0], "0.1", None, float("nan")])
def test_a_time_that_is_no_number_is_named(tmp_path, value):
    """A list in timing.jsonl was a traceback."""
    data, path = write_gqa(tmp_path / "data"), tmp_path / "o" / "timing.jsonl"
    run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    path.write_text("".join(json.dumps(row | {"prefill": value}) + "\n" for row in rows(path)[:1]))
    with pytest.raises(UserError, match=r"question 1000 in .*timing\.jsonl .*prefill"):
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())


@pytest.mark.parametrize("how", ["sync", "torn"])
def test_means_over_fewer_questions_than_were_asked_say_so(tmp_path, monkeypatch, capsys, how):
    """Operations and times were means over what a failed sync or a torn line had left, without a word."""
    data, path, real = write_gqa(tmp_path / "data"), tmp_path / "o" / "timing.jsonl", os.fsync

    def fail(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    def stop_failing(batch: int) -> None:
        monkeypatch.setattr(os, "fsync", fail if batch else real)  # the first batch is synced

    if how == "sync":
        with pytest.raises(UserError, match=r"timing\.jsonl: Input/output error"):
            run(config(data, tmp_path / "o"), FakeLlava(stop_failing), FakeReducer())
        monkeypatch.undo()
        counted = 4
    else:
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
        path.write_bytes(path.read_bytes()[:-30])
        counted = 36
    capsys.readouterr()
    model = FakeLlava()
    result = run(config(data, tmp_path / "o"), model, FakeReducer())
    assert model.asked == [] and result["asked"] == 40 and result["accounting"]["samples"] == 40
    assert result["flops"]["questions"] == result["timing"]["questions"] == counted
    assert any(f"{counted} of 40 questions" in remark for remark in result["remarks"])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "GFLOP" in line and f"{counted} of 40 questions" in line]
    assert report.operations_of(result) is None and "flops/per_question" not in numbers_of(result)


def test_no_mean_over_all_questions_says_anything(tmp_path, capsys):
    result = run(config(write_gqa(tmp_path / "data"), tmp_path / "o"), FakeLlava(), FakeReducer())
    assert result["remarks"] == [] and " of 40 questions" not in capsys.readouterr().out
    assert report.operations_of(result) == result["flops"]["per_question"] == numbers_of(result)["flops/per_question"]


@pytest.mark.parametrize("lost", ["submission", "result"])
def test_submission_and_result_are_written_after_what_they_are_made_of(tmp_path, monkeypatch, lost):
    """The result was written first: after a failure in between it counted as complete, without answers or file."""
    data, synced = write_gqa(tmp_path / "data"), []
    name = {"submission": "predictions.json", "result": "result.json"}[lost]
    real = os.replace

    def look(source, target):
        if Path(target).name == name:
            synced.extend(path.name for path in (tmp_path / "o").iterdir())
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", look)
    with pytest.raises(UserError, match=rf"{name}: Input/output error"):
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    assert "result.json" not in synced and ("predictions.json" in synced) == (lost == "result")
    assert len(rows(tmp_path / "o" / "answers.jsonl")) == 40
