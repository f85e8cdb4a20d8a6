"""scripts/setup.sh with an interpreter that only writes down what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.config import ROOT

FAKE = """#!/usr/bin/env bash
echo "$*" >> "{log}"
case "$*" in
-c*) exit 0 ;;
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
