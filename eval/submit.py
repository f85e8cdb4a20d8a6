"""Check an entry for a leaderboard, or replay a method from a file of the tokens that it keeps.

    vtr submit check RUN_FOLDER --full RUN_OF_FULL          # a finished run, or a folder with reported.json
    vtr submit check kept.jsonl --full RUN_OF_FULL          # a kept-index file
    vtr submit replay kept.jsonl --full RUN_OF_FULL --output FOLDER

RUN_OF_FULL is the output folder of `vtr eval --method full` on the same questions: entries are compared with its model
files, data type, questions and labels. docs/evaluation.md describes the files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from eval import benchmarks
from eval.answers.entries import Entry, check_entry, kept_file_faults
from eval.answers.kept_indices import Replayed, pixel_hash, read_kept
from eval.answers.reuse import read_result, results_folder
from eval.benchmarks.base import Dataset
from eval.command import Parser, exit_on_user_error, make_parser, open_dataset, value
from eval.config import FULL, RunConfig, count, embedded_model, path_name
from eval.results.statistics import rounded
from eval.statistics.command import Run, read_run
from llava.errors import UserError


def submit_parser(command: str, about: str) -> Parser:
    """The flags that both commands share."""
    p = make_parser(f"eval.cli submit {command}", about)
    p.add_argument(
        "--full", type=Path, required=True, metavar="FOLDER", help="output folder of the board's run of full"
    )
    p.add_argument(
        "--judge", default="auto", metavar="JUDGE", help="who scores open answers, as for vtr score; default: auto"
    )
    p.add_argument("--data", type=value(path_name), default=None, help="folder that holds the benchmarks")
    return p


def board(folder: Path, data_folder: str | None, judge: str) -> tuple[Run, Dataset]:
    """The board's run of `full`, scored again with the house's labels, and its data set."""
    result = read_result(results_folder(folder))
    settings, facts = result["settings"], result["facts"]
    source = "mirror" if facts.get("source") not in (None, "official") else "auto"
    data = open_dataset(
        settings["benchmark"],
        data_folder or str(RunConfig.data),
        settings["split"],
        facts.get("profile"),
        source,
    )
    full = read_run(folder, data, judge)
    if full.method != FULL:
        raise UserError(f"--full should be a run of {FULL}, got one of {full.method}: {folder}.")
    return full, data


def refuse(place: Path, faults: Sequence[str]) -> int:
    """Print all faults; returns the exit code."""
    head = f"{place} cannot enter the board: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}."
    print("\n".join([head, *(f"  - {one}" for one in faults)]), file=sys.stderr)
    return 1


def accepted(entry: Entry) -> str:
    """What a board would say of an entry without faults."""
    main, score = entry.score.main, entry.score.values[entry.score.main]
    assert score is not None  # check_entry refuses an entry without a score
    return (
        f"{entry.folder} can enter the board as {entry.badge}: {entry.method} at {entry.size}, {main} "
        f"{rounded(score)}, {entry.tokens:.1f} tokens per layer."
    )


@exit_on_user_error
def check_command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 without faults, 1 with faults."""
    p = submit_parser("check", "Say everything that keeps an entry from a leaderboard.")
    p.add_argument("entry", type=Path, help="folder of a run or of a reported entry, or a kept-index file")
    args = p.parse_args(arguments)
    full, data = board(args.full, args.data, args.judge)
    if not args.entry.is_dir():
        kept = read_kept(args.entry)
        if faults := kept_file_faults(kept, full):
            return refuse(args.entry, faults)
        print(
            f"{args.entry} can be replayed: {kept.header['method']} at {kept.header['budget']}, {len(kept.lines):,} "
            "questions. vtr submit replay also compares the hash `preprocessing`."
        )
        return 0
    entry, faults = check_entry(args.entry, full, data, args.judge)
    faults = [*faults, *(entry.code_faults if entry else ())]
    if entry is None or faults:
        return refuse(args.entry, faults)
    print(accepted(entry))
    return 0


@exit_on_user_error
def replay_command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = submit_parser("replay", "Run the model with the tokens that a kept-index file names.")
    p.add_argument("file", type=Path, help="kept-index file")
    p.add_argument("--output", type=value(path_name), required=True, help="folder of the run")
    p.add_argument(
        "--model", type=value(path_name), help="folder or hub name of the checkpoint; default: the toy model"
    )
    p.add_argument("--device", default="auto", help="torch device")
    p.add_argument("--batch-size", type=value(count), default=RunConfig.batch_size, help="questions at once")
    args = p.parse_args(arguments)
    full, data = board(args.full, args.data, args.judge)
    kept = read_kept(args.file)
    if faults := kept_file_faults(kept, full):
        return refuse(args.file, faults)
    from eval.run import load_model, prepare, run_job

    settings = full.stored.result["settings"]
    if own := [name for name in ("image_options", "quantization", "engine") if settings.get(name)]:
        raise UserError(
            f"Kept indices are replayed on models whose images are one tile, without {' or '.join(own)}; the board's "
            "full has that."
        )
    config = RunConfig(
        Replayed.name,
        kept.header["budget"],
        benchmark=settings["benchmark"],
        split=settings["split"],
        model=args.model or embedded_model(benchmarks.get(settings["benchmark"]).model),
        data=Path(args.data or RunConfig.data),
        output=Path(args.output),
        batch_size=args.batch_size,
        limit=full.stored.result["limit"],
        dtype=settings["dtype"],
        device=args.device,
        max_new_tokens=settings["max_new_tokens"],
        profile=full.stored.result["facts"].get("profile"),
        judge=args.judge,
        wandb="disabled",
    )
    model = load_model(config)
    first = next(question for question in data.questions if question.id in full.texts and question.images)
    if (pixels := pixel_hash(model, data.images.open(first.images[0]))) != kept.header["preprocessing"]:
        fault = f"preprocessing is {kept.header['preprocessing']!r}, this model makes {pixels!r} of {first.images[0]}"
        return refuse(args.file, [fault])
    job = prepare(config, model, Replayed.of(kept), data)
    if changed := [name for name in ("model_files", "questions") if job.settings[name] != settings[name]]:
        return refuse(args.file, [f"--model has other {changed[0].replace('_', ' ')} than the board's full"])
    run_job(job)
    return 0


if __name__ == "__main__":
    sys.exit(check_command())
