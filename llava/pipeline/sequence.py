"""A batch of prompts in the decoder: left-padded, with one span of visual tokens per image.

All lengths are integers on the host, so reducing, masking and padding never wait for the device. Index tensors are made
from the lengths and cached; batches of equal lengths share them (llava/reduction/ranking.py), so never write into one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.pipeline import positions
from llava.pipeline.positions import Piece, Span
from llava.reduction.merging import Reduction
from llava.reduction.ranking import cached_by_sizes, gather_tokens, places

ImageKey = tuple[int, int]  # (sample, number of the image in its prompt)
Samples = tuple[int, ...] | None  # indices of samples, which may repeat; None for all samples in order
Cut = tuple[int, int, int]  # a reduced image: its first column, and its number of tokens before and after the reduction
KEPT_MASK = 2**18  # masks with at most so many entries (256 KB) are cached for batches of the same lengths


@dataclass
class Rotary:
    """Cosines and sines [B, L, d] at the positions of prompts."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class ImageReduction:
    """Images that are reduced together.

    Attributes:
        images: the image of each row of the reduction.
        reduction: which tokens are kept and which are merged.
        values: [images, K, D] output tokens if the reduction merges; None if the output is the kept tokens, unchanged.
    """

    images: list[ImageKey]
    reduction: Reduction
    values: Tensor | None = None


