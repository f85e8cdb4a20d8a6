"""Ask the questions of a run batch by batch, and store every batch before the next one starts.

Questions are asked window by window of the benchmark's order, inside a window by the length of their text: a batch of
equal lengths has no padding, so it needs no mask and attention runs its fastest kernel. The order depends neither on
the batch size nor on the number of ranks nor on what was answered before. At its end a run puts the answers into the
benchmark's order, so equal runs write equal files, whatever happened in between. A window is small enough for its
images to be remembered (eval/feature_cache.py). Images are read and preprocessed in threads while the model answers the
batch before. What cannot be answered is a Failure, which leaves the other questions alone.
"""

import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from eval import tracking
from eval.answers.source_hash import check_sources
from eval.answers.store import AnswerFiles, answer_id, settings_hash
from eval.benchmarks.base import Dataset, Question
from eval.config import RunConfig, device_name
from eval.feature_cache import without_memory
from eval.parallel.ranks import ASKING, Rank
from eval.results import cost, report
from llava.budget import budget_text
from llava.errors import MethodError, UserError, is_out_of_memory, release_memory
from llava.pipeline.accounting import Batch
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction.reducer import Reducer

T = TypeVar("T")

WINDOW = 256  # questions
READERS = 4  # threads that read images
HELD_BYTES = 256 << 20  # of images that were read, beside those of the batches under way
# So many errors of the model, one after the other, end a run.
ERRORS_IN_A_ROW = 16
# Batches of which the time to first token is measured; no number is printed of fewer.
TIMED, FEWEST_TIMED = 12, 10
# At least, from one look at code and weights on the disk to the next.
CHECK_SECONDS = 10
MICRO = 1_000_000  # the counters that ranks share hold whole numbers


