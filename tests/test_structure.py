"""The structure of the packages: who may import whom, how large folders and files may be."""

import ast
from functools import cache
from pathlib import Path

import pytest

from eval.config import ROOT

PACKAGES = ("llava", "eval", "toy", "baselines", "consensusdrop", "visiondrop", "attnmix")
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
        if module.startswith("llava"):
            assert not [name for name in imports(module, True) if name.split(".")[0] in (*METHODS, "eval", "toy")], (
                module
            )


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
