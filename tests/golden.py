"""Golden kept indices and limits of dispatched operations, of every method.

    python -m tests.golden METHOD     # writes its rows of tests/data/golden.json and tests/data/operations.json anew
    python -m tests.golden            # writes all rows; do either only when the change is intended

golden.json holds what a method keeps of 20 seeded images on the tiny random model. A difference means that answers
change: raise the method's `version` then. operations.json holds how many operations a prefill of the bundled model may
dispatch above its oracle (tests/test_dispatched.py).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from eval.efficiency.counts import calls_of
from eval.efficiency.oracle import Oracle, oracle_of
from eval.efficiency.shapes import noise
from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.reducer import Reducer
from tests import contract
from tests.conftest import QUESTIONS, drawn_image
from tests.tiny_checkpoints import save_transformers_layout

FILE = Path(__file__).parent / "data" / "golden.json"
LIMITS = FILE.with_name("operations.json")
BUDGET = 128  # methods meet it on the bundled model with default options, but for these
OTHER_BUDGETS = {"feather": 192}  # all 576 tokens enter a quarter of the layers
OPTIONS = {"ivcprune": {"schedule": "kept"}}  # all 576 tokens enter half of the layers
# Loops that compare near ties or read rows ahead dispatch a few operations more or less by the last bits, which differ
# between processors. So operations are counted on this many copies of the model with disturbed weights, too, and a
# limit is the highest count and room for three.
COPIES, NOISE, ROOM = 6, 1e-5, 3
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
    batch = [Sample(f"g{i}", QUESTIONS[i % len(QUESTIONS)], image=drawn_image(1000 + i)) for i in range(CASES)]
    _, record = prefill(model, batch, reducer)
    return [[step.reduction.kept[0].tolist() for step in steps] for steps in record.steps]


def all_kept(model: Llava, name: str) -> dict[str, list]:
    found = {}
    for budget, options in settings(name):
        label = f"{budget}" + "".join(f" {key}={value}" for key, value in options.items())
        if (lists := kept(model, name, budget, options)) is not None:
            found[label] = lists
    return found


def method(name: str, tokens: int) -> Reducer:
    """With the budget of the limits; `full` keeps all tokens."""
    budget = tokens if name == "full" else OTHER_BUDGETS.get(name, BUDGET)
    return registry.build(name, budget, OPTIONS.get(name, {}))


def question() -> list[Sample]:
    """One question about one image of noise.

    In an image of one colour patches differ by rounding alone, and SCOPE's loop dispatches operations per near tie: 41
    or 47 in all, depending on the processor.
    """
    return [Sample("q", "What color is the square?", "Answer with one word.", noise(0))]


def disturbed(seed: int) -> Llava:
    """The bundled model with relative noise in every weight."""
    model, generator = load(device="cpu"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.hf_model.parameters():
            weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
    return model


def counted_oracle(model: Llava, reducer: Reducer, asked: list[Sample]) -> Oracle:
    """The oracle of a method; without a plan, with the tokens of the one image that is asked about."""
    state, record = prefill(model, asked, reducer)
    return oracle_of(reducer, model.spec, record.accounting(state)[0].tokens_per_layer)


def above_oracle(model: Llava, name: str) -> int:
    """Operations of a prefill above those of the oracle with the same tokens per layer."""
    reducer = method(name, model.visual_tokens)
    own, oracle = (calls_of(model, one, question()) for one in (reducer, counted_oracle(model, reducer, question())))
    return len(own) - len(oracle)


def limit(models: Sequence[Llava], name: str) -> int:
    """0 where nothing is dispatched above the oracle."""
    most = max(above_oracle(model, name) for model in models)
    return most + ROOM if most else 0


def main(names: Sequence[str]) -> None:
    """Write the rows of some methods, or of all."""
    chosen = names or contract.METHODS
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        save_transformers_layout(Path(folder) / "tiny", text_tower=True)
        model = load(Path(folder) / "tiny", device="cpu")
        golden = {name: all_kept(model, name) for name in chosen if name not in ("full", "downsample")}
    models = [load(device="cpu"), *map(disturbed, range(COPIES))]
    for path, rows in ((FILE, golden), (LIMITS, {name: limit(models, name) for name in chosen})):
        rows = dict(sorted((json.loads(path.read_text()) | rows if names else rows).items()))
        lines = [f" {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"Wrote {path}.")


if __name__ == "__main__":
    main(sys.argv[1:])
