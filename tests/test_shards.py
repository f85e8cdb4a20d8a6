"""Shards of ranks: merging takes every answer once, whatever kills the process, and refuses what does not belong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.answers.store import Shard, shard_folders
from eval.config import ROOT
from llava.errors import UserError
from tests.shard_worker import KNOWN, SETTINGS, describe, line, open_store

# Everything that eval/answers/store.py names, for a store whose ranks met broken images.
NAMED = {"answers.jsonl", "timing.jsonl", "runs.jsonl", "failures.jsonl", "settings.json", "lock"}


def rows(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def write_shard(folder: Path, world: str, rank: int, *batches: str, **changes) -> None:
    """A shard with one batch per text of question numbers."""
    with Shard(folder, world, rank, describe(world, rank) | changes) as shard:
        for batch in batches:
            lines = [line(f"q{int(number):03}") for number in batch.split()]
            shard.add(lines, {})


def names(numbers: str) -> list[str]:
    return [f"q{int(number):03}" for number in numbers.split()]


def timed(store) -> list[str]:
    return [name for batch in store.timing_of(store.answers) for name in batch["question_ids"]]


# -- merging -------------------------------------------------------------------------------------------------------


def test_only_the_folders_of_ranks_are_shards(tmp_path):
    """Merging deletes shards: somebody's own folder there, or a file with the name of a rank, is left alone."""
    for name in ("2-rank0", "notes", "my-rank"):
        (tmp_path / "shards" / name).mkdir(parents=True)
    (tmp_path / "shards" / "2-rank1").write_text("")
    assert [shard.name for shard in shard_folders(tmp_path)] == ["2-rank0"]
    assert shard_folders(tmp_path / "nowhere") == []


def test_merging_takes_every_answer_with_its_timing_and_its_process(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("q000")], {"run": "start single 0"})
        write_shard(tmp_path, "w", 0, "1 2", "5")
        write_shard(tmp_path, "w", 1, "3", "4 6")
        assert store.merge() == 6
        assert list(store.answers) == names("0 1 2 3 4 5 6"), "whichever rank answered first"
        assert [(" ".join(t["question_ids"]), t.get("rank")) for t in store.timing_of(store.answers)] == [
            ("q000", None), ("q001 q002", 0), ("q005", 0), ("q003", 1), ("q004 q006", 1)
        ]  # fmt: skip
        assert store.timing_of(names("1 2 4 6 3 9")) == [store.timing_of(store.answers)[n] for n in (1, 3, 4)]
        store.add([line("q007")], {})
        made = {run["run"] if run else None: count for run, count in store.origins(KNOWN)}
        assert made["start w 0"] == made["start w 1"] == 3
        assert [(run["run"], count) for run, count in store.origins(names("2 4 7"))] == [
            ("start w 0", 1), ("start w 1", 1), ("start single 0", 1)
        ]  # fmt: skip
        assert store.merge() == 0
    assert {path.name for path in tmp_path.iterdir()} == NAMED - {"failures.jsonl"}
    with open_store(tmp_path) as again:
        assert list(again.answers) == names("0 1 2 3 4 5 6 7") and again.remarks == []
        assert timed(again) == names("0 1 2 5 3 4 6 7")


def test_shards_without_settings_are_refused_and_restart_moves_them(tmp_path):
    write_shard(tmp_path, "a", 0, "0 1")
    write_shard(tmp_path, "a", 1, "2")
    with pytest.raises(UserError, match=r"no settings\.json beside them"):
        open_store(tmp_path)
    with open_store(tmp_path, restart=True):
        pass
    assert sorted(path.name for path in (tmp_path / "replaced-1" / "shards").iterdir()) == ["a-rank0", "a-rank1"]


def test_other_settings_are_refused_when_only_shards_hold_answers(tmp_path):
    with open_store(tmp_path):
        pass
    write_shard(tmp_path, "a", 0, "0 1")
    with pytest.raises(UserError, match=r"\(dtype: float32, now float16\)"):
        open_store(tmp_path, settings=SETTINGS | {"dtype": "float16"})
    with open_store(tmp_path) as store:
        assert list(store.answers) == names("0 1")


