"""One run: ask the questions that have no answer yet, store the answers, score all of them, write result.json."""

import dataclasses
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval import benchmarks, tracking
from eval.answers.jsonl import make_folder, write_file, write_json
from eval.answers.reuse import RESULT, check_reuse, images_digest, images_of, read_result
from eval.answers.source_hash import differences
from eval.answers.store import TIMING, AnswerFiles, AnswerStore, Shard, check_restart
from eval.ask import Job, Progress, ask, first_token_times, measured_under
from eval.benchmarks.base import Dataset, Question
from eval.command import open_dataset
from eval.config import RunConfig, build_reducer, default_output, device_name, flat_config, store_settings
from eval.feature_cache import RUN_BYTES, CachingLlava
from eval.judging.choice import check_judge, score_answers
from eval.parallel import ranks
from eval.parallel.ranks import MERGING, SCORING, WAITING, Rank
from eval.results import cost, report
from eval.statistics.gain import floor_of
from eval.versions import commit, versions
from llava.budget import BLIND
from llava.errors import UserError
from llava.model.builder import device_of, load
from llava.model.checkpoint.files import locate
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a sentence about what is kept."""


# -- before the first question ---------------------------------------------------------------------------------------


def read_questions(config: RunConfig, model: bool = True, reducer: bool = True) -> tuple[Dataset, str]:
    """The benchmark's questions and the split; checks all that can be wrong before weights are read, cheapest first.

    Args:
        model, reducer: whether the configuration's are used, and checked.
    """
    split = benchmarks.check_split(benchmarks.get(config.benchmark), config.split, Path(config.data))
    if reducer:
        build_reducer(config, visual_tokens=None)
    if model:  # refuse a device that is not there before any file is read
        device_of(config.device)
    data = open_dataset(config.benchmark, str(config.data), split, config.profile, config.source)
    check_judge(data, config.judge)
    data.check_images(data.questions[: config.limit])
    return data, split


def prepare(config: RunConfig, model: Any = None, reducer: Reducer | None = None, data: Dataset | None = None) -> Job:
    """Read and check everything, the weights last.

    Args:
        model, reducer: see `run`.
        data: the questions, if they were read and checked before; many runs share one reading of them.
    """
    split = benchmarks.check_split(benchmarks.get(config.benchmark), config.split, Path(config.data))
    if data is None:
        data, _ = read_questions(config, model is None, reducer is None)
    if model is None:
        model = load_model(config)
    if data.images.noun == "videos" and not getattr(model, "takes_videos", True):
        raise UserError(
            f"{data.title} asks about videos, and {model.name} takes images only; choose a Video-LLaVA or a Qwen-VL "
            "with --model, or leave --model out for the bundled toy model."
        )
    if reducer is None:
        reducer = build_reducer(config, model.visual_tokens)
        require(reducer, model.spec)
        plain = dataclasses.replace(config, options={}, seed=0, budget=reducer.budget)
        standard = build_reducer(plain, model.visual_tokens)
    else:
        standard = reducer
    job = Job(
        config=config,
        data=data,
        planned=data.questions[: config.limit],
        model=model,
        reducer=reducer,
        settings=store_settings(config, split, data, model, reducer),
        output=Path(config.output or default_output(config, split, model, reducer, standard)),
        started=datetime.now(UTC).isoformat(),
    )
    job.check_unchanged()  # since the process started; loading a model takes minutes
    if config.restart and config.limit:
        check_restart(job.output, [question.id for question in job.planned])
    return job


def load_model(config: RunConfig) -> CachingLlava:
    """The model of this run."""
    if config.engine != "own":
        return with_engine(config)
    model = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        text_tower=config.text_tower,
        quantization=config.quantization,
        tensor_parallel=config.tensor_parallel,
        zero=config.zero,
        videos=benchmarks.get(config.benchmark).videos,
        **config.image_options,
    )
    return CachingLlava(model, RUN_BYTES)  # it remembers what its tower gave for an image


def with_engine(config: RunConfig) -> CachingLlava:
    """The same up to the decoder, which is an engine's."""
    # Here, because the client of servers that comes with it takes a second to import.
    from llava.serving.client import PIXELS, load_client_model
    from llava.serving.engine_model import Engine, engine_arguments, import_vllm

    import_vllm()  # before weights are read
    directory = locate(config.model, "checkpoint")
    first = build_reducer(config, visual_tokens=None)
    engine_arguments(first, directory)
    front = load_client_model(
        config.model, first, config.dtype, config.device, config.text_tower, **config.image_options
    )
    model = CachingLlava(front, RUN_BYTES)
    reducer = build_reducer(config, model.visual_tokens)
    model.engine = Engine(model, reducer, directory, config.dtype, config.batch_size)
    model.answers = model.engine.answers
    if model.engine.route == PIXELS:  # the engine's tower sees the images
        model.takes_views = model.remembers_features = False
    return model


