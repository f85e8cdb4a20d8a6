"""Find out how firmly methods choose: tokens on padding, and choices that change with batch, precision and noise.

    python -m lab.bench.stability --budget 64,128,192,320    # every method, each at the first budget that it can reach

Questions about pictures that are not square are answered in float32 in one batch. The same questions are then answered
one at a time, in half precisions, and with noise as large as float32's rounding. The table says which of the tokens
kept at first are lost then, and how many answers change: other tokens alone may be as good.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser, open_dataset, value
from eval.config import FULL, count
from eval.results.report import hardware
from eval.results.statistics import rounded
from eval.tables import markdown
from eval.versions import commit
from llava.errors import UserError
from llava.model.builder import device_of, load
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer
from llava.pipeline.generate import generate
from llava.places import ASSETS, WORK, check_checkout
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import on_padding

PAGE = WORK / "docs" / "tables" / "stability.md"
DTYPES = ("float32", "float16", "bfloat16")
NOISE = 1e-6  # of the size of the numbers; float32 rounds to 6e-8
NEW_TOKENS = 8
# Condition -> its name in the table.
CONDITIONS = {"batch": "one at a time", "noise": "noise of 1e-6", "float16": "float16", "bfloat16": "bfloat16"}
# Fields of llava.reduction.reducer.Release that make a release's choice depend on more than image, question and budget.
REGISTER = ("random", "batch", "dtype", "order")


def survivors(answer: Answer) -> set[tuple[int, int]]:
    """(step, token) for the tokens of the image at whose places tokens remain after each step of a method.

    All steps count. What is left after the last one may be a single token, which alone says little.
    """
    places, found = list[int](), set[tuple[int, int]]()
    for number, step in enumerate(answer.trace):
        kept = step.reduction.kept[0].tolist()
        places = [places[place] for place in kept] if number else kept
        found |= {(number, place) for place in places}
    return found


def answers_of(model: Llava, samples: Sequence[Sample], reducer: Reducer, together: bool = False) -> list[Answer]:
    """The method's answers to the questions, one at a time or together in one batch."""
    batches = [samples] if together else [[sample] for sample in samples]
    return [answer for batch in batches for answer in generate(model, batch, reducer, NEW_TOKENS).answers]


def kept_share(exact: Sequence[Answer], other: Sequence[Answer]) -> float:
    """The share of the tokens kept in `exact` that the `other` answers to the same questions keep too."""
    kept = [(survivors(one), survivors(two)) for one, two in zip(exact, other, strict=True)]
    total = sum(len(one) for one, _ in kept)
    return sum(len(one & two) for one, two in kept) / total if total else 1.0


def padding_shares(answers: Sequence[Answer]) -> tuple[float, float]:
    """The shares of tokens wholly on padding: among those that a method keeps, and among all."""
    kept_on = kept = padding = everything = 0
    for answer in answers:
        (layout,), (canvas,) = answer.runs, answer.canvases
        assert canvas is not None  # known for every picture of LLaVA-1.5
        own = survivors(answer)
        takes_cls = bool(own) and answer.trace[0].reduction.inputs != layout.tokens
        flags = on_padding(layout.with_cls if takes_cls else layout, canvas)
        empty = set(flags.nonzero().flatten().tolist())
        padding, everything = padding + len(empty), everything + layout.tokens
        kept_on += sum(place in empty for _, place in own) if own else len(empty)
        kept += len(own) or layout.tokens
    return kept_on / kept, padding / everything


