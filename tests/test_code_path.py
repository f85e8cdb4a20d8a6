"""The count of the code inside one answer, and that one whole image meets no code for tiles."""

import sys
from pathlib import Path

import pytest

from scripts.dev.code_path import code_path, main, trace

ONE = """from two import inner


def outer():
    return sum(inner(k) for k in range(3)) + helper()


def helper():
    return 0
"""
TWO = """def inner(k):
    return k
"""


def test_functions_files_and_calls_between_files_of_a_planted_call(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "two.py").write_text(TWO)
    monkeypatch.syspath_prepend(tmp_path)
    import one

    found = trace(one.outer, tmp_path)
    assert found.functions == {("one.py", "outer"), ("one.py", "helper"), ("two.py", "inner")}
    assert found.files == {"one.py", "two.py"} and found.crossings == 3
    assert sys.getprofile() is None
    del sys.modules["one"], sys.modules["two"]


@pytest.mark.parametrize("method", ["full", "fastervlm", "consensusdrop", "fastv"])
def test_one_whole_image_meets_no_code_for_tiles(method):
    """Every image went through the code of tiles, frames and budgets over them."""
    functions = code_path(method, None if method == "full" else 80).functions
    files = {Path(file).name for file, _ in functions}
    assert not files & {"views.py", "video.py", "llava_next.py"}
    assert any(name == "Stages.reduce_between_layers" for _, name in functions) == (method == "fastv")


def test_the_command_prints_one_line(capsys):
    assert main(["fastervlm", "64"]) == 0
    assert capsys.readouterr().out.startswith("fastervlm: ")
