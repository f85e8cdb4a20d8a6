"""Where "<image>" becomes visual tokens: the embeddings of a batch of prompts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.model.llava_arch import EncodedImage, Llava
from llava.pipeline import positions
from llava.pipeline.positions import Piece, Span
from llava.pipeline.sequence import Row, Sequence
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Prompt
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import ModelSpec


@dataclass
class ImageBatch:
    """Images of a batch; the key of an image is (sample, number of the image in its prompt).

    Attributes:
        encoded: image -> what the tower gave; questions about the same image share one object.
        tokens: image -> [N, H] projected visual tokens.
        kept: image -> [N] indices of its tokens among the unreduced ones; None if it is not reduced.
        inputs: image -> visual tokens before any reduction.
        specs: image -> the model as a method may know it, with the tokens and tiles of this image.
    """

    encoded: dict[Row, EncodedImage]
    tokens: dict[Row, Tensor] = field(default_factory=dict)
    kept: dict[Row, Tensor | None] = field(default_factory=dict)
    inputs: dict[Row, int] = field(default_factory=dict)
    specs: dict[Row, ModelSpec] = field(default_factory=dict)


def embed(model: Llava, reducer: Reducer, prompts: list[Prompt], images: ImageBatch | None) -> Sequence:
    """Embed the text of every prompt and put visual tokens where "<image>" stands."""
    # Of each prompt the ids before, between and after its images.
    texts: list[list[list[int]]] = []
    for prompt in prompts:
        texts.append([[]])
        for token in prompt.ids:
            if token == IMAGE_TOKEN_INDEX:
                texts[-1].append([])
            else:
                texts[-1][-1].append(token)
    # All texts at once: one copy to the device and one lookup.
    line = torch.tensor([token for runs in texts for run in runs for token in run]).to(model.device, non_blocking=True)
    embedded = iter(model.llm.embed_tokens(line).split([len(run) for runs in texts for run in runs]))
    # Numbered anew, text and visual tokens follow one another without gaps. Otherwise text after an image keeps the
    # position ids that it would have with every visual token present.
    gaps = model.axes or reducer.positions == "original"
    batch: list[list[Piece]] = []
    for sample, runs in enumerate(texts):
        pieces = []
        for number, run in enumerate(runs):
            if number and images is not None:
                image = sample, number - 1
                tokens, groups = images.tokens[image], model.groups(images.encoded[image]) if model.axes else None
                inputs, kept = (images.inputs[image], images.kept[image]) if gaps else (len(tokens), None)
                pieces.append(Piece(tokens, inputs, kept, image=True, groups=groups))
            pieces.append(Piece(next(embedded), len(run)))
        batch.append(pieces)
    sequence = assemble(batch, [one.question for one in prompts], [one.instruction for one in prompts], model.axes)
    reduced = images is not None and any(indices is not None for indices in images.kept.values())
    return sequence.renumbered() if gaps and reduced and reducer.positions == "renumber" else sequence


def assemble(
    prompts: list[list[Piece]], questions: list[Span], instructions: list[Span], axes: bool = False
) -> Sequence:
    """Put the pieces of each prompt side by side and pad on the left.

    Args:
        questions, instructions: spans in token ids where every image counts as one id.
        axes: positions have three axes.
    """
    lengths, visual, after = [], [], []
    moved: list[list[Span]] = [[], []]
    for pieces, *spans in zip(prompts, questions, instructions, strict=True):
        images, ids, length = [], 0, 0  # of an image: its span, and its index among the ids
        for piece in pieces:
            if piece.image:
                images.append(((length, length + len(piece.tokens)), ids))
            ids += 1 if piece.image else len(piece.tokens)
            length += len(piece.tokens)
        lengths.append(length)
        visual.append(tuple(span for span, _ in images))
        after.append((visual[-1][-1][1] if images else 0, length))
        for target, (start, stop) in zip(moved, spans, strict=True):
            ahead = sum(end - begin - 1 for (begin, end), index in images if index < start)
            target.append((start + ahead, stop + ahead))
    width, first = max(lengths), prompts[0][0].tokens
    line: list[Tensor] = []
    for pieces, length in zip(prompts, lengths, strict=True):
        if length < width:
            line.append(first.new_zeros(width - length, first.shape[1]))
        line += [one.tokens if one.tokens.dtype == first.dtype else one.tokens.to(first.dtype) for one in pieces]
    hidden = torch.cat(line).view(len(prompts), width, -1)
    if axes or any(one.kept is not None or one.inputs != len(one.tokens) for pieces in prompts for one in pieces):
        position = positions.original(prompts, axes, hidden.device)
    else:
        position = positions.contiguous(tuple(lengths), width, hidden.device)
    return Sequence(hidden, position, tuple(lengths), tuple(visual), tuple(moved[0]), tuple(moved[1]), tuple(after))
