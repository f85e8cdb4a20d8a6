"""The repository installs with pip, and its lists of packages agree with each other and with the imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

from eval import cli
from eval.config import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
PINS = {found.name: found for found in map(Requirement, filter(lambda line: line and line[0] != "#", LINES))}
EXTRAS = PROJECT["project"]["optional-dependencies"]
INSTALLED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
DECLARED = [*INSTALLED, *(Requirement(text) for extra in EXTRAS.values() for text in extra)]

# Packages that come with a declared one and are part of its interface.
WITH = {"huggingface_hub": "transformers", "tokenizers": "transformers", "pyarrow": "datasets"}


def packages() -> list[str]:
    """The packages that a wheel holds, by setuptools' own rule."""
    return find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])


def test_packages_are_named_one_by_one():
    """`pip install -e .` failed: "Multiple top-level packages discovered in a flat-layout"."""
    found = packages()
    assert {"llava", "consensusdrop", "visiondrop", "attnmix", "baselines", "eval", "eval.benchmarks"} <= set(found)
    assert not [name for name in found if name.split(".")[0] in ("tests", "docs", "assets", "scripts", "results")]


def test_every_folder_with_code_is_in_a_package():
    """A folder without __init__.py runs from the checkout and is missing in the wheel."""
    found = set(packages())
    for top in {name for name in found if "." not in name}:
        folders = {path.parent for path in (ROOT / top).rglob("*.py")}
        assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= found


def test_files_that_code_reads_are_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for top in {name for name in packages() if "." not in name}:
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(path.match(pattern) for pattern in patterns), f"{path} is not in the wheel"


@pytest.mark.parametrize("module", ["eval.cli", "eval"])
def test_another_llava_is_told_in_a_sentence(tmp_path, module):
    """With LLaVA's own package installed, `vtr` ended in "No module named 'llava.errors'"."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("from .model import LlavaLlamaForCausalLM\n")
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"in {tmp_path}/llava, hides the one of this repository; uninstall it (pip uninstall llava)" in done.stderr


@pytest.mark.parametrize("needed", DECLARED, ids=str)
def test_the_pinned_version_satisfies_pyproject(needed):
    pin = PINS[needed.name]
    version = str(pin.specifier).removeprefix("==")
    assert needed.specifier.contains(version), f"{pin} in requirements.txt, {needed} in pyproject.toml"


def test_every_pin_is_exact_and_declared():
    assert {name for name, pin in PINS.items() if not str(pin.specifier).startswith("==")} == set()
    assert PINS.keys() == {needed.name for needed in DECLARED}
    assert set(EXTRAS["toy"]) <= set(EXTRAS["dev"]), "tests of the toy models need what training them needs"
    assert PROJECT["project"]["scripts"] == {"vtr": "eval.cli:main"} and callable(cli.main)


@pytest.mark.parametrize("folder", sorted({name.split(".")[0] for name in packages()}))
def test_imported_libraries_are_declared(folder):
    """An undeclared import works on the developer's machine and fails after `pip install`."""
    modules = metadata.packages_distributions()
    extras = EXTRAS["toy"] if folder == "toy" else ()
    declared = {needed.name.lower() for needed in [*INSTALLED, *map(Requirement, extras)]}
    demo = {Requirement(text).name for text in EXTRAS["demo"]}
    own = {name.split(".")[0] for name in packages()} | {"tests"}
    optional = {"bitsandbytes", "lmms_eval", "loguru", "flash_attn"}  # asked for with a sentence where they are used
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path.read_text()) - own - optional - sys.stdlib_module_names:
            names = {text.lower().replace("_", "-") for text in modules.get(name, [name])}
            names |= {WITH.get(name, name)}
            own_extra = demo if "eval/pages/demo" in path.as_posix() else set()
            assert names & (declared | own_extra), (
                f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not list"
            )


def imported(source: str) -> set[str]:
    """Top-level names of the absolute imports of a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_versions_of_package_and_citation_agree():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert cited and cited[1] == PROJECT["project"]["version"] and f"## [{cited[1]}]" in changes
