"""The lines of code that the README promises run as they stand there."""

import re
from pathlib import Path

from tests.conftest import picture
from tests.stock_inputs import stock

README = Path(__file__).resolve().parent.parent / "README.md"


def block(mark: str) -> str:
    """The Python block of the README that contains `mark`."""
    found = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if mark in code]
    assert len(found) == 1
    return found[0]


def test_reduce_runs_around_a_model_of_transformers(capsys):
    """On a tiny model of 16 visual tokens; only the budget is another than in the README."""
    tiny = stock("llava")

    class Processor:
        """The library's processor behind the call that the README shows."""

        def __call__(self, images, text, return_tensors):
            assert return_tensors == "pt"
            return Inputs(tiny.prepare([text], [images]))

    class Inputs(dict):
        def to(self, device):
            return self

    code = block("from llava import reduce")
    assert len(code.strip().splitlines()) <= 10 and "budget=64" in code
    names = {"model": tiny.model, "processor": Processor(), "image": picture(0), "prompt": "USER: <image> where is it"}
    exec(code.replace("budget=64", "budget=6"), names)
    assert capsys.readouterr().out.strip() == str((6,) * 4)
    assert names["output"].shape[0] == 1 and names["reduced"].audits[0].visual_tokens == 16
