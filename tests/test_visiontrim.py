"""VisionTrim: official selections and features, a definition in plain words, planted answers, ends of each option."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from baselines.visiontrim import CLS, RECEIVED, VisionTrim, complemented, dominant
from tests.drawn_images import state_with
from tests.vectors import vectors

ABOUT, ARRAYS = vectors("visiontrim")


@pytest.mark.parametrize("case", ABOUT["cases"], ids=lambda case: case["case"])
def test_keeps_and_adds_what_the_release_does_of_drawn_inputs(case):
    """Dominant tokens, targets, and the features after three rounds."""
    inputs = ("cls", "received", "patches", "text", "complements")
    cls, received, patches, text, expected = (ARRAYS[f"{case['case']}_{name}"][None] for name in inputs)
    count = case["complements"]
    kept = dominant(cls, received, case["budget"] - count)
    assert kept[0].tolist() == case["dominant"]
    plan = complemented(kept, patches @ ARRAYS["visual_projection"], text, count)
    assert plan.kept[0].tolist() == case["dominant"] + case["targets"] and plan.appended == count
    features = plan.merge_matrix.double() @ patches
    assert (features[:, -count:] - expected).abs().max() < case["tolerance"]
    assert torch.equal(features[:, :-count], patches[:, kept[0]])


def complements_by_the_book(patches, words, kept, count):
    """One image, one token after another: the targets, and the weights of all patches in each."""
    unit, words = F.normalize(patches, dim=-1), F.normalize(words, dim=-1)
    rest = [token for token in range(len(patches)) if token not in kept]
    near = {token: sum(float(unit[token] @ word) for word in words) / len(words) for token in rest}
    targets = sorted(sorted(rest, key=lambda token: (-near[token], token))[:count])
    weights = torch.zeros(count, len(patches), dtype=patches.dtype)
    weights[range(count), targets] = 1
    for _ in range(3):
        members = [[] for _ in targets]
        centres = [F.normalize(row @ patches, dim=-1) for row in weights]
        for token in (token for token in rest if token not in targets):
            like = [sum(float((unit[token] @ word) * (word @ centre)) for word in words) for centre in centres]
            members[like.index(max(like))].append(token)
        for own, row in zip(members, weights, strict=True):
            row[own] += 1 / max(len(own), 1)
    return targets, weights


def test_equals_its_definition_for_questions_of_different_length():
    """The shorter question is followed by zeros, which are no words."""
    patches, text = torch.randn(2, 40, 6, dtype=torch.double), torch.randn(2, 5, 6, dtype=torch.double)
    text[1, 3:] = 0
    kept = dominant(torch.rand(2, 40), torch.rand(2, 40), 7)
    plan = complemented(kept, patches, text, 6)
    for row, length in enumerate((5, 3)):
        targets, weights = complements_by_the_book(patches[row], text[row, :length], kept[row].tolist(), 6)
        assert plan.kept[row].tolist() == kept[row].tolist() + targets
        torch.testing.assert_close(plan.merge_matrix[row, 7:], weights)


def state_of(patches: torch.Tensor, words: torch.Tensor, cls: torch.Tensor, received: torch.Tensor, asked=None):
    """One image, in a space that patches and words share."""

    def text(texts, long, every_token):
        assert every_token, "one vector for each text"
        if asked is not None:
            asked.append((texts, long))
        return words[None], torch.ones(1, len(words), dtype=torch.bool), 0

    def image(features, normed):
        assert not normed, "through the tower's last norm"
        return features, 0

    clip = SimpleNamespace(text=text, image=image)
    fields = {"questions": ("question",), "messages": ("question suffix",), "clip": clip}
    return state_with(patches[None], {CLS: cls[None], RECEIVED: received[None]}, **fields)


def planted(asked=None):
    """12 patches: 3 and 8 have attention, 1 and 6 are like one of two words each, the others a little like one."""
    words, patches = torch.eye(4)[:2], torch.eye(4)[2].repeat(12, 1)
    patches[1], patches[6] = words
    patches[[0, 2, 4]] += 0.1 * words[0]
    patches[[5, 7]] += 0.1 * words[1]
    patches[9:] -= 0.1 * words.sum(0)
    cls, received = torch.full((12,), 0.01), torch.full((12,), 0.01)
    cls[3] = received[8] = 0.3
    return state_of(patches, words, cls, received, asked), patches


def test_planted_attention_and_planted_words_are_kept_and_their_likes_added():
    state, patches = planted()
    plan = VisionTrim(budget=4, complement=0.5).encoder(state)
    assert plan.kept.tolist() == [[3, 8, 1, 6]]
    features = plan.apply(patches[None])[0]
    assert torch.equal(features[:2], patches[[3, 8]])
    first, second = (set(row.nonzero().flatten().tolist()) for row in plan.merge_matrix[0, 2:])
    assert {0, 1, 2, 4} <= first and {5, 6, 7} <= second and first | second == set(range(12)) - {3, 8}
    torch.testing.assert_close(plan.merge_matrix[0, 2:].sum(1), torch.full((2,), 4.0))  # itself, and three means


def test_both_kinds_of_attention_count_alike_whatever_their_scale():
    """Each is scaled to length 1: attention of the class token is not outweighed by the larger one, nor outweighs."""
    cls, received = torch.tensor([[0.0, 3.0, 4.0, 0.0]]), torch.tensor([[0.004, 0.003, 0.0, 0.0]])
    assert dominant(cls, received, 1).tolist() == [[1]]  # 0.6 + 0.6 before 0.8
    assert dominant(cls, 0 * received, 1).tolist() == [[2]] and dominant(0 * cls, received, 1).tolist() == [[0]]


@pytest.mark.parametrize(
    ("budget", "complement", "complements"),
    [(64, 0.25, 16), (192, 0.25, 48), (64, 10 / 64, 10), (5, 0.25, 1), (1, 0.25, 0), (64, 0.0, 0), (8, 1.0, 7)],
)
def test_complements_are_a_part_of_the_budget(budget, complement, complements):
    """The splits of the release, both ends of the share, and a budget of one token."""
    state = state_of(torch.randn(300, 4), torch.randn(3, 4), torch.rand(300), torch.rand(300))
    plan = VisionTrim(budget=budget, complement=complement).encoder(state)
    assert plan.kept.shape == (1, budget) and plan.appended == complements
    assert plan.merges == (complements > 0)


def test_official_reads_the_whole_message_and_cuts_it_off():
    for official, expected in ((False, (("question",), "frame")), (True, (("question suffix",), "truncate"))):
        asked = []
        VisionTrim(budget=4, official=official).encoder(planted(asked)[0])
        assert asked == [expected]
