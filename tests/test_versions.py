"""Other versions of libraries: what is private in transformers stands in one module, what was tested in one place.

`scripts/dev/versions.sh` runs these tests with other versions, the weekly check of .github/workflows with the newest.
"""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from inspect import signature

import pytest
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.requirements import Requirement
from torch import nn
from transformers import (
    GenerationMixin,
    LlamaModel,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLTextModel,
)

from eval.config import ROOT
from llava import reduce
from llava import transformers_names as names
from llava.errors import UserError
from llava.versions import TESTED, minor, note_untested
from tests.stock_inputs import shared
from tests.test_structure import modules

OWNERS = {
    names.EXPAND: GenerationMixin,
    names.PREPARE_POSITIONS: GenerationMixin,
    names.CANDIDATES: GenerationMixin,
    names.DEEPSTACK: Qwen3VLTextModel,
    names.KERNEL: PretrainedConfig,
    names.RANKS: PreTrainedModel,
    names.HOOK: add_hook_to_module(nn.Identity(), ModelHook()),
}


def test_no_private_name_is_gone():
    """What is imported is missed at once; a method or an attribute that has another name would be found late."""
    layer = shared("llava").model.model.language_model.layers[0]
    gone = [name for name, owner in OWNERS.items() if not hasattr(owner, name)]
    for part in (LlavaForConditionalGeneration, LlamaModel, type(layer), type(layer.self_attn)):
        if names.CACHE not in signature(part.forward).parameters:
            gone.append(f"{names.CACHE} of {part.__name__}.forward")
    assert not gone


def test_private_names_stand_in_one_module():
    """They were spread over fifteen files, so that one renamed argument broke five places in five ways."""
    private, found = {*OWNERS, *names.CACHE_NAMES[1:]}, []
    for name, path in modules().items():
        if name == names.__name__:
            continue
        # LLaVA's own `forward` has an argument of this name.
        sought = private - {"past_key_values"} if name == "llava.hf.interface" else private
        for node in ast.walk(ast.parse(path.read_text())):
            used = [getattr(node, field, None) for field in ("attr", "arg", "id", "value")]
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = any(module and module.startswith("transformers.") for module in imported)
            if inside or any(isinstance(one, str) and one in sought for one in used):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_a_model_without_a_method_to_override_is_refused(monkeypatch):
    """The error came in the middle of entering the context, and what was overridden before it stayed so."""
    model = shared("llava").model
    monkeypatch.delattr(GenerationMixin, names.CANDIDATES)
    with pytest.raises(UserError, match=names.CANDIDATES), reduce(model, "full"):
        pass
    assert "forward" not in vars(model)


# What was tested


def test_every_place_names_the_same_versions():
    """The page about clusters said up to 5.23, and pip installed transformers 5.24, with which `reduce` failed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {one.name: str(one.specifier) for one in map(Requirement, project["dependencies"])}
    assert project["requires-python"] == f">={TESTED['python'][0]}"
    assert all(f">={TESTED[name][0]}" in needed[name].split(",") for name in ("torch", "transformers"))
    ends = [end for one in TESTED.values() for end in one]
    ranges = "Python {} to {}, torch {} to {}, transformers {} to {}".format(*ends)
    for page in ("README.md", "docs/cluster.md"):
        assert ranges in " ".join((ROOT / page).read_text().split()), f"{page} should say: {ranges}"
    (lowest, highest), extra = TESTED["vllm"], Requirement(*project["optional-dependencies"]["vllm"])
    page = " ".join((ROOT / "docs" / "models" / "serving.md").read_text().split())
    assert f"vLLM {lowest} to {highest}" in page and f"gets transformers {TESTED['transformers'][0]}," in page
    assert f">={lowest}" in str(extra.specifier) and f"{highest}.99" in extra.specifier
    assert f"{minor(highest)[0]}.{minor(highest)[1] + 1}.0" not in extra.specifier
    assert "llava.versions" in (ROOT / "scripts" / "serve_setup.sh").read_text()
    script = (ROOT / "scripts" / "dev" / "versions.sh").read_text()
    assert "llava.versions" in script and not re.search(r"\{[2-4]:-[\w.]*\d", script)


@pytest.mark.parametrize(
    ("package", "version", "noted"),
    [
        ("transformers", "5.18.1", True),
        ("transformers", "5.19.0", False),
        ("transformers", "5.24.9.dev0", False),
        ("transformers", "5.100.0", True),
        ("torch", "2.13.0+cu130", False),
        ("torch", "2.14.1", False),
        ("torch", "2.14a0+git1", False),  # a build from source, and a release candidate
        ("transformers", "6.0rc1", True),
        ("torch", "2.15.0", True),
        ("vllm", "0.32.1+cpu", False),
        ("vllm", "0.25.1", True),
    ],
)
def test_a_version_that_was_not_tested_is_noted(package, version, noted):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        note_untested(package, version)
    assert [version in str(one.message) and TESTED[package][1] in str(one.message) for one in found] == [True] * noted


@pytest.mark.process
def test_the_note_comes_once_and_nothing_is_refused():
    code = "from llava import versions; versions.TESTED['transformers'] = '4.1', '4.2'; from llava import load, reduce"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("transformers 4.1 to 4.2 were tested") == 1
