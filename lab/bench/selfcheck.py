"""Check in seconds that a device computes what the CPU computes, before anything is timed on it.

    python -m lab.bench.selfcheck --device cuda      # exit code 1 and names if something differs

* The greedy loops of llava/reduction/ranking.py must choose the same tokens for several inputs in a row. A captured
  loop that returns the choice for an earlier input fails at the second input.
* Each bundled toy model is asked a question about noise. In float32 every method must keep the CPU's tokens and give
  the CPU's text. In float16 and bfloat16 it must run, and the share of float32's tokens that it keeps is printed.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.command import exit_on_user_error, make_parser
from eval.efficiency.oracle import reducers_of
from eval.efficiency.shapes import noise_batches
from eval.results.report import hardware
from eval.tables import markdown
from lab.bench.stability import DTYPES, answers_of, kept_share
from llava.model.builder import device_of, load
from llava.places import ASSETS
from llava.reduction import ranking

FAMILIES = {"tinyllava": "all", "tinyllava_next": "", "tinyllava_video": ""}  # bundled model -> its methods, or METHODS
METHODS = "consensusdrop,visiondrop,attnmix,divprune,scope,fastv"
# Share of the kept tokens that must be equal. When weights were disturbed by 3e-6 of their size, one near tie of 514
# choices changed; a wrong loop agrees in at most half of them.
EQUAL = 0.95
# On images of noise, rounding in float32 changes what these methods choose, so no two processors agree.
ROUNDED = ("cdpruner", "vispruner")
LOOPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "farthest_from": lambda tokens, weight: ranking.farthest_from(F.normalize(tokens, dim=-1), weight.argmax(1), 32),
    "farthest_apart": lambda tokens, weight: ranking.farthest_apart(tokens, 32),
    "largest_determinant": lambda tokens, weight: ranking.largest_determinant(tokens, weight, 32),
    "cover_greedily": lambda tokens, weight: ranking.cover_greedily(tokens, weight, 32),
    "distinct": lambda tokens, weight: ranking.distinct(tokens, 224),
}
INPUTS, TOKENS, CHANNELS = 4, 256, 64  # number and size of the inputs of each loop


def loop_input(number: int) -> tuple[Tensor, Tensor]:
    """Tokens [2, TOKENS, CHANNELS] and weights [2, TOKENS] without near ties, which a device may break in another way.

    An H100 differed on seed 0, where `distinct` also changes its choice on a CPU when channels are summed in another
    order.
    """
    drawn = torch.Generator().manual_seed(number + 1)
    return torch.randn(2, TOKENS, CHANNELS, generator=drawn), torch.rand(2, TOKENS, generator=drawn) + 0.1


def loops(device: torch.device) -> list[str]:
    """The greedy loops that choose other tokens on the device than on the CPU, with the number of the input."""
    wrong = []
    for number in range(INPUTS):
        tokens, weight = loop_input(number)
        for name, loop in LOOPS.items():
            here, there = loop(tokens, weight), loop(tokens.to(device), weight.to(device)).cpu()
            if not torch.equal(here.sort(1).values, there.sort(1).values):
                wrong.append(f"{name} on input {number + 1} of {INPUTS}")
    return wrong


def compare_with_cpu(folder: Path, device: str) -> tuple[list[list[str]], list[str]]:
    """The rows of the table for one bundled model, and a sentence for everything that is wrong."""
    model = load(folder, device="cpu")
    reducers = reducers_of((FAMILIES[folder.name] or METHODS).split(","), model.visual_tokens // 4, {}, model)
    samples = noise_batches(model, 1, False)(0)
    exact = {name: answers_of(model, samples, reducer) for name, reducer in reducers.items()}
    rows, wrong = {name: [folder.name, name] for name in reducers}, []
    for dtype in DTYPES:
        there = load(folder, dtype, device)
        for name, reducer in reducers.items():
            try:
                found = answers_of(there, samples, reducer)
            except Exception as error:  # whatever a device raises, the other methods are still checked
                rows[name].append("fails")
                wrong.append(f"{name} on {folder.name} in {dtype}: {type(error).__name__}: {error}")
                continue
            share, same = kept_share(exact[name], found), exact[name][0].text == found[0].text
            rows[name].append(f"{100 * share:.0f} %" + ("" if same else ", another text"))
            if dtype == "float32" and not (same and (share >= EQUAL or name in ROUNDED)):
                wrong.append(f"{name} on {folder.name} in float32: {rows[name][-1]} of the CPU's tokens")
    return list(rows.values()), wrong


def check(device: str) -> tuple[str, list[str]]:
    """The result of the check as Markdown, and a sentence for everything that is wrong on this device."""
    there, rows = device_of(device), list[list[str]]()
    wrong, absent = loops(there), []
    for name in FAMILIES:
        if (ASSETS / name / "config.json").is_file():
            found, differing = compare_with_cpu(ASSETS / name, device)
            rows, wrong = rows + found, wrong + differing
        else:
            absent.append(name)
    blocks = [
        f"{hardware(str(there))} beside the CPU: {len(LOOPS)} greedy loops on {INPUTS} inputs each; shares of the "
        "tokens that the CPU keeps in float32. Those of a method in float32 may differ by near ties, at most 5 % "
        f"({' and '.join(ROUNDED)}, whose choice of noise rests on rounding, by more)."
        + (f" Not here: {', '.join(absent)}." if absent else ""),
        "**Wrong: " + "; ".join(wrong) + ".**" if wrong else "Nothing is wrong.",
        markdown(["model", "method", *DTYPES], rows),
    ]
    return "\n\n".join(blocks), wrong


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where something is wrong."""
    parser = make_parser("lab.bench.selfcheck", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--markdown", type=Path, help="also write the result here")
    args = parser.parse_args(arguments)
    # A convolution in TF32 would round patches to three digits, which changes more than near ties.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        text, wrong = check(str(device_of(args.device)))
    print(text)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(text + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
