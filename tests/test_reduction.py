"""Reductions as data, the sequence they are applied to, and stages in the decoder, against plain loops."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from baselines._staged import OneStage, Staged, plan, proportional
from llava.errors import MethodError, UserError
from llava.pipeline import sequence as columns
from llava.pipeline.accounting import Applied, Record, SeenImage
from llava.pipeline.positions import Piece
from llava.pipeline.sequence import ImageReduction, PromptBatch, assemble
from llava.reduction import PatchGrid, Reduction, keep_top, registry, split
from llava.reduction.budget import scaled_layers, tokens_by_layer
from llava.reduction.ranking import cached_by_sizes, gather_tokens
from llava.reduction.reducer import check_reductions
from llava.reduction.token_layout import CLS, ModelSpec, single


def test_keep_top_finds_planted_tokens_and_of_equal_ones_those_with_the_lower_index():
    """Flipping the sort order passes every shape test, and fails here."""
    score = torch.zeros(2, 36)
    score[0, [4, 20, 33]] = score[1, [0, 1, 35]] = 1 / 3
    assert keep_top(score, 3).tolist() == [[4, 20, 33], [0, 1, 35]]
    assert keep_top(torch.zeros(1, 50), 4).tolist() == [[0, 1, 2, 3]]


def test_apply_is_the_weighted_sum():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 9, 5, generator=generator)
    anchor = torch.tensor([[1, 4, 8], [0, 2, 3]])
    owner = torch.randint(-1, 3, (2, 9), generator=generator)
    weight = torch.rand(2, 9, generator=generator)
    expected = torch.zeros(2, 3, 5)
    for b in range(2):
        for n in range(9):
            if owner[b, n] >= 0:
                expected[b, owner[b, n]] += weight[b, n] * tokens[b, n]
    reduction = Reduction(anchor, 9, owner, weight)
    torch.testing.assert_close(reduction.apply(tokens), expected)
    members = [[int((owner[b] == k).sum()) > 1 for k in range(3)] for b in range(2)]
    assert reduction.merged_count().tolist() == [sum(row) for row in members]


def sequence(counts=(4, 4, 0), texts=(5, 3, 6), slots=(2, 1, None)):
    """Token n of sample s has the value 100 s + n, its place in the unreduced prompt."""
    rows = []
    for s, (count, text, slot) in enumerate(zip(counts, texts, slots, strict=True)):
        line = 100.0 * s + torch.arange(text + count)
        start = slot or 0
        pieces = [Piece(line[:start, None], start)]
        if slot is not None:
            pieces.append(Piece(line[start : start + count, None], count, image=True))
        rows.append([*pieces, Piece(line[start + count :, None], text - start)])
    questions = [(s + 1, t) if s is not None else (1, 4) for s, t in zip(slots, texts, strict=True)]
    return assemble(rows, questions, questions)


def real(seq, sample, tensor):
    return tensor[sample, seq.padding(sample) :].flatten().tolist()


def test_a_span_that_begins_right_behind_an_image_moves_with_it():
    """Text, image, question: "after the image" includes the token at its end. So does the text between two images."""
    line = torch.arange(12.0)[:, None]
    pieces = [Piece(line[:2], 2), Piece(line[2:6], 4, image=True), Piece(line[6:9], 3)]
    two = [*pieces[:2], Piece(line[6:7], 1), Piece(line[7:11], 4, image=True), Piece(line[11:], 1)]
    seq = assemble([pieces, two], [(3, 5), (3, 4)], [(3, 6), (5, 6)])
    assert seq.question == ((6, 8), (6, 7)) and seq.instruction == ((6, 9), (11, 12))
    kept = Reduction(torch.tensor([[1, 3]]), 4)
    out = seq.reduce([ImageReduction([image], kept) for image in ((0, 0), (1, 0), (1, 1))], True)
    assert out.visual == (((2, 4),), ((2, 4), (5, 7)))
    assert out.question == ((4, 6), (4, 5)) and out.instruction == ((4, 7), (7, 8)) and out.after == ((4, 7), (7, 8))
    spans = zip(out.question, out.after, strict=True)
    held = [[real(out, s, out.hidden)[start:stop] for start, stop in own] for s, own in enumerate(spans)]
    assert held == [[[6, 7], [6, 7, 8]], [[6], [11]]]


def test_merged_tokens_are_counted_of_every_image():
    """Of the second image, which is the second row of one reduction, and of a third with a reduction of its own."""
    target = torch.tensor([[0, 0, 1, 1], [0, 0, -1, 1]])
    first = Reduction(torch.tensor([[0, 2], [0, 3]]), 4, target, torch.full((2, 4), 0.5))
    third = Reduction(torch.tensor([[1]]), 4, torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 0.25))
    assert first.merged_count().tolist() == [2, 1]
    applied = [Applied("prompt", 0, first, 0), Applied("prompt", 1, first, 1), Applied("prompt", 2, third, 0)]
    record = Record([[SeenImage(single(2, 2), 4, None, asked=3)] * 3], [applied])
    prefilled = SimpleNamespace(segments=[SimpleNamespace(visual=[5], layers=[0, 1])], kv_bytes=[0])
    (found,) = record.accounting(prefilled)
    assert (found.merged, found.images, found.visual_tokens, found.tokens_per_layer) == (2 + 1 + 1, 3, 12, (5, 5))
    assert [step.place for step in record.steps[0]] == ["prompt", "prompt #2", "prompt #3"]


@pytest.mark.parametrize("renumber", [False, True])
def test_reduce_by_the_book(renumber):
    seq = sequence()
    reduction = Reduction(torch.tensor([[1, 3], [0, 2]]), 4)
    out = seq.reduce([ImageReduction([(0, 0), (1, 0)], reduction)], renumber)
    expected = [[0, 1, 3, 5, 6, 7, 8], [100, 101, 103, 105, 106], [200, 201, 202, 203, 204, 205]]
    for s, values in enumerate(expected):
        assert real(out, s, out.hidden) == values
        places = [v - 100 * s for v in values]
        assert real(out, s, out.position) == (list(range(len(values))) if renumber else places)
        assert out.hidden[s, : out.padding(s)].abs().sum() == 0
    assert out.visual == (((2, 4),), ((1, 3),), ())
    # Spans still point at the same tokens.
    for s in range(3):
        (a, b), (c, d) = seq.question[s], out.question[s]
        assert real(seq, s, seq.hidden)[a:b] == real(out, s, out.hidden)[c:d]


def test_reduce_puts_merged_values_at_their_anchors():
    seq = sequence()
    reduction = Reduction(torch.tensor([[0, 3]]), 4)
    out = seq.reduce([ImageReduction([(1, 0)], reduction, torch.tensor([[[-1.0], [-2.0]]]))], True)
    assert real(out, 1, out.hidden) == [100, -1, -2, 105, 106]
    assert real(out, 0, out.hidden) == real(seq, 0, seq.hidden)


def test_reduce_allows_a_token_twice():
    """Official AttnMix keeps some tokens twice; the seam must be able to reproduce that."""
    seq = sequence()
    out = seq.reduce([ImageReduction([(0, 0)], Reduction(torch.tensor([[2, 2, 0]]), 4))], False)
    assert real(out, 0, out.hidden)[2:5] == [4, 4, 2]


def test_coordinates_of_tokens_are_those_of_their_tile():
    grid = PatchGrid(3, 2, crops=2, has_cls=True)
    found = grid.coordinates()
    assert found.shape == (grid.tokens, 2)
    for token in range(grid.tokens):
        _, row, column = grid.place(token)
        expected = [0.0, 0.0] if row == CLS else [row - 1.0, 2.0 * column - 1]
        assert found[token].tolist() == expected
    assert PatchGrid(1, 1).coordinates().tolist() == [[0, 0]]


def test_a_reduction_of_other_tokens_is_refused():
    """The README's example ranked the patches of one tile where it was given those of all: 16 tokens in place of 24."""
    with pytest.raises(MethodError, match="of 16 tokens, but each image has 80"):
        check_reductions(registry.build("fastv", 4), "encoder", Reduction(torch.arange(4)[None], 16), ("q",), 80)


