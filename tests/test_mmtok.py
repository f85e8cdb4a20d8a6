"""MMTok: choices, keywords and padding against the release's, the definition, and where words and padding come from."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from baselines.mmtok import MMTok, keywords, on_padding
from llava.errors import UserError
from llava.hf.reduce import reduce
from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.image import ImageProcessor
from llava.processing.prompt import Sample
from llava.reduction import PatchGrid
from llava.reduction.token_layout import WITHOUT_PADDING
from tests.conftest import drawn_image, samples
from tests.stock_inputs import shared
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers
from tests.vectors import vectors

GRID = PatchGrid(24, 24)
CLIP = ImageProcessor(size=336, crop=336)


def state_of(tokens, features, words, grid=GRID, canvases=(), messages=()) -> SimpleNamespace:
    """Images [B, N, D] with the embeddings of their words."""
    each = iter(words)
    return SimpleNamespace(
        tokens=tokens,
        features=features,
        ids=tuple(map(str, range(len(tokens)))),
        messages=messages or ("a dog",) * len(tokens),
        embed_words=lambda _: next(each),
        matmul=torch.matmul,
        canvases=canvases,
        layout=grid,
    )


def drawn(seed: int, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Tokens, features and words, of another number in each image, which are near some tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens, features = (torch.randn(batch, count, size, generator=draw) for size in (12, 8))
    words = [own[:number] + 0.5 * torch.randn(number, 12, generator=draw) for number, own in enumerate(tokens, 2)]
    return tokens, features, words


def test_kept_tokens_are_those_of_the_release():
    """Recorded choices for one word, seven and twelve."""
    about, arrays = vectors("mmtok")
    for case in about["cases"]:
        tokens, features, words = (arrays[f"{case['case']}_{name}"] for name in ("tokens", "features", "words"))
        kept = MMTok(budget=case["budget"]).prompt(state_of(tokens[None], features[None], [words])).kept
        assert kept[0].tolist() == case["kept"], case["case"]


def test_keywords_are_those_of_the_release():
    """Recorded: two answer formats go, and words that show nothing; the rest keeps its case."""
    for message, found in vectors("mmtok")[0]["keywords"]:
        assert keywords(message) == found.split()
    assert keywords("") == [] and keywords("Which ANSWER upon IT?") == ["Which", "ANSWER", "upon", "IT?"]


@pytest.mark.parametrize("case", vectors("mmtok")[0]["padding"], ids=lambda case: "x".join(map(str, case["size"])))
def test_padding_is_that_of_the_release(case):
    """Recorded for wide, high and square images; sides are rounded to pixels first, as at 640 x 427."""
    (width, height), lines = case["size"], case["lines"]
    mask = on_padding(CLIP.canvas((width, height)), GRID)
    expected = torch.zeros(24, 24, dtype=torch.bool)
    (expected if width > height else expected.T)[lines] = True
    assert (mask is None) == (not lines) and (mask is None or torch.equal(mask, expected.flatten()))


def covered_by_the_book(tokens, features, words, budget: int, alpha: float, temperature: float) -> list[int]:
    """Plain loops over one image."""

    def cosine(a, b):
        return F.cosine_similarity(a.double(), b.double(), dim=0).item()

    rows = []
    for word in words:
        row = [math.exp(cosine(word, token) / temperature) for token in tokens]
        rows.append([value / sum(row) / len(words) for value in row])
    for patch in features:
        row = [math.exp(cosine(patch, other) / 0.2) for other in features]
        rows.append([alpha * value / sum(row) / len(features) for value in row])
    best, chosen = [0.0] * len(rows), list[int]()
    for _ in range(budget):
        gains = [
            -1.0 if token in chosen else sum(max(row[token] - known, 0) for row, known in zip(rows, best, strict=True))
            for token in range(len(tokens))
        ]
        chosen.append(gains.index(max(gains)))
        best = [max(known, row[chosen[-1]]) for row, known in zip(rows, best, strict=True)]
    return sorted(chosen)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"alpha": 4.0}, {"temperature": 0.1}, {"temperature": 0.3}])
def test_a_batch_equals_the_definition(options):
    """Images with other numbers of words do not change one another, and weight and temperature do what they say."""
    tokens, features, words = drawn(3, 3, 20)
    kept = MMTok(budget=7, **options).prompt(state_of(tokens, features, words, PatchGrid(4, 5))).kept.tolist()
    known = {"alpha": 0.5, "temperature": 0.02, **options}
    assert kept == [covered_by_the_book(*own, 7, **known) for own in zip(tokens, features, words, strict=True)]


def test_planted_tokens_for_a_word_and_for_a_group_of_patches_are_kept():
    """Plant the answer: one token that a word points at, and one for each of two groups of alike patches."""
    tokens = torch.eye(9)[[0, 1, 2, 3, 4, 5, 6, 7, 8]][None]
    features = torch.eye(2)[[0, 0, 0, 0, 0, 1, 1, 1, 1]][None]
    words = [torch.eye(9)[7] + 0.2 * torch.eye(9)[3]]
    kept = MMTok(budget=2).prompt(state_of(tokens, features, [torch.stack(words)], PatchGrid(3, 3))).kept
    assert kept.tolist() == [[0, 7]]  # 7 also covers the second group


def test_patches_of_padding_come_last():
    """Wide, high and without padding in one batch; a budget above the number of other patches is filled up."""
    tokens, features, words = drawn(5, 3, 64)
    sizes, grid = ((112, 40), (40, 112), (112, 112)), PatchGrid(8, 8)
    canvases = tuple(ImageProcessor(size=112, crop=112).canvas(size) for size in sizes)
    masks = [on_padding(canvas, grid) for canvas in canvases]
    assert [mask is not None and int((~mask).sum()) for mask in masks] == [32, 32, False]

    def kept(budget, canvases, **options):
        state = state_of(tokens, features, words, grid, canvases)
        return MMTok(budget=budget, **options).prompt(state).kept

    like, unknown = kept(20, canvases, padding="like"), kept(20, (None, *canvases[1:]))
    found = kept(20, canvases)
    assert not masks[0][found[0]].any() and not masks[1][found[1]].any()
    assert masks[0][like[0]].any() and masks[1][like[1]].any()
    assert torch.equal(found[2], like[2]) and torch.equal(unknown[0], like[0]) and torch.equal(unknown[1], found[1])
    assert torch.equal(kept(20, ()), like)  # tiles
    for row, full in enumerate(kept(40, canvases)[:2]):
        assert len(full.unique()) == 40 and int((~masks[row][full]).sum()) == 32
        # Those that fill up add most to what the others cover.
        assert set(full.tolist()) > set((~masks[row]).nonzero().flatten().tolist())


def seen_by(monkeypatch, model, batch) -> list:
    """The states of a run."""
    states, prompt = [], MMTok.prompt
    monkeypatch.setattr(MMTok, "prompt", lambda self, state: states.append(state) or prompt(self, state))
    prefill(model, batch, MMTok(budget=9))
    return states


def test_words_are_tokenized_each_on_its_own_without_a_begin_token(tiny, monkeypatch):
    """LLaMA's tokenizer puts a blank before each word then; the table of the decoder gives the embeddings."""
    (state, *_) = seen_by(monkeypatch, tiny, samples(1))
    words = ["dog", "cat", "star"]
    ids = [token for word in words for token in tiny.tokenizer(word, add_special_tokens=False).input_ids]
    assert tiny.tokenizer.bos_token_id not in ids and len(ids) >= 3
    assert torch.equal(state.embed_words(words), tiny.llm.embed_tokens.weight[torch.tensor(ids)])


def test_images_say_where_they_lie_and_tiles_do_not(tiny, tmp_path, monkeypatch):
    """The release excludes no padding of LLaVA-NeXT; a question about no image is no row of a state."""
    (state,) = seen_by(monkeypatch, tiny, samples(4, text_only=(2,)))
    assert state.canvases == (tiny.canvas(drawn_image(0)),) * 3 and state.canvases[0] != WITHOUT_PADDING
    save_next_transformers(tmp_path, make_tiny_next("mistral"))
    model = load(tmp_path, device="cpu")
    tiled = seen_by(monkeypatch, model, [Sample("q", "is there a dog?", image=drawn_image(1, (70, 112)))])
    assert tiled and all(state.canvases == () for state in tiled)


def test_a_prompt_without_words_is_refused(tiny):
    """And so is a model whose questions are not given, before it runs."""
    with pytest.raises(UserError, match="mmtok compares images with words, and sample 'q' has no question"):
        prefill(tiny, [Sample("q", "", image=drawn_image(0))], MMTok(budget=8))
    with pytest.raises(UserError, match=r"mmtok reads the words .* give reduce\(\) `questions` and `tokenizer`"):
        reduce(shared("llava").model, "mmtok", 8)
