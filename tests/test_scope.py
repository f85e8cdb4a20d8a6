"""SCOPE against its definition in loops, and planted answers."""

import pytest
import torch
import torch.nn.functional as F

from baselines.scope import Scope
from llava.errors import UserError
from llava.reduction.ranking import cover_greedily
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import PatchGrid


def scope_by_the_book(features, weight, budget):
    """One image, plain loops: positions in the order of choice."""
    tokens = range(len(features))
    cosine = [[F.cosine_similarity(features[i], features[j], dim=0).item() for j in tokens] for i in tokens]
    chosen, covered = [], [0.0 for _ in tokens]
    while len(chosen) < budget:
        gain = {
            i: sum(max(0.0, cosine[i][j] - covered[j]) for j in tokens) * weight[i].item()
            for i in tokens
            if i not in chosen
        }
        chosen.append(max(gain, key=lambda i: (gain[i], -i)))
        covered = [max(covered[j], cosine[chosen[-1]][j]) for j in tokens]
    return chosen


@pytest.mark.parametrize(("tokens", "width", "budget"), [(20, 5, 7), (36, 16, 12), (9, 3, 8)])
def test_equals_its_definition(tokens, width, budget):
    features, weight = torch.randn(3, tokens, width), torch.rand(3, tokens)
    chosen = cover_greedily(features, weight, budget)
    assert chosen.tolist() == [scope_by_the_book(features[i], weight[i], budget) for i in range(3)]


def encode(reducer, features, attention):
    signals = {TowerScore("cls_attention"): attention}
    ids = tuple(map(str, range(len(features))))
    return reducer.encoder(EncoderState(ids=ids, features=features, scores=signals, layout=PatchGrid(3, 4)))


def test_planted_groups_give_one_token_each_the_one_that_cls_looks_at():
    """Three groups of equal tokens: a second token of a group adds no coverage, however much attention it has."""
    features = torch.eye(3).repeat_interleave(4, dim=0)[None]
    attention = torch.full((1, 12), 0.01)
    attention[0, [1, 2, 7, 8]] = torch.tensor([0.3, 0.2, 0.02, 0.05])
    assert encode(Scope(budget=3), features, attention).kept.tolist() == [[1, 7, 8]]


def test_without_attention_coverage_decides():
    """alpha 0: the largest group first, whatever CLS looks at."""
    features = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0])][None]
    attention = torch.zeros(1, 12)
    attention[0, 0] = 1.0
    assert encode(Scope(budget=2, alpha=0.0), features, attention).kept.tolist() == [[2, 7]]
    assert encode(Scope(budget=1), features, attention).kept.tolist() == [[0]]


def test_tokens_without_any_gain_are_still_chosen_once():
    """Identical tokens: the first covers all, then ties go to the lower index."""
    plan = encode(Scope(budget=5), torch.ones(2, 12, 4), torch.full((2, 12), 0.1))
    assert plan.kept.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_negative_alpha_is_refused():
    with pytest.raises(UserError, match=r"scope\.alpha"):
        Scope(budget=8, alpha=-1.0)