# -- the run ---------------------------------------------------------------------------------------------------------


def run(
    config: RunConfig, model: Any = None, reducer: Reducer | None = None, rank: Rank | None = None, timed: bool = True
) -> dict[str, Any]:
    """Run or continue an evaluation.

    Args:
        model: a loaded model, to share one between runs; otherwise `config.model` is loaded.
        reducer: a built method, for methods that are not registered; otherwise `config.method` is built.
        rank, timed: see `run_job`.

    Returns:
        The content of result.json; nothing on ranks other than the first.
    """
    return run_job(prepare(config, model, reducer), rank, timed)


def run_job(job: Job, rank: Rank | None = None, timed: bool = True) -> dict[str, Any]:
    """Run or continue an evaluation whose inputs are read.

    Args:
        rank: this process's place; by default among the ranks that were started together.
        timed: whether to time first tokens in a pass of its own; the result holds none otherwise.

    Returns:
        The content of result.json; nothing on ranks other than the first.
    """
    rank = rank or ranks.current()
    rank = Rank() if rank.alone else rank  # with counters of its own
    config = job.config
    job = dataclasses.replace(job, started=datetime.now(UTC).isoformat())  # it may have waited for its turn
    if not rank.first:
        follow_first_rank(job, rank)
        return {}
    known = [question.id for question in job.data.questions]
    with AnswerStore(job.output, job.settings, known, config.restart, process_of(job, rank)) as store:
        check_reuse(job.data, job.planned, store.answers, job.output)
        make_folder(job.results)
        flat = flat_config(config, job.settings, job.data, job.reducer)
        tracker = tracking.start_evaluation(config, job.results, job.settings, flat)
        finished = False
        try:
            throughput = answer_questions(job, store, tracker, rank)
            ttft = None if throughput["questions"] else former_times(job)
            rank.put("time", measured := timed and ttft is None and config.engine == "own")
            if measured:
                ttft = first_token_times(job, rank)
            rank.report(SCORING)
            job.check_unchanged()
            # Each is on the disk before the next is written, and the result, which says that all is there, comes last.
            store.put_in_order()
            files = job.data.submission(texts(job, store))
            result = summarise(job, store, throughput, ttft)
            result |= {"config": flat, "submission": list(files)}
            for name, content in files.items():
                write_file(job.results / name, content)
            write_json(job.results / RESULT, result)
            tracker.finish(result, lambda: sample_table(job, store))
            finished = True
        except KeyboardInterrupt as stop:
            done = sum(question.id in store.answers for question in job.planned)
            raise Interrupted(
                f"Stopped. {done:,} of {len(job.planned):,} answers are kept in {job.output}; "
                "run the same command again to go on."
            ) from stop
        finally:
            tracker.close(failed=not finished)
    remarks = [f"note: {remark}" for remark in result["remarks"]]
    shown = [*remarks, *report.failed_lines(result)]
    if not config.quiet:
        shown = [*report.score_lines(result), *remarks, *report.cost_lines(result), *report.failed_lines(result)]
        shown.append(f"result: {job.results / RESULT}")
    print("\n".join([*shown, result["sentence"]]), flush=True)
    return result


def process_of(job: Job, rank: Rank) -> dict[str, Any]:
    """What runs.jsonl says about a process that adds answers."""
    return {"run": job.started, "commit": commit(), "versions": versions(), "rank": rank.number}


