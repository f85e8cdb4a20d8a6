"""Write the table of the official models' expected memory in docs/cluster.md.

    python -m lab.pages.memory

Everything is computed from the shapes of the modules (eval/efficiency/memory.py). No weight is read and nothing is
measured.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from eval.command import exit_on_user_error, make_parser
from eval.config import FULL
from eval.efficiency.estimate import Estimate, Spread, Workload
from eval.efficiency.memory import GIB, QuestionShape, figures, layout_of
from eval.efficiency.shapes import MODELS, official
from eval.tables import insert, markdown
from llava.places import WORK, check_checkout
from llava.reduction import registry

PAGE = WORK / "docs" / "cluster.md"
METHOD = "consensusdrop"
TEXT, NEW_TOKENS, BATCH = 64, 128, 8
# Visual tokens of an image -> the budgets of the papers' tables.
BUDGETS = {576: (192, 64), 2880: (640, 160), 2056: (136,), 1280: (320, 128)}


def expected(name: str, budget: int | None = None) -> Estimate:
    """The estimate of a batch in bfloat16.

    Args:
        budget: visual tokens per image; None for all.
    """
    model = official(name)
    reducer = registry.build(FULL if budget is None else METHOD, budget or model.visual_tokens)
    shape = QuestionShape(TEXT, (layout_of(model, size_of(name), video="Video" in name),))
    work = Workload((shape,), 0.0, BATCH, BATCH)
    return Estimate(model, reducer, work, BATCH, NEW_TOKENS, torch.bfloat16, device="cuda")


def size_of(name: str) -> tuple[int, int] | None:
    """Size of the largest image: for Qwen one of exactly 1,280 visual tokens, for the others None, their default."""
    return (28 * 40, 28 * 32) if name.startswith("Qwen") else None


def table(names: Sequence[str] = tuple(MODELS)) -> str:
    """The table: weights, and for each budget the cache, the activations, and the total of three ways to run."""
    rows = []
    for name in names:
        tokens = official(name).visual_tokens
        for budget in (None, *BUDGETS[tokens]):
            one = expected(name, budget)
            parts = one.weights.device
            found = one.activations
            two = replace(one, spread=Spread(tensor_parallel=2))
            outside = replace(one, spread=Spread(zero="cpu"))
            rows.append(
                [
                    name if budget is None else "",
                    f"{tokens:,} (all)" if budget is None else f"{budget:,}",
                    gib(one.weights.total) if budget is None else "",
                    gib(parts["vision tower"] + parts["projector"]) if budget is None else "",
                    gib(one.kv_bytes),
                    gib(max(found.vision, found.prefill, found.decode)),
                    gib(one.peak),
                    gib(two.peak),
                    gib(outside.peak),
                ]
            )
    header = ["model", "visual tokens", "weights", "of these tower, projector", "cache", "activations", "one GPU"]
    return markdown([*header, "each of two (`TP=2`)", "one, `--zero cpu`"], rows)


def gib(size: float) -> str:
    return figures(size / GIB)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.pages.memory", __doc__)
    parser.parse_args(arguments)
    check_checkout(parser.prog)
    insert(PAGE, "memory", table())
    print(f"The table is in {PAGE.relative_to(WORK)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
