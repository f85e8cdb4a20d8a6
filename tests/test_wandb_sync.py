"""scripts/wandb/sync.sh and `vtr wandb sync`, with a `wandb` that only notes what it is asked to upload."""

import os
from pathlib import Path

import pytest

from eval.answers.store import lock_folder
from eval.tracking.sync import main
from tests.read_wandb import without_wandb

FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
shift 2
for part in "$@"; do
  [ "$part" = "$REFUSE" ] || for file in "$part"/run-*.wandb; do touch "$file.synced"; done
done
exit "${CODE:-0}"
"""


@pytest.fixture(autouse=True)
def fake_wandb(monkeypatch, tmp_path):
    """A key, and a `wandb` in front of the real one; returns the file with its calls."""
    without_wandb(monkeypatch, tmp_path / "nobody")
    program = tmp_path / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return tmp_path / "calls"


def part(output: Path, name: str, number: int = 1, synced: bool = False) -> Path:
    """One start of an offline run."""
    folder = output / "wandb" / f"offline-run-20260101_00000{number}-{name}"
    folder.mkdir(parents=True)
    (folder / f"run-{name}.wandb").touch()
    if synced:
        (folder / f"run-{name}.wandb.synced").touch()
    return folder


def calls(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_all_parts_of_new_runs_are_uploaded_once(tmp_path, fake_wandb, capsys):
    results = tmp_path / "results"
    new = part(results / "gqa" / "m" / "a", "aa")
    # Continued after its first part was uploaded: W&B joins the parts only when it gets them together.
    first, second = part(results / "gqa" / "m" / "b", "bb", 1, synced=True), part(results / "gqa" / "m" / "b", "bb", 2)
    part(results / "gqa" / "m" / "c" / "limit8", "cc", synced=True)
    (results / "gqa" / "m" / "a" / "wandb" / "latest-run").symlink_to(new.name)
    before = {path for path in results.rglob("*") if "wandb" not in path.parts}
    assert main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert f"3 offline runs below {results}: 2 to upload, 1 uploaded before." in printed
    assert "2 of 2 runs are uploaded." in printed
    (call,) = calls(fake_wandb)
    assert call[:2] == ["sync", "--include-synced"] and call[2:] == [str(new), str(first), str(second)]
    assert {path for path in results.rglob("*") if "wandb" not in path.parts} == before
    assert main([str(results)]) == 0
    assert "0 to upload, 3 uploaded before." in capsys.readouterr().out and len(calls(fake_wandb)) == 1


def test_runs_in_progress_and_replaced_runs_wait(tmp_path, fake_wandb, capsys):
    busy, again = tmp_path / "results" / "busy", tmp_path / "results" / "again"
    part(busy, "running")
    part(busy / "limit8", "limited")
    new, _ = part(again, "new"), part(again, "old")
    (again / "replaced-1").mkdir()
    (again / "replaced-1" / "wandb_id").write_text("old\n")
    part(again / "replaced-1" / "limit8", "older")
    lock, _ = lock_folder(busy)
    owner = (busy / "lock").read_bytes()
    try:
        assert main([str(tmp_path / "results")]) == 0
    finally:
        assert lock is not None
        lock.release()
    assert "1 to upload, 2 still running, 2 replaced by --restart." in capsys.readouterr().out
    assert [call[2:] for call in calls(fake_wandb)] == [[str(new)]]
    assert (busy / "lock").read_bytes() == owner


def test_what_wandb_did_not_upload_is_named(tmp_path, fake_wandb, capsys, monkeypatch):
    """`wandb sync` ends with 0 also when it uploaded nothing."""
    part(tmp_path / "results" / "a", "aa")
    bad = part(tmp_path / "results" / "b", "bb")
    monkeypatch.setenv("REFUSE", str(bad))
    assert main([str(tmp_path / "results")]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs are uploaded." in printed.out and printed.err == f"not uploaded: {bad}\n"
    monkeypatch.setenv("CODE", "7")
    assert main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("wandb sync ended with code 7; ")


def test_without_key_program_or_folder_one_sentence_says_what_to_do(tmp_path, fake_wandb, capsys, monkeypatch):
    assert main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == f"There is no folder {tmp_path}/gone; name the one that holds the results.\n"
    new = part(tmp_path / "results" / "a", "aa")
    monkeypatch.delenv("WANDB_API_KEY")
    assert main([str(tmp_path / "results"), "--dry-run"]) == 0
    assert str(new) in capsys.readouterr().out, "a dry run needs no key"
    assert main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("W&B has no API key; run `wandb login` or set WANDB_API_KEY")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("The command wandb is not installed here")
    assert not calls(fake_wandb)
