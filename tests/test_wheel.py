"""The project as a wheel: what is in it, and every command from a folder that is empty.

The commands of a case run one after the other in one interpreter, because starting one takes seconds.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from eval import benchmarks
from eval.config import ROOT
from scripts.dev.wheel import INSTALLED

pytestmark = pytest.mark.process
INCLUDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
PACKAGES = [name for name in INCLUDED if "." not in name]
RUN = """
import contextlib, io, json, sys
import eval
from eval import cli
def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    return code, out.getvalue(), err.getvalue()
sys.stdout.write(json.dumps([eval.__file__, *map(run, json.load(sys.stdin))]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git knows, unpacked."""
    if not (ROOT / ".git").exists():
        pytest.skip("only git knows which files belong to the project")
    source, made, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "made", "unpacked"))
    for name in tracked("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(made)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = made.glob("*.whl")
    zipfile.ZipFile(file).extractall(unpacked)
    return unpacked


def tracked(*paths: str) -> list[str]:
    """Files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


def answers(folder: Path, *paths: Path, commands: list[str]) -> list[tuple[object, str, str]]:
    """Exit code, output and errors of commands in a folder, of the packages below `paths`."""
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "MODEL": ""}
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    asked = json.dumps([shlex.split(command) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment, input=asked, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, *found = json.loads(done.stdout)
    assert Path(place).is_relative_to(paths[0]), "the packages are those of the wheel"
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    """Templates, pages' scripts and published values in folders without an __init__.py were not in it."""
    assert set(tracked(*PACKAGES)) <= files(wheel)


CHECKOUT = "needs a checkout: git clone "
TOY = "use a whole checkout of the repository, or install the toy wheel "
ARGUMENTS = "are required: "
LAB = "here; those of lab/ need a checkout."
# Command -> a part of its only sentence; every command of `vtr --help` that says one.
SENTENCES = {
    "eval --method full": TOY,
    "eval --method full --benchmark mmstar": TOY,
    "score": ARGUMENTS,
    "compare a b": "no folder a",
    "stats a b": "no folder a",
    "run-vlmeval consensusdrop 64 -- run.py": "there is no file 'run.py'",
    "report": "`vtr report FOLDER`",
    "leaderboard": ARGUMENTS,
    "submit check a --full b": "no folder b",
    "submit replay a --full b --output c": "no folder b",
    "recommend gqa": TOY,
    "bench turns --method full --budget 64": TOY,
    "gallery": TOY,
    "demo": TOY,
    "serve-client consensusdrop 64 --question what --image photo.png": TOY,
    "export prompts.safetensors consensusdrop 64 --question what --image photo.png": TOY,
    "check-data": TOY,
    "wandb sync": "no folder results",
    "wandb workspace": ARGUMENTS,
    "wandb report": ARGUMENTS,
    "tables paper consensusdrop/llava15_7b": TOY,
    "tables paper consensusdrop/llava15_7": "There is no table consensusdrop/llava15_7. Did you mean 'llava15_7b'?",
    "tables paper consensusdrop/llava15_7b --data data": "data folder data ",
    "tables paper tables/embedded_main --page": CHECKOUT,
    "bench latency --method full --budget 576": TOY,
    "findings attnmix": LAB,
    "bench growth": LAB,
    "tables methods": LAB,
    **{f"new {kind} name": CHECKOUT for kind in ("method", "benchmark", "family")},
    "new table paper/name": CHECKOUT,
    **{f"check {name}": CHECKOUT for name in ("method trim", "benchmark gqa", "family Gemma3")},
}
RIGHT = ["--help", "show methods", "show methods trim", "show benchmarks", "check table attnmix/llava15_7b"]


def test_every_command_says_in_an_empty_folder_what_it_needs(wheel, tmp_path):
    """Five of nineteen commands ended with a traceback, and `vtr new` left half a method in site-packages."""
    asked = [command.split()[:length] for command in (*SENTENCES, *RIGHT) for length in (1, 2)]
    assert not [name for name in INSTALLED if name.split() not in asked], "a command is in no case"
    before = files(wheel)
    found = answers(tmp_path, wheel, commands=[*RIGHT, *SENTENCES])
    assert [code for code, _, _ in found[: len(RIGHT)]] == [0] * len(RIGHT)
    for (command, part), (code, out, said) in zip(SENTENCES.items(), found[len(RIGHT) :], strict=True):
        assert code == 2 and part in said and said.count("\n") == 1 and not out, f"{command}: {code} {out} {said}"
    assert files(wheel) == before and not list(tmp_path.iterdir()), "nothing is written"


def test_the_toy_wheel_holds_the_models_that_its_data_are_asked_of():
    """`vtr eval --benchmark pope` found its questions there, and not its model."""
    toy = tomllib.loads((ROOT / "assets" / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    asked = {benchmarks.get(name).model for name in benchmarks.names()}
    asked -= {"tinyllava_video", "tinyllava_boxes"}  # whose data are left out
    assert set(*toy.values()) == {"eval/**", *(f"{model}/**" for model in asked)}


def test_the_toy_wheel_holds_a_set_whole_or_not_at_all(monkeypatch):
    """POPE's questions, in pope/coco/, were left out as if they were the folder of RefCOCO's pictures."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT / "assets")
    module = runpy.run_path("setup.py")
    taken = {}
    for file in (path for path in Path("eval").rglob("*") if path.is_file()):
        if not any(folder.is_symlink() for folder in file.parents):  # of shared pictures there are some
            folder = Path(*file.parts[: 4 if file.parts[1] == "hub" else 2])
            taken.setdefault(folder, set()).add(module["wanted"](file))
    assert all(len(answers) == 1 for answers in taken.values()), taken
    assert {folder for folder, answers in taken.items() if answers == {False}} <= {*module["LEFT_OUT"]}


def test_the_toy_wheel_is_found_and_results_go_below_the_current_folder(wheel, tmp_path):
    """Toy model and data were looked for in site-packages/assets, and tables went to site-packages/results."""
    toy, work = tmp_path / "site" / "visual_token_reduction_toy", tmp_path / "work"
    (toy / "eval").mkdir(parents=True)
    work.mkdir()
    (toy / "__init__.py").touch()
    (toy / "tinyllava").symlink_to(ROOT / "assets" / "tinyllava")
    (toy / "eval" / "gqa").symlink_to(ROOT / "assets" / "eval" / "gqa")
    table = "tables paper tables/embedded_main --limit 1 --methods divprune --budgets 64"
    before = files(wheel)
    lacking = [f"eval --method full --benchmark {name}" for name in ("mmstar", "pope")]
    *ran, mmstar, pope = answers(
        work, wheel, toy.parent, commands=["eval --method full --limit 1", table, "report", *lacking]
    )
    assert [code for code, _, _ in ran] == [0, 0, 0], ran
    for name, (code, _, said) in {"mmstar": mmstar, "pope": pope}.items():
        assert code == 2 and f"lacks {name}: " in said and "--data" in said
    assert (work / "results" / "gqa-testdev" / "tinyllava" / "full-576").is_dir() and (work / "report.html").is_file()
    csv = (work / "results" / "tables" / "tables" / "tinyllava-limit1-part" / "embedded_main.csv").read_text()
    assert "vtr eval --benchmark gqa --method divprune --budget 64 --model " in csv, "bash scripts/ is not there"
    assert files(wheel) == before
