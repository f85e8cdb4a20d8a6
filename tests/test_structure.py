"""The structure of the packages: who may import whom, what is installed, what one answer runs through."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_namespace_packages

from eval import cli
from eval.config import ROOT
from llava import __version__, errors
from scripts.dev import wheel
from scripts.dev.code_path import code_path

PACKAGES = ("llava", "eval", "lab", "baselines", "consensusdrop", "visiondrop", "attnmix")
METHODS = ("baselines", "consensusdrop", "visiondrop", "attnmix")
# A package imports those before it, never those after it.
LAYERS = ("errors", "reduction", "processing", "model", "pipeline", "hf")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str, everywhere: bool = False) -> frozenset[str]:
    """Modules of the project that a module imports when it is loaded; `everywhere`: also in functions and for types."""
    tree = ast.parse(modules()[module].read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules() else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(name for name in found if name in modules() and name != module)


def layer(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "llava" and len(parts) > 1 and parts[1] in LAYERS else None


def test_no_import_circle():
    """model, runtime and families imported each other, and so did reducer and states.

    Imports in functions and for the type checker count: five circles hid there.
    """
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for name in sorted(imports(module, everywhere=True)):
                visit(name, (*above, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("package", LAYERS)
def test_lower_layers_of_llava_import_no_higher_one(package):
    for module in modules():
        if module.split(".")[:2] == ["llava", package]:
            higher = [name for name in imports(module) if (layer(name) or 0) > LAYERS.index(package)]
            assert not higher, f"{module} imports {higher}"


def test_llava_knows_no_method_and_no_benchmark():
    for module in modules():
        if module.startswith("llava") and not module.startswith("llava.eval"):  # LLaVA's own names for our eval
            assert not [name for name in imports(module, True) if name.split(".")[0] in (*METHODS, "eval", "lab")], (
                module
            )


def test_the_core_knows_no_lab():
    """What serves this project's own pages and models was a third of `eval/`. A wheel holds none of it."""
    for module in modules():
        if module.partition(".")[0] != "lab" and module != "eval.cli":
            assert not [name for name in imports(module, True) if name.partition(".")[0] == "lab"], module
    assert imports("eval.cli", True) & {name for name in modules() if name.startswith("lab")} == {"lab.commands"}
    assert not [name for name in packages() if name.startswith("lab")]


def test_a_method_imports_llava_reduction_in_one_line_and_no_other_method():
    """merge_plan was imported from ConsensusDrop by VisionDrop, VisionZip and VScan."""
    for module, path in modules().items():
        package = module.split(".")[0]
        if package not in METHODS:
            continue
        for name in imports(module):
            own = name.split(".")[0] == package and (package != "baselines" or name.split(".")[1].startswith("_"))
            assert own or name == "llava.reduction", f"{module} imports {name}"
        lines = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert sum(node.module == "llava.reduction" for node in lines) <= 1, module


# The repository installs with pip, and its lists of packages agree with each other and with the imports.


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
PINS = {found.name: found for found in map(Requirement, filter(lambda line: line and line[0] != "#", LINES))}
NAME = PROJECT["project"]["name"]
CORE = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
LISTED = {name: list(map(Requirement, texts)) for name, texts in PROJECT["project"]["optional-dependencies"].items()}
# Extra -> its packages; those of an extra that it includes stand there.
EXTRAS = {name: [needed for needed in several if needed.name != NAME] for name, several in LISTED.items()}
# vLLM pins its own torch, so it has an environment of its own (scripts/serve_setup.sh).
DECLARED = [*CORE, *(needed for name in EXTRAS if name != "vllm" for needed in EXTRAS[name])]

# Packages that come with a declared one and are part of its interface.
WITH = {"huggingface_hub": "transformers", "tokenizers": "transformers", "pyarrow": "datasets"}
MODULES = metadata.packages_distributions()


def packages() -> list[str]:
    """The packages that a wheel holds, by setuptools' own rule."""
    return find_namespace_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])


def test_packages_are_named_one_by_one():
    """`pip install -e .` failed: "Multiple top-level packages discovered in a flat-layout"."""
    found = packages()
    assert {"llava", "consensusdrop", "visiondrop", "attnmix", "baselines", "eval", "eval.benchmarks"} <= set(found)
    assert not [name for name in found if name.split(".")[0] in ("tests", "docs", "assets", "scripts", "results")]


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
    assert f"in {tmp_path}/llava, hides " in done.stderr


@pytest.mark.parametrize("needed", DECLARED, ids=str)
def test_the_pinned_version_satisfies_pyproject(needed):
    pin = PINS[needed.name]
    version = str(pin.specifier).removeprefix("==")
    assert needed.specifier.contains(version), f"{pin} in requirements.txt, {needed} in pyproject.toml"


