"""scripts/slurm/eval.sbatch, run by bash with Slurm's variables and with commands that record their arguments."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from eval.config import ROOT

SCRIPT = ROOT / "scripts" / "slurm" / "eval.sbatch"


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A repository whose gqa.sh writes down its arguments or waits for a signal, and a scontrol that writes them."""
    (tmp_path / "scripts" / "eval").mkdir(parents=True)
    (tmp_path / "scripts" / "eval" / "gqa.sh").write_text(
        'echo "$@" > asked\n[[ $1 == fail ]] && exit 3\n[[ $1 == wait ]] || exit 0\n'
        "trap 'sleep 0.5; touch ended; exit 143' TERM\ntouch waiting\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    (tmp_path / "cells.txt").write_text(
        "gqa full\ngqa consensusdrop 64 --limit 100\ngqa wait\ngqa fail\nnothing full\n"
    )
    return tmp_path


def environment(cluster: Path, task: int, **more: str) -> dict[str, str]:
    path = f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77"}
    return {**os.environ, **slurm, "PATH": path, **more}


def submit(cluster: Path, task: int) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), "cells.txt"]
    return subprocess.run(command, env=environment(cluster, task), capture_output=True, text=True, timeout=300)


def test_a_task_runs_its_line(cluster):
    done = submit(cluster, 2)
    assert done.returncode == 0, done.stderr
    assert (cluster / "asked").read_text() == "consensusdrop 64 --limit 100\n"
    assert not (cluster / "requeued").exists()


def test_exit_code_of_the_run_is_that_of_the_task(cluster):
    """3: some questions failed. Asking again would fail again, so the task is not put back."""
    assert submit(cluster, 4).returncode == 3
    assert not (cluster / "requeued").exists()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (5, "got 'nothing full'"),
        (6, "has 5 lines, but this is task 6; submit with --array=1-5."),
        (0, "this is task 0"),
    ],
)
def test_a_line_that_is_no_cell_is_refused(cluster, task, sentence):
    done = submit(cluster, task)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (cluster / "asked").exists()


@pytest.mark.parametrize(("restarts", "back"), [("0", True), ("10", False)])
def test_before_the_time_limit_the_run_is_stopped_and_goes_back_into_the_queue(cluster, restarts, back):
    """Slurm signals the batch shell alone; the run has to end by itself, with its store in order."""
    more = {"SLURM_RESTART_COUNT": restarts}
    command = ["bash", str(SCRIPT), "cells.txt"]
    task = subprocess.Popen(command, env=environment(cluster, 3, **more), stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while not (cluster / "waiting").exists():
        assert task.poll() is None, "the task ended before its run was asked"
        assert time.monotonic() < limit, "after 300 s the run was not asked yet"
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    assert task.wait(300) == 143
    assert (cluster / "ended").exists(), "the task must wait for its run"
    assert (cluster / "requeued").exists() == back
    if back:
        assert (cluster / "requeued").read_text() == "requeue 77\n"


def test_the_script_is_valid_for_bash_and_names_its_signal():
    checked = subprocess.run([shutil.which("bash") or "bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:TERM@120" in text and "#SBATCH --requeue" in text