@dataclass(frozen=True)
class Job:
    """Everything a run works with once its inputs are read and checked.

    Attributes:
        planned: the questions of this run, answered already or not.
        settings: what the answers depend on.
        started: ISO time; the name of this process in timing.jsonl.
    """

    config: RunConfig
    data: Dataset
    planned: tuple[Question, ...]
    model: Any
    reducer: Reducer
    settings: dict[str, Any]
    output: Path
    started: str

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.data.max_new_tokens

    @property
    def results(self) -> Path:
        """Folder of the result and the submission files; a partial result never replaces the complete one."""
        asked = len(self.planned)
        return self.output if asked >= len(self.data.questions) else self.output / f"limit{asked}"

    def check_unchanged(self) -> None:
        """Raise UserError if code or files of the model are no longer what this process imported and read."""
        known = {**self.settings["code"], **self.settings["method_code"]}
        check_sources(self.model, getattr(self.model, "engine", None), self.reducer, known=known)
        if check_files := getattr(self.model, "check_files", None):
            check_files()

    def sample_scores(self, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """What each answer is worth; nothing where the benchmark has no sample score for a single answer."""
        judge = self.data.sample_score
        return [] if judge is None else [judge(q, text) for q, text in zip(questions, texts, strict=True)]


def measured_under(job: Job) -> dict[str, Any]:
    """The conditions that belong to every timing."""
    device = device_name(job.model)
    return {
        "device": device,
        "hardware": report.hardware(device),
        "threads": torch.get_num_threads(),
        "batch_size": job.config.batch_size,
        "dtype": job.config.dtype,
    }


# -- batches, and their images ---------------------------------------------------------------------------------------


def asking_order(planned: Sequence[Question], pending: Sequence[Question], model: Any) -> list[Question]:
    """The pending questions in the order in which they are asked.

    Args:
        planned: all questions of the run, whose windows are those of the benchmark.
        model: counts the tokens of a text. One without a tokenizer leaves the order as it is.
    """
    places = {question.id: place for place, question in enumerate(planned)}
    tokenizer = getattr(model, "tokenizer", None)
    lengths = dict.fromkeys(places, 0)
    if tokenizer is not None and pending:
        texts = [question.message for question in pending]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        lengths = {question.id: len(tokens) for question, tokens in zip(pending, ids, strict=True)}
    return sorted(pending, key=lambda one: (places[one.id] // WINDOW, lengths[one.id], places[one.id]))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Parts of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def claimed(pending: Sequence[Question], size: int, rank: Rank) -> Iterator[Sequence[Question]]:
    """The batches that this replica gets.

    Batches are cut before they are claimed, so each is the same whatever the number of ranks. A replica takes the next
    one when it is ready, so all end within two batches of each other: the images of one are read ahead.
    """
    batches = list(chunks(pending, size))
    while (number := rank.claim("batches")) < len(batches):
        yield batches[number]


@dataclass(frozen=True)
class LoadedImage:
    """An image that was read.

    Attributes:
        views: what the model's tower sees of it; None where that is not needed, or left to the model.
        seconds: that making `views` took.
    """

    image: Any
    digest: str
    views: Any
    seconds: float

    @property
    def nbytes(self) -> int:
        frames = getattr(self.image, "frames", (self.image,))
        pixels = sum(3 * frame.width * frame.height for frame in frames)
        return int(pixels + (self.views[0].nbytes if self.views is not None else 0))


@dataclass(frozen=True)
class LoadedQuestion:
    """A question whose images are read.

    Attributes:
        digest: hash of the images.
        views: id of an image -> it and what the model's tower sees of it, as far as that was made ahead.
        seconds: that making these views took; 0 where an earlier question paid for them.
    """

    question: Question
    sample: Sample
    digest: str
    views: Mapping[int, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A question without an answer.

    Attributes:
        kind: "image" (its files cannot be read), "memory" or "error".
        error: what was raised.
    """

    question: str
    kind: str
    error: Exception

    @property
    def reason(self) -> str:
        """One sentence; an error that is not the user's is named by its type."""
        text = " ".join(str(self.error).split())
        return text if isinstance(self.error, UserError) else f"{type(self.error).__name__}: {text}"


class ReadAhead:
    """Reads and preprocesses images in threads while the model answers the batch before.

    What goes wrong with an image stays with the questions that need it. Images of the questions before are held, up to
    HELD_BYTES, because questions about one image stand together.
    """

    def __init__(self, job: Job):
        self._job = job
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._reading: OrderedDict[str, Future[LoadedImage]] = OrderedDict()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(
        self, batches: Iterator[Sequence[Question]]
    ) -> Iterator[tuple[Sequence[Question], list[LoadedQuestion | Failure]]]:
        """Each batch with its questions' images read, or why they cannot be; one batch is read ahead."""
        started = ((questions, self._start(questions)) for questions in batches)
        for (questions, collect), _ in pairwise(chain(started, [((), list)])):
            yield questions, collect()

    def _start(self, questions: Sequence[Question]) -> Callable[[], list[LoadedQuestion | Failure]]:
        """Start to read the images of a batch; returns the function that waits for them."""
        fresh: set[str] = set()
        needed: dict[str, Future[LoadedImage]] = {}
        for question in questions:
            for name in question.images:
                if name not in self._reading:
                    fresh.add(name)
                    self._reading[name] = self._pool.submit(self._load, name)
                self._reading.move_to_end(name)
                needed[name] = self._reading[name]

        def collect() -> list[LoadedQuestion | Failure]:
            loaded: list[LoadedQuestion | Failure] = []
            for question in questions:
                try:
                    images = {name: needed[name].result() for name in question.images}
                    digests = [images[name].digest for name in question.images]
                    sample = self._job.data.with_images(question, [images[n].image for n in question.images], digests)
                    views = {id(one.image): (one.image, one.views) for one in images.values() if one.views is not None}
                    seconds = sum(one.seconds for name, one in images.items() if name in fresh)
                    loaded.append(LoadedQuestion(question, sample, " ".join(digests), views, seconds))
                    fresh.difference_update(images)
                except Exception as error:
                    loaded.append(Failure(question.id, "memory" if is_out_of_memory(error) else "image", error))
            self._evict(needed)
            return loaded

        return collect

    def _load(self, name: str) -> LoadedImage:
        images, model = self._job.data.images, self._job.model
        image, digest = images.read(name)
        if not getattr(model, "takes_views", False) or model.remembers(digest):
            return LoadedImage(image, digest, None, 0.0)
        start = time.perf_counter()
        return LoadedImage(image, digest, model.views(image), time.perf_counter() - start)

    def _evict(self, needed: Mapping[str, Future[LoadedImage]]) -> None:
        """Forget the images that were used longest ago, and those that could not be read: they are tried again."""
        held = 0
        for name, future in reversed(list(self._reading.items())):
            if not future.done():
                continue
            failed = future.exception() is not None
            held += 0 if failed else future.result().nbytes
            if failed or (held > HELD_BYTES and name not in needed):
                del self._reading[name]


# -- answers of one batch --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """Questions that the model answered together."""

    parts: Sequence[LoadedQuestion]
    batch: Batch

    def lines(self, model: str, settings: str) -> list[dict[str, Any]]:
        """LLaVA's answer lines. The answer id depends on question and settings, so equal runs write equal files.

        Args:
            settings: their hash.
        """
        return [
            {
                "question_id": part.sample.id,
                "prompt": part.sample.message,
                "text": answer.text,
                "answer_id": answer_id(settings, part.sample.id),
                "model_id": model,
                "metadata": {"accounting": cost.accounting_record(answer.accounting), "images": part.digest},
            }
            for part, answer in zip(self.parts, self.batch.answers, strict=True)
        ]


@dataclass
class BatchLimit:
    """How many questions fit into memory at once, as far as is known.

    Attributes:
        size: None until a batch did not fit.
        notes: sentences for the result.
    """

    size: int | None = None
    notes: list[str] = field(default_factory=list)

    def halve(self, asked: int) -> None:
        """A batch of `asked` questions did not fit."""
        self.size = asked // 2
        self.notes.append(
            f"A batch of {asked} questions did not fit into memory; smaller ones were asked from there on."
        )


def outcomes(
    job: Job, batch: Sequence[LoadedQuestion | Failure], limit: BatchLimit, divide: bool = True
) -> Iterator[Answered | Failure]:
    """Answer a batch; what cannot be answered becomes a Failure and leaves the others alone.

    A batch that does not fit into memory is divided; one that fails is asked again one by one.

    Args:
        batch: questions whose images are read, and those whose images cannot be.
        limit: is made smaller when a batch does not fit into memory.
        divide: False raises in place of asking a failed batch again in parts: the ranks that hold one model together
            must run the same batches, and not all of them may have failed.
    """
    yield from (one for one in batch if isinstance(one, Failure))
    loaded = [one for one in batch if isinstance(one, LoadedQuestion)]
    for parts in chunks(loaded, limit.size or max(1, len(loaded))):
        samples = [part.sample for part in parts]
        if getattr(job.model, "takes_views", False):
            job.model.ready_views = {name: views for part in parts for name, views in part.views.items()}
        try:
            answers = generate(job.model, samples, job.reducer, max_new_tokens=job.max_new_tokens)
        except MethodError:
            raise  # no question is to blame: the run ends
        except Exception as raised:
            error = raised
        else:
            yield Answered(parts, answers)
            continue
        if out_of_memory := is_out_of_memory(error):
            if getattr(job.model, "remembers_features", False):
                job.model.forget()
            release_memory(error)
        if not divide:
            advice = " Use a smaller --batch-size." if out_of_memory and len(parts) > 1 else ""
            raise UserError(
                f"Questions {', '.join(sample.id for sample in samples)} failed on a model that several ranks hold "
                f"({type(error).__name__}: {' '.join(str(error).split())}); everything before them is kept.{advice}"
            ) from error
        if len(parts) == 1:
            yield Failure(samples[0].id, "memory" if out_of_memory else "error", error)
        elif out_of_memory:
            limit.halve(len(parts))
            yield from outcomes(job, parts, limit, divide)
        else:
            for part in parts:
                yield from outcomes(job, [part], limit, divide)


# -- a whole run -----------------------------------------------------------------------------------------------------


class Progress:
    """The bar, W&B, and how far all replicas are together.

    Args:
        sample_scores: sample scores of the questions that were answered before; empty where the benchmark has none.
        before: their number.
    """

    def __init__(self, job: Job, rank: Rank, tracker: tracking.Tracker, sample_scores: Sequence[float], before: int):
        self._job, self._rank, self._tracker = job, rank, tracker
        self._points, self.before, self.answered = sum(sample_scores), before, 0
        self.began = time.time()
        self.bar = tqdm(
            total=len(job.planned),
            initial=before,
            desc=f"{job.reducer.name} {budget_text(job.reducer.budget, job.reducer.retention_ratio)}",
            unit="question",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no line per batch
            disable=not rank.first or job.config.quiet,
        )

    def add(self, outcome: Answered) -> None:
        """A batch of this replica is stored."""
        questions, batch = [part.question for part in outcome.parts], outcome.batch
        self.answered += len(questions)
        if not self._rank.leads:
            return
        sample_scores = self._job.sample_scores(questions, [answer.text for answer in batch.answers])
        everyone = self.before + self._rank.count("answered", len(questions))
        points = self._points + self._rank.count("points", round(MICRO * sum(sample_scores))) / MICRO
        self.show(everyone)
        accuracy = 100 * points / everyone if sample_scores else None
        samples = [part.sample for part in outcome.parts]
        self._tracker.batch(samples, batch, sample_scores, answered=everyone, accuracy=accuracy)

    @property
    def everyone(self) -> int:
        """Questions of the run that have an answer, from any rank."""
        return self.before + self._rank.count("answered", 0)

    def show(self, everyone: int | None = None) -> None:
        """Move the bar to the number of answers; to that of all replicas if it is left out."""
        self.bar.update((self.everyone if everyone is None else everyone) - self.bar.n)


class Failures:
    """Failed questions on their way to the store.

    Unreadable images are written at once. Errors of the model wait for the next answer: many in a row mean that the run
    is broken (a bug, an accelerator that is gone), not the questions, and end it without being recorded.
    """

    def __init__(self, sink: AnswerFiles | None):
        self._sink = sink
        self._waiting: list[Failure] = []

    def add(self, failure: Failure) -> None:
        if failure.kind == "image":
            self._write([failure])
            return
        self._waiting.append(failure)
        if len(self._waiting) >= ERRORS_IN_A_ROW:
            raise self._waiting[0].error

    def release(self) -> None:
        """A question was answered after those that wait, or may be by another rank."""
        self._write(self._waiting)
        self._waiting = []

    def raise_first(self) -> None:
        """Nothing was answered: the first error is that of the run."""
        if self._waiting:
            raise self._waiting[0].error

    def _write(self, failures: Sequence[Failure]) -> None:
        for one in failures:
            tqdm.write(f"Question {one.question} failed: {one.reason}", file=sys.stderr)
            if not isinstance(one.error, UserError):
                traceback.print_exception(one.error)
        if failures and self._sink is not None:
            lines = [{"question_id": one.question, "reason": one.reason, "kind": one.kind} for one in failures]
            self._sink.fail(lines)


def ask(job: Job, sink: AnswerFiles | None, pending: Sequence[Question], progress: Progress, rank: Rank) -> None:
    """Answer this replica's part of the pending questions.

    Args:
        sink: where answers go: the answer store, or this rank's shard of it; None where another rank of the replica
            writes them.
        pending: the same list on every rank; its batches go to the replicas one by one, as they ask for them.

    Raises:
        UserError, or what the model raised: nothing can be answered at all.
    """
    settings = settings_hash(job.settings)
    conditions = measured_under(job) | {"run": job.started, "rank": rank.number}
    limit, failures, next_check = BatchLimit(), Failures(sink), 0.0
    order = asking_order(job.planned, pending, job.model)
    with ReadAhead(job) as images:
        for questions, batch in images.batches(claimed(order, job.config.batch_size, rank)):
            rank.report(ASKING, [question.id for question in questions])
            if time.monotonic() >= next_check:
                job.check_unchanged()
                next_check = time.monotonic() + CHECK_SECONDS
            for outcome in outcomes(job, batch, limit, divide=rank.size == 1):
                if isinstance(outcome, Failure):
                    failures.add(outcome)
                    continue
                lines = outcome.lines(job.model.name, settings)
                if sink is not None:
                    record = cost.timing_record(outcome.batch, conditions)
                    record["preprocess"] += sum(part.seconds for part in outcome.parts)  # made ahead of the model
                    record["notes"] += limit.notes
                    sink.add(lines, record)
                # Said after the first batch, as the result says it after the last: that may be hours later.
                accounts = [line["metadata"]["accounting"] for line in lines]
                if progress.answered == 0 and (off := cost.off_budget(accounts, job.reducer, planned_only=True)):
                    print(f"Warning, first batch: {off['remark']}", file=sys.stderr)
                progress.add(outcome)
                failures.release()
    # Another rank may answer later: then these are failures, and if none does, the first rank says that all failed.
    if rank.alone and progress.everyone == 0:
        failures.raise_first()
    failures.release()


def first_token_times(job: Job, rank: Rank) -> dict[str, Any] | None:
    """Time to first token over batches of the run's own questions, after its answers; None below ten full batches.

    The times of the run itself do not say it: images are remembered, and how many differs by benchmark and by method.
    Here every image goes through the tower, for each method alike; one batch more goes first, as a warm-up. The batches
    lie evenly over the run. All ranks of the first replica take part.

    Returns:
        `median_ms` from prepared pixels and token ids to the first token of a batch, `questions` of a batch, `batches`.
    """
    size = job.config.batch_size
    full = [batch for batch in chunks(asking_order(job.planned, job.planned, job.model), size) if len(batch) == size]
    if len(full) < FEWEST_TIMED:
        return None
    count = min(TIMED, len(full))
    batches = [full[number * len(full) // count] for number in range(count)]
    job = replace(job, model=without_memory(job.model), config=replace(job.config, max_new_tokens=1))
    seconds = []
    with ReadAhead(job) as images:
        for number, (questions, batch) in enumerate(images.batches(iter([batches[0], *batches]))):
            rank.report(ASKING, [question.id for question in questions])
            results = list(outcomes(job, batch, BatchLimit(), divide=rank.size == 1))
            # A batch that failed in part, or did not fit, is another one.
            if number and len(results) == 1 and isinstance(results[0], Answered):
                seconds.append(results[0].batch.timing.ttft)
    if len(seconds) < FEWEST_TIMED:
        return None
    return {"median_ms": 1000 * median(seconds), "questions": size, "batches": len(seconds)}
