"""The console command `vtr`: every command line under one name."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest

from eval import cli, show
from eval.config import ROOT
from llava.reduction import registry


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    """The commands replace `sys.argv`."""
    monkeypatch.setattr(sys, "argv", ["vtr"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_names_the_command_and_runs_nothing(name, capsys):
    """`python -m lab.pages.methods --help` used to rewrite the pages, because it read no arguments."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    first = capsys.readouterr().out.splitlines()[0]
    assert stopped.value.code == 0 and first.startswith(f"usage: vtr {name.split()[0]}")


def test_every_module_that_users_start_has_a_command():
    """A command line added to eval/ must be reachable through `vtr`, unless another one starts it."""
    workers = {"eval.parallel.worker"}
    started = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("eval", "lab/bench", "lab/findings", "lab/pages")
        for path in (ROOT / folder).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text() and "def main(" in path.read_text()
    }
    assert started - {"eval.cli"} - workers == {
        command.module for command in cli.COMMANDS.values() if command.function == "main"
    }


@pytest.mark.parametrize(
    ("words", "name"),
    [("score gqa", "score"), ("bench latency gqa", "bench latency"), ("bench --budget 64", "bench latency")],
)
def test_arguments_and_exit_code_pass_through(monkeypatch, words, name):
    """`vtr bench` is short for `vtr bench latency`."""
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name].module), "main", lambda: 7)
    assert cli.main([*words.split(), "a b"]) == 7
    assert sys.argv == [f"vtr {name}", *(["gqa"] if "gqa" in words else ["--budget", "64"]), "a b"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evl"], "vtr has no command 'evl'. Did you mean 'eval'? Available: "),
        (["tables", "metods"], "vtr tables has no command 'metods'. Did you mean 'methods'? Available: "),
        (["tables"], "vtr tables needs one of: paper, "),
        (["tables", "--budget"], "vtr tables needs one of: paper, "),
    ],
)
def test_unknown_commands_end_in_a_sentence_with_a_suggestion(words, expected, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(expected) and not printed.out


def test_help_lists_every_command_in_groups_and_imports_nothing_heavy():
    """It was one flat list, in which `eval` stood beside `tables memory`."""
    code = (
        "import sys\nfrom eval.cli import COMMANDS, main\nassert main(['--help']) == 0\n"
        "assert not {'torch', 'numpy', 'argparse', 'eval.config'} & sys.modules.keys(), 'a heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part, (title, group) in zip(done.stdout.split("\n\n")[2:], cli.GROUPS.items(), strict=True):
        assert part.startswith(f"{title}:\n  {next(iter(group))} ")
        assert all(f"\n  {name} " in part and command.summary in part for name, command in group.items())


@pytest.mark.parametrize("words", ("--help", "show benchmarks"))
def test_a_closed_pipe_is_no_traceback(words):
    """`vtr show benchmarks | head -1` printed a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "eval.cli", *words.split()]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", show.KINDS)
def test_show_lists_what_there_is(kind, capsys):
    assert cli.main(["show", kind]) == 0
    names = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [entry["name"] for entry in show.entries_of(kind)]
    assert {"methods": "consensusdrop", "benchmarks": "gqa"}.get(kind, names[0]) in names


def printed_json(code, capfd):
    """Standard output, all of which must be JSON."""
    assert code == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("kind", show.KINDS)
def test_show_prints_json_alone_with_the_keys_of_its_help(kind, capfd, monkeypatch):
    """Scripts had to read columns of words. Libraries that print on import must not get between the lines."""
    known = show.entries_of
    monkeypatch.setattr(show, "entries_of", lambda *asked: print("[INFO] a library") or known(*asked))
    keys = {name.replace(" ", "_").lower() for name in show.KEYS[kind]}
    entries = printed_json(cli.main(["show", kind, "--json"]), capfd)
    assert [entry["name"] for entry in entries] == [entry["name"] for entry in known(kind)]
    assert all(set(entry) == keys for entry in entries)
    kept = {name.replace(" ", "_").lower() for entry in known(kind) for name in entry}
    adaptive = {"the_image_decides_how_many_tokens_are_kept"}  # of some methods, or of none
    assert kept - adaptive == keys - adaptive, "nothing that is known is left out"
    one = printed_json(cli.main(["show", kind, entries[-1]["name"], "--json"]), capfd)
    assert one == entries[-1]
    with pytest.raises(SystemExit):
        cli.main(["show", "--help"])
    assert f"{kind}: {', '.join(map(show.json_key, show.KEYS[kind]))}" in " ".join(capfd.readouterr().out.split())


def test_check_data_prints_json_alone(capfd, monkeypatch):
    found = show.check_folder
    monkeypatch.setattr(show, "check_folder", lambda *asked: print("[INFO] a library") or found(*asked))
    folder = str(show.DEFAULT_DATA)
    record = printed_json(cli.main(["check-data", folder, "pope", "--json"]), capfd)
    (entry,) = record.pop("benchmarks")
    assert record == {"data": folder, "complete": 1, "incomplete": 0, "absent": 0}
    assert entry["name"] == "pope" and entry["state"] == "complete" and "questions about" in entry["details"][0]


def test_show_one_method_lists_its_options(capsys):
    assert cli.main(["show", "methods", "consensusdrop"]) == 0
    assert "    alpha = " in capsys.readouterr().out
    assert cli.main(["show", "methods", "consensusdrip"]) == 2
    assert "Did you mean 'consensusdrop'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [row["name"] for row in registry.describe() if "official code read" in row])
def test_show_says_what_differs_from_the_release(name, capsys):
    """ "official=true does exactly what the release does" was not true with tiles, and only heads of files told."""
    assert cli.main(["show", "methods", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    text, _, rest = shown.partition("differs from the release: ")[2].partition(" determinism of the release: ")
    assert len(text) > 20, f"{name} does not say what differs from its release"
    if name in ("visiondrop", "visionzip", "holov", "hired", "globalcom2"):
        assert "tiles" in text
    if name in ("sparsevlm", "tome"):
        assert "=release" in text
    stated = registry.method(name).metadata.release
    for kind, clause in dataclasses.asdict(stated).items():
        assert (f"{kind}: {clause}" in rest) == bool(clause)


def test_families_are_shown_where_there_are_no_toy_models(monkeypatch, capsys, tmp_path):
    """Only the repository holds assets/; in a wheel the list was an empty maximum, hence a traceback."""
    monkeypatch.setattr(show, "ASSETS", tmp_path / "assets")
    assert cli.main(["show", "models"]) == 0
    assert "Qwen3.5" in capsys.readouterr().out
    assert cli.main(["show", "models", "Qwen3.5"]) == 0
    assert "decoder layers, of which some have linear attention" in capsys.readouterr().out
