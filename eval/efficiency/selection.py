"""Time greedy choices beside their reference in torch: what selection alone costs as images grow.

    python -m eval.efficiency.selection
    python -m eval.efficiency.selection --tokens 11520 --repeats 1

The tokens are drawn: a smooth field, as neighbouring patches of an image are alike, and noise. Both forms begin with
the same tokens and take turns, so that a busy machine slows both; times are of the processor, and medians.
Memory is the highest resident size above that at the start, of a first run of each form.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.command import exit_on_user_error, make_parser, value
from eval.config import count
from eval.efficiency.dispatched import Calls
from eval.efficiency.latency.memory_peak import read_peak, start_peak
from llava.reduction.greedy import coverage, determinant, duplicates, farthest

SHARE = 0.11  # budget, about 64 of 576 tokens
Form = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Choice:
    """A greedy choice in both forms: (tokens [B, N, D], weight [B, N], budget) -> [B, K].

    Attributes:
        channels: D of the method's tokens in LLaVA-1.5-7B and LLaVA-NeXT-7B.
    """

    channels: int
    ours: Form
    reference: Form


def cosines(tokens: Tensor) -> Tensor:
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def merge_targets(form: Callable[[Tensor, Tensor, int], Tensor]) -> Form:
    """ConsensusDrop's: half of the budget, from the token with the highest weight."""
    return lambda tokens, weight, budget: form(F.normalize(tokens, dim=-1), weight.argmax(1), budget // 2)


CHOICES = {
    "consensusdrop": Choice(64, merge_targets(farthest.farthest_from), merge_targets(farthest.from_tokens)),
    "divprune": Choice(
        4096,
        lambda tokens, weight, budget: farthest.farthest_apart(tokens, budget),
        lambda tokens, weight, budget: farthest.reference(cosines(tokens), budget),
    ),
    "cdpruner": Choice(
        4096,
        determinant.largest_determinant,
        lambda tokens, weight, budget: determinant.reference(cosines(tokens), weight, budget),
    ),
    "scope": Choice(
        1024,
        coverage.cover_greedily,
        lambda tokens, weight, budget: coverage.reference(cosines(tokens), weight, budget),
    ),
    "vispruner": Choice(
        1024,
        lambda tokens, weight, budget: duplicates.distinct(tokens, budget // 2),
        lambda tokens, weight, budget: duplicates.reference(cosines(tokens), budget // 2),
    ),
}


def drawn(images: int, total: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] whose neighbours are alike, and weights [B, N] of which a few are large."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, channels, max(2, total // 9), generator=generator)
    field = F.interpolate(coarse, size=total, mode="linear").transpose(1, 2)
    tokens = field + 0.5 * torch.randn(images, total, channels, generator=generator)
    return tokens.contiguous(), torch.rand(images, total, generator=generator) ** 4 + 1e-3


def peak_bytes(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and the highest resident memory while it runs, above that at its start."""
    cpu = torch.device("cpu")
    start_peak(cpu)
    start = read_peak(cpu)
    found = call()
    return found, read_peak(cpu) - start


def timed(call: Callable[[], object]) -> float:
    """Seconds of the processor: with one thread, other programs add nothing to them but their use of the caches."""
    start = time.process_time()
    call()
    return time.process_time() - start


def line(name: str, choice: Choice, total: int, images: int, repeats: int) -> str:
    """Measure one choice at one number of tokens."""
    budget = round(SHARE * total)
    tokens, weight = drawn(images, total, choice.channels)
    forms = (choice.ours, choice.reference)
    found, memory, operations = [], [], []
    for form in forms:
        with Calls() as calls:
            kept, peak = peak_bytes(partial(form, tokens, weight, budget))
        found.append(kept)
        memory.append(peak)
        calls.mark("selection")
        operations.append(len(calls.found))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for form, own in zip(forms, seconds, strict=True):
            own.append(timed(partial(form, tokens, weight, budget)))
    ours, before = map(statistics.median, seconds)
    return (
        f"{name:14}{total:7,}{budget:7,}{images:7}{1000 * ours:12.1f}{1000 * before:12.1f}{before / ours:8.1f}x"
        f"{operations[0]:9,}{operations[1]:9,}{memory[0] / 1e6:9.0f}{memory[1] / 1e6:9.0f}"
        f"   {'equal' if torch.equal(*found) else 'DIFFERENT'}"
    )


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.selection", __doc__)
    parser.add_argument("--method", choices=tuple(CHOICES), action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--tokens", type=value(count), nargs="+", default=[576, 2880], help="visual tokens of an image; 2 or more"
    )
    parser.add_argument("--images", type=value(count), default=1, help="images at a time")
    parser.add_argument("--repeats", type=value(count), default=5, help="measurements of each form")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"one thread; {100 * SHARE:.0f} % of the tokens are kept; ours, then the reference")
    print(
        f"{'':14}{'tokens':>7}{'budget':>7}{'images':>7}{'ms':>12}{'ms':>12}{'ratio':>9}"
        f"{'ops':>9}{'ops':>9}{'MB':>9}{'MB':>9}   choice"
    )
    with torch.inference_mode():
        for total in args.tokens:
            for name in args.method or CHOICES:
                print(line(name, CHOICES[name], total, args.images, args.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