@dataclass(frozen=True)
class PromptBatch:
    """B prompts padded on the left to L.

    Spans are [start, stop) in a sample's own coordinates, without padding.

    Attributes:
        hidden: [B, L, D] embeddings or hidden states, zero in the padding.
        position: [B, L] int64 position ids, or [B, L, 3] with three axes (llava/pipeline/positions.py); 0 in the
            padding.
        lengths: length of each prompt, without padding.
        visual: spans of each sample's visual tokens, one per image in order; () for a text-only prompt.
        question: span of the last question's tokens.
        instruction: span of the last question with its answer-format suffix.
        after: span of all text after the last image. If the prompt ends with its image, this is the span of the
            question; if there is no image, it is the whole prompt.
        contiguous: True if every prompt has the positions 0, 1, 2, ... of `positions.contiguous`.
        rotary: cosines and sines of the decoder at these positions, once they have been computed.
    """

    hidden: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    visual: tuple[tuple[Span, ...], ...]
    question: tuple[Span, ...]
    instruction: tuple[Span, ...]
    after: tuple[Span, ...]
    contiguous: bool = False
    rotary: Rotary | None = None

    @property
    def padded(self) -> bool:
        """Whether a sample is shorter than the batch."""
        return min(self.lengths) < self.hidden.shape[1]

    def padding(self, sample: int) -> int:
        return self.hidden.shape[1] - self.lengths[sample]

    def valid(self) -> Tensor:
        """[B, L] bool, False in the padding."""
        return real_columns(self.lengths, self.hidden.shape[1], self.hidden.device)

    @property
    def images(self) -> list[Span]:
        """The span of each sample's visual tokens, if every sample has one image, as in the result of `rows`."""
        return [run for (run,) in self.visual]

    def padded_spans(self, spans: Sequence[Span], samples: Samples = None) -> tuple[Span, ...]:
        """One span for each of `samples`, as columns of the padded batch."""
        width, lengths = self.hidden.shape[1], self.lengths
        own = lengths if samples is None else [lengths[sample] for sample in samples]
        before = [width - length for length in own]
        return tuple((pad + start, pad + stop) for pad, (start, stop) in zip(before, spans, strict=True))

    def row_index(self, spans: Sequence[Span], samples: Samples = None) -> tuple[Tensor, Tensor]:
        """Columns [n, T] of spans of different length in the padded batch, and a mask [n, T] of those that exist."""
        return columns_of(self.padded_spans(spans, samples), self.hidden.device)

    def take(self, tensor: Tensor, spans: Sequence[Span], samples: Samples = None) -> Tensor:
        """[n, T, ...]: the rows of `tensor` [B, L, ...] in one span for each of `samples`.

        T is the length of the longest span. A shorter span repeats its last row.
        """
        columns = self.padded_spans(spans, samples)
        start, stop = columns[0]
        if start < stop and all(other == (start, stop) for other in columns):
            part = tensor[:, start:stop]
            return part if samples is None else self.of_samples(part, samples)
        return self.at(tensor, columns_of(columns, tensor.device)[0], samples)

    def at(self, tensor: Tensor, index: Tensor, samples: Samples = None) -> Tensor:
        """[n, T, ...]: the rows of `tensor` [B, L, ...] at columns [n, T] of `samples`."""
        if samples is None:
            return gather_tokens(tensor, index)
        return tensor[on_device(samples, tensor.device)[:, None], index]

    def of_samples(self, tensor: Tensor, samples: tuple[int, ...]) -> Tensor:
        """The entries of some samples in the given order; the tensor itself if these are all samples in order."""
        if samples == tuple(range(len(self.lengths))):
            return tensor
        return tensor.index_select(0, on_device(samples, tensor.device))

    def unseen(self, spans: Sequence[Span], width: int) -> Tensor | None:
        """[B, 1, T, width] bool, True for the keys that a row of a span does not see: padding, and tokens after it.

        None if every row sees all keys.

        Args:
            width: only the first `width` columns of the batch are keys.
        """
        padded = self.padded
        if not padded and all(span == (width - 1, width) for span in spans):
            return None
        padding = tuple(self.hidden.shape[1] - length for length in self.lengths) if padded else ()
        columns, device = self.padded_spans(spans), self.hidden.device
        count = sum(stop - start for start, stop in columns) * width
        make = unseen_kept if count <= KEPT_MASK else unseen
        return make(columns, padding, width, device)

    def rows(self, rows: list[ImageKey]) -> "PromptBatch":
        """A batch with one prompt per image: the image's whole prompt, with only this image's span as visual tokens.

        It is padded to the longest of these prompts.
        """
        samples = tuple(sample for sample, _ in rows)
        lengths = tuple(self.lengths[s] for s in samples)
        width = max(lengths)
        return PromptBatch(
            self.of_samples(self.hidden, samples)[:, -width:],
            self.of_samples(self.position, samples)[:, -width:],
            lengths,
            tuple((self.visual[s][number],) for s, number in rows),
            tuple(self.question[s] for s in samples),
            tuple(self.instruction[s] for s in samples),
            tuple(self.after[s] for s in samples),
        )

    def keys_of(self, keys: Tensor, rows: list[ImageKey]) -> Tensor:
        """Keys [B, Hkv, L, d] of these prompts -> keys of the prompts of `self.rows(rows)`."""
        width = max(self.lengths[sample] for sample, _ in rows)
        keys = self.of_samples(keys, tuple(sample for sample, _ in rows))
        return keys if width == keys.shape[2] else keys[:, :, -width:]

    def renumbered(self) -> "PromptBatch":
        """The same prompts, numbered without gaps: see `positions.renumber`."""
        position = positions.renumber(self.position, self.lengths, self.visual)
        return replace(self, position=position, contiguous=position.dim() == 2, rotary=None)

    def reduce(self, reduced: list[ImageReduction], renumber: bool) -> "PromptBatch":
        """Replace the visual tokens of images by the output tokens of their reductions.

        Args:
            reduced: images that are not among them keep all tokens.
            renumber: the rule for position ids: True for "renumber", False for "original".
        """
        shorter, cuts = self._shorter(_counts(reduced))
        width, device = max(shorter.lengths), self.hidden.device
        contiguous = renumber and self.position.dim() == 2
        # A common simple case is a plain concatenation: every prompt has one image, whose tokens are merged and stand
        # in the same columns in all prompts.
        hidden = None
        if (
            len(reduced) == 1
            and reduced[0].values is not None
            and reduced[0].images == [(sample, 0) for sample in range(len(self.lengths))]
            and all(len(spans) == 1 for spans in self.visual)
            and all(own == cuts[0] for own in cuts)
        ):
            ((start, before, _),) = cuts[0]
            merged = reduced[0].values.to(self.hidden.dtype)
            hidden = torch.cat([self.hidden[:, :start], merged, self.hidden[:, start + before :]], 1)
        if hidden is None or not contiguous:
            index, slots = self._sources(shorter, cuts, reduced)
        if hidden is None:
            hidden = gather_tokens(self.hidden, index)
            for part, slot in zip(reduced, slots, strict=True):
                if part.values is not None:
                    hidden.flatten(0, 1).index_copy_(0, slot, part.values.to(hidden.dtype).flatten(0, 1))
        blank = None
        if min(shorter.lengths) < width:
            blank = ~real_columns(shorter.lengths, width, device)
            hidden.masked_fill_(blank[..., None], 0)
        if contiguous:
            position, rotary = positions.contiguous(shorter.lengths, width, device), None
            dropped = self.hidden.shape[1] - width
            alike = all(before - after == dropped for before, after in zip(self.lengths, shorter.lengths, strict=True))
            if self.rotary is not None and self.contiguous and alike:
                # Positions are the first of those before, so their cosines and sines can be taken over.
                rotary = Rotary(self.rotary.cos[:, :width], self.rotary.sin[:, :width])
            return replace(shorter, hidden=hidden, position=position, contiguous=True, rotary=rotary)
        position = positions.keep(self.position, index)
        if blank is not None:
            position = position.masked_fill(blank if position.dim() == 2 else blank[..., None], 0)
        shorter = replace(shorter, hidden=hidden, position=position, contiguous=False, rotary=None)
        return shorter.renumbered() if renumber else shorter

    def columns(self, reduced: list[ImageReduction]) -> Tensor:
        """[B, shorter L] int64: for every column of the prompts after `reduce`, the column that it comes from."""
        return self._sources(*self._shorter(_counts(reduced)), reduced)[0]

    def _sources(
        self, shorter: "PromptBatch", cuts: tuple[tuple[Cut, ...], ...], reduced: list[ImageReduction]
    ) -> tuple[Tensor, list[Tensor]]:
        """The result of `columns`, and for each reduction where its output tokens are in the flattened prompts."""
        device = self.hidden.device
        index = sources(self.lengths, self.hidden.shape[1], cuts, device)
        slots = [image_places(shorter.lengths, shorter.visual, tuple(part.images), device) for part in reduced]
        for part, slot in zip(reduced, slots, strict=True):
            index = index.scatter_add(0, slot, part.reduction.kept.flatten())
        return index.view(len(self.lengths), -1), slots

    def _shorter(self, counts: dict[ImageKey, int]) -> tuple["PromptBatch", tuple[tuple[Cut, ...], ...]]:
        """These prompts with their lengths and spans after a reduction, and the cuts that shorten each prompt.

        Args:
            counts: for each reduced image, its number of tokens after the reduction.
        """
        lengths, visual, cuts = [], [], []
        texts: dict[str, list[Span]] = {"question": [], "instruction": [], "after": []}
        for sample, (length, spans) in enumerate(zip(self.lengths, self.visual, strict=True)):
            padding, gone = self.hidden.shape[1] - length, 0
            after: list[Span] = []
            own: list[Cut] = []
            moves = []  # for each image, its end and how many tokens are gone up to there
            for number, (start, stop) in enumerate(spans):
                count = counts.get((sample, number), stop - start)
                after.append((start - gone, start - gone + count))
                gone += stop - start - count
                moves.append((stop, gone))
                if (sample, number) in counts:
                    own.append((padding + start, stop - start, count))
            for name, moved in texts.items():
                start, stop = getattr(self, name)[sample]
                shift = max((total for end, total in moves if start >= end), default=0)
                moved.append((start - shift, stop - shift))
            lengths.append(length - gone)
            visual.append(tuple(after))
            cuts.append(tuple(own))
        question, instruction, after_images = map(tuple, texts.values())
        shorter = replace(
            self,
            lengths=tuple(lengths),
            visual=tuple(visual),
            question=question,
            instruction=instruction,
            after=after_images,
        )
        return shorter, tuple(cuts)


