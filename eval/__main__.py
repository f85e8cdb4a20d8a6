"""Evaluate one method at one budget on one benchmark.

python -m eval --method consensusdrop --budget 64
python -m eval --method full --limit 100
python -m eval --list
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import benchmarks
from eval.command import Parser, add_data_flags, ends_in_a_sentence, make_parser
from eval.config import (
    ROOT,
    RunConfig,
    count_or_share,
    embedded_model,
    method_options,
    pairs,
    whole_number,
)
from eval.judging.choice import HELP as JUDGE_HELP
from llava.errors import UserError


def parser() -> Parser:
    p = make_parser("eval", __doc__)
    p.add_argument("--method", help="name of the method; see --list")
    p.add_argument("--budget", help="visual tokens to keep per image, or a share such as 1/9; not needed for 'full'")
    p.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="option of the method")
    p.add_argument("--benchmark", default="gqa", help="benchmark; see --list")
    add_data_flags(p)
    p.add_argument("--model", help="folder or hub name of a checkpoint; default: the embedded one for the benchmark")
    p.add_argument("--output", help="default: results/BENCHMARK-SPLIT/MODEL/METHOD-BUDGET")
    p.add_argument("--batch-size", default="8", help="questions answered at once")
    p.add_argument("--limit", help="ask the first LIMIT questions only")
    p.add_argument(
        "--picture",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how pictures are read, where the model's family leaves a choice: merge=spatial, reading=transformers, "
        "force=672x672 (LLaVA-NeXT), flip=SEED (Video-LLaVA), min_pixels=N, max_pixels=N (Qwen)",
    )
    p.add_argument("--judge", default="auto", metavar="JUDGE", help=JUDGE_HELP)
    p.add_argument("--quantization", choices=("8bit", "4bit"), help="hold the decoder in 8 or 4 bits (bitsandbytes)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", default="auto", help="torch device")
    p.add_argument(
        "--text-tower", help="the CLIP that the vision tower comes from, for methods that read its text half"
    )
    p.add_argument("--max-new-tokens", help="longest answer; default: what the benchmark's profile says")
    p.add_argument("--seed", default="0", help="for methods that draw random numbers, and for the intervals")
    p.add_argument("--wandb", default="auto", choices=("auto", "online", "offline", "disabled"), help="W&B logging")
    p.add_argument("--restart", action="store_true", help="move an earlier run in the output folder aside")
    p.add_argument("--list", action="store_true", help="print the methods, benchmarks and models there are")
    p.add_argument("--json", action="store_true", help="with --list: as JSON")
    return p


@ends_in_a_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = parser().parse_args(arguments)
        if args.list:
            print_list(args.json)
            return 0
        config = configuration(args)
        from eval.run import run

        run(config)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped before the first answer; run the same command again.'}", file=sys.stderr)
        return 130
    return 0


def configuration(args: argparse.Namespace) -> RunConfig:
    """Flags to a checked configuration."""
    if args.json:
        raise UserError("--json goes with --list; a run writes result.json to its output folder.")
    if not args.method:
        raise UserError("--method is missing; --list prints the methods there are.")
    budget, share = count_or_share("--budget", args.budget)
    options = method_options(args.method, args.set)
    if share is not None and "share" in options:
        raise UserError(f"--budget {args.budget} and --set {args.method}.share are both given; leave one out.")
    benchmark = benchmarks.get(args.benchmark)
    benchmarks.check_split(benchmark, args.split)
    benchmarks.check_profile(benchmark, args.profile)
    return RunConfig(
        method=args.method,
        budget=budget,
        benchmark=args.benchmark,
        split=args.split,
        model=args.model or embedded_model(benchmark.model),
        profile=args.profile,
        source=args.source,
        judge=args.judge,
        data=Path(args.data),
        output=Path(args.output) if args.output else None,
        batch_size=whole_number("--batch-size", args.batch_size),
        limit=whole_number("--limit", args.limit),
        options=options if share is None else {**options, "share": repr(share)},
        picture=pairs("--picture", args.picture),
        quantization=args.quantization,
        dtype=args.dtype,
        text_tower=args.text_tower,
        device=args.device,
        max_new_tokens=whole_number("--max-new-tokens", args.max_new_tokens),
        seed=whole_number("--seed", args.seed, minimum=0, maximum=2**32 - 1),
        wandb=args.wandb,
        restart=args.restart,
    )


def print_list(as_json: bool) -> None:
    """Everything that can be named on the command line."""
    from llava.reduction import registry

    registry.load_all()
    there_is = {"methods": registry.describe(), "benchmarks": benchmarks.describe(), "models": models()}
    if as_json:
        print(json.dumps(there_is, indent=1, default=str))
        return
    for kind, entries in there_is.items():
        print(f"{kind}:")
        for entry in entries:
            rest = "; ".join(text for key, value in entry.items() if key != "name" and (text := readable(value)))
            print(f"  {entry['name']:16s} {rest}")


def readable(value: object) -> str:
    """A field of --list in one line."""
    if isinstance(value, dict):
        name, default = value.get("name"), value.get("default")
        return f"{name}={default}" if name else ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(readable, value)) if isinstance(value, list | tuple) else str(value)


def models() -> list[dict[str, str]]:
    """The checkpoints that come with the repository."""
    configs = sorted((ROOT / "assets").glob("*/config.json"))
    return [{"name": config.parent.name, "path": str(config.parent)} for config in configs]


if __name__ == "__main__":
    sys.exit(main())
