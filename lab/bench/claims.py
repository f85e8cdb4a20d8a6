"""Compare published claims of speed with what is counted and measured here, for docs/efficiency.md.

    python -m lab.bench.claims            # print it
    python -m lab.bench.claims --write    # and put it into docs/efficiency.md

Operations and cache bytes are counted at full depth on the meta device, which computes shapes only. The claims are in
lab/bench/claims.yaml.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator

from eval.command import exit_on_user_error, make_parser
from eval.config import FULL
from eval.efficiency.counts import Computed, computed
from eval.efficiency.shapes import noise_batches, random_llava, reading_of
from eval.papers.published import Trust
from eval.tables import insert, left_aligned, markdown
from eval.yaml_files import Part, read_yaml
from llava.places import WORK, check_checkout
from llava.reduction import registry

CLAIMS = Path(__file__).with_name("claims.yaml")
PAGE = WORK / "docs" / "efficiency.md"

Status = Literal["empirical", "extrapolated", "open"]
Quantity = Literal["flops", "flops_saved", "tflops", "kv"]
# How each quantity is written, and how it is computed from the counts of full and of the method.
QUANTITIES: dict[Quantity, tuple[str, Callable[[Computed, Computed], float]]] = {
    "flops": ("{:.2f} times fewer operations", lambda full, ours: full.flops / ours.flops),
    "flops_saved": ("{:.1f} % fewer operations", lambda full, ours: 100 * (1 - ours.flops / full.flops)),
    "tflops": ("{:.2f} TFLOP", lambda full, ours: ours.flops / 1e12),
    "kv": ("{:.2f} times smaller cache", lambda full, ours: full.kv_bytes / ours.kv_bytes),
}


class Check(Part):
    """What is counted to check a claim."""

    shape: str
    method: str
    budget: int
    quantity: Quantity
    options: Mapping[str, str] = {}


class Claim(Part):
    """One published claim.

    Attributes:
        published: the number as printed; None if none is known.
        ours: what was measured here, if the claim is not checked by counting.
    """

    id: str
    claim: str
    source: str
    trust: Trust
    status: Status
    published: float | None = None
    check: Check | None = None
    ours: str | None = None
    note: str

    @model_validator(mode="after")
    def answered(self) -> "Claim":
        if (self.status == "open") == bool(self.check or self.ours):
            raise ValueError(f"{self.id} should have a check or a measured number unless it is open, and none if it is")
        return self


def read(path: Path = CLAIMS) -> list[Claim]:
    """The claims of the file."""
    return [Claim.model_validate(entry) for entry in read_yaml(path)["claims"]]


@functools.cache
def computed_by(shape: str, method: str, budget: int | None, options: tuple[tuple[str, str], ...]) -> Computed:
    """What one question computes and holds. Budget None keeps all tokens."""
    model = random_llava(shape, 1, device=torch.device("meta"), **reading_of(shape))
    reducer = registry.build(method, budget or model.visual_tokens, dict(options))
    return computed(model, reducer, noise_batches(model, 1, False)(0))


def answer(check: Check) -> float:
    """The counted quantity of a check."""
    full = computed_by(check.shape, FULL, None, ())
    ours = computed_by(check.shape, check.method, check.budget, tuple(sorted(check.options.items())))
    return QUANTITIES[check.quantity][1](full, ours)


def ledger(claims: Sequence[Claim]) -> str:
    """The claims as a table."""
    rows = []
    for claim in claims:
        ours = claim.ours or "nothing yet"
        if claim.check is not None:
            ours = f"{QUANTITIES[claim.check.quantity][0].format(answer(claim.check))}, counted"
        rows.append([claim.claim, f"{claim.source} (trust {claim.trust})", ours, claim.status, claim.note])
    return left_aligned(markdown(["claim", "source", "here", "status", "note"], rows))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.bench.claims", __doc__)
    parser.add_argument("--write", action="store_true", help="put the ledger into docs/efficiency.md")
    args = parser.parse_args(arguments)
    if args.write:
        check_checkout(f"{parser.prog} --write")
    table = ledger(read())
    print(table)
    if args.write:
        insert(PAGE, "claims", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