def test_split_is_keep_top_and_the_rest():
    score = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 5.0, 0.0, 1.0]])
    kept, rest = split(score, 2)
    assert kept.tolist() == keep_top(score, 2).tolist() == [[0, 2], [2, 4]]
    assert rest.tolist() == [[1, 3, 4], [0, 1, 3]]


def test_a_reduction_without_dropped_tokens_sums_as_one_with():
    generator = torch.Generator().manual_seed(5)
    tokens, weight = torch.randn(2, 9, 5, generator=generator), torch.rand(2, 9, generator=generator)
    owner = torch.randint(0, 3, (2, 9), generator=generator)
    some = Reduction(torch.tensor([[0, 4, 8]] * 2), 9, owner, weight)
    assert torch.equal(replace(some, drops=False).apply(tokens), some.apply(tokens))


@pytest.mark.parametrize("text", [(3, 3), (3, 5)])  # prompts of one length, and of two
def test_spliced_tokens_are_those_that_are_put_in_their_columns(text, monkeypatch):
    """Merged tokens of images in the same columns are spliced in; otherwise they are written into gathered rows."""
    generator = torch.Generator().manual_seed(6)
    words = [torch.randn(count, 4, generator=generator) for count in text]
    images = [torch.randn(6, 4, generator=generator) for _ in text]
    prompts = [
        [Piece(word[:1], 1), Piece(image, 6, image=True), Piece(word[1:], len(word) - 1)]
        for word, image in zip(words, images, strict=True)
    ]
    sequence = assemble(prompts, [(0, 0)] * 2, [(0, 0)] * 2)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    merged = [ImageReduction([(0, 0), (1, 0)], Reduction(kept, 6), torch.randn(2, 3, 4, generator=generator))]
    written = []
    monkeypatch.setattr(columns, "gather_tokens", lambda *given: written.append(True) or gather_tokens(*given))
    found = sequence.reduce(merged, True)
    assert bool(written) == (text == (3, 5))
    # Images that are reduced one by one are never spliced in.
    alone = [
        ImageReduction([(row, 0)], Reduction(kept[row : row + 1], 6), merged[0].values[row : row + 1]) for row in (0, 1)
    ]
    expected = sequence.reduce(alone, True)
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.position, expected.position)
    assert found.visual == expected.visual == (((1, 4),), ((1, 4),))


