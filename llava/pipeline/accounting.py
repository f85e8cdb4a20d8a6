"""What a batch gives and what it cost: answers, tokens per layer, reductions, seconds, operations and cache bytes.

Nothing here waits for the device or computes while the model runs: operations are counted, and reductions copied to the
host, when they are read.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from llava.pipeline.decoder import Prefilled
from llava.reduction.merging import Reduction, Step, Trace
from llava.reduction.token_layout import Canvas, TokenLayout, on_padding


class Timer:
    """Seconds by stage of one batch.

    `mark(stage)` adds the time since the previous mark to a stage. On a CUDA device a mark records an event and returns
    at once; reading `seconds` waits for the last event. On other devices a mark reads a clock.

    Args:
        clock: its seconds; None for the monotonic clock.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None):
        self.device = device
        self._now: Callable[[], Any] = self._event if device.type == "cuda" else clock or time.perf_counter
        self._stages: list[str] = []
        self._marks: list[Any] = [self._now()]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def mark(self, stage: str) -> None:
        """End an interval that belongs to `stage`."""
        self._stages.append(stage)
        self._marks.append(self._now())

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far."""
        cuda = self.device.type == "cuda"
        if cuda:
            self._marks[-1].synchronize()
        seconds: dict[str, float] = {}
        for stage, before, after in zip(self._stages, self._marks[:-1], self._marks[1:], strict=True):
            passed = before.elapsed_time(after) / 1000 if cuda else after - before
            seconds[stage] = seconds.get(stage, 0.0) + passed
        return seconds


@dataclass
class Operations:
    """Floating point operations of a batch: what to count, counted when `total` or `alone` is first read."""

    _counts: list[tuple[str, int, Callable[..., int], tuple[Any, ...]]] = field(default_factory=list)

    def add(self, part: str, function: Callable[..., int], *arguments: Any, images: int = 1) -> None:
        """Count `function(*arguments)` operations; arguments hold modules and whole numbers, never tensors.

        Args:
            part: "tower", "projector", "selection" or "prefill".
            images: number of images in the batch that share these operations; if asked alone, each would need them.
        """
        self._counts.append((part, images, function, arguments))

    @cached_property
    def _counted(self) -> list[tuple[str, int, int]]:
        # Questions of equal length need equally many: each count is worked out once.
        calls = {(function, arguments) for _, _, function, arguments in self._counts}
        known = {(function, arguments): function(*arguments) for function, arguments in calls}
        return [(part, images, known[function, arguments]) for part, images, function, arguments in self._counts]

    @property
    def total(self) -> int:
        """Operations of the batch."""
        return sum(amount for _, _, amount in self._counted)

    @property
    def alone(self) -> dict[str, int]:
        """Operations by part, summed over the questions as if each were asked alone."""
        by_part: dict[str, int] = {}
        for part, images, amount in self._counted:
            by_part[part] = by_part.get(part, 0) + images * amount
        return by_part


def mean_visual_tokens(tokens_per_layer: Sequence[int]) -> float:
    """Mean over decoder layers of the visual tokens that enter each layer.

    Papers disagree: SparseVLM counts a layer that prunes on its way out as already pruned, DART
    counts only the layers after pruning. We count what each layer computes on.
    """
    return sum(tokens_per_layer) / len(tokens_per_layer)


@dataclass(frozen=True)
class TokenAccounting:
    """Visual tokens and cache bytes of one sample, counted on the tensors that were computed.

    Attributes:
        tokens_per_layer: visual tokens that enter each decoder layer.
        visual_tokens: visual tokens before any reduction.
        images: images of the sample; the budget holds for each.
        merged: tokens among those entering layer 0 that are averages of several input tokens.
        kv_bytes: bytes of this sample's keys and values in the cache after prefill, padding left out.
        planned: mean visual tokens per layer and image that the method plans for these images at its budget; None if
            that depends on the image.
        asked: visual tokens per image that the budget asks for, at most those that the images have.
        on_padding: mean visual tokens per layer and image, as `mean`, that stand at a patch without any pixel of the
            image. A merged token counts where it stands. None where the image's place is not known.
    """

    tokens_per_layer: tuple[int, ...]
    visual_tokens: int
    merged: int
    kv_bytes: int
    images: int
    planned: float | None
    asked: float
    on_padding: float | None = None

    @property
    def mean(self) -> float:
        """Mean visual tokens per layer and image, which is compared with the budget."""
        return mean_visual_tokens(self.tokens_per_layer) / max(1, self.images)


@dataclass(frozen=True)
class Applied:
    """One reduction of one image, on the device."""

    place: str
    number: int
    reduction: Reduction
    row: int


@dataclass(frozen=True)
class SeenImage:
    """An image of a sample.

    Attributes:
        layout: of its visual tokens before any reduction.
        inputs: how many these are for the method.
        planned: those planned to enter each layer; None if that depends on the image.
        asked: those that the budget asks for, as a mean over layers.
        canvas: where the image lies on what the patches cover; None if that is not known.
    """

    layout: TokenLayout
    inputs: int
    planned: tuple[int, ...] | None
    asked: int
    canvas: Canvas | None = None

    def on_padding(self, steps: Trace, layers: int) -> int | None:
        """Tokens on padding that enter the decoder layers, summed over these; `steps` are the image's own."""
        if self.canvas is None:
            return None
        takes_cls = bool(steps) and steps[0].reduction.inputs != self.layout.tokens
        flags, layer, total = on_padding(self.layout.with_cls if takes_cls else self.layout, self.canvas), 0, 0
        for step in steps:
            total += int(flags.sum()) * (step.layer - layer)
            flags, layer = flags[step.reduction.kept[0]], step.layer
        return total + int(flags.sum()) * (layers - layer)


