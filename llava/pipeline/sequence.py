"""A batch of prompts in the decoder: left-padded, with one span of visual tokens per image.

All lengths are host integers, so that reducing, masking and padding never wait for the device. Index tensors are made
from them, and prompts of equal lengths share these (llava/reduction/ranking.py): they must not be written into.
"""

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.pipeline import positions
from llava.pipeline.positions import Span
from llava.reduction.merging import Reduction
from llava.reduction.modules import Angles
from llava.reduction.ranking import gather_tokens, made_once

Row = tuple[int, int]  # (sample, number of the image in its prompt)
Samples = tuple[int, ...] | None  # numbers of samples, one of them as often as wanted; None for all, in order
Cut = tuple[int, int, int]  # a reduced image: its first column, its tokens before and after


@dataclass
class Rotary:
    """Cosines and sines [B, L, d] at positions [B, L].

    Attributes:
        longer: those of the prompts before they were shortened, if they begin with these.
    """

    position: Tensor
    cos: Tensor
    sin: Tensor
    longer: "Rotary | None" = None

    @cached_property
    def angles(self) -> Angles:
        """The same, ready for scores, computed once for all stages: of these columns and maybe of more behind them."""
        return self.longer.angles if self.longer else Angles.of(self.cos, self.sin)


@dataclass(frozen=True)
class Reduced:
    """Images with one reduction.

    Attributes:
        images: in the order of the rows of the reduction.
        reduction: their output tokens.
        values: [images, K, D] of the output tokens where these are merged; None where they are the kept tokens.
    """

    images: list[Row]
    reduction: Reduction
    values: Tensor | None = None