def _counts(reduced: list[ImageReduction]) -> dict[ImageKey, int]:
    """For each reduced image, its number of tokens after the reduction."""
    return {image: part.reduction.kept.shape[1] for part in reduced for image in part.images}


def assemble(
    prompts: list[list[Piece]], questions: list[Span], instructions: list[Span], axes: bool = False
) -> PromptBatch:
    """Join the pieces of each prompt, and pad the prompts on the left.

    Args:
        questions, instructions: for each prompt, a span of its token ids, where an image is one id.
        axes: True for positions with three axes.
    """
    lengths, visual, after = [], [], []
    moved: list[list[Span]] = [[], []]
    for pieces, *spans in zip(prompts, questions, instructions, strict=True):
        images, ids, length = [], 0, 0  # for each image, its span and its index among the ids
        for piece in pieces:
            if piece.image:
                images.append(((length, length + len(piece.tokens)), ids))
            ids += 1 if piece.image else len(piece.tokens)
            length += len(piece.tokens)
        lengths.append(length)
        visual.append(tuple(span for span, _ in images))
        for target, (start, stop) in zip(moved, spans, strict=True):
            ahead = sum(end - begin - 1 for (begin, end), index in images if index < start)
            target.append((start + ahead, stop + ahead))
        behind = images[-1][0][1] if images else 0
        after.append((behind, length) if behind < length else moved[0][-1])
    width, first = max(lengths), prompts[0][0].tokens
    line: list[Tensor] = []
    for pieces, length in zip(prompts, lengths, strict=True):
        if length < width:
            line.append(first.new_zeros(width - length, first.shape[1]))
        line += [one.tokens if one.tokens.dtype == first.dtype else one.tokens.to(first.dtype) for one in pieces]
    hidden = torch.cat(line).view(len(prompts), width, -1)
    gaps = axes or any(one.kept is not None or one.inputs != len(one.tokens) for pieces in prompts for one in pieces)
    if gaps:
        position = positions.original(prompts, axes, hidden.device)
    else:
        position = positions.contiguous(tuple(lengths), width, hidden.device)
    question, instruction = map(tuple, moved)
    return PromptBatch(
        hidden, position, tuple(lengths), tuple(visual), question, instruction, tuple(after), contiguous=not gaps
    )


