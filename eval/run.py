"""One run: ask the questions that have no answer yet, store the answers, score all of them, write result.json."""

import dataclasses
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from eval import tracking
from eval.answers import AnswerStore, Shard, seal_of
from eval.answers.jsonl import read_json, write_file, write_json
from eval.answers.reuse import check_reuse, images_digest
from eval.asking import Progress, ask, first_token_times
from eval.benchmarks.base import Question
from eval.config import RunConfig
from eval.job import Job, measured_under, prepare
from eval.judging.choice import score_answers
from eval.parallel import ranks
from eval.parallel.ranks import MERGING, SCORING, WAITING, Rank
from eval.results import cost, provenance, report
from eval.settings import device_name, flat_config
from llava.errors import UserError

if TYPE_CHECKING:
    from llava.reduction.reducer import Reducer


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a sentence about what is kept."""


def run(
    config: RunConfig,
    model: Any = None,
    reducer: "Reducer | None" = None,
    rank: Rank | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Run or continue an evaluation.

    Args:
        model: a loaded model, to share one between runs; otherwise `config.model` is loaded.
        reducer: a built method, for methods that are not registered; otherwise `config.method` is built.
        rank: this process's place; by default among the ranks that were started together.
        timed: whether to time first tokens in a pass of its own; the result holds none otherwise.

    Returns:
        The content of result.json; nothing on ranks other than the first.
    """
    rank = rank or ranks.current()
    rank = Rank() if rank.alone else rank  # with counters of its own
    job = prepare(config, model, reducer)
    if not rank.first:
        answer_part(job, rank)
        return {}
    known = [question.id for question in job.data.questions]
    process = process_of(job, rank)
    began = provenance.command_began(rank) if model is None else None
    with AnswerStore(job.output, job.settings, known, config.restart, process) as store:
        check_reuse(job.data, job.planned, store.answers, job.output)
        job.results.mkdir(exist_ok=True)
        flat = flat_config(config, job.settings, job.data, job.reducer)
        tracker = tracking.start_evaluation(config, job.results, job.settings, flat)
        finished = False
        try:
            throughput = answer_questions(job, store, tracker, rank, began)
            ttft = time_to_first_token(job, rank, throughput["questions"]) if timed else None
            rank.report(SCORING)
            files = job.data.submission(texts(job, store))
            result = summarise(job, store, throughput, ttft)
            result |= {"config": flat, "submission": list(files)}
            write_json(job.results / "result.json", result)
            for name, content in files.items():
                write_file(job.results / name, content)
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
    print("\n".join([*report.score_lines(result), *remarks, *report.cost_lines(result)]))
    print("".join(f"{line}\n" for line in report.failed_lines(result)), end="")
    print(f"result: {job.results / 'result.json'}")
    print(result["sentence"], flush=True)
    return result


def process_of(job: Job, rank: Rank) -> dict[str, Any]:
    """What runs.jsonl says about a process that adds answers."""
    return {
        "run": job.started,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "rank": rank.number,
    }


def answer_questions(
    job: Job, store: AnswerStore, tracker: tracking.Tracker, rank: Rank, began: float | None
) -> dict[str, Any]:
    """Ask what is not answered yet, with all replicas; returns the throughput of each.

    Args:
        began: when the command started; None where that says nothing about this run.
    """
    wanted = [place for place, question in enumerate(job.planned) if is_wanted(job, store, question)]
    done = [question for question in job.planned if question.id in store.answers]
    rank.put(
        "run",
        {
            "output": str(job.output.resolve()),
            "before": len(done),
            "planned": len(job.planned),
            "started": job.started,
            "seal": seal_of(job.settings),
            "pending": spans(wanted),
        },
    )
    pending = [job.planned[place] for place in wanted]
    credits = job.credits(done, [store.answers[question.id]["text"] for question in done])
    progress = Progress(job, rank, tracker, credits, len(done), len(job.planned))
    if rank.alone:
        with progress.bar:
            ask(job, store, pending, progress, rank)
        parts = [part_of(job, progress, rank)]
    else:
        with progress.bar:
            with Shard(job.output, rank.name, rank.number, process_of(job, rank)) as shard:
                ask(job, shard, pending, progress, rank)
            rank.put(f"part{rank.replica}", part_of(job, progress, rank))
            rank.report(WAITING)
            parts = [rank.get(f"part{replica}") for replica in range(rank.replicas)]
            progress.show()
        rank.report(MERGING)
        store.merge()
    seconds = max(part["seconds"] for part in parts)
    questions = sum(part["questions"] for part in parts)
    return {
        "questions": questions,
        "seconds": seconds,
        "questions_per_second": questions / seconds if questions else None,
        "start_seconds": None if began is None else parts[0]["began"] - began,
        "ranks": parts,
    }