def answer_questions(job: Job, store: AnswerStore, tracker: tracking.Tracker, rank: Rank) -> dict[str, Any]:
    """Ask what is not answered yet, with all replicas; returns the throughput of each."""
    wanted = []
    for place, question in enumerate(job.planned):
        states = ("again", "only") if question.id in store.failures else ("skip", "again")
        if question.id not in store.answers and job.config.failed in states:
            wanted.append(place)
    done = [question for question in job.planned if question.id in store.answers]
    plan = {
        "output": str(job.output.resolve()),
        "before": len(done),
        "planned": len(job.planned),
        "started": job.started,
        "settings": job.settings,
        "pending": wanted,
    }
    rank.put("run", plan)
    pending = [job.planned[place] for place in wanted]
    sample_scores = job.sample_scores(done, [store.answers[question.id]["text"] for question in done])
    progress = Progress(job, rank, tracker, sample_scores, len(done))
    with progress.bar:
        parts = [answer_part(job, store if rank.alone else None, pending, progress, rank)]
        if not rank.alone:
            rank.report(WAITING)
            parts = [rank.get(f"part{replica}") for replica in range(rank.replicas)]
            progress.show()
    if not rank.alone:
        rank.report(MERGING)
        store.merge()
    seconds = max(part["seconds"] for part in parts)
    questions = sum(part["questions"] for part in parts)
    return {
        "questions": questions,
        "seconds": seconds,
        "questions_per_second": questions / seconds if questions else None,
        "ranks": parts,
    }


def answer_part(
    job: Job, store: AnswerFiles | None, pending: Sequence[Question], progress: Progress, rank: Rank
) -> dict[str, Any]:
    """Answer this replica's part of the pending questions; returns what it did, and publishes it to the other ranks.

    Args:
        store: None to answer into a shard of this rank, which the first rank merges.
    """
    if store is not None:
        ask(job, store, pending, progress, rank)
    else:
        with Shard(job.output, rank.name, rank.number, process_of(job, rank)) as shard:
            ask(job, shard, pending, progress, rank)
    seconds = time.time() - progress.began
    part = {
        "rank": rank.number,
        "replica": rank.replica,
        "host": socket.gethostname(),
        "device": device_name(job.model),
        "questions": progress.answered,
        "seconds": seconds,
        "questions_per_second": progress.answered / seconds,
    }
    rank.put(f"part{rank.replica}", part)
    return part


def follow_first_rank(job: Job, rank: Rank) -> None:
    """Answer this rank's share of the questions, on a rank other than the first.

    Raises:
        UserError: its questions or its model are not those of the first rank.
    """
    rank.report(WAITING)
    plan = rank.get("run")
    changes = differences(plan["settings"], job.settings, between=" there, here")
    if plan["planned"] != len(job.planned):
        changes.append(f"questions: {plan['planned']:,} there and {len(job.planned):,} here")
    if changes:
        raise UserError(
            f"Rank {rank.number} on {socket.gethostname()} has other code, questions or files of the model than the "
            f"first rank ({'; '.join(changes)}); all ranks must see the same files, and code must not be edited while "
            "they start. Run the same command again."
        )
    job = dataclasses.replace(job, started=plan["started"])
    pending = [job.planned[place] for place in plan["pending"]]
    progress = Progress(job, rank, tracking.Tracker(), [], plan["before"])
    if rank.leads:
        answer_part(job, None, pending, progress, rank)
        return
    ask(job, None, pending, progress, rank)
    rank.report(WAITING)
    if rank.replica == 0 and rank.get("time"):
        first_token_times(job, rank)


def former_times(job: Job) -> dict[str, Any] | None:
    """The times to first token of the result that is there, if they were measured under the conditions of this run."""
    with suppress(UserError, KeyError, TypeError):  # no result yet, or a damaged one
        former = read_result(job.results)
        return former["timing"]["ttft"] if former["conditions"] == measured_under(job) else None
    return None


