"""Every benchmark has its script and its section in docs/benchmarks.md."""

import subprocess

import pytest

from eval import benchmarks
from eval.config import ROOT
from lab.pages import benchmarks as pages

pytestmark = pytest.mark.lab

NAMES = [benchmark.name for benchmark in pages.reported()]


@pytest.mark.parametrize("name", NAMES)
def test_script_asks_its_own_benchmark_and_explains_itself(name):
    script = ROOT / "scripts" / "eval" / f"{name}.sh"
    assert f'/../benchmark.sh" {name} "$@"' in script.read_text()
    shown = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and f"bash scripts/eval/{name}.sh METHOD [BUDGET]" in shown.stderr


def test_there_is_no_script_without_a_benchmark():
    scripts = {path.stem for path in (ROOT / "scripts" / "eval").glob("*.sh")}
    assert scripts == set(NAMES)


def test_pages_are_up_to_date():
    assert pages.data_sections() in pages.PAGE.read_text(), "run `vtr tables benchmarks pages`"


@pytest.mark.parametrize("name", benchmarks.names())
def test_benchmark_is_described(name):
    found = benchmarks.get(name)
    assert found.name == name and found.summary.endswith(".") and found.licence
    assert found.needs or found.mirror, "nobody could get the data"
    assert set(found.split_files) <= set(found.splits)
    assert (ROOT / "assets" / found.model / "config.json").is_file()
    assert bool(found.published) == bool(found.published_by)
