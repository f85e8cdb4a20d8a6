"""A batch of prompts in the decoder: left-padded, with one span of visual tokens per image.

All lengths are host integers, so that reducing, masking and padding never wait for the device.
"""

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.pipeline import columns
from llava.pipeline import positions as mrope
from llava.pipeline.positions import Groups
from llava.reduction.modules import Angles
from llava.reduction.ranking import gather_tokens
from llava.reduction.reduction import Reduction

Span = tuple[int, int]
Row = tuple[int, int]  # (sample, number of the image in its prompt)
Samples = tuple[int, ...] | None  # numbers of samples, one of them as often as wanted; None for all, in order


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
        return columns.real_columns(self.lengths, self.hidden.shape[1], self.hidden.device)

    @property
    def images(self) -> list[Span]:
        """The span of visual tokens of every sample, for a sequence made by `rows`, with one span each."""
        return [run for (run,) in self.visual]

    @cached_property
    def visual_counts(self) -> tuple[int, ...]:
        """Visual tokens of each sample."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.visual)

    def by_visual_count(self) -> dict[int, list[Row]]:
        """Images grouped by how many visual tokens they have now."""
        groups: dict[int, list[Row]] = {}
        for sample, runs in enumerate(self.visual):
            for number, (start, stop) in enumerate(runs):
                groups.setdefault(stop - start, []).append((sample, number))
        return groups

    def take(self, tensor: Tensor, spans: Listed[Span], samples: Samples = None) -> Tensor:
        """[n, T, ...] rows of `tensor` [B, L, ...] in spans of the same length T, one for each of `samples`."""
        cut = self.padded_spans(spans, samples)
        if len(set(cut)) == 1:
            return self.of_samples(tensor[:, slice(*cut[0])], samples)
        return self.at(tensor, columns.columns_of(cut, tensor.device), samples)

    def padded_spans(self, spans: Listed[Span], samples: Samples = None) -> tuple[Span, ...]:
        """Spans of samples as columns of the padded batch."""
        before = map(self.padding, range(len(self.lengths)) if samples is None else samples)
        return tuple((pad + start, pad + stop) for pad, (start, stop) in zip(before, spans, strict=True))

    def at(self, tensor: Tensor, index: Tensor, samples: Samples = None) -> Tensor:
        """[n, T, ...] rows of `tensor` [B, L, ...] at columns [n, T] of samples."""
        if samples is None:
            return gather_tokens(tensor, index)
        return tensor[columns.rows_of(samples, tensor.device)[:, None], index]

    def rows(self, rows: list[Row]) -> "Sequence":
        """One row per image: its whole prompt, with only this image's span as visual tokens.

        Padding is cut to the longest of these prompts.
        """
        if rows == [(sample, 0) for sample, runs in enumerate(self.visual) if len(runs) == 1] and len(rows) == len(
            self.lengths
        ):
            return self
        samples = tuple(sample for sample, _ in rows)
        lengths = tuple(self.lengths[s] for s in samples)
        width = max(lengths)
        pick = lambda spans: tuple(spans[s] for s in samples)  # noqa: E731
        cut = lambda tensor: self.of_samples(tensor, samples)[:, -width:]  # noqa: E731
        return Sequence(
            cut(self.hidden),
            cut(self.position),
            lengths,
            tuple((self.visual[s][number],) for s, number in rows),
            pick(self.question),
            pick(self.instruction),
            pick(self.after),
        )

    def keys_of(self, keys: Tensor, rows: list[Row]) -> Tensor:
        """[B, Hkv, L, d] keys of these prompts -> those of `rows(rows)`."""
        width = max(self.lengths[sample] for sample, _ in rows)
        keys = self.of_samples(keys, tuple(sample for sample, _ in rows))
        return keys if width == keys.shape[2] else keys[:, :, -width:]

    def of_samples(self, tensor: Tensor, samples: Samples) -> Tensor:
        """The rows of some samples, in this order; the tensor itself where these are all."""
        if samples is None or samples == tuple(range(len(self.lengths))):
            return tensor
        return tensor.index_select(0, columns.rows_of(samples, tensor.device))

    def reduce(self, reduced: list[Reduced], renumber: bool) -> "Sequence":
        """Replace the visual tokens of images by their reductions' output tokens.

        Args:
            reduced: images left out keep everything.
            renumber: contiguous position ids afterwards; else every token keeps its own.
        """
        counts = {image: part.reduction.kept.shape[1] for part in reduced for image in part.images}
        runs = tuple(self._runs_after(sample, counts) for sample in range(len(self.lengths)))
        gone = [
            [(b - a) - (d - c) for (a, b), (c, d) in zip(old, new, strict=True)]
            for old, new in zip(self.visual, runs, strict=True)
        ]
        shorter = replace(
            self,
            lengths=tuple(length - sum(cut) for length, cut in zip(self.lengths, gone, strict=True)),
            visual=runs,
            question=self._shift(self.question, gone),
            instruction=self._shift(self.instruction, gone),
            after=self._shift(self.after, gone),
        )
        return shorter._filled(self, reduced, self._cuts(counts), renumber)

    def _cuts(self, counts: dict[Row, int]) -> tuple[tuple[columns.Cut, ...], ...]:
        """For each sample its reduced images in order: first column, tokens before and after."""
        return tuple(
            tuple(
                (self.padding(sample) + start, stop - start, counts[sample, number])
                for number, (start, stop) in enumerate(spans)
                if (sample, number) in counts
            )
            for sample, spans in enumerate(self.visual)
        )

    def _filled(
        self, longer: "Sequence", reduced: list[Reduced], cuts: tuple[tuple[columns.Cut, ...], ...], renumber: bool
    ) -> "Sequence":
        """The same lengths and spans, with the tensors of the prompts before the reduction."""
        width, device = max(self.lengths), longer.hidden.device
        renumbered = renumber and longer.position.dim() == 2
        hidden = longer._spliced(reduced)
        if hidden is None or not renumbered:
            index = columns.sources(longer.lengths, longer.hidden.shape[1], cuts, device)
            slots = [columns.line_of(self._places(part.images, width), device) for part in reduced]
            for part, places in zip(reduced, slots, strict=True):
                index = index.scatter_add(0, places, part.reduction.kept.flatten())
            index = index.view(len(self.lengths), width)
        if hidden is None:
            hidden = gather_tokens(longer.hidden, index)
            for part, places in zip(reduced, slots, strict=True):
                if part.values is not None:
                    hidden.flatten(0, 1).index_copy_(0, places, part.values.to(hidden.dtype).flatten(0, 1))
        if min(self.lengths) < width:
            hidden.masked_fill_(~columns.real_columns(self.lengths, width, device)[..., None], 0)
        shorter = replace(self, hidden=hidden)
        if renumbered:
            shorter = shorter.renumbered()
            return replace(shorter, rotary=shorter._same_angles(longer))
        axes = longer.position.dim() == 3
        position = mrope.keep(longer.position, index) if axes else longer.position.gather(1, index)
        if shorter.padded:
            blank = ~shorter.valid()
            position = position.masked_fill(blank[..., None] if axes else blank, 0)
        shorter = replace(shorter, position=position, rotary=None)
        return shorter.renumbered() if renumber else shorter

    def _spliced(self, reduced: list[Reduced]) -> Tensor | None:
        """Hidden states with merged tokens in place of one image per prompt, all in the same columns; else None."""
        if len(reduced) != 1 or reduced[0].values is None or any(len(spans) != 1 for spans in self.visual):
            return None
        spans = {(self.padding(s) + start, self.padding(s) + stop) for s, ((start, stop),) in enumerate(self.visual)}
        if len(spans) != 1 or reduced[0].images != [(sample, 0) for sample in range(len(self.lengths))]:
            return None
        start, stop = spans.pop()
        merged = reduced[0].values.to(self.hidden.dtype)
        return torch.cat([self.hidden[:, :start], merged, self.hidden[:, stop:]], 1)

    def _places(self, images: list[Row], width: int) -> tuple[Span, ...]:
        """Spans of images in the batch of prompts written as one line."""
        found = []
        for sample, number in images:
            first = sample * width + width - self.lengths[sample]
            start, stop = self.visual[sample][number]
            found.append((first + start, first + stop))
        return tuple(found)

    def _same_angles(self, longer: "Sequence") -> Rotary | None:
        """Cosines and sines after contiguous prompts were all shortened by as much: the numbers are the first ones."""
        width, before = self.hidden.shape[1], longer.hidden.shape[1]
        alike = all(width - new == before - old for new, old in zip(self.lengths, longer.lengths, strict=True))
        if longer.rotary is None or not alike or not longer._contiguous:
            return None
        return Rotary(self.position, longer.rotary.cos[:, :width], longer.rotary.sin[:, :width], longer.rotary)

    @property
    def _contiguous(self) -> bool:
        """Whether the position ids are 0, 1, 2, ...; no value is read."""
        return self.position is columns.numbers_from_zero(self.lengths, self.hidden.shape[1], self.hidden.device)

    def _runs_after(self, sample: int, counts: dict[Row, int]) -> tuple[Span, ...]:
        runs, cut = [], 0
        for number, (start, stop) in enumerate(self.visual[sample]):
            count = counts.get((sample, number), stop - start)
            runs.append((start - cut, start - cut + count))
            cut += (stop - start) - count
        return tuple(runs)

    def _shift(self, spans: tuple[Span, ...], gone: list[list[int]]) -> tuple[Span, ...]:
        """Move text spans forward by the number of tokens dropped before them."""
        moved = []
        for (start, stop), runs, cuts in zip(spans, self.visual, gone, strict=True):
            cut = sum(c for (_, end), c in zip(runs, cuts, strict=True) if start >= end)
            moved.append((start - cut, stop - cut))
        return tuple(moved)

    def next_position(self) -> Tensor:
        """[B, 1] or [B, 1, 3], position of the first generated token; see llava.pipeline.positions."""
        if self._contiguous:
            return columns.lengths_of(self.lengths, self.hidden.device)
        return mrope.next_position(self.position)

    def renumbered(self) -> "Sequence":
        """Position ids 0, 1, 2, ... over the real tokens, as LLaVA numbers a shortened sequence.

        With three axes see llava.pipeline.positions.renumber.
        """
        if self.position.dim() == 3:
            return replace(self, position=mrope.renumber(self.position, self.lengths, self.visual))
        numbers = columns.numbers_from_zero(self.lengths, self.hidden.shape[1], self.hidden.device)
        return replace(self, position=numbers)


def assemble(
    texts: list[Tensor],
    slots: list[list[int]],
    visuals: list[list[Tensor]],
    places: list[list[Tensor | None]],
    inputs: list[list[int]],
    questions: list[Span],
    instructions: list[Span],
    groups: list[list[Groups]] | None = None,
) -> Sequence:
    """Put each sample's visual tokens into its image slots and pad on the left.

    Args:
        texts: [T, D] embedded text of each sample, without the slots.
        slots: for every image, the index in the text at which its visual tokens go; ascending.
        visuals: [K, D] visual tokens of every image.
        places: [K] input positions of the visual tokens, for the position ids; None means 0 .. K-1.
        inputs: visual tokens of every image before any reduction; text after an image is numbered after all of them.
        questions, instructions: spans in token ids where every slot counts as one id.
        groups: frames, rows and columns of every image, for a decoder whose positions have three axes.
    """
    lengths, runs, after, order = [], [], [], []
    moved: list[list[Span]] = [[], []]
    # Rows of the list of all texts, then of the list of all visual tokens behind them.
    row, behind = 0, sum(map(len, texts))
    for text, cuts, images, *ranges in zip(texts, slots, visuals, questions, instructions, strict=True):
        pieces, spans, done, length = [], [], 0, 0
        for slot, visual in zip(cuts, images, strict=True):
            pieces += [(row + done, row + slot), (behind, behind + len(visual))]
            behind += len(visual)
            length += slot - done
            spans.append((length, length + len(visual)))
            length, done = length + len(visual), slot
        order.append((*pieces, (row + done, row + len(text))))
        row += len(text)
        runs.append(tuple(spans))
        lengths.append(length + len(text) - done)
        after.append((length, lengths[-1]))
        for target, (start, stop) in zip(moved, ranges, strict=True):
            # The i-th slot is id number slots[i] + i.
            ahead = [len(v) - 1 for i, (slot, v) in enumerate(zip(cuts, images, strict=True)) if slot + i < start]
            target.append((start + sum(ahead), stop + sum(ahead)))
    lines, width = tuple(lengths), max(lengths)
    dtype, device = texts[0].dtype, texts[0].device
    values = [one if one.dtype == dtype else one.to(dtype) for one in (*texts, *(v for vs in visuals for v in vs))]
    hidden = torch.cat(values)[columns.assembled(lines, tuple(order), device)]
    if min(lengths) < width:
        hidden = hidden.masked_fill(~columns.real_columns(lines, width, device)[..., None], 0)
    counts = [[len(visual) for visual in images] for images in visuals]
    if groups is None and inputs == counts and all(place is None for seats in places for place in seats):
        position = columns.numbers_from_zero(lines, width, device)
    else:
        position = _positions([len(text) for text in texts], slots, places, inputs, groups, device)
    return Sequence(hidden, position, lines, tuple(runs), tuple(moved[0]), tuple(moved[1]), tuple(after))


def _positions(
    texts: list[int],
    slots: list[list[int]],
    places: list[list[Tensor | None]],
    inputs: list[list[int]],
    groups: list[list[Groups]] | None,
    device: torch.device,
) -> Tensor:
    """[B, L] or [B, L, 3]: every token has the position id that it would have with every visual token present."""
    rows = []
    for sample, (text, cuts, seats, before_each) in enumerate(zip(texts, slots, places, inputs, strict=True)):
        ids, done, number = [], 0, 0
        for image, (slot, place, count) in enumerate(zip(cuts, seats, before_each, strict=True)):
            before = _text_positions(number, slot - done, groups, device)
            number, done = number + slot - done, slot
            if groups is None:
                own = torch.arange(number, number + count, device=device)
                number += count
            else:
                own = mrope.picture_positions(groups[sample][image], number, device)
                number += max(groups[sample][image])
            ids += [before, own if place is None else own[place]]
        rows.append(torch.cat([*ids, _text_positions(number, text - done, groups, device)]))
    width = max(map(len, rows))
    return torch.stack([F.pad(row, (*[0, 0] * (row.dim() - 1), width - len(row), 0)) for row in rows])


def _text_positions(start: int, count: int, groups: list | None, device: torch.device) -> Tensor:
    """[count] or, on three equal axes, [count, 3]."""
    places = torch.arange(start, start + count, device=device)
    return places if groups is None else places[:, None].expand(-1, 3)
