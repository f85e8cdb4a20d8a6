"""Prefill of a batch whose prompts begin alike: the common beginning runs once (`--share-prefix`).

Every prompt of a run begins with the same system prompt, and under a method that leaves the image as it is, all
questions about one image have the system prompt and all its visual tokens in common. Keys and values of a beginning
depend on nothing behind it, so one row of the decoder gives them for all prompts that share it; then each prompt runs
only its own rest against them. A method that acts between decoder layers reads whole prompts: it is prefilled as usual.

Sums over keys are taken in other blocks than in a whole prefill, so logits differ in their last bits.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pipeline import decoder
from llava.pipeline.decoder import Prefilled
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.kv_cache import ValidKeys
from llava.pipeline.positions import next_position
from llava.pipeline.sequence import Sequence
from llava.processing.prompt import Prompt
from llava.reduction.decoder_attention import rotary_angles

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True)
class Beginning:
    """The beginning of a prompt.

    Attributes:
        name: prompts with the same name begin with the same tokens.
        length: its tokens, visual ones included.
    """

    name: Hashable
    length: int


def beginnings(prompts: list[Prompt], images: ImageBatch | None, sequence: Sequence) -> list[Beginning]:
    """The beginning of each prompt that others may share: up to its images, or behind them where nothing is reduced.

    Args:
        sequence: the prompts as they enter layer 0.
    """
    found = []
    for sample, prompt in enumerate(prompts):
        slots = [place for place, token in enumerate(prompt.ids) if token == IMAGE_TOKEN_INDEX]
        rows = [(sample, number) for number in range(len(slots))]
        if images is None or not slots:
            found.append(Beginning(("text", prompt.ids[:1]), 1))
            continue
        counts = [stop - start for start, stop in sequence.visual[sample]]
        whole = all(images.kept[row] is None and images.inputs[row] == n for row, n in zip(rows, counts, strict=True))
        end = slots[-1] + 1 if whole else slots[0]
        owners = tuple(images.owner[row] for row in rows) if whole else ()
        length = sequence.visual[sample][-1][1] if whole else sequence.visual[sample][0][0]
        found.append(Beginning((prompt.ids[:end], owners), length))
    return found


def prefill(llm: nn.Module, sequence: Sequence, starts: list[Beginning]) -> Prefilled:
    """`decoder.prefill` without reductions between layers, each beginning once.

    Args:
        starts: of every prompt; each must leave at least one token of its own.
    """
    names = list(dict.fromkeys(start.name for start in starts))
    first = [next(row for row, start in enumerate(starts) if start.name == name) for name in names]
    owner = [names.index(start.name) for start in starts]
    lengths = [starts[row].length for row in first]
    common = cut(sequence, first, [0] * len(first), lengths)
    own = cut(sequence, list(range(len(starts))), [start.length for start in starts], list(sequence.lengths))
    before = decoder.prefill(llm, common, (), None)
    state = behind(llm, own, common, before.cache, torch.tensor(owner, device=sequence.hidden.device))
    counts = [tuple(sequence.lengths)] * len(llm.layers)
    visual = [sequence.visual_counts] * len(llm.layers)
    token = [bytes_ // length for bytes_, length in zip(before.kv_bytes, lengths, strict=True)]
    used = [length * token[number] for length, number in zip(sequence.lengths, owner, strict=True)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers) * getattr(llm, "ranks", 1)
    return replace(state, lengths=counts, visual=visual, kv_bytes=used, kv_bytes_held=held)


def behind(llm: nn.Module, own: Sequence, common: Sequence, cache: "DynamicCache", owner: Tensor) -> Prefilled:
    """Run the prompts' own rests against the keys and values of their beginnings.

    Args:
        cache: of the beginnings, one row each; it gets a row per prompt, and the rests behind.
        owner: [B], the beginning of each prompt.
    """
    cache.batch_select_indices(owner)
    valid = torch.cat([common.valid()[owner], own.valid()], 1)
    mask = decoder.causal_mask(valid, own.hidden.shape[1], own.hidden.dtype, decoder.is_eager(llm))
    rotary = rotary_angles(llm, own.hidden, own.position)
    hidden = own.hidden
    for layer in llm.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    known = None if not (common.padded or own.padded) else ValidKeys.of(valid)
    following = next_position(own.position)
    layers = len(llm.layers)
    return Prefilled(hidden[:, -1:], cache, [known] * layers, [following] * layers)


def cut(sequence: Sequence, rows: list[int], starts: list[int], stops: list[int]) -> Sequence:
    """Tokens [start, stop) of some prompts, padded on the left; spans are not carried over."""
    lengths = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    width = max(lengths)
    hidden = sequence.hidden.new_zeros(len(rows), width, sequence.hidden.shape[-1])
    position = sequence.position.new_zeros(len(rows), width, *sequence.position.shape[2:])
    for place, (row, start, stop) in enumerate(zip(rows, starts, stops, strict=True)):
        pad = sequence.padding(row)
        hidden[place, width - (stop - start) :] = sequence.hidden[row, pad + start : pad + stop]
        position[place, width - (stop - start) :] = sequence.position[row, pad + start : pad + stop]
    none = ((0, 0),) * len(rows)
    return Sequence(hidden, position, lengths, ((),) * len(rows), none, none, none)
