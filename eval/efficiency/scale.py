"""Questions per second against accelerators, on paper: what a run of many ranks spends its time on.

    python -m eval.efficiency.scale measure    # constants of this machine, into docs/tables/scale_constants.json
    python -m eval.efficiency.scale page       # table, constants and plot of docs/cluster.md

A run starts its ranks, loads the model on each, deals batches to the replicas one by one, merges the answers, scores
and logs them. Every term is a function of the number of questions and of accelerators, and of constants in a file; each
constant says whether it was measured, and where, or from what it is extrapolated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from eval.command import exit_on_user_error
from eval.config import ROOT
from eval.efficiency.quantities import duration
from eval.efficiency.scale_constants import Constant, measure
from eval.tables.page import insert, markdown
from eval.tables.plots import COLOURS, MARKERS
from llava.errors import UserError

CONSTANTS = ROOT / "docs" / "tables" / "scale_constants.json"
PAGE = ROOT / "docs" / "cluster.md"
PLOT = ROOT / "docs" / "images" / "scale.png"

GPUS = (1, 2, 4, 8, 16, 32, 64)
QUESTIONS = (100, 10_000, 1_000_000)
KINDS = ("measured", "given", "extrapolated")

# Parts of a batch that a replica spends its time on, in seconds per batch or per question.
PER_BATCH = ("vision", "prefill", "decode")
PER_QUESTION = ("preprocess", "store")
# In the order in which a run comes to them.
TERMS = ("launch", "load", *PER_QUESTION[:1], *PER_BATCH, "store", "dealing", "skew", "merge", "scoring", "W&B")
NEEDED = (
    "batch_size",
    "gpus_per_node",
    "start_alone",
    "start_ranks",
    "start_per_node",
    "weights",
    "read_per_node",
    "read_shared",
    *PER_QUESTION,
    *PER_BATCH,
    "store_operation",
    "operations_per_batch",
    "polls_per_rank",
    "merge",
    "scoring",
    "wandb",
)


def read_constants(path: Path = CONSTANTS) -> dict[str, dict[str, Constant]]:
    """Setting -> name -> constant.

    Raises:
        UserError: a constant is missing or says not where it comes from.
    """
    found = {
        setting: {name: Constant(**fields) for name, fields in constants.items()}
        for setting, constants in json.loads(path.read_text()).items()
    }
    for setting, constants in found.items():
        missing = [name for name in NEEDED if name not in constants]
        wrong = [name for name, constant in constants.items() if constant.kind not in KINDS or not constant.how]
        if missing or wrong:
            raise UserError(
                f"{path}, {setting}: missing {', '.join(missing) or 'nothing'}; without a known kind and a source "
                f"{', '.join(wrong) or 'nothing'}; run `python -m eval.efficiency.scale measure`."
            )
    return found


def values(constants: Mapping[str, Constant]) -> dict[str, float]:
    return {name: constant.value for name, constant in constants.items()}


def seconds_by_term(constants: Mapping[str, float], questions: int, gpus: int) -> dict[str, float]:
    """Seconds of a run by term, of whole replicas of one accelerator each; their sum is the run.

    Terms that all replicas work on together are the time of the average replica; what the slowest one takes beyond it
    is "skew". "dealing" is the time that the replicas wait for the store they share: the way to it for every batch and,
    where it is busy all the time, what its work takes beyond theirs.
    """
    c = constants
    nodes, batches = ceil(gpus / c["gpus_per_node"]), ceil(questions / c["batch_size"])
    used = min(gpus, batches)
    alone = gpus == 1
    count = min(questions, c["batch_size"])
    parts = {name: c[name] for name in PER_BATCH} | {name: c[name] * count for name in PER_QUESTION}
    wait = 0.0 if alone else c["operations_per_batch"] * c["store_operation"]
    batch = sum(parts.values()) + wait
    rounds = ceil(batches / used)
    busy = rounds * batch
    # The parent process asks for the state of every rank some times a second.
    server = 0.0 if alone else batches * wait + busy * gpus * c["polls_per_rank"] * c["store_operation"]
    spent = {name: batches / used * value for name, value in parts.items()}
    return {
        "launch": c["start_alone"] if alone else c["start_ranks"] + (nodes - 1) * c["start_per_node"],
        "load": max(c["weights"] / c["read_per_node"], nodes * c["weights"] / c["read_shared"]),
        "preprocess": spent["preprocess"],
        **{name: spent[name] for name in PER_BATCH},
        "store": spent["store"],
        "dealing": batches / used * wait + max(0.0, server - busy),
        "skew": (rounds - batches / used) * batch,
        "merge": 0.0 if alone else questions * c["merge"],
        "scoring": questions * c["scoring"],
        "W&B": c["wandb"],
    }


def questions_per_second(constants: Mapping[str, float], questions: int, gpus: int) -> float:
    return questions / sum(seconds_by_term(constants, questions, gpus).values())


def first_limit(constants: Mapping[str, float], questions: int, term: str, share: float) -> int | None:
    """The smallest number of accelerators, 1 to 64, from which a term takes more than `share` of the run; None if it
    never does."""
    over = []
    for gpus in range(1, max(GPUS) + 1):
        spent = seconds_by_term(constants, questions, gpus)
        over.append(spent[term] > share * sum(spent.values()))
    if not over[-1]:
        return None
    return max((gpus for gpus, more in enumerate(over, start=1) if not more), default=0) + 1


# The page


def speed_table(constants: Mapping[str, float]) -> str:
    """Per number of accelerators: time, questions per second, and the term that takes most besides the model."""
    header = ["GPUs"]
    for questions in QUESTIONS:
        header += [f"{questions:,} questions", "questions/s", "most after the model"]
    rows = []
    for gpus in GPUS:
        row = [str(gpus)]
        for questions in QUESTIONS:
            spent = seconds_by_term(constants, questions, gpus)
            total = sum(spent.values())
            rest = {term: value for term, value in spent.items() if term not in (*PER_BATCH, "preprocess")}
            most = max(rest, key=rest.__getitem__)
            row += [duration(total), f"{questions / total:,.1f}", f"{most} {100 * rest[most] / total:.0f} %"]
        rows.append(row)
    return markdown(header, rows)


def limit_table(constants: Mapping[str, float]) -> str:
    """Per term: from how many accelerators on it takes more than a tenth, and more than half, of a run."""
    header = ["term", *(f"{questions:,} questions" for questions in QUESTIONS)]
    rows = []
    for term in TERMS:
        row = [term]
        for questions in QUESTIONS:
            tenth, half = (first_limit(constants, questions, term, share) for share in (0.1, 0.5))
            largest = seconds_by_term(constants, questions, max(GPUS))
            share = f"{100 * largest[term] / sum(largest.values()):.1f} % at {max(GPUS)}"
            row.append(share if tenth is None else f"from {tenth}" + (f", half from {half}" if half else ""))
        rows.append(row)
    return markdown(header, rows)


def constants_table(constants: Mapping[str, Constant]) -> str:
    header = ["constant", "value", "unit", "known how", "from"]
    rows = [[f"`{name}`", f"{c.value:.4g}", c.unit, c.kind, c.how] for name, c in constants.items()]
    text = markdown(header, rows)
    return text.replace("|---|---:|---:|---:|---:|", "|---|---:|---|---|---|")


def check_line(constants: Mapping[str, float]) -> str:
    """The model of scale with constants of one rank, beside what two ranks were measured to do."""
    questions, measured = int(constants["check_questions"]), constants["check_two_ranks"]
    spent = seconds_by_term(constants, questions, 2)
    asked = sum(spent[term] for term in (*PER_QUESTION, *PER_BATCH, "dealing", "skew"))
    return (
        f"Check on the machine that was measured, with the toy model: two ranks answer {questions:,} questions at "
        f"{questions / asked:.1f} questions per second on paper and at {measured:.1f} measured "
        f"({100 * (questions / asked / measured - 1):+.0f} %). One rank with two threads answered "
        f"{constants['check_two_threads']:.1f}."
    )


def plot(constants: Mapping[str, float], path: Path = PLOT) -> None:
    """Questions per second against accelerators, one line per number of questions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axes, bars) = plt.subplots(1, 2, figsize=(11.5, 4.4), dpi=150)
    ideal = constants["batch_size"] / (
        sum(constants[name] for name in PER_BATCH)
        + constants["batch_size"] * sum(constants[name] for name in PER_QUESTION)
    )
    axes.plot(GPUS, [ideal * gpus for gpus in GPUS], color="black", linestyle="--", linewidth=1, label="batches alone")
    for index, questions in enumerate(QUESTIONS):
        speed = [questions_per_second(constants, questions, gpus) for gpus in GPUS]
        axes.plot(GPUS, speed, color=COLOURS[index], marker=MARKERS[index], label=f"{questions:,} questions")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("questions per second, launch to score")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5)
    _shares(bars, constants)
    figure.suptitle(
        "On paper: LLaVA-1.5-7B, ConsensusDrop at 64 tokens, batch size 8; constants of the table", fontsize=10
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _shares(axes: Any, constants: Mapping[str, float]) -> None:
    """Stacked bars: the share of each term at 1, 8 and 64 accelerators."""
    columns = [(questions, gpus) for questions in QUESTIONS for gpus in (1, 8, 64)]
    found = [seconds_by_term(constants, *column) for column in columns]
    groups = {
        "launch": ("launch",),
        "load": ("load",),
        "preprocess": ("preprocess",),
        "vision": ("vision",),
        "prefill": ("prefill",),
        "decode": ("decode",),
        "store, dealing, skew": ("store", "dealing", "skew"),
        "merge": ("merge",),
        "scoring, W&B": ("scoring", "W&B"),
    }
    places = [number + number // 3 * 0.6 for number in range(len(columns))]
    below = [0.0] * len(columns)
    palette = (*COLOURS, "#F0E442")
    for (label, terms), colour in zip(groups.items(), palette, strict=True):
        height = [100 * sum(spent[term] for term in terms) / sum(spent.values()) for spent in found]
        axes.bar(places, height, bottom=below, color=colour, label=label, width=0.8)
        below = [low + high for low, high in zip(below, height, strict=True)]
    axes.set_xticks(places, [f"{gpus}" for _, gpus in columns])
    for number, questions in enumerate(QUESTIONS):
        axes.text(places[3 * number + 1], 102, f"{questions:,} questions", ha="center", fontsize=8.5)
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("GPUs")
    axes.set_ylabel("share of the run, %")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def write_page(path: Path = PAGE) -> None:
    """The tables and the plot, from the constants file."""
    found = read_constants()
    gpu = values(found["gpu"])
    insert(path, "scale", speed_table(gpu))
    insert(path, "scale limits", limit_table(gpu))
    insert(path, "scale constants", constants_table(found["gpu"]))
    insert(path, "scale check", check_line(values(found["cpu"])))
    plot(gpu)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    prog = sys.argv[0] if sys.argv[0].startswith("vtr ") else "python -m eval.efficiency.scale"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=("measure", "page"))
    parser.add_argument("--questions", type=int, default=320, help="asked by each measured run of the toy model")
    parser.add_argument("--answers", type=int, default=1_000_000, help="merged and scored")
    args = parser.parse_args(arguments)
    if args.step == "measure":
        found = measure(args.questions, args.answers)
        CONSTANTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"Constants are in {CONSTANTS.relative_to(ROOT)}; `scale page` writes the page.")
    else:
        write_page()
        print(f"Tables are in {PAGE.relative_to(ROOT)}, the plot in {PLOT.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
