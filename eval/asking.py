"""Ask the questions of a run batch by batch, and store every batch before the next one starts."""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from eval import tracking
from eval.answers import answer_id, seal_of
from eval.batches import ReadAhead, asking_order, claimed
from eval.benchmarks.base import Question
from eval.feature_cache import without_memory
from eval.job import Job, measured_under
from eval.outcomes import Answered, Failure, Room, chunks, outcomes
from eval.parallel.ranks import ASKING, Rank
from eval.results import cost
from llava.errors import UserError

if TYPE_CHECKING:
    from llava.pipeline.answer import Batch

# So many errors of the model, one after the other, end a run.
ERRORS_IN_A_ROW = 16
# Batches of which the time to first token is measured; no number is printed of fewer.
TIMED, FEWEST_TIMED = 12, 10
MICRO = 1_000_000  # the counters that ranks share hold whole numbers


class Sink(Protocol):
    """Where answers go: the answer store, or this rank's shard of it."""

    def add(self, answers: Sequence[dict[str, Any]], timing: dict[str, Any]) -> None: ...

    def fail(self, failures: Sequence[dict[str, Any]]) -> None: ...


class Progress:
    """The bar, W&B, and how far all replicas are together.

    Args:
        credits: sample scores of the questions that were answered before; empty where the benchmark has none.
        before: their number.
        planned: questions of the run.
    """

    def __init__(
        self, job: Job, rank: Rank, tracker: tracking.Tracker, credits: list[float], before: int, planned: int
    ):
        self._job, self._rank, self._tracker = job, rank, tracker
        self._points, self.before, self.answered = sum(credits), before, 0
        self.began = time.time()
        self.bar = tqdm(
            total=planned,
            initial=before,
            desc=f"{job.reducer.name} {job.reducer.budget}",
            unit="question",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no line per batch
            disable=not rank.first,
        )

    def add(self, questions: Sequence[Question], batch: "Batch", samples: Sequence[Any]) -> None:
        """A batch of this replica is stored."""
        self.answered += len(questions)
        if not self._rank.leads:
            return
        credits = self._job.credits(questions, [answer.text for answer in batch.answers])
        everyone = self.before + self._rank.count("answered", len(questions))
        points = self._points + self._rank.count("points", round(MICRO * sum(credits))) / MICRO
        self.show(everyone)
        accuracy = 100 * points / everyone if credits else None
        self._tracker.batch(samples, batch, credits, answered=everyone, accuracy=accuracy)

    def show(self, everyone: int | None = None) -> None:
        """Move the bar to the number of answers; to that of all replicas if it is left out."""
        answers = self.before + self._rank.count("answered", 0) if everyone is None else everyone
        self.bar.update(answers - self.bar.n)

    def nothing_answered(self) -> bool:
        """Whether no question of the run has an answer, from any rank."""
        return self.before + self._rank.count("answered", 0) == 0

    def throughput(self) -> dict[str, Any]:
        """What this replica has done since it began."""
        seconds = time.time() - self.began
        rate = self.answered / seconds
        return {"began": self.began, "questions": self.answered, "seconds": seconds, "questions_per_second": rate}


class Failures:
    """Failed questions on their way to the store.

    Unreadable images are written at once. Errors of the model wait for the next answer: many in a row mean that the run
    is broken (a bug, an accelerator that is gone), not the questions, and end it without being recorded.
    """

    def __init__(self, sink: Sink, rank: Rank, started: str):
        self._sink, self._rank, self._started = sink, rank, started
        self._waiting: list[Failure] = []

    def add(self, failure: Failure) -> None:
        if failure.kind == "image":
            self._write([failure])
            return
        self._waiting.append(failure)
        if len(self._waiting) >= ERRORS_IN_A_ROW:
            raise self._waiting[0].error

    def release(self) -> None:
        """A question was answered after those that wait."""
        self._write(self._waiting)
        self._waiting = []

    def finish(self, nothing_answered: bool) -> None:
        """The last question was asked."""
        if nothing_answered and self._waiting:
            raise self._waiting[0].error
        self.release()

    def _write(self, failures: Sequence[Failure]) -> None:
        for one in failures:
            tqdm.write(f"Question {one.question} failed: {one.reason}", file=sys.stderr)
            if not isinstance(one.error, UserError):
                traceback.print_exception(one.error)
        if failures and self._rank.leads:
            common = {"run": self._started}
            lines = [{"question_id": one.question, "reason": one.reason, "kind": one.kind} for one in failures]
            self._sink.fail([line | common for line in lines])