# Index tensors of a batch that is padded to `width`. Spans are columns of the padded batch here.


@cached_by_sizes
def real_columns(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[B, width] bool, False in the padding."""
    first = torch.tensor([width - length for length in lengths]).to(device, non_blocking=True)
    return torch.arange(width, device=device) >= first[:, None]


@cached_by_sizes
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as a tensor [n] int64."""
    return torch.tensor(numbers).to(device, non_blocking=True)


@cached_by_sizes
def columns_of(spans: tuple[Span, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns of spans, [n, T] int64, and a mask [n, T] bool, False for padding.

    T is the length of the longest span. A shorter span repeats its last column. An empty span gives the column before
    it, which exists even if the span is at the end of the batch.
    """
    longest = max(1, max(stop - start for start, stop in spans))
    index = [[max(0, min(start + i, stop - 1)) for i in range(longest)] for start, stop in spans]
    mask = [[i < stop - start for i in range(longest)] for start, stop in spans]
    return torch.tensor(index).to(device, non_blocking=True), torch.tensor(mask).to(device, non_blocking=True)


def unseen(spans: tuple[Span, ...], padding: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[n, 1, T, width] bool, True for the columns that a row of a span does not see.

    Args:
        padding: number of padding columns of each prompt; () if no prompt has any.
    """
    index, _ = columns_of(spans, device)
    columns = places(1, width, device)
    after = columns > index[..., None]
    if padding:
        first = torch.tensor(padding).to(device, non_blocking=True)
        after = after | (columns[None] < first[:, None, None])
    return after[:, None]


unseen_kept = cached_by_sizes(unseen)


@cached_by_sizes
def sources(lengths: tuple[int, ...], width: int, cuts: tuple[tuple[Cut, ...], ...], device: torch.device) -> Tensor:
    """[B * shorter width] int64: for the tokens of the shorter prompts, one prompt after another, where they come from.

    This is a token's column before the reduction; for tokens of a reduced image, the first column of that image; and 0
    in the padding.

    Args:
        lengths, width: before the reduction.
        cuts: for each prompt, its reduced images in order.
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


@cached_by_sizes
def image_places(
    lengths: tuple[int, ...], visual: tuple[tuple[Span, ...], ...], images: tuple[ImageKey, ...], device: torch.device
) -> Tensor:
    """[n] int64: where the visual tokens of some images are in a padded batch that is flattened to [B * L]."""
    width, places = max(lengths), []
    for sample, number in images:
        first, (start, stop) = (sample + 1) * width - lengths[sample], visual[sample][number]
        places.append(torch.arange(first + start, first + stop))
    return torch.cat(places).to(device, non_blocking=True)