@dataclass
class Record:
    """What happened to the samples of one batch up to the first token.

    Attributes:
        images: of each sample in order.
        reductions: of each sample in order.
        operations: floating point operations.
    """

    images: list[list[SeenImage]]
    reductions: list[list[Applied]]
    operations: Operations = field(default_factory=Operations)

    @cached_property
    def steps(self) -> list[Trace]:
        """The reductions of each sample, in order, copied to the host."""
        return [
            tuple(
                Step(a.place if a.number == 0 else f"{a.place} #{a.number + 1}", a.reduction.only(a.row, on_cpu=True))
                for a in applied
            )
            for applied in self.reductions
        ]

    def accounting(self, prefilled: Prefilled) -> list[TokenAccounting]:
        """Token accounting of each sample."""
        accounts = []
        for sample, (images, applied, steps) in enumerate(zip(self.images, self.reductions, self.steps, strict=True)):
            entering = tuple(segment.visual[sample] for segment in prefilled.segments for _ in segment.layers)
            count, plans = max(1, len(images)), [image.planned for image in images if image.planned is not None]
            planned = sum(map(sum, plans)) / len(entering) / count if len(plans) == len(images) else None
            numbered = list(zip((a.number for a in applied), steps, strict=True))
            own = [tuple(step for at, step in numbered if at == number) for number in range(len(images))]
            # Tokens that are averages of several, after the last reduction of each image.
            merged = sum(int(trace[-1].reduction.merged_count()[0]) for trace in own if trace)
            padding = [image.on_padding(trace, len(entering)) for image, trace in zip(images, own, strict=True)]
            known = [tokens for tokens in padding if tokens is not None]
            empty = sum(known) / len(entering) / count if len(known) == len(padding) else None
            inputs = sum(image.inputs for image in images)
            asked = sum(image.asked for image in images) / count
            held = prefilled.kv_bytes[sample]
            accounts.append(TokenAccounting(entering, inputs, merged, held, count, planned, asked, empty))
        return accounts


@dataclass(frozen=True)
class Answer:
    """One answer and its token accounting.

    Attributes:
        text: decoded answer, special tokens and stop string removed, stripped.
        token_ids: generated ids, end token excluded.
        accounting: visual tokens entering each decoder layer, merged tokens, key/value bytes.
        trace: the reductions that were applied, in order, on the CPU.
        runs: the layout of the unreduced visual tokens of every image.
        canvases: where each image lies on what its patches cover, see SeenImage; as many as `runs`.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    accounting: TokenAccounting
    trace: Trace
    runs: tuple[TokenLayout, ...] = ()
    canvases: tuple[Canvas | None, ...] = ()


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
        kv_bytes_allocated: bytes of the memory that holds them after the last step: with the new tokens, and from the
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
    images: int = 0
    kv_bytes_allocated: int = 0
