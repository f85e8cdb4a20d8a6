"""A batch of prompts as the decoder sees it: left-padded, with one run of visual tokens per sample.

All lengths are host integers, known before any tensor is, so that reducing, masking and padding never wait for the
device.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.reduction import Reduction


@dataclass(frozen=True)
class Sequence:
    """B prompts padded on the left to L.

    Spans are [start, stop) in a sample's own coordinates, without padding.

    Attributes:
        hidden: [B, L, D] embeddings or hidden states; padding rows are zero.
        position: [B, L] int64 position ids; 0 in the padding.
        lengths: real length of each sample.
        visual: span of the visual tokens; empty for a text-only prompt.
        question: span of the last question's tokens.
        instruction: the same with the answer-format suffix.
    """

    hidden: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    visual: tuple[tuple[int, int], ...]
    question: tuple[tuple[int, int], ...]
    instruction: tuple[tuple[int, int], ...]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.hidden.shape[1]

    def padding(self, sample: int) -> int:
        return self.hidden.shape[1] - self.lengths[sample]

    def valid(self) -> Tensor:
        """[B, L] bool, False in the padding."""
        width = self.hidden.shape[1]
        first = torch.tensor([width - length for length in self.lengths]).to(self.hidden.device, non_blocking=True)
        return torch.arange(width, device=self.hidden.device) >= first[:, None]

    def visual_count(self, sample: int) -> int:
        start, stop = self.visual[sample]
        return stop - start

    def by_visual_count(self) -> dict[int, list[int]]:
        """Samples grouped by how many visual tokens they have now; text-only samples are left out."""
        groups: dict[int, list[int]] = {}
        for sample in range(len(self.lengths)):
            if count := self.visual_count(sample):
                groups.setdefault(count, []).append(sample)
        return groups

    def take(self, tensor: Tensor, samples: list[int], spans: list[tuple[int, int]]) -> Tensor:
        """Rows of `tensor` [B, L, ...] in equally long spans of the given samples, stacked."""
        cut = [
            (self.padding(s) + start, self.padding(s) + stop) for s, (start, stop) in zip(samples, spans, strict=True)
        ]
        return torch.stack([tensor[s, start:stop] for s, (start, stop) in zip(samples, cut, strict=True)])

    def select(self, samples: list[int]) -> "Sequence":
        """The sub-batch of some samples, padding cut to what they need."""
        lengths = tuple(self.lengths[s] for s in samples)
        width = max(lengths)
        pick = lambda spans: tuple(spans[s] for s in samples)  # noqa: E731
        return Sequence(
            self.hidden[samples][:, -width:],
            self.position[samples][:, -width:],
            lengths,
            pick(self.visual),
            pick(self.question),
            pick(self.instruction),
        )

    def reduce(
        self, reductions: dict[int, tuple[Reduction, int]], merged: dict[int, Tensor], renumber: bool
    ) -> "Sequence":
        """Replace each sample's visual tokens by its reduction's output tokens.

        Args:
            reductions: sample -> (reduction, row of that sample in it); samples left out keep everything.
            merged: sample -> [K, D] values of the output tokens where they are not just the anchors' values.
            renumber: contiguous position ids afterwards; else every token keeps its own.
        """
        counts = {s: reduction.anchor.shape[1] for s, (reduction, _) in reductions.items()}
        gone = [self.visual_count(s) - counts.get(s, self.visual_count(s)) for s in range(len(self.lengths))]
        lengths = tuple(length - cut for length, cut in zip(self.lengths, gone, strict=True))
        width, device = max(lengths), self.hidden.device
        index = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
        for sample, length in enumerate(lengths):
            pad, (start, stop) = self.padding(sample), self.visual[sample]
            row = index[sample, width - length :]
            if sample not in reductions:
                row.copy_(torch.arange(pad, pad + length, device=device))
                continue
            reduction, position = reductions[sample]
            kept = reduction.anchor.shape[1]
            row[:start] = torch.arange(pad, pad + start, device=device)
            row[start : start + kept] = reduction.anchor[position] + (pad + start)
            row[start + kept :] = torch.arange(pad + stop, self.hidden.shape[1], device=device)
        hidden = self.hidden.gather(1, index[..., None].expand(-1, -1, self.hidden.shape[-1]))
        for sample, values in merged.items():
            at = width - lengths[sample] + self.visual[sample][0]
            hidden[sample, at : at + len(values)] = values
        reduced = replace(
            self,
            hidden=hidden,
            position=self.position.gather(1, index),
            lengths=lengths,
            visual=tuple((a, b - cut) for (a, b), cut in zip(self.visual, gone, strict=True)),
            question=self._shift(self.question, gone),
            instruction=self._shift(self.instruction, gone),
        )
        blank = ~reduced.valid()[..., None] if reduced.padded else None
        if blank is not None:
            reduced = replace(
                reduced,
                hidden=hidden.masked_fill(blank, 0),
                position=reduced.position.masked_fill(blank[..., 0], 0),
            )
        return reduced.renumbered() if renumber else reduced

    def _shift(self, spans, gone) -> tuple[tuple[int, int], ...]:
        """Spans behind the visual tokens move forward by what was cut."""
        return tuple(
            (a - cut, b - cut) if a >= stop else (a, b)
            for (a, b), (_, stop), cut in zip(spans, self.visual, gone, strict=True)
        )

    def renumbered(self) -> "Sequence":
        """Position ids 0, 1, 2, ... over the real tokens, as LLaVA gives them to a shortened sequence."""
        width = self.hidden.shape[1]
        first = torch.tensor([width - length for length in self.lengths]).to(self.hidden.device, non_blocking=True)
        places = torch.arange(width, device=self.hidden.device) - first[:, None]
        return replace(self, position=places.clamp(min=0))


def assemble(
    texts: list[Tensor],
    slots: list[int | None],
    visuals: list[Tensor | None],
    places: list[Tensor | None],
    inputs: int,
    questions: list[tuple[int, int]],
    instructions: list[tuple[int, int]],
) -> Sequence:
    """Put each sample's visual tokens into its image slot and pad on the left.

    Args:
        texts: [T, D] embedded text of each sample, without the slot.
        slots: index in the text at which the visual tokens go; None for a text-only prompt.
        visuals: [K, D] visual tokens.
        places: [K] input positions of the visual tokens, for the position ids; None means 0 .. K-1.
        inputs: visual tokens per image before any reduction; text behind the image is numbered after all of them.
        questions, instructions: spans in token ids where the slot counts as one id.
    """
    rows, positions, lengths, spans = [], [], [], []
    moved: list[list[tuple[int, int]]] = [[], []]
    for text, slot, visual, place, *ranges in zip(texts, slots, visuals, places, questions, instructions, strict=True):
        device = text.device
        if slot is None:
            rows.append(text)
            positions.append(torch.arange(len(text), device=device))
            spans.append((0, 0))
            for target, span in zip(moved, ranges, strict=True):
                target.append(span)
        else:
            count = len(visual)
            rows.append(torch.cat([text[:slot], visual.to(text.dtype), text[slot:]]))
            inside = torch.arange(count, device=device) if place is None else place
            after = torch.arange(slot + inputs, inputs + len(text), device=device)
            positions.append(torch.cat([torch.arange(slot, device=device), slot + inside, after]))
            spans.append((slot, slot + count))
            for target, (start, stop) in zip(moved, ranges, strict=True):
                shift = count - 1 if start > slot else 0
                target.append((start + shift, stop + shift))
        lengths.append(len(rows[-1]))
    width = max(lengths)
    hidden = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
    position = torch.zeros(len(rows), width, dtype=torch.long, device=hidden.device)
    for sample, (row, ids) in enumerate(zip(rows, positions, strict=True)):
        hidden[sample, width - len(row) :] = row
        position[sample, width - len(row) :] = ids
    return Sequence(hidden, position, tuple(lengths), tuple(spans), tuple(moved[0]), tuple(moved[1]))
