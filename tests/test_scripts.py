"""The scripts of scripts/, run by bash with commands that only write down what they are asked to do."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.config import ROOT

pytestmark = pytest.mark.process


# -- scripts/setup.sh ------------------------------------------------------------------------------------------------

FAKE = """#!/usr/bin/env bash
echo "$*" >> "{log}"
case "$*" in
-c*) echo ${{LACKS:-}}; exit 0 ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
*requirements.txt) exit ${{PIP_CODE:-0}} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository's setup and nothing else."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(FAKE.format(log=tmp_path / "log"))
    fake.chmod(0o755)
    return tmp_path


def source(checkout: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code of sourcing the script, and what the interpreter was asked to do."""
    (checkout / "log").write_text("")
    given = {**os.environ, "PYTHON": str(checkout / "fake-python"), "VENV": ".venv", **environment}
    done = subprocess.run(["bash", "-c", "source scripts/setup.sh"], cwd=checkout, env=given, capture_output=True)
    asked = (checkout / "log").read_text().splitlines()
    return done.returncode, [line for line in asked if not line.startswith("-c")]


def test_it_installs_the_requirements_and_the_console_command_once(checkout):
    code, asked = source(checkout)
    assert code == 0 and asked[0] == "-m venv .venv"
    assert [line.split("--disable-pip-version-check ")[1] for line in asked[1:]] == [
        "-r requirements.txt",
        "--no-deps --editable .",
    ]
    assert source(checkout) == (0, [])


def test_other_requirements_are_installed_again(checkout):
    source(checkout)
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    code, asked = source(checkout)
    assert code == 0 and any(line.endswith("-r requirements.txt") for line in asked)


def test_a_failed_install_is_not_taken_for_done(checkout):
    assert source(checkout, PIP_CODE="1")[0] != 0
    code, asked = source(checkout)
    assert code == 0 and asked[-1].endswith("--editable .")


def test_an_environment_as_it_is_may_be_used(checkout):
    """On a machine without a network the scripts ended in pip."""
    assert source(checkout, VENV="none") == (0, []) and not (checkout / ".venv" / "bin").exists()
    (checkout / "log").write_text("")
    given = {**os.environ, "PYTHON": str(checkout / "fake-python"), "VENV": "none"}
    calls = "source scripts/setup.sh; cd /; exec python -m eval"
    subprocess.run(["bash", "-c", calls], cwd=checkout, env=given, check=True)
    assert (checkout / "log").read_text().splitlines()[-1] == "-m eval"
    for more, lacks in (({"LACKS": "einops PIL"}, "lacks einops pillow;"), ({"PYTHON": "/no"}, "/no lacks a Python")):
        done = subprocess.run(["bash", "-c", calls], cwd=checkout, env=given | more, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and lacks in done.stderr


# What setup.sh does not ask for under VENV=none.
NOT_NEEDED = "av datasets deepspeed openai openpyxl pandas plotly pyarrow pycocoevalcap sklearn wandb wandb_workspaces"
RUN = """import runpy, sys
del sys.argv[0]
sys.modules.update(dict.fromkeys({hidden}))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""


@pytest.mark.slow
def test_a_small_tree_and_few_packages_are_enough_for_the_benchmark(tmp_path):
    """Some GPU machines take at most 64 MiB, and have no PyAV."""
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), "."], cwd=tmp_path, check=True)
    with (ROOT / "scripts" / "bench" / "sparse.txt").open() as patterns:
        command = ["git", "sparse-checkout", "set", "--no-cone", "--stdin"]
        subprocess.run(command, cwd=tmp_path, stdin=patterns, check=True)
    subprocess.run(["git", "checkout", "--quiet"], cwd=tmp_path, check=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert 10 * 2**20 < sum(path.stat().st_size for path in files) < 50 * 2**20
    run = RUN.format(hidden=NOT_NEEDED.split())
    given = os.environ | {"PYTHONPATH": "."}
    shipped = "eval.efficiency.latency --method=consensusdrop --budget=64 --lengths=0 --gate=8 --model=assets/tinyllava"
    random = "lab.bench.growth --methods=consensusdrop --tokens=256 --width=64 --layers=4 --blocks=3"
    for words, row in ((shipped, "| oracle of consensusdrop |"), (random, "| consensusdrop |")):
        command = [sys.executable, "-c", run, *words.split(), "--repeats=1"]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
        assert done.returncode == 0 and row in done.stdout, done.stderr[-2000:]


# -- scripts/eval/ ---------------------------------------------------------------------------------------------------


def test_the_shell_script_explains_itself():
    script = str(ROOT / "scripts" / "eval" / "gqa.sh")
    bare = subprocess.run(["bash", script], capture_output=True, text=True)
    assert bare.returncode == 2 and "METHOD [BUDGET]" in bare.stderr
    assert subprocess.run(["bash", script, "--help"], capture_output=True, text=True).returncode == 0


def test_the_shell_script_passes_everything_on(tmp_path):
    """With a setup that does nothing and a python that prints its arguments."""
    (tmp_path / "scripts" / "eval").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "eval" / "gqa.sh", tmp_path / "scripts" / "eval")
    shutil.copy(ROOT / "scripts" / "benchmark.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("cd /\n")
    (tmp_path / "python").write_text('#!/bin/sh\npwd\nfor a in "$@"; do echo "$a"; done\n')
    (tmp_path / "python").chmod(0o755)
    here = tmp_path / "elsewhere"
    here.mkdir()

    def call(*arguments: str, **environment: str) -> list[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA")}
        env = {**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
        script = tmp_path / "scripts" / "eval" / "gqa.sh"
        done = subprocess.run(["bash", str(script), *arguments], env=env, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    start = [str(here), "-m", "eval", "--benchmark", "gqa"]
    assert call("consensusdrop", "64") == [*start, "--method=consensusdrop", "--budget=64"]
    assert call("full", "--limit", "5") == [*start, "--method=full", "--limit", "5"]
    assert call("full") == [*start, "--method=full"]
    assert call("m", "-3", "--x", MODEL="a b", DATA="c d") == [
        *start, "--method=m", "--budget=-3", "--model=a b", "--data=c d", "--x"
    ]  # fmt: skip


# -- scripts/slurm/ --------------------------------------------------------------------------------------------------

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


def submit(cluster: Path, task: int, **more: str) -> subprocess.Popen:
    path = f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77"}
    given = {**os.environ, **slurm, "PATH": path, **more}
    return subprocess.Popen(["bash", str(SCRIPT), "cells.txt"], env=given, stderr=subprocess.PIPE, text=True)


def test_a_task_runs_its_line(cluster):
    assert submit(cluster, 2).wait(300) == 0
    assert (cluster / "asked").read_text() == "consensusdrop 64 --limit 100\n"
    assert not (cluster / "requeued").exists()


def test_exit_code_of_the_run_is_that_of_the_task(cluster):
    """3: some questions failed. Asking again would fail again, so the task is not put back."""
    assert submit(cluster, 4).wait(300) == 3
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
    task = submit(cluster, task)
    assert sentence in task.communicate(timeout=300)[1] and task.returncode == 2
    assert not (cluster / "asked").exists()


@pytest.mark.parametrize(("restarts", "back"), [("0", True), ("10", False)])
def test_before_the_time_limit_the_run_is_stopped_and_goes_back_into_the_queue(cluster, restarts, back):
    """Slurm signals the batch shell alone; the run has to end by itself, with its store in order."""
    task = submit(cluster, 3, SLURM_RESTART_COUNT=restarts)
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