def ask(job: Job, sink: Sink, pending: Sequence[Question], progress: Progress, rank: Rank) -> None:
    """Answer this replica's part of the pending questions.

    Args:
        pending: the same list on every rank; its batches go to the replicas one by one, as they ask for them.

    Raises:
        UserError, or what the model raised: nothing can be answered at all.
    """
    seal = seal_of(job.settings)
    conditions = measured_under(job) | {"run": job.started, "rank": rank.number}
    room, failures = Room(), Failures(sink, rank, job.started)
    reduced = bool(getattr(job.reducer, "acts_in", True))
    pending = asking_order(job.planned, pending, job.model, reduced)
    with ReadAhead(job) as images:
        for questions, batch in images.batches(claimed(pending, job.config.batch_size, rank)):
            rank.report(ASKING, [question.id for question in questions])
            for outcome in outcomes(job, batch, room, divide=rank.size == 1):
                if isinstance(outcome, Failure):
                    failures.add(outcome)
                    continue
                record = timing_line(job, outcome, conditions, room)
                lines = answer_lines(outcome, job.model.name, seal)
                if rank.leads:
                    sink.add(lines, record)
                if progress.answered == 0:
                    warn_off_budget(job, lines)
                asked = [part.question for part in outcome.parts]
                progress.add(asked, outcome.batch, [part.sample for part in outcome.parts])
                failures.release()
    # Another rank may answer later: then these are failures, and if none does, the first rank says that all failed.
    failures.finish(rank.alone and progress.nothing_answered())


def first_token_times(job: Job, rank: Rank) -> dict[str, Any] | None:
    """Time to first token over batches of the run's own questions, after its answers; None below ten full batches.

    The times of the run itself do not say it: images are remembered, and how many differs by benchmark and by method.
    Here every image goes through the tower and every prompt through the decoder whole, for each method alike; one batch
    more goes first, as a warm-up. The batches lie evenly over the run.

    Returns:
        `median_ms` from prepared pixels and token ids to the first token of a batch, `questions` of a batch, `batches`.
    """
    reduced, size = bool(getattr(job.reducer, "acts_in", True)), job.config.batch_size
    order = asking_order(job.planned, job.planned, job.model, reduced)
    full = [batch for batch in chunks(order, size) if len(batch) == size]
    if len(full) < FEWEST_TIMED:
        return None
    count = min(TIMED, len(full))
    batches = [full[number * len(full) // count] for number in range(count)]
    job = replace(job, model=without_memory(job.model), config=replace(job.config, max_new_tokens=1))
    seconds = []
    with ReadAhead(job) as images:
        for number, (questions, batch) in enumerate(images.batches(iter([batches[0], *batches]))):
            rank.report(ASKING, [question.id for question in questions])
            found = list(outcomes(job, batch, Room(), divide=rank.size == 1))
            # A batch that failed in part, or did not fit, is another one.
            if number and len(found) == 1 and isinstance(found[0], Answered):
                seconds.append(found[0].batch.timing.ttft)
    if len(seconds) < FEWEST_TIMED:
        return None
    return {"median_ms": 1000 * median(seconds), "questions": size, "batches": len(seconds)}


def timing_line(job: Job, answered: Answered, conditions: dict[str, Any], room: Room) -> dict[str, Any]:
    """The batch's line of timing.jsonl. What was prepared ahead of the model counts as preprocessing."""
    record = cost.timing_record(answered.batch, conditions)
    record["preprocess"] += sum(part.seconds for part in answered.parts)
    record["notes"] += room.notes
    return record


def answer_lines(answered: Answered, model: str, seal: str) -> list[dict[str, Any]]:
    """LLaVA's answer lines. The answer id depends on question and settings, so equal runs write equal files.

    Args:
        seal: hash of the settings.
    """
    if [answer.id for answer in answered.batch.answers] != [part.sample.id for part in answered.parts]:
        raise AssertionError("the model's answers are not in the order of the samples")
    return [
        {
            "question_id": part.sample.id,
            "prompt": part.sample.message,
            "text": answer.text,
            "answer_id": answer_id(seal, part.sample.id),
            "model_id": model,
            "metadata": {"audit": cost.audit_record(answer.accounting), "pictures": part.digest},
        }
        for part, answer in zip(answered.parts, answered.batch.answers, strict=True)
    ]


def warn_off_budget(job: Job, lines: Sequence[dict[str, Any]]) -> None:
    """Say after the first batch what the result will say after the last: that may be hours later."""
    if off := job.off_budget(lines):
        print(f"Warning, first batch: {off['remark']}", file=sys.stderr)
