"""Many runs on one loaded model, with tower features computed once per image: of `vtr eval`, and of tables.

Every one is an ordinary run with its own answer store, so a sweep can be interrupted and continued, and two sweeps
share the runs they have in common. Times are not comparable with single runs, because the tower's work is remembered;
`timing.jsonl` says so.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from eval import benchmarks
from eval.answers.jsonl import is_file, make_folder, read_json, write_json
from eval.answers.reuse import RESULT, check_reuse, own_lines, read_result
from eval.answers.source_hash import differences
from eval.answers.store import ANSWERS, UNLOCKED
from eval.ask import Job
from eval.benchmarks.base import Dataset
from eval.command import exit_on_user_error
from eval.config import DEFAULT_DATA, RunConfig, build_reducer, folder_name
from eval.feature_cache import CACHE_BYTES, CachingLlava
from eval.parallel import placement, ranks
from eval.parallel.launch import launch
from eval.parallel.placement import Placement
from eval.parallel.ranks import Control, Rank
from eval.results import report
from eval.run import load_model, prepare, read_questions, run_job
from llava.budget import WITHOUT_BUDGET, budget_text
from llava.errors import UserError
from llava.model.builder import device_of, load
from llava.model.llava_arch import Llava
from llava.reduction.reducer import Reducer

CELL_SECONDS = 24 * 3600  # a setting is a whole run


def run_all(configs: Sequence[RunConfig]) -> bool:
    """Run several benchmarks, methods and budgets, each into the store of a single run; finished ones are left alone.

    All are checked before the first question. Several ranks take one run after the other, each with its own model.

    Returns:
        Whether every question has an answer.

    Raises:
        UserError: some cannot run, all of which are named, or a run has failed.
    """
    first = configs[0]
    if first.ranks_per_model > 1 or first.zero is not None or first.engine != "own":
        raise UserError("--tensor-parallel, --zero and --engine vllm take one benchmark, method and budget in a call.")
    place = placement.here(device=first.device)
    check_all(configs, lambda config: build_reducer(config, visual_tokens=None))
    check_all(list({config.benchmark: config for config in configs}.values()), read_questions)
    here: dict[str, Any] = {} if place is None else {"device": "cpu"}  # the ranks have their own
    by_model = {config.model: dataclasses.replace(config, **here) for config in configs}
    models = {name: load_model(config) for name, config in by_model.items()}
    kind = device_of(first.device).type

    def plan(config: RunConfig) -> tuple[Job, bool]:
        job = prepare(config, models[config.model])
        return job, is_complete(job, kind)

    runs, complete = check_all(configs, plan), True
    for name, model in models.items():
        own = [(job, finished) for job, finished in runs if job.config.model == name]
        missing = [dataclasses.replace(job.config, output=job.output) for job, finished in own if not finished]
        if place is not None and missing:
            fill_on_ranks(missing, {**model.loaded_with, "device": first.device}, Path("results"), place, go_on=True)
        model.cache_bytes = CACHE_BYTES
        model.expect([job.reducer for job, _ in own])
        for job, finished in own:
            job.check_unchanged()  # ranks import the code later than this process does
            if place is None and not finished:
                with contextlib.redirect_stdout(io.StringIO()):
                    run_job(job)
            result = read_result(job.results)
            print("\n".join([*report.failed_lines(result), result["sentence"]]), flush=True)
            complete = complete and not result["failed"]
    return complete


Checked = TypeVar("Checked")


def check_all(configs: Sequence[RunConfig], check: Callable[[RunConfig], Checked]) -> list[Checked]:
    """What `check` gives for each run.

    Raises:
        UserError: names every run that `check` refuses, with the reason.
    """
    found, refused = [], []
    for config in configs:
        try:
            found.append(check(config))
        except UserError as error:
            size = budget_text(config.budget, config.retention_ratio)
            at = f" at {size}" if config.method not in WITHOUT_BUDGET else ""
            refused.append(f"{config.benchmark}, {config.method}{at}: {error}")
    if refused:
        raise UserError("\n".join(["Nothing was run, because this cannot be:", *refused]))
    return found


class UnansweredQuestions(UserError):
    """A run is over, but some questions failed."""


def fill(job: Job) -> None:
    """Run one setting; its configuration asks again what failed before.

    First tokens are not timed: tables time all methods in turns, and the pass can take longer than a cell's answers.

    Raises:
        UnansweredQuestions: some questions have no answer; a table must not hold their score.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = run_job(job, Rank(), timed=False)
    if result["failed"]:
        first = result["failed"][0]
        raise UnansweredQuestions(
            f"{len(result['failed'])} questions have no answer in {job.output} (question {first['question_id']}: "
            f"{first['reason']}); run the same command again to retry them."
        )