def test_shards_without_an_answer_leave_nothing_behind(tmp_path):
    with open_store(tmp_path):
        Shard(tmp_path, "a", 0, describe("a")).close()
    with open_store(tmp_path, settings={"model": "other"}) as store:
        assert not store.answers and not (tmp_path / "shards").exists()


def test_different_answers_of_two_ranks_are_said(tmp_path):
    with open_store(tmp_path):
        write_shard(tmp_path, "a", 0, "0 1")
        with Shard(tmp_path, "b", 0, describe("b", 0)) as shard:
            shard.add([line("q000"), line("q001") | {"text": "another"}], {})
    with open_store(tmp_path) as store:
        assert store.answers["q001"]["text"] == line("q001")["text"]
        assert store.remarks == [
            "two ranks answered question q001 differently; conflicts.jsonl holds what is not counted"
        ]


def test_a_shard_of_other_settings_or_code_is_left_out_and_said(tmp_path):
    """A rank that outlived --restart wrote its first answer into the new store."""
    other = SETTINGS | {"code": {"a.py": "1"}}
    with open_store(tmp_path, settings=other):
        write_shard(tmp_path, "a", 0, "0 1")
    (tmp_path / "settings.json").write_text(json.dumps(other))
    with open_store(tmp_path, settings=other) as store:
        assert not store.answers
        assert len(store.remarks) == 1 and "shards/a-rank0" in store.remarks[0] and "other code" in store.remarks[0]
        store.merge()
        assert len(store.remarks) == 1
    assert len(rows(tmp_path / "shards" / "a-rank0" / "answers.jsonl")) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (line("q001") | {"answer_id": "0" * 22}, "line 2 was made under other settings than the first line"),
        (line("q001") | {"question_id": "900"}, "line 2 answers question 900"),
        ({"question_id": "q001"}, "line 2 needs"),
        ([1], "line 2 .* got list"),
    ],
)
def test_lines_that_do_not_belong_are_refused_and_nothing_is_merged(tmp_path, extra, message):
    with open_store(tmp_path):
        write_shard(tmp_path, "a", 0, "0")
        write_shard(tmp_path, "b", 0, "2")
    with open(tmp_path / "shards" / "b-rank0" / "answers.jsonl", "a") as file:
        file.write(json.dumps(extra) + "\n")
    with pytest.raises(UserError, match=message):
        open_store(tmp_path)
    assert rows(tmp_path / "answers.jsonl") == []
    assert {path.name for path in tmp_path.iterdir()} == (NAMED - {"failures.jsonl"}) | {"shards"}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_of_a_killed_rank_is_cut_and_nothing_else(tmp_path, cut):
    with open_store(tmp_path):
        write_shard(tmp_path, "a", 0, "0 1", "2 8")
    path = tmp_path / "shards" / "a-rank0" / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with open_store(tmp_path) as store:
        # Without its newline only, the last answer is whole and stays.
        assert list(store.answers) == names("0 1 2 8" if cut == 1 else "0 1 2")
        # The seconds of half a batch are not known.
        assert len(store.timing_of(store.answers)) == (2 if cut == 1 else 1)
    text = (tmp_path / "answers.jsonl").read_bytes()
    assert text.endswith(b"\n") and (text == whole if cut == 1 else whole.startswith(text))


def test_a_question_that_two_ranks_answered_counts_once(tmp_path):
    """A process of an earlier start went on while its question was dealt again."""
    with open_store(tmp_path) as store:
        store.add([line("q000")], {})
        write_shard(tmp_path, "a", 0, "0 1 2", "3", "4")
        write_shard(tmp_path, "b", 0, "5", "2 6", "7")
        assert store.merge() == 7 and store.remarks == []
        assert list(store.answers) == names("0 1 2 3 4 5 6 7")
        # Batches of which an answer was not taken have no timing.
        assert timed(store) == names("0 3 4 5 7")
        assert [(r["run"], n) for r, n in store.origins(names("1 2 3 4"))] == [("start a 0", 4)]
        assert [(r["run"], n) for r, n in store.origins(names("5 6 7"))] == [("start b 0", 3)]


