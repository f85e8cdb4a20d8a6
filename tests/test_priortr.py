"""PriorTR: the divergence and its choices against the release's, the rows that it reads, and its count."""

from types import SimpleNamespace

import pytest
import torch

from baselines.priortr import PriorTR, information
from llava.pipeline.generate import prefill
from llava.reduction import keep_top
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_maps, real
from tests.conftest import samples
from tests.vectors import vectors

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def test_kept_tokens_are_those_of_the_release():
    """Recorded choices by attention of all rows and of the last one, for four numbers of tokens."""
    about, arrays = vectors("priortr")
    for case in about["cases"]:
        score = information(arrays[f"{case['case']}_task"][None], arrays[f"{case['case']}_prior"][None])
        assert keep_top(score, case["budget"])[0].tolist() == case["kept"], case["case"]


def state_of(attention: list[list[float]], crops: tuple[PatchGrid, ...] = (), text: int = 0) -> SimpleNamespace:
    """Rows of attention to the image, of two heads; `text` is the number of rows that exist, 0 for all."""
    weights = torch.tensor(attention)
    heads = torch.stack([weights * 1.5, weights * 0.5])[None]
    mask = torch.arange(len(weights))[None] < (text or len(weights))
    return SimpleNamespace(
        tokens=torch.zeros(1, weights.shape[1], 4),
        attention=lambda rows, at: (heads, mask) if (rows, at) == ("after", "previous") else None,
        spec=SimpleNamespace(crops=crops),
    )


# The prior looks at tokens 0 and 1, all of the question's rows at 1 and 2, its last one at 3, too.
PLANTED = [[0.4, 0.4, 0.1, 0.1], [0.1, 0.5, 0.35, 0.05], [0.1, 0.4, 0.1, 0.4]]


@pytest.mark.parametrize(
    ("options", "crops", "kept"),
    [
        ({}, (), [2]),
        ({}, (PatchGrid(2, 1),) * 2, [3]),
        ({"rows": "last"}, (), [3]),
        ({"rows": "after"}, (PatchGrid(2, 1),) * 2, [2]),
    ],
)
def test_planted_tokens_that_only_the_question_looks_at_are_kept(options, crops, kept):
    """Token 1 has the highest attention, but has it without the question; tiles are ranked by the last row."""
    reduction = PriorTR(budget=1, **options).reduce(state_of(PLANTED, crops), 1)
    assert reduction.kept[0].tolist() == kept


def test_rows_that_repeat_a_shorter_text_do_not_count():
    """In a batch, a shorter text repeats its last row; the mean is over its own rows."""
    expected = PriorTR(budget=1).score(state_of(PLANTED))
    torch.testing.assert_close(PriorTR(budget=1).score(state_of([*PLANTED, PLANTED[-1]], text=3)), expected)


def test_the_rows_are_those_of_the_layer_before_from_the_first_token_after_the_image(tiny):
    """Against the attention maps of a run; layer 3 of 32 is layer 1 of 4 by default, layer 2 is asked for."""
    (sample,) = samples(1)
    for layer in (1, 2):
        with eager_maps(tiny) as maps:
            state, record = prefill(tiny, [sample], PriorTR(budget=5, layer=layer, schedule="kept"))
        start = tiny.prompt(sample).ids.index(-200)
        seen = real(maps, layer - 1, 0, state.lengths[0][0])[:, start + 16 :, start : start + 16].mean(0)
        score = information(seen.mean(0)[None], seen[:1])
        (step,) = record.steps[0]
        assert step.place == f"layer {layer}"
        assert step.reduction.kept[0].tolist() == keep_top(score, 5)[0].tolist()


@pytest.mark.parametrize(("budget", "kept", "mean"), [(192, 152, 228), (128, 82, 170), (64, 11, 112)])
def test_the_release_counts_the_tokens_after_the_drop(budget, kept, mean):
    """Its 192, 128 and 64 tokens are means of 228, 170 and 112; an honest mean of 64 keeps 11 tokens."""
    honest = PriorTR(budget=budget).tokens_per_layer(LLAVA_15)
    assert honest == (576,) * 3 + (kept,) * 29
    counted = PriorTR(budget=budget, schedule="kept").tokens_per_layer(LLAVA_15)
    assert counted == (576,) * 3 + (budget,) * 29 and sum(counted) / 32 == mean


def test_positions_stay():
    """The release gives kept tokens the position ids that they had."""
    assert PriorTR(budget=8).positions == "original"