@dataclass(frozen=True)
class Sequence:
    """B prompts padded on the left to L.

    Spans are [start, stop) in a sample's own coordinates, without padding.

    Attributes:
        hidden: [B, L, D] embeddings or hidden states; padding rows are zero.
        position: [B, L] int64 position ids, or [B, L, 3] where they have three axes (llava/pipeline/positions.py); 0
        in the padding.
        lengths: real length of each sample.
        visual: spans of visual tokens of each sample, one per image in order; () for a text-only prompt.
        question: span of the last question's tokens.
        instruction: the same with the answer-format suffix.
        after: span of all text after the last image; the whole prompt if it is text only.
        rotary: cosines and sines of the decoder's layers, once they are computed, and the positions that they are of.
    """

    hidden: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    visual: tuple[tuple[Span, ...], ...]
    question: tuple[Span, ...]
    instruction: tuple[Span, ...]
    after: tuple[Span, ...]
    rotary: Rotary | None = None

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.hidden.shape[1]

    def padding(self, sample: int) -> int:
        return self.hidden.shape[1] - self.lengths[sample]

    def valid(self) -> Tensor:
        """[B, L] bool, False in the padding."""
        return real_columns(self.lengths, self.hidden.shape[1], self.hidden.device)

    @property
    def images(self) -> list[Span]:
        """The span of visual tokens of every sample, for a sequence made by `rows`, with one span each."""
        return [run for (run,) in self.visual]

    def take(self, tensor: Tensor, spans: Listed[Span], samples: Samples = None) -> Tensor:
        """[n, T, ...] rows of `tensor` [B, L, ...] in spans of the same length T, one for each of `samples`."""
        cut = self.padded_spans(spans, samples)
        if len(set(cut)) == 1:
            return self.of_samples(tensor[:, slice(*cut[0])], samples)
        return self.at(tensor, columns_of(cut, tensor.device), samples)

    def padded_spans(self, spans: Listed[Span], samples: Samples = None) -> tuple[Span, ...]:
        """Spans of samples as columns of the padded batch."""
        before = map(self.padding, range(len(self.lengths)) if samples is None else samples)
        return tuple((pad + start, pad + stop) for pad, (start, stop) in zip(before, spans, strict=True))

    def at(self, tensor: Tensor, index: Tensor, samples: Samples = None) -> Tensor:
        """[n, T, ...] rows of `tensor` [B, L, ...] at columns [n, T] of samples."""
        if samples is None:
            return gather_tokens(tensor, index)
        return tensor[rows_of(samples, tensor.device)[:, None], index]

    def of_samples(self, tensor: Tensor, samples: Samples) -> Tensor:
        """The rows of some samples, in this order; the tensor itself where these are all."""
        if samples is None or samples == tuple(range(len(self.lengths))):
            return tensor
        return tensor.index_select(0, rows_of(samples, tensor.device))

    def rows(self, rows: list[Row]) -> "Sequence":
        """One row per image: its whole prompt, with only this image's span as visual tokens.

        Padding is cut to the longest of these prompts.
        """
        each_has_one = len(rows) == len(self.lengths) and all(len(runs) == 1 for runs in self.visual)
        if each_has_one and rows == [(sample, 0) for sample in range(len(rows))]:
            return self
        samples = tuple(sample for sample, _ in rows)
        lengths = tuple(self.lengths[s] for s in samples)
        width = max(lengths)
        return Sequence(
            self.of_samples(self.hidden, samples)[:, -width:],
            self.of_samples(self.position, samples)[:, -width:],
            lengths,
            tuple((self.visual[s][number],) for s, number in rows),
            tuple(self.question[s] for s in samples),
            tuple(self.instruction[s] for s in samples),
            tuple(self.after[s] for s in samples),
        )

    def keys_of(self, keys: Tensor, rows: list[Row]) -> Tensor:
        """[B, Hkv, L, d] keys of these prompts -> those of `rows(rows)`."""
        width = max(self.lengths[sample] for sample, _ in rows)
        keys = self.of_samples(keys, tuple(sample for sample, _ in rows))
        return keys if width == keys.shape[2] else keys[:, :, -width:]

    def renumbered(self) -> "Sequence":
        """The same prompts, numbered without gaps: see `positions.renumber`."""
        return replace(self, position=positions.renumber(self.position, self.lengths, self.visual))

    def reduce(self, reduced: list[Reduced], renumber: bool) -> "Sequence":
        """Replace the visual tokens of images by their reductions' output tokens.

        Args:
            reduced: images left out keep everything.
            renumber: contiguous position ids afterwards; else every token keeps its own.
        """
        counts = {image: part.reduction.kept.shape[1] for part in reduced for image in part.images}
        visual, dropped, cuts = [], [], []  # of each sample: spans afterwards; of its images: tokens dropped, `Cut`
        for sample, spans in enumerate(self.visual):
            after: list[Span] = []
            gone: list[int] = []
            own_cuts: list[Cut] = []
            for number, (start, stop) in enumerate(spans):
                count = counts.get((sample, number), stop - start)
                after.append((start - sum(gone), start - sum(gone) + count))
                gone.append(stop - start - count)
                if (sample, number) in counts:
                    own_cuts.append((self.padding(sample) + start, stop - start, count))
            visual.append(tuple(after))
            dropped.append(gone)
            cuts.append(tuple(own_cuts))

        def moved(texts: tuple[Span, ...]) -> tuple[Span, ...]:
            """Spans of text, forward by the tokens dropped before them."""
            shifts = [
                sum(count for (_, end), count in zip(spans, gone, strict=True) if start >= end)
                for (start, _), spans, gone in zip(texts, self.visual, dropped, strict=True)
            ]
            return tuple((start - shift, stop - shift) for (start, stop), shift in zip(texts, shifts, strict=True))

        shorter = replace(
            self,
            lengths=tuple(length - sum(gone) for length, gone in zip(self.lengths, dropped, strict=True)),
            visual=tuple(visual),
            question=moved(self.question),
            instruction=moved(self.instruction),
            after=moved(self.after),
        )
        return self._shortened(shorter, reduced, tuple(cuts), renumber)

    def _shortened(
        self, shorter: "Sequence", reduced: list[Reduced], cuts: tuple[tuple[Cut, ...], ...], renumber: bool
    ) -> "Sequence":
        """The tensors of these prompts at the lengths and spans of `shorter`."""
        width, device = max(shorter.lengths), self.hidden.device
        contiguous = renumber and self.position.dim() == 2
        hidden = self._spliced(reduced)
        if hidden is None or not contiguous:
            # For every column of the shorter prompts the column that it comes from.
            index = sources(self.lengths, self.hidden.shape[1], cuts, device)
            slots = [image_places(shorter.lengths, shorter.visual, tuple(part.images), device) for part in reduced]
            for part, slot in zip(reduced, slots, strict=True):
                index = index.scatter_add(0, slot, part.reduction.kept.flatten())
            index = index.view(len(self.lengths), width)
        if hidden is None:
            hidden = gather_tokens(self.hidden, index)
            for part, slot in zip(reduced, slots, strict=True):
                if part.values is not None:
                    hidden.flatten(0, 1).index_copy_(0, slot, part.values.to(hidden.dtype).flatten(0, 1))
        shorter = replace(shorter, hidden=hidden)
        if shorter.padded:
            hidden.masked_fill_(~shorter.valid()[..., None], 0)
        if contiguous:
            position, rotary = positions.contiguous(shorter.lengths, width, device), None
            dropped = self.hidden.shape[1] - width
            alike = all(before - after == dropped for before, after in zip(self.lengths, shorter.lengths, strict=True))
            if self.rotary is not None and alike and positions.is_contiguous(self.position, self.lengths):
                # The numbers are the first ones of before, and so are their cosines and sines.
                rotary = Rotary(position, self.rotary.cos[:, :width], self.rotary.sin[:, :width], self.rotary)
            return replace(shorter, position=position, rotary=rotary)
        position = positions.keep(self.position, index)
        if shorter.padded:
            blank = ~shorter.valid()
            position = position.masked_fill(blank if position.dim() == 2 else blank[..., None], 0)
        shorter = replace(shorter, position=position, rotary=None)
        return shorter.renumbered() if renumber else shorter

    def _spliced(self, reduced: list[Reduced]) -> Tensor | None:
        """Hidden states with merged tokens in place of one image per prompt, all in the same columns; else None."""
        if len(reduced) != 1 or reduced[0].values is None or any(len(spans) != 1 for spans in self.visual):
            return None
        spans = set(self.padded_spans(self.images))
        if len(spans) != 1 or reduced[0].images != [(sample, 0) for sample in range(len(self.lengths))]:
            return None
        start, stop = spans.pop()
        merged = reduced[0].values.to(self.hidden.dtype)
        return torch.cat([self.hidden[:, :start], merged, self.hidden[:, stop:]], 1)


