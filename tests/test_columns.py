"""Index tensors of padded prompts against loops, and cosines and sines that are kept over a reduction."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.pipeline import positions
from llava.pipeline import sequence as columns
from llava.pipeline.decoder import rotary_angles
from llava.pipeline.prefill import prefill
from llava.pipeline.sequence import Sequence
from llava.reduction import Reducer, Reduction
from llava.reduction.ranking import made_once
from llava.reduction.states import Angles, angles_of, prepared_angles, projected_heads
from tests.conftest import samples

CPU = torch.device("cpu")
LENGTHS, WIDTH = (7, 4, 9), 10


def test_padding_and_numbers_by_the_book():
    real, numbers = columns.real_columns(LENGTHS, WIDTH, CPU), positions.contiguous(LENGTHS, WIDTH, CPU)
    for sample, length in enumerate(LENGTHS):
        for column in range(WIDTH):
            inside = column >= WIDTH - length
            assert bool(real[sample, column]) == inside
            assert int(numbers[sample, column]) == (column - (WIDTH - length) if inside else 0)


def test_sources_of_shortened_prompts_by_the_book():
    """Prompt 0 loses 2 of the 3 tokens from column 4 on, prompt 2 one image and a part of another, prompt 1 nothing."""
    cuts = (((4, 3, 1),), (), ((2, 2, 0), (6, 3, 2)))
    found = columns.sources(LENGTHS, WIDTH, cuts, CPU).view(3, -1).tolist()
    expected = []
    for length, images in zip(LENGTHS, cuts, strict=True):
        row, column = [], WIDTH - length
        while column < WIDTH:
            image = next((cut for cut in images if cut[0] == column), None)
            row += [column] if image is None else [column] * image[2]
            column += 1 if image is None else image[1]
        expected.append(row)
    longest = max(map(len, expected))
    assert found == [[0] * (longest - len(row)) + row for row in expected]


def test_spans_by_the_book():
    spans = ((3, 5), (0, 2), (7, 9))
    assert columns.columns_of(spans, CPU)[0].tolist() == [[3, 4], [0, 1], [7, 8]]
    # Prompts of 4 and 6 tokens, padded to 6, in one line: the images are its tokens 3 to 4 and 6 to 8.
    visual = (((1, 3),), ((0, 3), (4, 5)))
    assert columns.image_places((4, 6), visual, ((0, 0), (1, 0)), CPU).tolist() == [3, 4, 6, 7, 8]


def test_made_once_and_no_inference_tensor():
    """A tensor that was first asked for in inference mode could not be used where gradients are kept."""
    calls = []

    @made_once
    def numbers(count: int) -> torch.Tensor:
        calls.append(count)
        return torch.arange(count)

    with torch.inference_mode():
        first = numbers(3)
    assert numbers(3) is first and calls == [3] and not first.is_inference()


class Probe(Reducer):
    """Keeps fewer tokens before each layer, of every second image fewer still, and looks at the angles first."""

    seen: list
    prepared: list

    def decoder_layers(self, layers):
        return tuple(range(1, layers))

    def decoder(self, state):
        sequence = state.sequence
        found, expected = (
            angles_of(state.llm, sequence),
            rotary_angles(state.llm, sequence.hidden, sequence.position),
        )
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        prepared, width = prepared_angles(state.llm, sequence), sequence.hidden.shape[1]
        again = Angles.of(*expected)
        same = same and all(torch.equal(a[:, :, :width], b) for a, b in zip(prepared, again, strict=True))
        self.seen.append((same, sequence.rotary is not None))
        self.prepared.append(prepared)
        total = state.tokens.shape[1]
        drop = [2 if int(name[1:]) % 2 and self.crops == "each" else 1 for name in state.ids]
        return [Reduction(torch.arange(count, total)[None], total) for count in drop]


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("crops", ["each", "global"])  # images lose different numbers of tokens, or as many
def test_angles_that_are_kept_are_those_of_the_positions(tiny, positions, crops, monkeypatch):
    monkeypatch.setattr(Probe, "seen", [], raising=False)
    monkeypatch.setattr(Probe, "prepared", [], raising=False)
    text_only = (3,) if crops == "each" else ()
    prefill(tiny, samples(text_only=text_only), Probe(budget=8, positions=positions, crops=crops))
    same, kept = zip(*Probe.seen, strict=True)
    assert len(same) >= len(tiny.llm.layers) - 1 and all(same)
    assert all(kept) == (crops == "global")
    if crops == "global" and positions == "renumber":
        assert all(angles is Probe.prepared[0] for angles in Probe.prepared), "prepared again"


def test_rotation_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    heads, angle = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    layer, normed = SimpleNamespace(self_attn=SimpleNamespace(head_dim=8)), heads.transpose(1, 2).flatten(2)
    rotated = projected_heads(layer, nn.Identity(), normed, Angles.of(cos, sin))
    assert torch.equal(rotated, expected)
    some = slice(1, 4)
    rotated = projected_heads(layer, nn.Identity(), normed[:, some], Angles.of(cos, sin).rows(some))
    assert torch.equal(rotated, expected[:, :, some])


@pytest.mark.parametrize("kept_numbers", [0, 2**18])  # made anew, or kept for the next question
def test_unseen_keys_by_the_book(monkeypatch, kept_numbers):
    monkeypatch.setattr(columns, "KEPT_MASK", kept_numbers)
    hidden = torch.zeros(2, 7, 4)
    sequence = Sequence(hidden, torch.zeros(2, 7), (7, 5), ((), ()), (), (), ())
    spans, width = [(2, 5), (1, 3)], 6  # of columns 2 to 4 and 3 to 4
    found = sequence.unseen(spans, width)
    for row, ((start, stop), padding) in enumerate(zip(spans, (0, 2), strict=True)):
        for query in range(3):
            own = padding + min(start + query, stop - 1)
            for column in range(width):
                assert bool(found[row, 0, query, column]) == (column > own or column < padding)
