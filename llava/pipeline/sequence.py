"""A batch of prompts in the decoder: left-padded, with one span of visual tokens per image.

All lengths are host integers, so that reducing, masking and padding never wait for the device.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llava.pipeline import positions as mrope
from llava.pipeline.positions import Groups
from llava.reduction.reduction import Reduction

Span = tuple[int, int]
Row = tuple[int, int]  # (sample, number of the image in its prompt)


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
    """

    hidden: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    visual: tuple[tuple[Span, ...], ...]
    question: tuple[Span, ...]
    instruction: tuple[Span, ...]
    after: tuple[Span, ...]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.hidden.shape[1]

    def padding(self, sample: int) -> int:
        return self.hidden.shape[1] - self.lengths[sample]

    def first(self) -> Tensor:
        """[B] int64, column of each sample's first real token."""
        width = self.hidden.shape[1]
        return torch.tensor([width - length for length in self.lengths]).to(self.hidden.device, non_blocking=True)

    def valid(self) -> Tensor:
        """[B, L] bool, False in the padding."""
        return torch.arange(self.hidden.shape[1], device=self.hidden.device) >= self.first()[:, None]

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

    def take(self, tensor: Tensor, spans: list[Span]) -> Tensor:
        """[B, T, ...] rows of `tensor` [B, L, ...] in one span per sample, all of the same length T."""
        cut = [(self.padding(s) + start, self.padding(s) + stop) for s, (start, stop) in enumerate(spans)]
        return torch.stack([tensor[s, start:stop] for s, (start, stop) in enumerate(cut)])

    def rows(self, rows: list[Row]) -> "Sequence":
        """One row per image: its whole prompt, with only this image's span as visual tokens.

        Padding is cut to the longest of these prompts.
        """
        if rows == [(sample, 0) for sample, runs in enumerate(self.visual) if len(runs) == 1] and len(rows) == len(
            self.lengths
        ):
            return self
        samples = [sample for sample, _ in rows]
        lengths = tuple(self.lengths[s] for s in samples)
        width = max(lengths)
        pick = lambda spans: tuple(spans[s] for s in samples)  # noqa: E731
        return Sequence(
            self.hidden[samples][:, -width:],
            self.position[samples][:, -width:],
            lengths,
            tuple((self.visual[s][number],) for s, number in rows),
            pick(self.question),
            pick(self.instruction),
            pick(self.after),
        )

    def reduce(
        self, reductions: dict[Row, tuple[Reduction, int]], merged: dict[Row, Tensor], renumber: bool
    ) -> "Sequence":
        """Replace the visual tokens of images by their reductions' output tokens.

        Args:
            reductions: image -> (reduction, row of that image in it); images left out keep everything.
            merged: image -> [K, D] values of the output tokens, if they differ from the kept tokens.
            renumber: contiguous position ids afterwards; else every token keeps its own.
        """
        device = self.hidden.device
        runs = tuple(self._runs_after(sample, reductions) for sample in range(len(self.lengths)))
        gone = [
            [(b - a) - (d - c) for (a, b), (c, d) in zip(old, new, strict=True)]
            for old, new in zip(self.visual, runs, strict=True)
        ]
        lengths = tuple(length - sum(cut) for length, cut in zip(self.lengths, gone, strict=True))
        width = max(lengths)
        index = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
        for sample, length in enumerate(lengths):
            pad, pieces, done = self.padding(sample), [], 0
            for number, (start, stop) in enumerate(self.visual[sample]):
                if (sample, number) in reductions:
                    reduction, row = reductions[sample, number]
                    pieces.append(torch.arange(pad + done, pad + start, device=device))
                    pieces.append(reduction.kept[row] + (pad + start))
                    done = stop
            pieces.append(torch.arange(pad + done, self.hidden.shape[1], device=device))
            index[sample, width - length :] = torch.cat(pieces)
        hidden = self.hidden.gather(1, index[..., None].expand(-1, -1, self.hidden.shape[-1]))
        for (sample, number), values in merged.items():
            at = width - lengths[sample] + runs[sample][number][0]
            hidden[sample, at : at + len(values)] = values
        reduced = replace(
            self,
            hidden=hidden,
            position=self.position.gather(1, index) if self.position.dim() == 2 else mrope.keep(self.position, index),
            lengths=lengths,
            visual=runs,
            question=self._shift(self.question, gone),
            instruction=self._shift(self.instruction, gone),
            after=self._shift(self.after, gone),
        )
        blank = ~reduced.valid()[..., None] if reduced.padded else None
        if blank is not None:
            reduced = replace(
                reduced,
                hidden=hidden.masked_fill(blank, 0),
                position=reduced.position.masked_fill(blank if reduced.position.dim() == 3 else blank[..., 0], 0),
            )
        return reduced.renumbered() if renumber else reduced

    def _runs_after(self, sample: int, reductions: dict[Row, tuple[Reduction, int]]) -> tuple[Span, ...]:
        runs, cut = [], 0
        for number, (start, stop) in enumerate(self.visual[sample]):
            count = stop - start
            if (sample, number) in reductions:
                count = reductions[sample, number][0].kept.shape[1]
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

    def renumbered(self) -> "Sequence":
        """Position ids 0, 1, 2, ... over the real tokens, as LLaVA numbers a shortened sequence.

        With three axes see llava.pipeline.positions.renumber.
        """
        if self.position.dim() == 3:
            return replace(self, position=mrope.renumber(self.position, self.lengths, self.visual))
        places = torch.arange(self.hidden.shape[1], device=self.hidden.device) - self.first()[:, None]
        return replace(self, position=places.clamp(min=0))


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
    rows, positions, lengths, runs, after = [], [], [], [], []
    moved: list[list[Span]] = [[], []]
    samples = zip(texts, slots, visuals, places, inputs, questions, instructions, strict=True)
    for sample, (text, cuts, images, seats, before_each, *ranges) in enumerate(samples):
        device = text.device
        pieces, ids, spans, done, length, number = [], [], [], 0, 0, 0
        for image, (slot, visual, place, count) in enumerate(zip(cuts, images, seats, before_each, strict=True)):
            pieces += [text[done:slot], visual.to(text.dtype)]
            before = _text_positions(number, slot - done, groups, device)
            number += slot - done
            if groups is None:
                own = torch.arange(number, number + count, device=device)
                number += count
            else:
                own = mrope.picture_positions(groups[sample][image], number, device)
                number += max(groups[sample][image])
            ids += [before, own if place is None else own[place]]
            length += slot - done
            spans.append((length, length + len(visual)))
            length, done = length + len(visual), slot
        pieces.append(text[done:])
        ids.append(_text_positions(number, len(text) - done, groups, device))
        rows.append(torch.cat(pieces))
        positions.append(torch.cat(ids))
        runs.append(tuple(spans))
        lengths.append(len(rows[-1]))
        after.append((length, lengths[-1]))
        for target, (start, stop) in zip(moved, ranges, strict=True):
            # The i-th slot is id number slots[i] + i.
            ahead = [len(v) - 1 for i, (slot, v) in enumerate(zip(cuts, images, strict=True)) if slot + i < start]
            target.append((start + sum(ahead), stop + sum(ahead)))
    width = max(lengths)
    hidden = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
    position = positions[0].new_zeros(len(rows), width, *positions[0].shape[1:])
    for sample, (row, ids) in enumerate(zip(rows, positions, strict=True)):
        hidden[sample, width - len(row) :] = row
        position[sample, width - len(row) :] = ids
    return Sequence(hidden, position, tuple(lengths), tuple(runs), tuple(moved[0]), tuple(moved[1]), tuple(after))


def _text_positions(start: int, count: int, groups: list | None, device: torch.device) -> Tensor:
    """[count] or, on three equal axes, [count, 3]."""
    places = torch.arange(start, start + count, device=device)
    return places if groups is None else places[:, None].expand(-1, 3)
