"""Evaluate methods at budgets on benchmarks, each in a run of its own.

python -m eval --method consensusdrop --budget 64
python -m eval --method full --limit 100
python -m eval --benchmark gqa,pope --method full,consensusdrop --budget 64,128
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.command import Parser, add_data_flags, exit_on_user_error, make_parser, value, without_bars
from eval.config import (
    FILLING,
    FULL,
    RunConfig,
    budget_of,
    count,
    embedded_model,
    options_by_method,
    pairs,
    path_name,
    setting_help,
)
from eval.parallel import placement
from eval.parallel.launch import launch
from llava.budget import BLIND, RETENTION_RATIO, WITHOUT_BUDGET, count_or_ratio
from llava.errors import UserError

# Exit code of a run that has a result, but not for all questions.
SOME_FAILED = 3


# Flag -> what argparse must know of it; default and help are those of the setting of this name in RunConfig.
FLAGS: dict[str, dict[str, Any]] = {
    "batch_size": {"type": value(count)},
    "engine": {"metavar": "NAME"},
    "limit": {"type": value(count)},
    "quantization": {"choices": ("8bit", "4bit")},
    "dtype": {"choices": ("float32", "bfloat16", "float16")},
    "device": {},
    "text_tower": {"type": value(path_name)},
    "max_new_tokens": {"type": value(count)},
    "seed": {"type": value(count, minimum=0, maximum=2**32 - 1)},
    "wandb": {"choices": ("auto", "online", "offline", "disabled")},
    "table": {"metavar": "NAME"},
    "tensor_parallel": {"type": value(count), "metavar": "N"},
    "zero": {"metavar": "PLACE"},
    "zero_ranks": {"type": value(count), "metavar": "N"},
    "restart": {"action": "store_true"},
    "quiet": {"action": "store_true"},
}


def parser() -> Parser:
    p = make_parser("eval", __doc__)
    p.add_argument("--method", type=names, help="name of the method, or several by commas; see vtr show methods")
    p.add_argument(
        "--budget",
        type=value(sizes),
        help="visual tokens to keep per image, or the ratio of each image's, as 1/9 or 0.111, or several separated by "
        "commas; not needed for 'full' and 'none'",
    )
    p.add_argument("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help="option of the method")
    p.add_argument(
        "--benchmark", type=names, default="gqa", help="benchmark, or several by commas; see vtr show benchmarks"
    )
    add_data_flags(p)
    p.add_argument(
        "--model",
        type=value(path_name),
        help="folder or hub name of a checkpoint; default: the bundled toy model for the benchmark",
    )
    p.add_argument("--output", type=value(path_name), help="default: results/BENCHMARK-SPLIT/MODEL/METHOD-BUDGET")
    p.add_argument(
        "--image-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how images are read, where the model's family leaves a choice: merge=spatial, anyres_rule=transformers, "
        "force=672x672 (LLaVA-NeXT), min_pixels=N, max_pixels=N (Qwen)",
    )
    meanings = setting_help()
    for name, more in FLAGS.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(RunConfig, name)
        p.add_argument(flag, default=default, help=meanings[name], **more)
    p.set_defaults(batch_size=None)  # depends on the engine
    p.add_argument(
        "--timeout",
        type=value(count),
        default=1800,
        metavar="SECONDS",
        help="with several ranks: end the run when one takes longer for a batch, or for loading",
    )
    p.add_argument("--retry-failed", action="store_true", help="ask only the questions that failed in an earlier run")
    p.add_argument(
        "--dry-run", action="store_true", help="print expected memory and time, without reading weights or asking"
    )
    p.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    p.epilog = (
        "In the environment: GPUS=4 uses any four accelerators, GPUS=0,2 these two and GPUS=3, (with a comma) the "
        "fourth; RANKS=2 two processes on a processor; none of them: all accelerators. See docs/cluster.md."
    )
    return p


def names(text: str) -> list[str]:
    """Words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def sizes(text: str) -> list[int | float]:
    """Budgets between commas, each once."""
    found = map(count_or_ratio, names(text))
    return list({repr(one): one for one in found}.values())  # 1 is a count, and 1.0 a ratio, though they are equal


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    with without_bars() if args.quiet else contextlib.nullcontext():
        return evaluate(args, words)


