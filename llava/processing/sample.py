"""What goes into the model and what comes out: one question, one answer, one batch of answers."""

from dataclasses import dataclass, field

from PIL import Image

from llava.pipeline.audit import Audit
from llava.reduction.reduction import Trace
from llava.reduction.token_layout import Arrangement


@dataclass(frozen=True)
class Sample:
    """One question about no, one or several images.

    Attributes:
        id: stable name of the question; seeds the methods that draw random numbers.
        question: the question alone, the text whose tokens query-aware methods look at.
        suffix: answer-format instruction, appended on a new line (GQA's asks for a single word or phrase).
        image: RGB image, a video (llava.processing.video.Video), a tuple of them, or None for a text-only prompt. The
        budget holds
            for each.
        image_id: samples of a batch with the same image_id share one pass of the vision tower.
        history: earlier turns about the same images as (user message, answer).
    """

    id: str
    question: str
    suffix: str = ""
    image: Image.Image | tuple[Image.Image, ...] | None = None
    image_id: str | None = None
    history: tuple[tuple[str, str], ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in the order in which they stand in front of the question."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def message(self) -> str:
        """The user turn as the benchmark scripts write it."""
        return f"{self.question}\n{self.suffix}" if self.suffix else self.question


@dataclass(frozen=True)
class Answer:
    """One answer with the record of what was really computed for it.

    Attributes:
        text: decoded answer, special tokens and stop string removed, stripped.
        token_ids: generated ids, end token excluded.
        audit: visual tokens entering each decoder layer, merged tokens, key/value bytes.
        trace: the reductions that were applied, in order, for overlays and tests.
        runs: the unreduced run of visual tokens of every image.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    audit: Audit
    trace: Trace
    runs: tuple[Arrangement, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds spent on one batch, each measured with the device synchronised at both ends."""

    vision: float = 0.0
    selection: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def ttft(self) -> float:
        """Time to first token: tower, projector, selection and prefill."""
        return self.vision + self.selection + self.prefill


@dataclass(frozen=True)
class Batch:
    """Answers in the order of the samples, and what the batch cost as a whole.

    Attributes:
        kv_bytes: bytes of the key/value tensors held after prefill, padding included.
        flops: realised floating point operations of tower, projector, selection and prefill, from audited lengths.
        decode_steps: forward passes after the first token.
    """

    answers: tuple[Answer, ...]
    timing: Timing
    kv_bytes: int
    flops: int
    decode_steps: int = 0
    notes: tuple[str, ...] = field(default=())
