"""Published claims of speed beside what is counted and measured here: the ledger of docs/efficiency.md.

    python -m eval.efficiency.claims            # print it
    python -m eval.efficiency.claims --write    # and put it into docs/efficiency.md

Operations and cache bytes are counted at full depth on the meta device, which computes shapes alone. The claims are in
eval/papers/claims.yaml.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from eval.command import exit_on_user_error, make_parser
from eval.config import FULL, ROOT
from eval.efficiency.counts import Computed, computed
from eval.efficiency.latency import reading_of
from eval.efficiency.shapes import noise_batches, random_llava
from eval.papers import read_yaml
from eval.papers.published import Trust
from eval.tables.page import insert, markdown
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry

CLAIMS = ROOT / "eval" / "papers" / "claims.yaml"
PAGE = ROOT / "docs" / "efficiency.md"

Status = Literal["empirical", "extrapolated", "open"]
Quantity = Literal["flops", "flops_saved", "tflops", "tflops_full", "kv", "kv_mb", "kv_mb_full"]
UNITS: dict[Quantity, str] = {
    "flops": "{:.2f} times fewer operations",
    "flops_saved": "{:.1f} % fewer operations",
    "tflops": "{:.2f} TFLOP",
    "tflops_full": "{:.2f} TFLOP for full",
    "kv": "{:.2f} times smaller cache",
    "kv_mb": "{:.1f} MB of keys and values",
    "kv_mb_full": "{:.1f} MB of keys and values for full",
}


class Check(BaseModel):
    """What is counted to answer a claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: str
    method: str
    budget: int
    quantity: Quantity
    options: dict[str, str] = {}


class Claim(BaseModel):
    """One published claim.

    Attributes:
        published: the number as printed; None where none is known.
        ours: what was measured, where it is no count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    """The claims of the file.

    Raises:
        UserError: it is not in the expected form, or names a claim twice.
    """
    try:
        found = [Claim.model_validate(entry) for entry in read_yaml(path)["claims"]]
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of claims: {' '.join(str(error).split())}.") from None
    names = [claim.id for claim in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names {', '.join(twice)} twice; give every claim its own id.")
    return found


@functools.lru_cache(maxsize=2)
def empty_model(shape: str) -> Llava:
    """A model of full depth without memory, which reads images as the tables of papers do."""
    return random_llava(shape, 1, "bfloat16", device=torch.device("meta"), **reading_of(shape, {}))


@functools.cache
def computed_by(shape: str, method: str, budget: int | None, options: tuple[tuple[str, str], ...]) -> Computed:
    """What one question computes and holds; budget None is all tokens."""
    model = empty_model(shape)
    reducer = registry.build(method, budget or model.visual_tokens, dict(options))
    return computed(model, reducer, noise_batches(model, 1, False)(0))


def answer(check: Check) -> float:
    """The counted quantity of a check."""
    full = computed_by(check.shape, FULL, None, ())
    ours = computed_by(check.shape, check.method, check.budget, tuple(sorted(check.options.items())))
    caches = sum(full.kv_bytes_per_layer), sum(ours.kv_bytes_per_layer)
    return {
        "flops": full.flops / ours.flops,
        "flops_saved": 100 * (1 - ours.flops / full.flops),
        "tflops": ours.flops / 1e12,
        "tflops_full": full.flops / 1e12,
        "kv": caches[0] / caches[1],
        "kv_mb": caches[1] / 1e6,
        "kv_mb_full": caches[0] / 1e6,
    }[check.quantity]


def ledger(claims: Sequence[Claim]) -> str:
    """The claims as a table."""
    rows = []
    for claim in claims:
        ours = claim.ours or "nothing yet"
        if claim.check is not None:
            ours = f"{UNITS[claim.check.quantity].format(answer(claim.check))}, counted"
        rows.append([claim.claim, f"{claim.source} (trust {claim.trust})", ours, claim.status, claim.note])
    return markdown(["claim", "source", "here", "status", "note"], rows).replace("---:", "---")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.claims", __doc__)
    parser.add_argument("--write", action="store_true", help="put the ledger into docs/efficiency.md")
    args = parser.parse_args(arguments)
    table = ledger(read())
    print(table)
    if args.write:
        insert(PAGE, "claims", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
