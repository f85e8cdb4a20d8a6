"""The commands printed in CONTRIBUTING.md succeed to the last, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval.config import ROOT
from eval.new import main

PAGE = ROOT / "CONTRIBUTING.md"


def commands(section: str) -> list[str]:
    """The lines of the section's first block of commands."""
    text = PAGE.read_text().partition(f"## {section}\n")[2]
    return re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files of the repository, without those that git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("section", ["A new method", "A new benchmark"])
def test_every_printed_command_succeeds(section, copy):
    """The method was green in the contract; the next printed command ended with three failures."""
    assert len(commands(section)) >= 3
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VENV": sys.prefix,
        "PYTHONPATH": str(copy),
    }
    for command in commands(section):
        done = subprocess.run(["bash", "-c", command], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"


@pytest.mark.process
def test_what_is_written_passes_the_style(copy):
    """Imports of a new method's test stood in another order than ruff's, so scripts/test.sh ended at its first line."""
    for kind in ("method", "benchmark"):
        command = [sys.executable, "-m", "eval.cli", "new", kind, f"my_{kind}"]
        subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, check=True)
    for style in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *style, "."], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["new", "method", "holov"], r"The name holov is taken \(baselines/holov.py, tests/test_holov.py\)"),
        (["new", "method", "Mine"], "has lower-case letters, digits and _"),
        (["new", "benchmark", "import"], "has lower-case letters, digits and _"),
        (["check", "method", "fastw"], "Did you mean 'fastv'"),
        (["check", "benchmark", "gqaa"], "Did you mean 'gqa'"),
    ],
)
def test_a_wrong_name_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert re.search(sentence, capsys.readouterr().err)