# Index tensors of padded prompts against loops, and cosines and sines that are kept over a reduction.


CPU = torch.device("cpu")
LENGTHS, WIDTH = (7, 4, 9), 10


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


def test_made_once_and_no_inference_tensor():
    """A tensor that was first asked for in inference mode could not be used where gradients are kept."""
    calls = []

    @cached_by_sizes
    def numbers(count: int) -> torch.Tensor:
        calls.append(count)
        return torch.arange(count)

    with torch.inference_mode():
        first = numbers(3)
    assert numbers(3) is first and calls == [3] and not first.is_inference()


@pytest.mark.parametrize("kept_numbers", [0, 2**18])  # made anew, or kept for the next question
def test_unseen_keys_by_the_book(monkeypatch, kept_numbers):
    monkeypatch.setattr(columns, "KEPT_MASK", kept_numbers)
    hidden = torch.zeros(2, 7, 4)
    sequence = PromptBatch(hidden, torch.zeros(2, 7), (7, 5), ((), ()), (), (), ())
    spans, width = [(2, 5), (1, 3)], 6  # of columns 2 to 4 and 3 to 4
    found = sequence.unseen(spans, width)
    for row, ((start, stop), padding) in enumerate(zip(spans, (0, 2), strict=True)):
        for query in range(3):
            own = padding + min(start + query, stop - 1)
            for column in range(width):
                assert bool(found[row, 0, query, column]) == (column > own or column < padding)


# Where stages stand in decoders of other depths, and counts that are fitted to a budget.


@pytest.mark.parametrize(
    ("stages", "depth", "expected"),
    [
        ((2,), 32, (2,)),
        ((2,), 40, (3,)),
        ((2,), 8, (1,)),
        ((2,), 4, (1,)),  # never in front of layer 0: nothing has been computed there
        ((2, 10, 20), 32, (2, 10, 20)),
        ((2, 10, 20), 40, (3, 13, 25)),
        ((2, 10, 20), 8, (1, 3, 5)),
        ((3, 7, 16), 8, (1, 2, 4)),
        ((3, 7, 16), 4, (1, 2, 3)),  # 0.4 and 0.9 would both be layer 1
        ((8, 16, 24), 24, (6, 12, 18)),
    ],
)
def test_stages_move_in_proportion_to_the_depth(stages, depth, expected):
    assert scaled_layers(stages, 32, depth) == expected


def test_counts_hold_from_their_stage_on():
    assert tokens_by_layer(16, (1, 3), (9, 4), 5) == (16, 9, 9, 4, 4)
    assert tokens_by_layer(16, (), (), 3) == (16, 16, 16)


@pytest.mark.parametrize(
    ("first", "expected"), [(312, (312, 156, 78)), (57, (57, 28, 14)), (3, (3, 1, 1)), (1, (1, 1, 1))]
)
def test_exact_halving_rounds_down_and_leaves_a_token(first, expected):
    """And proportions at their own first count are themselves: 303 * (110 / 303) would be 109 if rounded down."""
    assert proportional(first, (4, 2, 1)) == expected
    for parts in ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)):
        assert proportional(parts[0], parts) == parts


def by_the_book(budget, most, total_of, depth):
    best = None
    for x in range(1, most + 1):
        off = abs(total_of(x) / depth - budget)
        if off <= 0.5 and (best is None or off < best[0]):
            best = (off, x)
    return best and best[1]


@pytest.mark.parametrize("budget", [37, 38, 64, 100, 128, 192, 300, 323, 324, 325, 576])
def test_the_fitted_count_is_the_nearest(budget):
    class Halving(Staged):
        published = (2, 10, 20)

        def keeps(self, first, tokens):
            return proportional(first, (4, 2, 1))

    def total_of(x):
        return sum(tokens_by_layer(576, (2, 10, 20), proportional(x, (4, 2, 1)), 32))

    spec, first = ModelSpec(576, 32, PatchGrid(24, 24), 24), by_the_book(budget, 576, total_of, 32)
    assert (first is None) == (budget > 324)
    if first is not None:
        assert plan(Halving(budget=budget), spec, exact=True) == proportional(first, (4, 2, 1))
    elif budget < 576:
        with pytest.raises(UserError, match=r"reaches 36\.94 to 324"):
            plan(Halving(budget=budget), spec, exact=True)


def test_of_two_counts_equally_near_the_smaller_is_taken():
    """A budget of 3 in three layers is 9 tokens; with 4 in the first, 2 and 3 in the others are equally far."""
    assert plan(OneStage(budget=3, layer=1), ModelSpec(4, 3, PatchGrid(2, 2), 2), exact=True) == (2,)
