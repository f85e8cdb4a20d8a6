"""The answers of a batch and their cost: tokens per layer, reductions, seconds, operations and cache bytes.

Nothing here computes or waits for the device while the model runs. Operations are counted, and reductions are copied to
the host, only when they are read.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from llava.pipeline.decoder import Prefilled
from llava.reduction.merging import Reduction, Step, Trace
from llava.reduction.token_layout import Canvas, TokenLayout, on_padding


class Timer:
    """Measures how many seconds a batch spends in each stage.

    `mark(stage)` adds the time since the previous mark to a stage. On a CUDA device a mark records an event and returns
    at once; reading `seconds` waits for the last event. On other devices a mark reads a clock.

    Args:
        clock: returns seconds; None for the monotonic clock. Unused on a CUDA device.
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
        """Add the time since the previous mark to `stage`."""
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
        # Questions of equal length need equally many operations, so each distinct call runs once.
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

    Papers count differently: SparseVLM counts a layer after which it prunes as already pruned, and DART counts only the
    layers after pruning. We count the tokens that each layer computes on.
    """
    return sum(tokens_per_layer) / len(tokens_per_layer)


@dataclass(frozen=True)
class TokenAccounting:
    """Visual tokens and cache bytes of one sample, counted on the tensors that were computed.

    Attributes:
        tokens_per_layer: visual tokens that enter each decoder layer.
        visual_tokens: visual tokens before any reduction.
        merged: how many tokens are averages of several input tokens, after the last reduction of each image.
        kv_bytes: bytes of this sample's keys and values in the cache after prefill, without padding.
        images: number of images of the sample (at least 1); the budget applies to each image.
        planned: mean visual tokens per layer and image that the method plans for these images at its budget; None if
            that depends on the content of the image.
        asked: visual tokens per image that the budget asks for, but not more than the images have.
        on_padding: like `mean`, but counts only tokens at patches without any pixel of the image. A merged token counts
            at the place of the token that it replaces. None if it is not known which patches show the image.
        ahead: visual tokens on which a method computed in decoder layers that it ran before the prefill, as a mean over
            all layers and per image.
    """

    tokens_per_layer: tuple[int, ...]
    visual_tokens: int
    merged: int
    kv_bytes: int
    images: int
    planned: float | None
    asked: float
    on_padding: float | None = None
    ahead: float = 0.0

    @property
    def mean(self) -> float:
        """Mean visual tokens per layer and image; this is the number that is compared with the budget."""
        return mean_visual_tokens(self.tokens_per_layer) / max(1, self.images)

    @property
    def paid(self) -> float:
        """Like `mean`, but over all passes through decoder layers, those before the prefill included."""
        return self.mean + self.ahead


@dataclass(frozen=True)
class Applied:
    """A reduction that was applied to one image. Its tensors stay on the device.

    Attributes:
        place: the stage, for example "prompt" or "layer 2".
        number: of the image in its prompt.
        reduction: may be of several images.
        row: the row of `reduction` that is of this image.
    """

    place: str
    number: int
    reduction: Reduction
    row: int


@dataclass(frozen=True)
class SeenImage:
    """An image of a sample.

    Attributes:
        layout: layout of its visual tokens before any reduction.
        inputs: number of visual tokens that the method starts from.
        planned: for each layer, how many tokens are planned to enter it; None if that depends on the content of the
            image.
        asked: number of tokens that the budget asks for, as a mean over layers.
        canvas: tells the patches that show the image from padding; None if that is not known.
    """

    layout: TokenLayout
    inputs: int
    planned: tuple[int, ...] | None
    asked: int
    canvas: Canvas | None = None


@dataclass
class Record:
    """What happened to the samples of one batch up to the first token.

    Attributes:
        images: for each sample, its images in order.
        reductions: for each sample, its reductions in order.
        operations: floating point operations of the batch.
        ahead: sample -> visual tokens on which the method computed before the prefill, summed over decoder layers.
    """

    images: list[list[SeenImage]]
    reductions: list[list[Applied]]
    operations: Operations = field(default_factory=Operations)
    ahead: Counter[int] = field(default_factory=Counter)

    @cached_property
    def steps(self) -> list[Trace]:
        """For each sample its reductions in order, copied to the host."""
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
            layers, count, merged, empty = len(entering), max(1, len(images)), 0, 0
            for number, image in enumerate(images):
                own = [step for one, step in zip(applied, steps, strict=True) if one.number == number]
                if own:
                    merged += int(own[-1].reduction.merged_count()[0])
                if image.canvas is None:
                    continue
                # The tokens of this image on padding that enter each layer, summed over layers.
                takes_cls = bool(own) and own[0].reduction.inputs != image.layout.tokens
                flags, layer = on_padding(image.layout.with_cls if takes_cls else image.layout, image.canvas), 0
                for step in own:
                    empty += int(flags.sum()) * (step.layer - layer)
                    flags, layer = flags[step.reduction.kept[0]], step.layer
                empty += int(flags.sum()) * (layers - layer)
            plans = [image.planned for image in images if image.planned is not None]
            accounts.append(
                TokenAccounting(
                    entering,
                    visual_tokens=sum(image.inputs for image in images),
                    merged=merged,
                    kv_bytes=prefilled.kv_bytes[sample],
                    images=count,
                    planned=sum(map(sum, plans)) / layers / count if len(plans) == len(images) else None,
                    asked=sum(image.asked for image in images) / count,
                    on_padding=None if any(image.canvas is None for image in images) else empty / layers / count,
                    ahead=self.ahead[sample] / layers / count,
                )
            )
        return accounts


@dataclass(frozen=True)
class Answer:
    """One answer and its token accounting.

    Attributes:
        text: the decoded answer, without special tokens, stop string and surrounding white space.
        token_ids: generated ids, without the end token.
        accounting: visual tokens that enter each decoder layer, merged tokens, key/value bytes.
        trace: the reductions that were applied, in order, on the CPU.
        runs: for each image, the layout of its visual tokens before any reduction.
        canvases: for each image, its canvas (see SeenImage).
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
        """Time to first token of the whole batch, from prepared pixels and token ids on, without preprocessing."""
        return self.vision + self.selection + self.prefill


@dataclass(frozen=True)
class Batch:
    """Answers in the order of the samples, and the cost of the whole batch.

    Attributes:
        kv_bytes: bytes of the keys and values after prefill, with padding.
        kv_bytes_allocated: bytes that are allocated for keys and values after the last step. This includes the new
            tokens and, after at least one decoding step, space for up to 32 more in every layer.
        operations: floating point operations of tower, projector, selection and prefill.
        decode_steps: number of forward passes after the first token.
        images: number of images of all questions; an image that several questions share counts once for each.
    """

    answers: tuple[Answer, ...]
    timing: Timing
    kv_bytes: int
    operations: Operations
    decode_steps: int = 0
    images: int = 0
    kv_bytes_allocated: int = 0
