"""FasterVLM: a planted answer, its definition, and the precision that the release ranks in."""

import torch

from baselines.fastervlm import FasterVLM
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def state(attention: torch.Tensor) -> EncoderState:
    images, tokens = attention.shape
    return EncoderState(
        ids=tuple(map(str, range(images))),
        features=torch.randn(images, tokens, 8),
        scores={TowerScore("cls_attention"): attention},
        layout=PatchGrid(1, tokens),
    )


def test_keeps_the_planted_patches_that_cls_looks_at():
    attention = torch.full((2, 36), 0.001)
    attention[0, [4, 20, 33]] = attention[1, [0, 1, 35]] = 0.3
    assert FasterVLM(budget=3).encoder(state(attention)).kept.tolist() == [[4, 20, 33], [0, 1, 35]]


def test_equals_its_definition():
    attention = torch.rand(3, 50)
    for budget in (1, 7, 49):
        plan = FasterVLM(budget=budget).encoder(state(attention))
        for row, scores in enumerate(attention.tolist()):
            best = sorted(range(50), key=lambda i: (-scores[i], i))[:budget]
            assert plan.kept[row].tolist() == sorted(best)


def test_attention_is_not_rounded_to_half_precision():
    """The release ranks in float16, where these two tie and the lower index would win."""
    attention = torch.full((1, 8), 1e-4)
    attention[0, 2], attention[0, 5] = 0.5, 0.5 + 1e-5
    assert attention.half()[0, 2] == attention.half()[0, 5]
    assert FasterVLM(budget=1).encoder(state(attention)).kept.tolist() == [[5]]


def test_its_budgets_hold_in_every_layer():
    """144, 58 and 29 tokens are the paper's 75, 90 and 95 %."""
    for budget, share in ((144, 0.75), (58, 0.9), (29, 0.95)):
        assert FasterVLM(budget=budget).tokens_per_layer(LLAVA) == (budget,) * 32
        assert round(1 - budget / 576, 2) == share


def test_a_full_budget_keeps_everything():
    assert FasterVLM(budget=36).keeps_all(36) and not FasterVLM(budget=35).keeps_all(36)