def with_noise(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook that disturbs what a module returns by NOISE of its size, equally in every run."""
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    return output * (1 + NOISE * drawn.to(output.device))


def reachable(names: Sequence[str], budgets: Sequence[int], model: Llava) -> dict[str, Reducer]:
    """The methods, each at the first budget that it can reach.

    Raises:
        UserError: a method can reach none of them, or there is no such method.
    """
    found = {}
    for name in registry.names() if list(names) == ["all"] else names:
        for budget in budgets:
            reducer = registry.build(name, model.visual_tokens if name == FULL else budget, {})
            try:
                require(reducer, model.spec)
            except UserError as error:
                refused = error
                continue
            found[name] = reducer
            break
        else:
            raise UserError(f"{refused} Add a larger budget to --budget, or leave {name} out of --methods.")
    return found


def row_of(name: str, reducer: Reducer, found: dict[str, list[Answer]]) -> list[str]:
    """One line of the table.

    Args:
        found: condition, or "exact" for float32 in one batch -> the answers.
    """
    exact = found["exact"]
    row = [name, f"{reducer.budget:,}", rounded(100 * padding_shares(exact)[0])]
    for condition in CONDITIONS:
        changed = sum(one.text != two.text for one, two in zip(exact, found[condition], strict=True))
        row.append(f"{rounded(100 * (1 - kept_share(exact, found[condition])))} ({changed})")
    release = reducer.metadata.release
    return [*row, ", ".join(kind for kind in REGISTER if release and getattr(release, kind))]


def page(rows: list[list[str]], padding: float, pictures: int, command: str, device: str) -> str:
    """The table as a page of Markdown, with what its columns mean."""
    head = ["method", "tokens", "on padding, %"]
    return f"""# How firmly methods choose their tokens

{pictures} questions of GQA, each about another picture that is not square, on {device}.
Made by `{command}`, code of {commit()}.

The questions are asked in float32 in one batch. That answer is compared with others to the same questions:

* **tokens**: the budget, for each method the first of the command's that it can reach.
* **on padding**: the percentage of the kept tokens that lie on patches without any pixel of the picture. All steps of a
  method count. {rounded(100 * padding)} % of all tokens are such patches; a method that does not look keeps about as
  many.
* **{", ".join(CONDITIONS.values())}**: the percentage of the kept tokens that are lost if the questions are asked in
  this way, and in brackets the number of answers that change, of {pictures}. Other tokens may be as good as those that
  are lost, so only changed answers show a difference. The noise, {NOISE:g} of the size of each number, is put on what
  enters the first block of the vision tower.
* **release**: what the choice of the official code depends on besides image, question and budget; the details are in
  [methods.md](../methods.md#what-the-releases-leave-to-chance). All other columns are about this repository.

{markdown([*head, *CONDITIONS.values(), "release"], rows)}"""


def budgets(text: str) -> list[int]:
    """Read budgets separated by commas."""
    return [count(one) for one in text.split(",")]


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.bench.stability", __doc__)
    parser.add_argument("--model", help="folder or hub name of a LLaVA-1.5; default: the bundled toy model")
    parser.add_argument("--methods", default="all", help="names separated by commas, or all")
    parser.add_argument(
        "--budget",
        type=value(budgets),
        default=[64, 128, 192, 320],
        help="visual tokens to keep; of several, the first in reach",
    )
    parser.add_argument("--questions", type=value(count), default=24, help="of GQA, each about another image")
    parser.add_argument(
        "--data",
        type=Path,
        default=ASSETS / "eval_next",
        help="folder of the benchmarks; square pictures have no padding",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--write", action="store_true", help="put the table into docs/tables/stability.md")
    args = parser.parse_args(arguments)
    if args.write:
        check_checkout(f"{parser.prog} --write")
    data = open_dataset("gqa", str(args.data), None, None, "auto")
    one_each = {question.image: question for question in reversed(data.questions)}
    samples = [data.sample(question) for question in list(one_each.values())[: args.questions]]
    model = load(args.model, device=args.device)
    reducers = reachable(args.methods.split(","), args.budget, model)
    found: dict[str, dict[str, list[Answer]]] = {name: {} for name in reducers}
    for dtype in DTYPES:
        model = load(args.model, dtype, args.device)
        for name, reducer in tqdm(reducers.items(), desc=dtype, unit="method"):
            exact = dtype == "float32"
            found[name]["exact" if exact else dtype] = answers_of(model, samples, reducer, together=True)
            if exact:
                found[name]["batch"] = answers_of(model, samples, reducer)
                with model.tower.pre_layrnorm.register_forward_hook(with_noise):
                    found[name]["noise"] = answers_of(model, samples, reducer, together=True)
    rows = [row_of(name, reducer, found[name]) for name, reducer in reducers.items()]
    own = padding_shares(next(iter(found.values()))["exact"])[1]
    command = " ".join(("vtr bench stability", *(sys.argv[1:] if arguments is None else arguments)))
    text = page(rows, own, len(samples), command, hardware(str(device_of(args.device))))
    print(text)
    if args.write:
        PAGE.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