def test_a_process_of_an_earlier_start_stops_after_its_shard_was_merged(tmp_path):
    with open_store(tmp_path):
        late = Shard(tmp_path, "a", 0, describe("a"))
        late.add([line("q000")], {})
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["q000"]
        with pytest.raises(UserError, match="merged by a later start"):
            late.add([line("q001")], {})
    late.close()


# -- kills ---------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, object]:
    """What a merged store says, without the order of the answers and the names of the processes."""
    with open_store(folder) as store:
        timed = [name for t in store.timing_of(store.answers) for name in t["question_ids"]]
        assert len(timed) == len(set(timed)), "a batch was timed twice"
        assert all(run is not None for run, _ in store.origins(store.answers))
        for batch in store.timing_of(store.answers):
            runs = store.origins(batch["question_ids"])
            assert [(run["run"], count) for run, count in runs] == [(batch["run"], batch["questions"])]
        return {
            "answers": sorted((folder / "answers.jsonl").read_bytes().splitlines()),
            "failures": sorted(store.failures),
            "remarks": store.remarks,
        }


def test_a_merge_survives_a_kill_in_every_system_call(tmp_path):
    """And so does the repair after it: nothing is lost, repeated, or left behind."""
    whole = tmp_path / "whole"
    with open_store(whole) as store:
        store.add([line("q000")], {})
        for rank in range(2):
            with Shard(whole, "a", rank, describe("a", rank)) as shard:
                for first in (1 + rank, 11 + rank):
                    batch = [f"q{number:03}" for number in range(first, first + 10, 2)]
                    shard.add([line(name) for name in batch], {})
                shard.fail([{"question_id": f"q05{rank}", "reason": "the image cannot be read", "kind": "image"}])
        # The same question again, in other words.
        with Shard(whole, "b", 0, describe("b")) as shard:
            shard.add([line("q003", "something else")], {})
    copies = killed_in_every_call(tmp_path)
    assert len(copies) > 40
    expected = content(copies[-1])
    assert len(expected["answers"]) == 21 and expected["failures"] == ["q050", "q051"]
    for copy in copies:
        assert content(copy) == expected, copy
        for name, count in (("timing.jsonl", 5), ("runs.jsonl", 3), ("failures.jsonl", 2)):
            assert len(rows(copy / name)) == count, (copy, name)
        assert {path.name for path in copy.iterdir()} == NAMED | {"conflicts.jsonl"}


def killed_in_every_call(folder: Path) -> list[Path]:
    """Copies of folder/whole, each after a merge that was killed in another system call, and a second kill."""
    subprocess.run([sys.executable, "-m", "tests.shard_worker", str(folder)], cwd=ROOT, check=True)
    return sorted(path for path in folder.iterdir() if path.name != "whole")


def test_a_reader_sees_the_answers_before_a_merge_or_after_it(tmp_path, monkeypatch):
    with open_store(tmp_path) as store:
        store.add([line("q000")], {})
        write_shard(tmp_path, "w", 0, "1 2", "3")
        seen = set()
        for name in ("fsync", "write", "replace", "unlink", "open"):
            real = getattr(os, name)

            def look(*arguments, real=real, **options):
                seen.add((tmp_path / "answers.jsonl").read_bytes().count(b"\n"))
                return real(*arguments, **options)

            monkeypatch.setattr(os, name, look)
        store.merge()
        monkeypatch.undo()
    assert seen == {1, 4}


def test_a_merge_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    """The disk takes the answers, and then not the timing."""
    with open_store(tmp_path) as store:
        store.add([line("q000")], {})
        write_shard(tmp_path, "w", 0, "1 2")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        real, calls = os.fsync, []

        def full(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"Cannot merge .*: No space left"):
            store.merge()
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with open_store(tmp_path) as store:
        assert list(store.answers) == names("0 1 2") and len(store.timing_of(store.answers)) == 2
