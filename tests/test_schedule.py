"""Where stages stand in decoders of other depths, and counts that are fitted to a budget."""

import pytest

from baselines._staged import largest_within, proportional
from llava.errors import UserError
from llava.reduction.budget import refuse_budget, scaled_layers, tokens_by_layer


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


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_decoder_too_shallow_for_three_stages_is_refused(depth):
    with pytest.raises(UserError, match=f"do not fit into {depth} decoder layers"):
        scaled_layers((3, 7, 16), 32, depth)


def test_counts_hold_from_their_stage_on():
    assert tokens_by_layer(16, (1, 3), (9, 4), 5) == (16, 9, 9, 4, 4)
    assert tokens_by_layer(16, (), (), 3) == (16, 16, 16)


@pytest.mark.parametrize(
    ("first", "expected"), [(312, (312, 156, 78)), (57, (57, 28, 14)), (3, (3, 1, 1)), (1, (1, 1, 1))]
)
def test_exact_halving_rounds_down_and_leaves_a_token(first, expected):
    assert proportional(first, (4, 2, 1)) == expected


def test_proportions_at_their_own_first_count_are_themselves():
    """Integers, not ratios: 303 * (110 / 303) would be 109 if rounded down."""
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
    def total_of(x):
        return sum(tokens_by_layer(576, (2, 10, 20), proportional(x, (4, 2, 1)), 32))

    found = largest_within(budget, 576, total_of, 32)
    assert found == by_the_book(budget, 576, total_of, 32)
    assert (found is None) == (budget > 324)


def test_of_two_counts_equally_near_the_smaller_is_taken():
    """A budget of 3 in two layers is 6 tokens; 5 and 7 are equally far."""
    assert largest_within(3, 4, lambda x: 2 * x + 1, 2) == 2


def test_what_is_out_of_reach_is_said_with_the_range():
    error = refuse_budget("fastv", 64, 72.875, 576, "all 576 enter the first 1 of 8 layers", "Do this.")
    assert str(error) == (
        "fastv cannot reach a mean of 64 visual tokens per layer: all 576 enter the first 1 of 8 layers. "
        "On this model it reaches 72.88 to 576. Do this."
    )
    assert str(refuse_budget("x", 1, 2, 3, "why")).endswith("2 to 3.")