def evaluate(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Estimate or run what the flags ask for; returns the exit code.

    Args:
        words: the command line, for other ranks.
    """
    configs = configurations(args)
    config = configs[0]
    place = placement.here(config.ranks_per_model, config.device)
    if args.dry_run:
        from eval.efficiency.estimate import estimate

        with contextlib.redirect_stdout(sys.stderr):  # libraries print remarks when they are imported
            estimates = [estimate(one, place) for one in configs]
        records = [one.record() for one in estimates]
        lines = [line for one in estimates for line in one.lines()]
        print(json.dumps(records if len(records) > 1 else records[0], indent=1) if args.json else "\n".join(lines))
        return 0
    if len(configs) > 1:
        from eval.sweep import run_all

        return 0 if run_all(configs) else SOME_FAILED
    from eval.run import read_questions, run

    if place is not None and config.engine != "own":
        raise UserError(
            f"--engine {config.engine} runs in one process, not on {place.describe()}; choose one by GPUS=0."
        )
    if place is not None:  # the same command on every rank
        data, _ = read_questions(config)
        planned = data.questions[: config.limit]
        place = place.at_most(-(-len(planned) // config.batch_size))
        if not config.quiet:
            print(f"{data.title}: {len(planned):,} questions on {place.describe()}", file=sys.stderr)
        return launch("eval.__main__", words, place, args.timeout)
    result = run(config)
    if config.tensor_parallel > 1 or config.zero is not None:
        from llava.model.parallel import leave

        leave()
    return SOME_FAILED if result.get("failed") else 0


def configurations(args: argparse.Namespace) -> list[RunConfig]:
    """Flags to checked configurations of every benchmark, method and budget; `full` and `none` come first, and once."""
    if args.json and not args.dry_run:
        raise UserError("--json goes with --dry-run; a run writes result.json to its output folder.")
    if not args.method:
        raise UserError("--method is missing; vtr show methods prints those there are.")
    methods = sorted(args.method, key=lambda name: (name != FULL, name != BLIND))
    budgets = args.budget or [None]
    options = options_by_method(methods, args.set)
    configs = [
        configuration(args, name, method, budget, options[method])
        for name in args.benchmark
        for method in methods
        for budget in (budgets if method not in WITHOUT_BUDGET or len(methods) == len(budgets) == 1 else [None])
    ]
    if args.output and len(configs) > 1:
        raise UserError(f"--output is the folder of one run, and these are {len(configs)}; leave it out.")
    return configs


def configuration(
    args: argparse.Namespace, name: str, method: str, size: int | float | None, options: dict[str, str]
) -> RunConfig:
    """The configuration of one benchmark, method and budget; flags have the names of its fields."""
    budget, ratio = budget_of(size)
    if ratio and RETENTION_RATIO in options:
        raise UserError(f"--budget as a ratio and --set {method}.{RETENTION_RATIO} are both given; leave one out.")
    benchmark = benchmarks.get(name)
    benchmarks.check_split(benchmark, args.split)
    benchmarks.check_profile(benchmark, args.profile)
    flags = {field.name: getattr(args, field.name) for field in fields(RunConfig) if field.name in args}
    resolved: dict[str, Any] = {
        "method": method,
        "budget": budget,
        "batch_size": args.batch_size or (RunConfig.batch_size if args.engine == RunConfig.engine else FILLING),
        "benchmark": name,
        "model": args.model or embedded_model(benchmark.model),
        "data": Path(args.data),
        "output": Path(args.output) if args.output else None,
        "options": options | ratio,
        "image_options": pairs("--image-option", args.image_option),
        "failed": "only" if args.retry_failed else "skip",
    }
    return RunConfig(**{**flags, **resolved})


if __name__ == "__main__":
    sys.exit(main())
