"""The commands printed in CONTRIBUTING.md succeed to the last, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval import new
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
@pytest.mark.parametrize("section", ["A new method", "A new benchmark", "A new table", "A new model family"])
def test_every_printed_command_succeeds(section, copy):
    """The method was green in the contract; the next printed command ended with three failures."""
    assert len(commands(section)) >= 2
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
    for kind, *flags in (["method"], ["benchmark"], ["benchmark", "--yaml"]):
        command = [sys.executable, "-m", "eval.cli", "new", kind, f"my_{kind}{len(flags)}", *flags]
        subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, check=True)
    for style in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *style, "."], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        ("none", ["trim", "every_method", "write", "write", "golden"]),
        ("trim", ["trim"]),
        ("every_method", ["trim", "every_method"]),
        ("write", ["trim", "every_method", "write"]),
    ],
)
def test_a_methods_own_test_comes_first_and_nothing_is_written_before_the_others_pass(failing, ran, monkeypatch):
    """Golden rows of a wrong method were written first, and its own test came last, behind those of all methods."""
    seen = []

    def subprocess_run(command, cwd):
        marks = ("test_trim.py", "test_every_method.py", "test_golden.py")
        mark = next((mark for mark in marks if f"tests/{mark}" in command), "write")
        seen.append(mark.removeprefix("test_").removesuffix(".py"))
        assert mark == "write" or "--continue-on-collection-errors" in command
        return SimpleNamespace(returncode=int(seen[-1] == failing))

    monkeypatch.setattr(new.subprocess, "run", subprocess_run)
    monkeypatch.setattr(new, "tests_of", lambda kind, name, stems: [f"tests/test_{stem}.py" for stem in stems])
    assert new.check("method", "trim", write=True) == int(failing != "none")
    assert seen == ran


def test_a_table_anywhere_is_checked(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    text = (ROOT / "eval" / "papers" / "specs" / "attnmix" / "llava15_7b.yaml").read_text()
    path.write_text(text)
    assert new.main(["check", "table", str(path)]) == 0 and "budgets are valid" in capsys.readouterr().out
    path.write_text(text.replace("published: llava15_7b", "published: llava15_7"))
    assert new.main(["check", "table", str(path)]) == 2 and "Did you mean 'llava15_7b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["new", "table", "paper/first", "--yaml"], "--yaml is for"),
        (["new", "table", "first"], "PAPER/NAME, got 'first'"),
        (["new", "table", "attnmix/llava15_7b"], r"taken \(eval/papers/specs/attnmix/llava15_7b.yaml"),
        (["new", "table", "../x/first"], "letters, .* got '../x'"),
        (["new", "method", "own/first"], "one word, got 'own/first'"),
        (["new", "family", "Gemma3"], "family Gemma3 is declared"),
        (["new", "family", "Cohere2Vison"], "Did you mean 'Cohere2Vision'"),
        (["check", "family", "Gemma"], "Did you mean 'Gemma3'"),
        (["check", "table", "attnmix/llava15_7"], "Did you mean 'llava15_7b'"),
        (["new", "method", "holov"], r"The name holov is taken \(baselines/holov.py, tests/test_holov.py\)"),
        (["new", "method", "Mine"], "name has lower-case letters, digits and _, and starts with a letter; got 'Mine'"),
        (["new", "benchmark", "import"], "letters, .* got 'import'"),
        (["check", "method", "fastw"], "Did you mean 'fastv'"),
        (["check", "benchmark", "gqaa"], "Did you mean 'gqa'"),
    ],
)
def test_a_wrong_name_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert re.search(sentence, capsys.readouterr().err)