def time_to_first_token(job: Job, rank: Rank, answered: int) -> dict[str, Any] | None:
    """`first_token_times` on the ranks of the first replica, when no rank answers any more.

    A run that is only scored again keeps those of its result, if they were measured under its conditions.

    Args:
        answered: questions that this start has asked.
    """
    known = None
    if rank.first and not answered:
        with suppress(UserError, KeyError, TypeError):  # no result yet, or a damaged one
            former = read_json(job.results / "result.json")
            known = former["timing"]["ttft"] if former["conditions"] == measured_under(job) else None
    if rank.size > 1:
        if rank.first:
            rank.put("time", known is None)
        elif not rank.get("time"):
            return None
    return known or first_token_times(job, rank)


def answer_part(job: Job, rank: Rank) -> None:
    """What a rank other than the first does: answer its part, into a shard that the first rank merges.

    Raises:
        UserError: its questions or its model are not those of the first rank.
    """
    rank.report(WAITING)
    plan = rank.get("run")
    if plan["seal"] != seal_of(job.settings) or plan["planned"] != len(job.planned):
        raise UserError(
            f"Rank {rank.number} on {socket.gethostname()} reads other questions or another model than the first rank; "
            "all machines must see the same files."
        )
    job = dataclasses.replace(job, started=plan["started"])
    pending = [job.planned[place] for start, stop in plan["pending"] for place in range(start, stop)]
    progress = Progress(job, rank, tracking.Tracker(), [], plan["before"], len(job.planned))
    if not rank.leads:
        ask(job, Nowhere(), pending, progress, rank)
        if rank.replica == 0:
            rank.report(WAITING)
            time_to_first_token(job, rank, 0)
        return
    with Shard(job.output, rank.name, rank.number, process_of(job, rank)) as shard:
        ask(job, shard, pending, progress, rank)
    rank.put(f"part{rank.replica}", part_of(job, progress, rank))


class Nowhere:
    """The sink of ranks whose replica is led by another one."""

    def add(self, answers: Sequence[dict[str, Any]], timing: dict[str, Any]) -> None:
        raise AssertionError("only the first rank of a replica writes")

    def fail(self, failures: Sequence[dict[str, Any]]) -> None:
        raise AssertionError("only the first rank of a replica writes")


def part_of(job: Job, progress: Progress, rank: Rank) -> dict[str, Any]:
    """What a replica did, for the result."""
    place = {"rank": rank.number, "replica": rank.replica, "host": socket.gethostname()}
    return place | {"device": device_name(job.model)} | progress.throughput()


def is_wanted(job: Job, store: AnswerStore, question: Question) -> bool:
    """Whether this run asks the question: it has no answer, and the configuration wants those that failed, or not."""
    wanted = ("again", "only") if question.id in store.failures else ("skip", "again")
    return question.id not in store.answers and job.config.failed in wanted


def spans(places: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 7] -> [(0, 3), (7, 8)]: short, however many questions there are."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return found


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
    lines = [store.answers[question.id] for question in answered]
    if not lines:
        raise UserError(
            f"All {len(failed):,} questions failed, the first one with: {failed[0]['reason']}; mend that, and run the "
            "same command with --retry-failed."
        )
    off_budget = job.off_budget(lines)
    asked = [question.id for question in answered]
    answers = job.output / "answers.jsonl"
    score, judged = score_answers(job.data, job.config.judge, asked, texts(job, store), answers)
    timed = store.timing_of(asked)
    flops = cost.summarise_flops(timed)
    made = provenance.made_by(store.origins(asked))
    remarks = [*getattr(job.model, "notes", ()), *made.pop("notes"), *cost.notes(timed), *store.remarks]
    if off_budget:
        remarks.append(off_budget["remark"])
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
        **report.scored(score, answered),
        "audit": cost.summarise_audit([line["metadata"]["audit"] for line in lines]),
        "off_budget": off_budget,
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
        "scored_with": {"commit": provenance.commit(), "versions": provenance.versions()},
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
        mean = line["metadata"]["audit"]["mean"]
        picture = job.data.sample(question).image if number < tracking.TABLE_PICTURES else None
        credit = job.data.sample_score(question, line["text"]) if job.data.sample_score is not None else None
        rows.append([question.id, picture, None, question.question, question.answer, line["text"], credit, mean])
    return rows
