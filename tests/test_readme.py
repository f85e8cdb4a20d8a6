"""The examples of the README run as they are printed, and what it counts and names is what there is."""

import re
from pathlib import Path

from PIL import Image

from eval.tables import methods
from llava.reduction import registry

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "assets" / "tinyllava"
IMAGE = ROOT / "assets" / "eval" / "pope" / "val2014" / "test00042d.jpg"  # of the first question of its POPE


def block(mark: str) -> str:
    """The Python block of the README that contains `mark`."""
    found = [
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if mark in code
    ]
    assert len(found) == 1
    return found[0]


def test_the_reduce_example_runs_on_the_toy_model(capsys):
    """From disk, with AutoProcessor: the toy model once shipped no processor_config.json, and the example failed."""
    code, hub = block("from llava import reduce"), "llava-hf/llava-1.5-7b-hf"
    assert len(list(filter(None, code.splitlines()))) <= 8 and hub in code and "What is this?" in code
    question = "Is there a pink square in the image?\\nAnswer the question using a single word or phrase."
    names = {"image": Image.open(IMAGE)}
    exec(code.replace(hub, str(TOY)).replace("What is this?", question), names)
    (account,), output = names["reduced"].accounting, names["output"][0]
    assert capsys.readouterr().out.strip() == str(account.tokens_per_layer)
    assert account.visual_tokens == 576 and account.mean == 64
    answer = names["processor"].decode(output, skip_special_tokens=True).rpartition("ASSISTANT:")[2]
    assert answer.strip().lower() in ("yes", "no")


def test_methods_and_benchmarks_are_counted():
    """A new one left both numbers, and the list of methods, as they were."""
    text = (ROOT / "README.md").read_text()
    listed = re.search(r"\*\*(\d+) \[methods\]\(docs/methods\.md\)\*\*.*?\): (.*?)\n\n", text, re.DOTALL)
    assert listed and set(re.findall("`([a-z0-9_]+)`", listed[2])) == set(registry.names())
    assert int(listed[1]) == len(registry.names())
    counted = re.search(r"\*\*(\d+) \[benchmarks\]\(docs/evaluation\.md#benchmarks\)\*\*", text)
    sections = (ROOT / "docs" / "evaluation.md").read_text().partition("<!-- begin data -->")[2].count("\n### ")
    assert counted and int(counted[1]) == sections, "docs/evaluation.md has a section per benchmark"


def test_the_page_of_methods_is_up_to_date():
    """A method could be changed or added without its row."""
    text, hint = methods.PAGE.read_text(), "run `vtr tables methods`"
    for part in (methods.table, methods.budgets, methods.known_deviations, methods.splits):
        assert part() in text, hint
