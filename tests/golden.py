"""Golden kept indices: what every method keeps of 20 seeded pictures on the tiny random model.

    python -m tests.golden     # writes tests/data/golden.json anew; do so only when a change of answers is intended

A difference means that answers change: raise the method's `version` then.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction import registry
from tests.conftest import QUESTIONS, picture
from tests.tiny_checkpoints import save_transformers_layout

FILE = Path(__file__).parent / "data" / "golden.json"
BUDGETS = (8, 12)
CASES = 20


def settings(name: str) -> list[tuple[int, dict[str, str]]]:
    """Budgets and options to keep an eye on: the defaults, and the release where a method has one of its own."""
    official = [{"official": "true"}] if "official" in registry.options_of(registry.method(name)) else []
    return [(budget, options) for budget in BUDGETS for options in [{}, *official]]


def kept(model: Llava, name: str, budget: int, options: dict[str, str]) -> list[list[list[int]]] | None:
    """[case][step] -> anchors; None where the method refuses."""
    reducer = registry.build(name, budget, options)
    try:
        reducer.check(model.spec)
    except UserError:
        return None
    batch = [Sample(f"g{i}", QUESTIONS[i % len(QUESTIONS)], image=picture(1000 + i)) for i in range(CASES)]
    _, record = prefill(model, batch, reducer)
    return [[step.reduction.kept[0].tolist() for step in steps] for steps in record.steps]


def all_kept(model: Llava, name: str) -> dict[str, list]:
    found = {}
    for budget, options in settings(name):
        label = f"{budget}" + "".join(f" {key}={value}" for key, value in options.items())
        if (lists := kept(model, name, budget, options)) is not None:
            found[label] = lists
    return found


def main() -> None:
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        save_transformers_layout(Path(folder) / "tiny", text_tower=True)
        model = load(Path(folder) / "tiny", device="cpu")
        everything = {name: all_kept(model, name) for name in registry.names() if name not in ("full", "downsample")}
    lines = [f" {json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in everything.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"Wrote {FILE}.")


if __name__ == "__main__":
    main()