def fill_on_ranks(
    configs: Sequence[RunConfig], loaded_with: Mapping[str, Any], folder: Path, place: Placement, go_on: bool = False
) -> None:
    """Run settings on several ranks, each of which takes the next one when it is ready; `main` is what they do.

    Args:
        loaded_with: arguments of llava.model.builder.load, for the model of every rank.
        folder: for the list of settings while it runs.
        go_on: with the next setting when questions of one failed.

    Raises:
        SystemExit: a rank did not finish; the sentence is printed.
    """
    make_folder(folder)
    file = folder / f"sweep-{os.getpid()}.json"
    runs = [dataclasses.asdict(config) for config in configs]
    plain = json.loads(json.dumps({"model": dict(loaded_with), "go_on": go_on, "runs": runs}, default=str))
    write_json(file, plain)
    place = place.at_most(len(configs))
    try:
        with tqdm(total=len(configs), desc=f"{folder.name} on {place.describe()}", unit="setting") as bar:

            def show(control: Control) -> None:
                bar.update(control.count("finished", 0) - bar.n)

            code = launch("eval.sweep", [str(file.resolve())], place, CELL_SECONDS, show)
            if code == 0:
                bar.update(len(configs) - bar.n)
    finally:
        file.unlink(missing_ok=True)
    if code:
        raise SystemExit(code)


@exit_on_user_error
def main(words: Sequence[str]) -> int:
    """What a rank does: load the model, then run one setting of the file after the other."""
    rank, content = ranks.current(), read_json(Path(words[0]))
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content["model"].items()
    }
    configs = [RunConfig(**{**entry, "data": Path(entry["data"])}) for entry in content["runs"]]
    rank.put("runs", len(configs))
    model = CachingLlava(load(**arguments), CACHE_BYTES)
    model.expect([build_reducer(config, model.visual_tokens) for config in configs])
    while (number := rank.claim("settings")) < len(configs):
        rank.report(ranks.ASKING, [f"of {configs[number].output}"])
        job = prepare(configs[number], model)
        if not is_complete(job):
            with contextlib.suppress(*([UnansweredQuestions] if content["go_on"] else [])):
                fill(job)
        rank.count("finished")
    return 0


def is_complete(job: Job, device: str | None = None) -> bool:
    """Whether this very run is complete in its folder: same settings, labels, prompts and images, all its questions.

    A result alone proves nothing: its answers or its submission may be lost, or it may be damaged itself. Then the run
    is made again, which asks what has no answer and writes everything anew.

    Args:
        device: "cpu" or "cuda", where the answers are made by another process than the one that holds the model.

    Raises:
        UserError: its answers belong to other prompts or images.
    """
    if job.config.restart or not is_file(job.results / RESULT):
        return False
    try:
        result = read_result(job.results)
    except UserError:
        return False
    if result.get("config", {}).get("judge", "auto") != job.config.judge:
        return False
    expected = job.settings | ({"device": device} if device else {})
    if result["asked"] < len(job.planned) or differences(result["settings"], expected):
        return False
    if result.get("labels") != job.data.fingerprint:  # a run then asks nothing and scores anew
        return False
    if any(UNLOCKED in remark for remark in result.get("remarks", ())):  # perhaps there are locks now
        return False
    if "submission" not in result or not all(is_file(job.results / name) for name in result["submission"]):
        return False
    answers, foreign = own_lines(job.output / ANSWERS, result["settings"], (one.id for one in job.planned))
    check_reuse(job.data, job.planned, answers, job.output)
    return len(answers) == len(job.planned) and not foreign


def folder_of(output: Path, config: RunConfig, data: Dataset, model: Llava, reducer: Reducer) -> Path:
    """Where the answers of a run are, the same for every table: OUTPUT/MODEL/BENCHMARK-SPLIT/METHOD-BUDGET-HASH.

    A data folder of the user's own follows the split, with its name and a hash of the questions. The options
    follow the budget. The last hash is of the method's whole configuration, because defaults may change between two
    runs.
    """
    asked, folder = f"{config.benchmark}-{config.split}", config.data.resolve()
    if folder != DEFAULT_DATA.resolve():
        asked += f"-{folder_name(folder.name)}-{data.questions_digest[:8]}"
    options = "".join(f",{key}={value}" for key, value in sorted(config.options.items()))
    whole = json.dumps(dataclasses.asdict(reducer), sort_keys=True)
    name = f"{config.method}-{reducer.budget}{options}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return output / folder_name(model.name) / asked / name


@cache
def dataset(benchmark: str, data: Path, split: str) -> Dataset:
    """A benchmark's questions in its default profile, read once in a process."""
    return benchmarks.get(benchmark).load(data, split)
