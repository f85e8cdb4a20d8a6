"""SparseVLM: text raters, attention of the layer before, recycled clusters; and SparseVLM+."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from baselines._recycling import density_peaks, keep_and_recycle, recycled
from baselines.sparsevlm import TABLES, SparseVLM, text_raters
from llava.pipeline.generate import prefill
from llava.pipeline.sequence import PromptBatch
from llava.reduction import keep_top
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_maps, real
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


# -- from the definition, one image, plain loops --------------------------------------------------------------------


def raters_by_the_book(visual: torch.Tensor, words: torch.Tensor) -> list[int]:
    gained = [0.0] * len(words)
    for token in visual:
        shares = torch.tensor([float(token @ word) for word in words]).softmax(0)
        gained = [old + new.item() for old, new in zip(gained, shares, strict=True)]
    return [i for i, value in enumerate(gained) if value > sum(gained) / len(gained)]


def clusters_by_the_book(tokens: torch.Tensor, count: int) -> list[list[int]]:
    """Members of each cluster, its centre first."""
    indices = range(len(tokens))
    apart = [[float((a - b).norm()) / tokens.shape[1] ** 0.5 for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(apart[i])[:count]) / count) for i in indices]
    farthest = max(map(max, apart))
    score = []
    for i in indices:
        denser = [j for j in indices if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * min((apart[i][j] for j in denser), default=farthest))
    centres = sorted(indices, key=lambda i: -score[i])[:count]
    found = [[centre] for centre in centres]
    for i in indices:
        if i not in centres:
            found[min(range(count), key=lambda c: apart[centres[c]][i])].append(i)
    return found


def recycle_by_the_book(score: list[float], tokens: torch.Tensor, keep: int) -> tuple[list[int], list[list[int]]]:
    """(kept tokens, members of each cluster with its centre first)."""
    ranked = sorted(range(len(score)), key=lambda i: -score[i])
    dropped = sorted(ranked[keep:])
    used = sorted(dropped, key=lambda i: -score[i])[: int(len(dropped) * 0.3) + 1]
    clusters = clusters_by_the_book(tokens[used], len(used) // 10 + 1)
    return sorted(ranked[:keep]), [[used[i] for i in members] for members in clusters]


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 5, 23])
def test_raters_are_the_words_above_the_mean(words):
    """Also with padding; with one word, which cannot be above its own mean, that word rates."""
    visual, text = torch.randn(3, 12, 8), torch.randn(3, words + 4, 8)
    exists = torch.arange(words + 4) < torch.tensor([[words], [words + 4], [max(1, words - 1)]])
    found = text_raters(visual @ text.transpose(1, 2), exists)
    for row in range(3):
        expected = raters_by_the_book(visual[row], text[row][exists[row]])
        assert found[row].nonzero().flatten().tolist() == (expected or exists[row].nonzero().flatten().tolist())


@pytest.mark.parametrize(("tokens", "count"), [(4, 1), (13, 2), (30, 4), (83, 9)])
def test_clusters_are_those_of_the_definition(tokens, count):
    points = torch.randn(2, tokens, 6)
    centre, home = density_peaks(points, count)
    for row in range(2):
        expected = clusters_by_the_book(points[row].double(), count)
        assert centre[row].tolist() == [members[0] for members in expected]
        found = [set((home[row] == cluster).nonzero().flatten().tolist()) for cluster in range(count)]
        assert found == [set(members) for members in expected]


def test_planted_clusters_are_found():
    """Plant the answer: three tight heaps far from each other, mixed in order."""
    heaps = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 0])
    points = 10 * torch.eye(3)[heaps] + 0.05 * torch.randn(10, 3)
    _, home = density_peaks(points[None], 3)
    for heap in range(3):
        assert len(home[0][heaps == heap].unique()) == 1
    assert len(home.unique()) == 3


def test_two_nearest_neighbours_are_not_both_centres():
    """Tokens that are nearest to each other are exactly equally dense. The release adds random noise so that one of
    them counts as denser; without it, and without an order, both are peaks, and the other heap gets no centre."""
    points = torch.tensor([[[0.0], [0.1], [5.0], [5.5], [6.5]]])
    centre, home = density_peaks(points, 2)
    assert centre.tolist() == [[0, 2]] and home.tolist() == [[0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("tokens", "keep"), [(40, 5), (40, 36), (60, 20), (150, 10)])
def test_recycling_is_the_one_of_the_definition(tokens, keep):
    score, points = torch.rand(2, tokens), torch.randn(2, tokens, 6)
    reduction = keep_and_recycle(score, points, keep)
    merged = reduction.apply(points)
    for row in range(2):
        kept, clusters = recycle_by_the_book(score[row].tolist(), points[row].double(), keep)
        assert reduction.kept[row].tolist() == kept + [members[0] for members in clusters]
        torch.testing.assert_close(merged[row, :keep], points[row, kept])
        for place, members in enumerate(clusters):
            torch.testing.assert_close(merged[row, keep + place], points[row, members].mean(0))
    assert merged.shape[1] == keep + recycled(tokens - keep)[1]


def test_planted_tokens_are_kept_and_the_next_best_recycled():
    """Plant the answer: scores fall with the index but for the last token; ten dropped make four for one cluster."""
    score = torch.arange(12, 0, -1).float()[None].repeat(2, 1)
    score[:, 11] = 100
    reduction = keep_and_recycle(score, torch.zeros(2, 12, 3), 2)
    assert reduction.kept.tolist() == [[0, 11, 1]] * 2
    assert reduction.assignment.tolist() == [[0, 2, 2, 2, 2, -1, -1, -1, -1, -1, -1, 1]] * 2
    assert reduction.merge_weight[0, 1:5].tolist() == [0.25] * 4


def test_a_cluster_of_one_stays_in_its_place():
    """Three dropped tokens or fewer leave one to recycle. The release would put that very token behind the others."""
    reduction = keep_and_recycle(torch.tensor([[5.0, 1, 4, 3, 2]]), torch.randn(1, 5, 2), 2)
    assert reduction.kept.tolist() == [[0, 2, 3]] and not reduction.merges


# -- in the decoder ---------------------------------------------------------------------------------------------------


class Watch(SparseVLM):
    def reduce(self, state, keep):
        reduction = super().reduce(state, keep)
        self.seen.append((state, keep, reduction))
        return reduction


def watch(**options) -> Watch:
    return type("Watching", (Watch,), {"seen": []})(**options)


def head_scores(tiny, state, row: int, whole: torch.Tensor, correct: bool) -> list[list[float]]:
    """[H][N], what the raters give: rows of the eager map, divided by the product of rotated ones for v2."""
    start, stop = state.start.images[row]
    pad, entered = state.start.padding(row), state.entered
    hidden, length = state.start.hidden[row], state.start.lengths[row]
    raters = raters_by_the_book(hidden[pad + start : pad + stop], hidden[pad + stop : pad + length])
    first, last = entered.images[row]
    if correct:
        cos, sin = tiny.llm.rotary_emb(entered.hidden, entered.position)
        ones = torch.ones(1, 1, whole.shape[-1], cos.shape[-1])
        cut = slice(entered.padding(row), None)
        turned, _ = apply_rotary_pos_emb(ones, ones, cos[row : row + 1, cut], sin[row : row + 1, cut])
        whole = whole / (turned[0] @ turned[0].transpose(1, 2) / math.sqrt(cos.shape[-1]))
    return [[sum(float(head[last + word, token]) for word in raters) for token in range(first, last)] for head in whole]


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_each_stage_keeps_what_the_map_of_the_layer_before_says(tiny, variant):
    """A padded batch; three stages, so later ones rank clusters too. Of 4 heads v2 listens to 2 (14 of 32)."""
    batch, method = samples(), watch(budget=9, variant=variant)
    with eager_maps(tiny) as maps, torch.inference_mode():
        prefill(tiny, batch, method)
        assert len(method.seen) == 3
        for state, keep, reduction in method.seen:
            for row, name in enumerate(state.ids):
                whole = real(maps, state.layer - 1, int(name[1:]), state.entered.lengths[row])
                heads = head_scores(tiny, state, row, whole, variant == "v2")
                if variant == "v2":
                    heads = sorted(heads, key=lambda head: -sum(head))[:2]
                score = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
                if variant == "v1" and recycled(len(score) - keep)[0] > 1:
                    kept, clusters = recycle_by_the_book(score, state.tokens[row].double(), keep)
                    expected = kept + [members[0] for members in clusters]
                else:
                    expected = keep_top(torch.tensor([score]), keep + (variant == "v1"))[0].tolist()
                assert reduction.kept[row].tolist() == expected


def test_planted_heads_are_listened_to():
    """Plant the answer: two of four heads look at the image, and only they may say at what."""
    weights = torch.full((1, 4, 3, 6), 1e-3)
    weights[0, 1, :, 2] = weights[0, 3, :, 5] = 0.4
    weights[0, 0, :, 0] = weights[0, 2, :, 1] = 0.05
    position = torch.zeros(1, 9, dtype=torch.long)
    words = PromptBatch(torch.zeros(1, 9, 4), position, (9,), (((0, 6),),), (), (), ((6, 9),))
    state = SimpleNamespace(
        tokens=torch.zeros(1, 6, 4),
        start=words,
        entered=words,
        layer=1,
        llm=SimpleNamespace(rotary_emb=lambda hidden, position: (torch.ones(1, 9, 2), torch.zeros(1, 9, 2))),
        attention=lambda rows, at: (weights, torch.ones(1, 3, dtype=torch.bool)),
        matmul=torch.matmul,
    )
    assert SparseVLM(budget=2, variant="v2").reduce(state, 2).kept.tolist() == [[2, 5]]


@pytest.mark.parametrize(("variant", "stays"), [("v1", False), ("v2", True)])
def test_positions_follow_the_variant(tiny, variant, stays):
    """v1 takes the first n ids, v2 keeps the original ones; another choice can be asked for."""
    method = SparseVLM(budget=9, variant=variant)
    assert method.positions == ("original" if stays else "renumber")
    state, _ = prefill(tiny, samples(2), method)
    last = torch.stack([part.next_position[:, 0] for part in state.segments for _ in part.layers])
    expected = torch.tensor(state.lengths)
    assert last.tolist() == (expected[:1].expand_as(expected) if stays else expected).tolist()
    assert SparseVLM(budget=9, variant="v2", positions="renumber").positions == "renumber"


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "counts", "mean"),
    [(192, (309, 204, 113), 206.5), (128, (312, 117, 39), 145.40625), (64, (82, 32, 18), 82.25)],
)
def test_the_release_counts_layers_as_pruned_that_are_not(budget, counts, mean):
    """SparseVLMs issue 35: layers 2, 6 and 15 run on everything and are counted as shortened; what enters is more."""
    planned = SparseVLM(budget=budget, schedule="release").tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 3 + (counts[0],) * 4 + (counts[1],) * 9 + (counts[2],) * 16
    assert sum(planned) / 32 == mean
    theirs = (576,) * 2 + (counts[0],) * 4 + (counts[1],) * 9 + (counts[2],) * 17
    assert sum(theirs) / 32 == pytest.approx(budget, abs=0.85)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("budget", [64, 96, 100, 128, 160, 192, 270])
def test_fitted_budgets_meet_the_mean_and_keep_the_proportions(budget, variant):
    method = SparseVLM(budget=budget, variant=variant)
    planned = method.tokens_per_layer(LLAVA_15)
    assert abs(sum(planned) / 32 - budget) <= method.rounding
    assert planned[:3] == (576,) * 3 and planned[3] > planned[7] > planned[16] == planned[31]
    nearest = min(TABLES[variant], key=lambda known: abs(known - budget))
    first, *others = TABLES[variant][nearest]
    kept = method.keeps(200, 576)
    assert kept == (200, *(200 * other // first for other in others))


def test_recycling_is_three_tenths_and_a_tenth_of_them():
    """The clusters that the release's tables get at 192, 128 and 64 tokens."""
    found = []
    for keeps in ((300, 200, 110), (303, 110, 36), (66, 30, 17)):
        counts = SparseVLM(budget=192).counts(keeps, 576)
        found.append(tuple(count - keep for count, keep in zip(counts, keeps, strict=True)))
    assert found == [(9, 4, 3), (9, 7, 3), (16, 2, 1)]
