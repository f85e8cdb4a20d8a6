"""A batch of questions through the model: the answers, or for each question without one the reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from eval.benchmarks.base import Question
from llava.errors import MethodError, UserError
from llava.pipeline.generate import generate

if TYPE_CHECKING:
    from eval.job import Job
    from llava.pipeline.answer import Batch
    from llava.processing.sample import Sample


T = TypeVar("T")


@dataclass(frozen=True)
class Ready:
    """A question whose images are read.

    Attributes:
        digest: hash of the images.
        views: id of an image -> what the model's tower sees of it, as far as that was made ahead.
        seconds: that making these views took; 0 where an earlier question paid for them.
    """

    question: Question
    sample: "Sample"
    digest: str
    views: Mapping[int, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Answered:
    """Questions that the model answered together."""

    parts: Sequence[Ready]
    batch: "Batch"


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


@dataclass
class Room:
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
    job: "Job", batch: "Sequence[Ready | Failure]", room: Room, divide: bool = True
) -> Iterator[Answered | Failure]:
    """Answer a batch; what cannot be answered becomes a Failure and leaves the others alone.

    Args:
        batch: questions whose images are read, and those whose images cannot be.
        room: is made smaller when a batch does not fit into memory.
        divide: False raises in place of asking a failed batch again in parts: the ranks that hold one model together
            must run the same batches, and not all of them may have failed.
    """
    yield from (one for one in batch if isinstance(one, Failure))
    yield from answered(job, [one for one in batch if isinstance(one, Ready)], room, divide)


def answered(job: "Job", ready: Sequence[Ready], room: Room, divide: bool) -> Iterator[Answered | Failure]:
    """Answer questions in batches that fit; a batch that fails is asked again one by one."""
    import torch

    for parts in chunks(ready, room.size or max(1, len(ready))):
        samples = [part.sample for part in parts]
        if getattr(job.model, "takes_views", False):
            job.model.ready_views = {name: views for part in parts for name, views in part.views.items()}
        try:
            batch = generate(job.model, samples, job.reducer, max_new_tokens=job.max_new_tokens)
        except MethodError:
            raise  # no question is to blame: the run ends
        except Exception as raised:
            error = raised
        else:
            yield Answered(parts, batch)
            continue
        full = isinstance(error, torch.OutOfMemoryError)
        if full:
            error.with_traceback(None)  # its frames hold the tensors that fill the memory
            if getattr(job.model, "remembers_features", False):
                job.model.forget()
            torch.cuda.empty_cache()
        if not divide:
            raise UserError(
                f"Questions {', '.join(sample.id for sample in samples)} failed on a model that several ranks hold "
                f"({type(error).__name__}: {' '.join(str(error).split())}); everything before them is kept."
            ) from error
        if len(parts) == 1:
            yield Failure(samples[0].id, "memory" if full else "error", error)
        elif full:
            room.halve(len(parts))
            yield from answered(job, parts, room, divide)
        else:
            for part in parts:
                yield from answered(job, [part], room, divide)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Parts of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