# Index tensors of a batch that is padded to a width; spans are columns of it here.


@made_once
def real_columns(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B, width] bool, False in the padding."""
    first = torch.tensor([width - length for length in lengths]).to(device, non_blocking=True)
    return torch.arange(width, device=device) >= first[:, None]


@made_once
def rows_of(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """[n] int64 index of rows of the batch."""
    return torch.tensor(samples).to(device, non_blocking=True)


@made_once
def columns_of(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    """[B, T] int64, the columns of one span per prompt, all of the same length T."""
    return torch.stack([torch.arange(start, stop) for start, stop in spans]).to(device, non_blocking=True)


@made_once
def sources(lengths: tuple[int, ...], width: int, cuts: tuple[tuple[Cut, ...], ...], device: torch.device) -> Tensor:
    """[B * shorter width] int64, where the tokens of shortened prompts come from, prompt by prompt.

    For a text token its column before, for a token of a reduced image the first column of that image, 0 in the padding.

    Args:
        lengths, width: before.
        cuts: of each prompt its reduced images in order.
    """
    rows = []
    for length, images in zip(lengths, cuts, strict=True):
        pieces, done = [], width - length
        for first, before, after in images:
            pieces += [torch.arange(done, first), torch.full((after,), first)]
            done = first + before
        rows.append(torch.cat([*pieces, torch.arange(done, width)]))
    shorter = max(map(len, rows))
    return torch.cat([F.pad(row, (shorter - len(row), 0)) for row in rows]).to(device, non_blocking=True)


@made_once
def image_places(
    lengths: tuple[int, ...], visual: tuple[tuple[Span, ...], ...], images: tuple[Row, ...], device: torch.device
) -> Tensor:
    """[n] int64, the places of images' visual tokens in the prompts of a padded batch written as one line."""
    width, places = max(lengths), []
    for sample, number in images:
        first, (start, stop) = (sample + 1) * width - lengths[sample], visual[sample][number]
        places.append(torch.arange(first + start, first + stop))
    return torch.cat(places).to(device, non_blocking=True)