def summarise(job: Job, store: AnswerStore, throughput: dict[str, Any], ttft: dict[str, Any] | None) -> dict[str, Any]:
    """The result of all answers to the planned questions, whichever process gave them.

    Args:
        throughput: of this process, or of the ranks.
        ttft: of `first_token_times`.
    """
    answered = [question for question in job.planned if question.id in store.answers]
    missing = [question.id for question in job.planned if question.id not in store.answers]
    failed = [store.failures[name] for name in missing if name in store.failures]
    if len(failed) < len(missing):
        raise UserError(
            f"{len(missing) - len(failed):,} of {len(job.planned):,} questions were not asked yet; run the same "
            "command without --retry-failed."
        )
    if not answered:
        raise UserError(
            f"All {len(failed):,} questions failed, the first one with: {failed[0]['reason']}; fix that, and run the "
            "same command with --retry-failed."
        )
    asked = [question.id for question in answered]
    lines = [store.answers[name] for name in asked]
    accounts = [line["metadata"]["accounting"] for line in lines]
    score, judged = score_answers(job.data, job.config.judge, asked, texts(job, store), job.output / "answers.jsonl")
    timed = cost.checked(store.timing_of(asked), job.output / TIMING)
    flops = cost.summarise_flops(timed)
    made = report.made_by(store.origins(asked))
    remarks = [*getattr(job.model, "notes", ()), *made.pop("notes"), *cost.notes(timed, len(asked))]
    remarks += [*cost.mixed_batches(timed), *store.remarks]
    if without_cls := job.reducer.without_cls(job.model.spec):
        remarks.append(without_cls)
    if off_budget := cost.off_budget(accounts, job.reducer):
        remarks.append(off_budget["remark"])
    floor = None
    if job.reducer.name == BLIND and score.values.get(score.main) is not None:
        split, profile = job.settings["split"], job.data.facts.get("profile")
        floor = floor_of(job.data, frozenset(asked), Path(job.config.data), split, profile)
        remarks.append(floor.text)
    result = {
        "title": job.data.title,
        "facts": {**job.data.facts, **judged},
        "method": job.reducer.name,
        "budget": job.reducer.budget,
        "visual_tokens": job.model.visual_tokens,
        "asked": len(answered),
        "failed": failed,
        "available": len(job.data.questions),
        "partial": len(job.planned) < len(job.data.questions),
        **report.scored(score, answered, job.data.labels({line["question_id"]: images_of(line) for line in lines})),
        **({"floor": dataclasses.asdict(floor)} if floor else {}),
        "accounting": cost.summarise_accounting(accounts),
        "off_budget": off_budget,
        "counts_otherwise": job.reducer.deviates("uncounted") or None,
        "timing": cost.summarise_timing(timed, job.started) | {"ttft": ttft},
        "throughput": throughput,
        "flops": flops,
        "flops_per_question": flops["per_question"],
        "settings": job.settings,
        "labels": job.data.fingerprint,
        "images": images_digest(lines),
        "limit": job.config.limit,
        "remarks": remarks,
        "conditions": measured_under(job),
        **made,
        "scored_with": {"commit": commit(), "versions": versions()},
        "started": job.started,
        "finished": datetime.now(UTC).isoformat(),
    }
    return {"sentence": report.sentence(result), **result}


def texts(job: Job, store: AnswerStore) -> dict[str, str]:
    """Raw answer text by id, for the planned questions that have an answer."""
    return {question.id: store.answers[question.id]["text"] for question in job.planned if question.id in store.answers}


def sample_table(job: Job, store: AnswerStore) -> list[list[Any]]:
    """Rows of tracking.COLUMNS for the first questions."""
    rows = []
    answered = [question for question in job.planned if question.id in store.answers]
    for number, question in enumerate(answered[: tracking.TABLE_ROWS]):
        line = store.answers[question.id]
        mean = line["metadata"]["accounting"]["mean"]
        image = job.data.sample(question).image if number < tracking.TABLE_IMAGES else None
        sample_score = job.data.sample_score(question, line["text"]) if job.data.sample_score is not None else None
        rows.append([question.id, image, None, question.question, question.answer, line["text"], sample_score, mean])
    return rows
