"""Positions on three axes: the rule "renumber" against its definition."""

import pytest
import torch

from llava.pipeline import positions as mrope
from llava.pipeline.positions import Piece

PROMPTS = [
    [7],
    [3, (1, 4, 6), 5],
    [3, (1, 4, 6), 1, (1, 2, 2), 4],
    [0, (1, 5, 2), 1, (1, 1, 3), 2],  # an image at the very beginning
    [2, (2, 3, 3), 4],
]


def positions(prompts):
    """[B, L, 3] of whole prompts, each a list of numbers of text tokens and of images as (frames, rows, columns)."""
    empty = torch.empty(0)
    text, image = (lambda part: Piece(empty, part)), (lambda part: Piece(empty, 0, image=True, groups=part))
    pieces = [[text(part) if isinstance(part, int) else image(part) for part in parts] for parts in prompts]
    return mrope.original(pieces, axes=True)


def spans(parts):
    """Length and visual runs of a whole prompt."""
    runs, length = [], 0
    for part in parts:
        count = part if isinstance(part, int) else part[0] * part[1] * part[2]
        if not isinstance(part, int):
            runs.append((length, length + count))
        length += count
    return length, runs


def renumber_by_the_book(rows, length, runs):
    """One sample as a list of triples, one token after another."""
    padding = len(rows) - length
    out, free, place = [(0, 0, 0)] * padding, 0, 0
    while place < length:
        run = next((run for run in runs if run[0] == place and run[1] > place), None)
        if run is None:
            out.append((free,) * 3)
            free, place = free + 1, place + 1
            continue
        tokens = rows[padding + run[0] : padding + run[1]]
        left = [sorted({token[axis] for token in tokens}) for axis in range(3)]
        out += [tuple(free + left[axis].index(token[axis]) for axis in range(3)) for token in tokens]
        free, place = free + max(map(len, left)), run[1]
    return out


def thinned(prompts, share, seed):
    """Drop visual tokens at random: index [B, K], lengths and runs of what is left. Padding is any token."""
    generator = torch.Generator().manual_seed(seed)
    full = max(spans(parts)[0] for parts in prompts)
    indices, lengths, visual = [], [], []
    for parts in prompts:
        length, runs = spans(parts)
        kept, left = [], []
        for place in range(length):
            run = next((run for run in runs if run[0] <= place < run[1]), None)
            if run is not None and place == run[0]:
                left.append([len(kept), len(kept)])
            if run is None or torch.rand((), generator=generator) < share:
                kept.append(place + full - length)
                if run is not None:
                    left[-1][1] = len(kept)
        indices.append(kept)
        lengths.append(len(kept))
        visual.append([tuple(run) for run in left])
    width = max(lengths)
    padding = torch.randint(full, (width,), generator=generator).tolist()
    return torch.tensor([padding[: width - len(kept)] + kept for kept in indices]), lengths, visual


def test_text_goes_on_behind_the_longest_axis():
    """A film of more frames than rows: get_rope_index of 5.23 would number text into the film."""
    assert positions([[1, (4, 1, 2), 1]])[0, -1].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]], 4),  # text is last
        ([[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1]], 4),  # an image is last; its width counts
        ([[0, 0, 0], [5, 1, 1], [2, 1, 2]], 6),  # the frames of a film; its last token is of an earlier frame
    ],
)
def test_the_first_new_token_stands_behind_the_largest_number(tokens, expected):
    """By hand: the largest number of any token on any axis, and one; a shorter prompt beside it has its own."""
    other = [[0, 0, 0]] * (len(tokens) - 1) + [[2, 9, 2]]
    found = mrope.next_position(torch.tensor([tokens, other]))
    assert found.tolist() == [[[expected] * 3], [[10] * 3]]
    assert mrope.next_position(torch.tensor([[0, 0, 1, 2], [0, 1, 2, 7]])).tolist() == [[3], [8]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_renumbering_equals_the_definition(share, seed):
    """Also with an image of which nothing is left."""
    index, lengths, visual = thinned(PROMPTS, share, seed)
    place = mrope.keep(positions(PROMPTS), index)
    expected = [renumber_by_the_book(*one) for one in zip(place.tolist(), lengths, visual, strict=True)]
    assert mrope.renumber(place, lengths, visual).tolist() == [[list(token) for token in row] for row in expected]


def test_merged_tokens_behind_the_kept_ones_and_doubles_share_ranks():
    """The order of an image's tokens does not matter, and two tokens of one place stay at one place."""
    straight = mrope.keep(positions([[1, (1, 3, 4), 1]]), torch.tensor([[0, 2, 4, 4, 11, 13]]))
    turn = torch.tensor([[0, 4, 1, 3, 2, 5]])
    expected = mrope.renumber(straight, [6], [[(1, 5)]])
    assert expected[0].tolist() == [[0] * 3, [1, 1, 1], [1, 1, 3], [1, 1, 3], [1, 2, 2], [4] * 3]
    turned = mrope.renumber(mrope.keep(straight, turn), [6], [[(1, 5)]])
    assert torch.equal(turned, mrope.keep(expected, turn))


def test_images_side_by_side():
    """No text between two images; transformers' function takes them for one and fails."""
    place = positions([[(1, 2, 2), (1, 1, 2), 1]])
    assert place[0, 4:].tolist() == [[2, 2, 2], [2, 2, 3], [4, 4, 4]]
    thin = mrope.keep(place, torch.tensor([[3, 5, 6]]))
    assert mrope.renumber(thin, [3], [[(0, 1), (1, 2)]])[0].tolist() == [[0] * 3, [1] * 3, [2] * 3]
