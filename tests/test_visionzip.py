"""VisionZip against its definition in loops, planted answers, the release's split of budgets and its sum."""

import pytest
import torch
import torch.nn.functional as F

from baselines.visionzip import VisionZip, zip_tokens
from llava.errors import UserError
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def zip_by_the_book(features, saliency, keys, dominant, contextual, added):
    """One image, plain loops: output tokens and the input positions they stand at; features has CLS in front."""
    patches = range(len(saliency))
    best = sorted(patches, key=lambda i: (-saliency[i].item(), i))[: dominant - 1]
    rest = [i for i in patches if i not in best]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: F.cosine_similarity(keys[i], keys[t], dim=0).item())].append(i)
    tokens = [features[0], *(features[i + 1] for i in sorted(best))]
    for target in targets:
        group = [features[i + 1] for i in members[target]]
        if added:
            tokens.append(features[target + 1] + (sum(group) / len(group) if group else 0))
        else:
            tokens.append(sum(group, features[target + 1]) / (len(group) + 1))
    return torch.stack(tokens), [0, *(i + 1 for i in sorted(best)), *(i + 1 for i in targets)]


@pytest.mark.parametrize("weights", ["mean", "anchor_plus_mean"])
@pytest.mark.parametrize(("tokens", "dominant", "contextual"), [(20, 5, 3), (36, 9, 7), (36, 1, 4), (12, 6, 1)])
def test_equals_its_definition(tokens, dominant, contextual, weights):
    features, saliency, keys = torch.randn(3, tokens + 1, 8), torch.rand(3, tokens), torch.randn(3, tokens, 6)
    plan = zip_tokens(saliency, keys, dominant, contextual, weights)
    for i, merged in enumerate(plan.apply(features)):
        expected, places = zip_by_the_book(
            features[i], saliency[i], keys[i], dominant, contextual, weights == "anchor_plus_mean"
        )
        assert plan.kept[i].tolist() == places
        torch.testing.assert_close(merged, expected)


def state(saliency, keys, features):
    signals = {TowerScore("cls_attention"): saliency, TowerScore("keys"): keys}
    return EncoderState(ids=("a",), features=features, scores=signals, layout=PatchGrid(4, 4, has_cls=True))


def test_planted_tokens_are_kept_and_planted_twins_are_merged():
    """CLS looks at two patches; all others have one of two keys, and so two contextual tokens become of them."""
    saliency = torch.full((1, 16), 0.01)
    saliency[0, [3, 12]] = torch.tensor([0.3, 0.4])
    kind = torch.tensor([i >= 8 for i in range(16)])
    keys = torch.where(kind[:, None], torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))[None]
    features = torch.arange(17.0).reshape(1, 17, 1)
    reducer = VisionZip(budget=5, contextual=0.4)
    plan = reducer.encoder(state(saliency, keys, features))
    # The rest is 0 1 2 4 .. 11 13 14 15; every seventh of it is a target: 0 and 8.
    assert plan.kept.tolist() == [[0, 4, 13, 1, 9]]
    first, second = [0, 1, 2, 4, 5, 6, 7], [8, 9, 10, 11, 13, 14, 15]
    expected = [0, 4, 13, *(sum(i + 1 for i in group) / 7 for group in (first, second))]
    torch.testing.assert_close(plan.apply(features).flatten(), torch.tensor(expected))


def test_budgets_are_split_as_in_the_release():
    """54 + 10, 108 + 20, 162 + 30, and 27 + 5 for a crop of LLaVA-NeXT; CLS is one of the first number."""
    splits = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}
    assert {budget: VisionZip(budget=budget).split() for budget in splits} == splits
    assert all(VisionZip(budget=budget, contextual=0.99).split()[0] >= 1 for budget in range(1, 577))
    assert VisionZip(budget=64).tokens_per_layer(LLAVA) == (64,) * 32


def test_the_release_adds_where_the_paper_averages():
    """VisionZip@3151f6d adds the mean of the members to their target: equal tokens come out twice as long."""
    features, saliency, keys = torch.ones(1, 17, 4), torch.rand(1, 16), torch.randn(1, 16, 3)
    for official, scale in ((False, 1.0), (True, 2.0)):
        reducer = VisionZip(budget=6, contextual=0.4, official=official)
        merged = reducer.encoder(state(saliency, keys, features)).apply(features)
        assert (merged[0, :4] == 1).all()
        torch.testing.assert_close(merged[0, 4:], torch.full((2, 4), scale))


def test_at_the_full_budget_only_cls_goes():
    features = torch.randn(1, 17, 4)
    plan = VisionZip(budget=16).encoder(state(torch.rand(1, 16), torch.randn(1, 16, 3), features))
    torch.testing.assert_close(plan.apply(features), features[:, 1:])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_shares_are_refused(share):
    with pytest.raises(UserError, match=r"visionzip\.contextual"):
        VisionZip(budget=8, contextual=share)
