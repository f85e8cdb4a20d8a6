"""Overlays of tiled pictures and videos, pixel by pixel where a patch is kept or dropped."""

import numpy as np
import pytest
import torch
from PIL import Image

from eval.figures.overlay import DIM
from eval.figures.overlay_tiles import GAP, draw_answer, draw_crops, draw_original, trace_of
from llava.pipeline.accounting import TokenAccounting
from llava.pipeline.answer import Answer
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction import Reduction, Step
from llava.reduction.token_layout import frames, stitched

WHITE = Image.new("RGB", (64, 32), "white")


def step(anchor: list[int], inputs: int, place: str = "encoder") -> Step:
    return Step(place, Reduction(torch.tensor([anchor]), inputs))


def test_kept_patches_of_both_views_are_clear_and_all_others_dim():
    """Tiles of 4 x 4 patches side by side, 2 rows left by unpadding: the run is 16, then 2 rows of 8 and a newline."""
    run = stitched((1, 2), (4, 4), (1, 3, 0, 8))
    kept_copy, kept_tile = 5, 16 + 9 + 6  # row 1, column 1 of the copy; second stitched row, seventh column
    drawn = np.asarray(draw_crops(WHITE, [step([kept_copy, kept_tile], run.tokens)], run))
    assert drawn.shape == (32, 2 * 64 + GAP, 3)
    copy, tiles = drawn[:, :64, 0], drawn[:, 64 + GAP :, 0]
    clear = np.zeros((32, 64), bool)
    clear[8:16, 16:32] = True
    assert ((copy == 255) == clear).all() and (copy[~clear] == round(255 * DIM)).all()
    clear = np.zeros((32, 64), bool)
    clear[16:, 48:56] = True
    assert ((tiles == 255) == clear).all()


def test_a_run_with_class_tokens_is_understood():
    run = stitched((1, 1), (2, 2), newline=False)
    place = int(run.with_cls().crops[1].indices[3])
    drawn = np.asarray(draw_crops(WHITE, [step([place], run.tokens + 2)], run))[..., 0]
    assert (drawn[16:, 64 + GAP + 32 :] == 255).all() and (drawn[:, :64] < 255).all()


def test_frames_of_a_video_stand_in_two_rows():
    run = frames(4, 2, 2).with_cls()
    video = Video(tuple(Image.new("RGB", (20, 20), "white") for _ in range(4)))
    drawn = np.asarray(draw_crops(video, [step([16], run.tokens)], run))[..., 0]
    assert drawn.shape == (2 * 20 + GAP, 2 * 20 + GAP)
    # Token 16 is the first patch of the fourth frame: 3 frames of 5 tokens and its class token are in front.
    assert (drawn[20 + GAP : 30 + GAP, 20 + GAP : 30 + GAP] == 255).all() and (drawn[:20, :20] < 255).all()


@pytest.mark.parametrize("images", [1, 2])
def test_every_image_of_a_sample_is_drawn_with_its_own_steps(images):
    run = stitched((1, 2), (4, 4))
    trace = tuple(step([n], run.tokens, "encoder" if n == 0 else f"encoder #{n + 1}") for n in range(images))
    audit = TokenAccounting((1,), run.tokens, 0, 0)
    answer = Answer("a", "yes", (1,), audit, trace, (run,) * images)
    drawn = draw_answer(Sample("a", "there?", image=(WHITE,) * images), answer)
    assert len(drawn) == images
    for number, picture in enumerate(drawn):
        clear = np.asarray(picture)[:32, : 2 * 64, 0] == 255
        assert clear[0, 32 * number] and clear.sum() == 2 * 16 * 2 * 8


def test_originals_are_drawn_as_large_as_their_overlays():
    """The original beside an overlay: enlarged alike, the frames of a video in the same two rows."""
    run = frames(4, 2, 2).with_cls()
    video = Video(tuple(Image.new("RGB", (20, 20), (60 * number, 0, 0)) for number in range(4)))
    answer = Answer("a", "yes", (1,), TokenAccounting((1,), run.tokens, 0, 0), (step([16], run.tokens),), (run,))
    original, (overlay,) = draw_original(video), draw_answer(Sample("a", "there?", image=video), answer)
    assert original.size == overlay.size == (2 * 40 + GAP, 2 * 40 + GAP)
    corners = [original.getpixel(place)[0] for place in ((0, 0), (83, 0), (0, 83), (83, 83))]
    assert corners == [0, 60, 120, 180]
    assert draw_original(WHITE).size == (128, 64)


def test_groups_of_frames_have_outlines_and_the_steps_of_another_image_are_not_its_own():
    run = frames(2, 2, 2)
    video = Video(tuple(Image.new("RGB", (48, 48), (200, 200, 200)) for _ in range(2)))
    owner = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    merged = Step("prompt #2", Reduction(torch.tensor([[0, 4]]), 8, owner, torch.full((1, 8), 0.25)))
    assert trace_of([step([0], 8), merged], 1) == [merged]
    assert [one.place for one in trace_of([step([0], 8), merged], 0)] == ["encoder"]
    drawn = np.asarray(draw_crops(video, [merged], run))
    first, second = drawn[:48], drawn[48 + GAP :]
    assert len(np.unique(first[24:].reshape(-1, 3), axis=0)) == 1, "one group fills a frame: no line inside"
    assert not np.array_equal(first[40, 10], second[40, 10]), "the groups of two frames have their own colours"
