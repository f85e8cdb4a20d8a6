"""Results of the model: one answer, a batch of answers, and the cost of the batch."""

from collections.abc import Mapping
from dataclasses import dataclass

from llava.pipeline.accounting import Operations, TokenAccounting
from llava.reduction.reduction import Trace
from llava.reduction.token_layout import TokenLayout


@dataclass(frozen=True)
class Answer:
    """One answer and its token accounting.

    Attributes:
        text: decoded answer, special tokens and stop string removed, stripped.
        token_ids: generated ids, end token excluded.
        accounting: visual tokens entering each decoder layer, merged tokens, key/value bytes.
        trace: the reductions that were applied, in order, on the CPU.
        runs: the layout of the unreduced visual tokens of every image.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    accounting: TokenAccounting
    trace: Trace
    runs: tuple[TokenLayout, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds spent on one batch as a whole.

    Attributes:
        vision: vision tower and projector.
        selection: the method's own functions, and applying what they return.
        prefill: embedding the prompts and running the decoder over them.
        decode: tokens after the first.
        preprocess: tokenizing prompts, and resizing and cutting images on the CPU.
    """

    vision: float = 0.0
    selection: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    preprocess: float = 0.0

    @property
    def ttft(self) -> float:
        """Time from prepared pixels and token ids to the first token of the batch: vision, selection and prefill."""
        return self.vision + self.selection + self.prefill


@dataclass(frozen=True)
class Batch:
    """Answers in the order of the samples, and the cost of the whole batch.

    Attributes:
        kv_bytes: bytes of the key/value tensors held after prefill, padding included.
        kv_bytes_with_room: bytes of the memory that holds them after the last step: with the new tokens, and from the
            first step on with room for up to 32 more in every layer.
        operations: floating point operations of tower, projector, selection and prefill.
        decode_steps: forward passes after the first token.
        images: images of all questions; one that several questions share counts once for each.
    """

    answers: tuple[Answer, ...]
    timing: Timing
    kv_bytes: int
    operations: Operations
    decode_steps: int = 0
    notes: tuple[str, ...] = ()
    images: int = 0
    kv_bytes_with_room: int = 0

    @property
    def flops(self) -> int:
        """Operations of the batch; questions about the same image share the tower's."""
        return self.operations.total

    @property
    def flops_alone(self) -> Mapping[str, int]:
        """Operations by part ("tower", "projector", "selection", "prefill") as if every question were asked alone."""
        return self.operations.alone