def test_the_repository_stays_small():
    """It travels to GPU machines; for those that take 64 MiB scripts/bench/sparse.txt leaves the toys' data out."""
    if not (ROOT / ".git").exists():
        pytest.skip("a copy without git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 87 * 2**20


def test_every_pin_is_exact_and_declared():
    assert {name for name, pin in PINS.items() if not str(pin.specifier).startswith("==")} == set()
    assert PINS.keys() == {needed.name for needed in DECLARED}
    included = next(needed.extras for needed in LISTED["dev"] if needed.name == NAME)
    assert included == LISTED.keys() - {"dev", "vllm"}, "the tests need all but the server"
    assert PROJECT["project"]["scripts"] == {"vtr": "eval.cli:main"} and callable(cli.main)


def of_module(name: str) -> set[str]:
    """The packages that a module may belong to."""
    return {text.lower().replace("_", "-") for text in MODULES.get(name, [name])} | {WITH.get(name, name)}


@pytest.mark.parametrize("folder", PACKAGES)
def test_imported_libraries_are_declared(folder):
    """An undeclared import works on the developer's machine and fails after `pip install`."""
    declared = {needed.name.lower().replace("_", "-") for needed in DECLARED}
    own = {*PACKAGES, "tests"}
    # Asked for with a sentence where they are used, or imported by vLLM alone.
    optional = {"bitsandbytes", "lmms_eval", "loguru", "flash_attn", "vllm", "vlmeval"}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path.read_text()) - own - optional - sys.stdlib_module_names:
            assert of_module(name) & declared, (
                f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not list"
            )


def test_a_missing_package_names_the_extra_that_brings_it():
    """`from llava import reduce` needed 28 packages; those that are optional now are listed in llava/errors.py, too."""
    told = {extra: {package for name in names for package in of_module(name)} for extra, names in errors.EXTRAS.items()}
    for extra, names in told.items():
        listed = {needed.name for needed in EXTRAS[extra]}
        assert listed <= names, f"{extra}: llava/errors.py lacks {listed - names}"
        for name in errors.EXTRAS[extra]:
            assert of_module(name) & listed, f"{extra} does not bring {name}"
            assert errors.PACKAGES.get(name, name) in of_module(name)
    assert told.keys() == EXTRAS.keys() - {"dev", "vllm"}


def imported(source: str) -> set[str]:
    """Top-level names of the absolute imports of a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_versions_of_packages_citation_and_changes_agree():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    toy = tomllib.loads((ROOT / "assets" / "pyproject.toml").read_text())["project"]["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llava.__version__"}
    assert cited and cited[1] == toy == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# Takes the modules named by the first argument out of the environment, for the project as for its libraries.
WITHOUT = """
import sys
hidden = set(sys.argv.pop(1).split(","))
class Finder:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Finder, sys.meta_path)
"""
OPTIONAL = {name for names in errors.EXTRAS.values() for name in names}
OF_CORE = {"filelock", "jinja2", "yaml"}  # come with torch and transformers


def without(hidden: set[str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + program, ",".join(hidden), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.process
def test_reduce_runs_with_the_core_alone():
    """`from llava import reduce` needed sentencepiece, and an installation 27 packages."""
    image = "assets/eval/gqa/data/images/test00012d.jpg"
    done = without(OPTIONAL - OF_CORE, wheel.REDUCE, "assets/tinyllava", image)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.process
def test_a_command_without_its_extra_is_one_sentence_and_its_version_needs_no_torch():
    program = "from eval.cli import main\ncodes = main(['--version']), main(['compare', 'a', 'b'])\nprint(codes)"
    done = without({"torch", "scipy"}, program)
    head = f"visual-token-reduction {__version__}, "
    assert done.returncode == 0 and done.stdout.startswith(head) and done.stdout.endswith("(0, 2)\n"), done.stderr
    assert f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}" in done.stdout
    assert done.stderr == (
        'This needs the package scipy, which is not installed; pip install "visual-token-reduction[eval]" brings it.\n'
    )


def test_only_absent_packages_of_extras_become_a_sentence():
    absent, broken = (
        r"pyyaml, which is not installed; .*\[eval\]",
        r"av, which cannot be imported \(no libav\); .*\[eval\]",
    )
    with pytest.raises(errors.UserError, match=absent), errors.optional_imports():
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
    with pytest.raises(errors.UserError, match=broken), errors.optional_imports("av"):
        raise ImportError("no libav")
    with pytest.raises(ImportError, match="a fault of our own"), errors.optional_imports():
        raise ImportError("a fault of our own", name="eval.score")


def test_the_trial_of_the_wheel_runs_every_command():
    assert wheel.CALLS.keys() == wheel.INSTALLED


# The code inside one answer.


@pytest.mark.parametrize("method", ["full", "fastervlm", "consensusdrop", "fastv"])
def test_one_whole_image_meets_no_code_for_tiles(method):
    """Every image went through the code of tiles, frames and budgets over them."""
    functions = code_path(method, None if method == "full" else 80).functions
    files = {Path(file).name for file, _ in functions}
    assert not files & {"views.py", "video.py", "llava_next.py"}
    assert any(name == "Stages.reduce_between_layers" for _, name in functions) == (method == "fastv")
