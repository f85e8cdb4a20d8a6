"""The batches of a run: which questions are asked together, and their images, read ahead of the model.

Questions are asked window by window of the benchmark's order, inside a window by the length of their text: a batch of
equal lengths has no padding, so it needs no mask and attention runs its fastest kernel. The order depends neither on
the batch size nor on the number of ranks nor on what was answered before, so equal runs write equal files. A window is
small enough for its images to be remembered (eval/feature_cache.py).
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.outcomes import Failure, Ready, chunks

if TYPE_CHECKING:
    from eval.benchmarks.base import Question
    from eval.job import Job
    from eval.parallel.ranks import Rank

WINDOW = 256  # questions
READERS = 4  # threads that read images
HELD_BYTES = 256 << 20  # of images that were read, beside those of the batches under way


def asking_order(
    planned: "Sequence[Question]", pending: "Sequence[Question]", model: Any, reduced: bool = True
) -> "list[Question]":
    """The pending questions in the order in which they are asked.

    Args:
        planned: all questions of the run, whose windows are those of the benchmark.
        model: counts the tokens of a text. One without a tokenizer leaves the order as it is, and so does one that
            draws random numbers image by image (Video-LLaVA with flip=SEED).
        reduced: the method acts on visual tokens. Where it does not, prompts that share their beginnings do so with
            those about the same image, which stand together in the benchmark's order.
    """
    if getattr(getattr(model, "video_processor", None), "flip", None) is not None:
        return list(pending)
    if getattr(model, "shares_prefix", False) and not reduced:
        return list(pending)
    places = {question.id: place for place, question in enumerate(planned)}
    tokenizer = getattr(model, "tokenizer", None)
    lengths = dict.fromkeys(places, 0)
    if tokenizer is not None and pending:
        texts = [question.message for question in pending]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        lengths = {question.id: len(tokens) for question, tokens in zip(pending, ids, strict=True)}
    return sorted(pending, key=lambda one: (places[one.id] // WINDOW, lengths[one.id], places[one.id]))


def claimed(pending: "Sequence[Question]", size: int, rank: "Rank") -> "Iterator[Sequence[Question]]":
    """The batches that this replica gets.

    Batches are cut before they are dealt, so each is the same whatever the number of ranks. A replica takes the next
    one when it is ready, so all end within two batches of each other: the images of one are read ahead.
    """
    batches = list(chunks(pending, size))
    while (number := rank.claim("batches")) < len(batches):
        yield batches[number]


@dataclass(frozen=True)
class Opened:
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
        return pixels + (self.views[0].nbytes if self.views is not None else 0)


class ReadAhead:
    """Reads and preprocesses images in threads while the model answers the batch before.

    What goes wrong with an image stays with the questions that need it. Images of the questions before are held, up to
    HELD_BYTES, because questions about one image stand together.
    """

    def __init__(self, job: "Job"):
        self._job = job
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._reading: OrderedDict[str, Future[Opened]] = OrderedDict()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(
        self, batches: "Iterator[Sequence[Question]]"
    ) -> "Iterator[tuple[Sequence[Question], list[Ready | Failure]]]":
        """Each batch with its questions' images read, or why they cannot be; one batch is read ahead."""
        waiting: tuple[Sequence[Question], Callable[[], list[Ready | Failure]]] | None = None
        for questions in batches:
            collect = self._start(questions)
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = questions, collect
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _start(self, questions: "Sequence[Question]") -> "Callable[[], list[Ready | Failure]]":
        """Start to read the images of a batch; returns the function that waits for them."""
        fresh: set[str] = set()
        needed: dict[str, Future[Opened]] = {}
        for question in questions:
            for name in question.images:
                if name not in self._reading:
                    fresh.add(name)
                    self._reading[name] = self._pool.submit(self._open, name)
                self._reading.move_to_end(name)
                needed[name] = self._reading[name]
        return lambda: self._collect(questions, needed, fresh)

    def _collect(
        self, questions: "Sequence[Question]", needed: "dict[str, Future[Opened]]", fresh: set[str]
    ) -> list[Ready | Failure]:
        found: list[Ready | Failure] = []
        for question in questions:
            try:
                opened = [needed[name].result() for name in question.images]
                digests = [one.digest for one in opened]
                sample = self._job.data.with_images(question, [one.image for one in opened], digests)
                seconds = sum(one.seconds for name, one in zip(question.images, opened, strict=True) if name in fresh)
                views = {id(one.image): one.views for one in opened if one.views is not None}
                found.append(Ready(question, sample, " ".join(digests), views, seconds))
                fresh -= set(question.images)
            except Exception as error:
                found.append(Failure(question.id, "image", error))
        self._let_go(needed)
        return found

    def _open(self, name: str) -> Opened:
        pictures, model = self._job.data.pictures, self._job.model
        image, digest = pictures.open(name), pictures.digest(name)
        if not getattr(model, "takes_views", False) or model.remembers(digest):
            return Opened(image, digest, None, 0.0)
        start = time.perf_counter()
        return Opened(image, digest, model.views(image), time.perf_counter() - start)

    def _let_go(self, needed: "dict[str, Future[Opened]]") -> None:
        """Forget the images that were used longest ago, and those that could not be read: they are tried again."""
        held = 0
        for name, future in reversed(list(self._reading.items())):
            if not future.done():
                continue
            failed = future.exception() is not None
            held += 0 if failed else future.result().nbytes
            if failed or (held > HELD_BYTES and name not in needed):
                del self._reading[name]
