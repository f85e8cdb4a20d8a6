"""The toy LLaVA-NeXT: large images, their tiles and token layouts, packed training; and what is shipped."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionModel, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

from eval import benchmarks
from eval.config import ROOT
from lab.toy.benchmarks.gqa_and_videos import LARGE_SPLITS as SPLITS
from lab.toy.benchmarks.gqa_and_videos import VIDEO_SPLITS
from lab.toy.clip import build_clip
from lab.toy.data.corpus import (
    FRAME_PATCHES,
    Corpus,
    arrange,
    crops,
    owner_crops,
    patch_owners,
    run_sources,
    tower_states,
    write_pictures,
)
from lab.toy.data.questions import FAMILIES, PlainQuestion
from lab.toy.data.scenes import DENSE_OFFSET, LARGE_SEEDS, large_scene
from lab.toy.data.scenes import SEEDS as SMALL_SEEDS
from lab.toy.data.videos import SEEDS as VIDEO_SEEDS
from lab.toy.data.vocabulary import IMAGE, NEXT_WORDS, TOY_WORDS
from lab.toy.llava import Trainee, build_llava
from lab.toy.long_stages import centres, choose_tokens, visuals, whole_sequence
from lab.toy.packing import forward, pack, predict, question_line, whole
from lab.toy.stages import scene_lines

pytestmark = pytest.mark.lab

DATA, MODEL = ROOT / "assets" / "eval_next", ROOT / "assets" / "tinyllava_next"
SCENES = [large_scene("val", index, dense) for index, dense in itertools.product(range(10), (False, True))]


def tiny_tower() -> CLIPVisionModel:
    torch.manual_seed(0)
    return build_clip(width=32, layers=2).vision_model.eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_pictures(folder, "train", 4, tiny_tower())
    return Corpus(folder)


def test_no_range_of_seeds_meets_another():
    images = [*LARGE_SEEDS.values(), *SMALL_SEEDS.values()]
    starts = sorted([*images, *(first + DENSE_OFFSET for first in images), *VIDEO_SEEDS.values()])
    assert min(b - a for a, b in itertools.pairwise(starts)) >= DENSE_OFFSET
    assert all(first + count < DENSE_OFFSET for _, first, count in SPLITS.values())
    assert all(first + count < DENSE_OFFSET for first, count in VIDEO_SPLITS.values())


def test_sources_follow_the_image_row_by_row():
    """An image whose patches are painted with their own number: reading the run gives the numbers in order."""
    numbers = np.arange(48 * 48).reshape(48, 48)
    painted = np.repeat(np.repeat(numbers, 8, 0), 8, 1)
    tiles = painted.reshape(2, 192, 2, 192).transpose(0, 2, 1, 3).reshape(4, 192, 192)
    patches = tiles[:, ::8, ::8].reshape(4, 576)
    sources = run_sources(arrange((384, 384)))
    assert sources[:576].tolist() == list(range(576))
    behind = sources[576:].reshape(48, 49)
    assert (behind[:, 48] == -1).all()
    crop, patch = behind[:, :48] // 576 - 1, behind[:, :48] % 576
    assert np.array_equal(patches[crop, patch], numbers)


def test_patch_owners_against_counting_pixels():
    drawn = SCENES[3]
    planes = owner_crops(drawn.owner)
    owners = patch_owners(planes)
    rng = np.random.default_rng(0)
    for crop, patch in zip(rng.integers(0, len(planes), 200), rng.integers(0, FRAME_PATCHES, 200), strict=True):
        row, column = divmod(int(patch), 24)
        pixels = planes[crop, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].ravel().tolist()
        counts = {thing: pixels.count(thing) for thing in sorted(set(pixels) - {-1})}
        best = max(counts, key=counts.get, default=None)
        expected = best if best is not None and counts[best] >= 8 else -1
        assert owners[crop, patch] == expected


def test_an_interrupted_encoding_goes_on_and_a_resized_one_starts_anew(tmp_path, corpus):
    write_pictures(tmp_path, "train", 2, tiny_tower())
    first = np.array(np.load(tmp_path / "features.npy"))
    done = np.load(tmp_path / "done.npy", mmap_mode="r+")
    done[1] = 0
    del done
    write_pictures(tmp_path, "train", 2, tiny_tower())
    assert np.array_equal(np.load(tmp_path / "features.npy"), first)
    # A larger corpus replaces the files, so what was marked as done must go with them.
    write_pictures(tmp_path, "train", 3, tiny_tower())
    again = Corpus(tmp_path)
    assert (again.sizes > 0).all() and np.array_equal(again.features[:2], first)
    assert np.array_equal(again.features[2], corpus.features[2])


def test_chosen_tokens_keep_their_places_and_things_come_before_background(corpus):
    rng, shown = np.random.default_rng(0), {False: [], True: []}
    for row, blind in itertools.product(range(4), (False, True)):
        chosen, whole = choose_tokens(corpus, row, 240, rng, blind=blind), whole_sequence(corpus, row)
        assert len(chosen.positions) == 240 and (np.diff(chosen.positions) > 0).all()
        assert np.array_equal(chosen.sources, whole.sources[chosen.positions])
        assert (chosen.sources < 0).sum() == (whole.sources < 0).sum()
        owners = corpus.owners[row].reshape(-1)[chosen.sources[chosen.sources >= 0]]
        shown[blind].append((owners >= 0).mean())
    assert all(first > 2 * blindly for first, blindly in zip(shown[False], shown[True], strict=True))
    without = choose_tokens(corpus, 0, 240, rng, newlines=False)
    assert len(without.positions) == 240 and (without.sources >= 0).all()


def test_visuals_hold_the_features_of_their_places(corpus):
    rows = [0, 1]
    chosen = [whole_sequence(corpus, 0), choose_tokens(corpus, 1, 240, np.random.default_rng(0))]
    seen = visuals(corpus, rows, chosen)
    assert seen.total.tolist() == [one.total for one in chosen]
    assert seen.present.sum(1).tolist() == [len(one.positions) for one in chosen]
    table = torch.from_numpy(np.array(corpus.features[1]).reshape(-1, 32)).view(torch.bfloat16)
    for column in range(0, 240, 7):
        source = int(chosen[1].sources[column])
        assert bool(seen.newline[1, column]) == (source < 0)
        if source >= 0:
            assert torch.equal(seen.features[1, column], table[source])


def test_centres_are_the_place_in_the_image(corpus):
    row = 0
    seen = visuals(corpus, [row], [whole_sequence(corpus, row)])
    where = centres(corpus, [row], seen)[0]
    layout = corpus.layout(row)
    tall = len(layout.newlines)
    wide = (layout.tokens - 576) // tall - 1
    fifth = 576 + 5 * (wide + 1)
    for place, (x, y) in (
        (0, (0.5 / 24, 0.5 / 24)),
        (575, (23.5 / 24, 23.5 / 24)),
        (577, (1.5 / wide, 0.5 / tall)),
        (fifth, (0.5 / wide, 5.5 / tall)),
        (fifth + wide - 1, (1 - 0.5 / wide, 5.5 / tall)),
    ):
        assert where[place].tolist() == pytest.approx([2 * x - 1, 2 * y - 1])
    assert where[layout.newlines].isnan().all()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    llava = build_llava(build_clip(width=32, layers=2).config.vision_config, width=64, layers=2).eval()
    return llava, Trainee(llava, newline=True, probe=2).eval()


def test_packed_runs_equal_separate_prompts(corpus, small):
    """Padding, sharing and skipping of tokens change no logit: every question alone, its positions written out."""
    llava, trainee = small
    rng = np.random.default_rng(0)
    asked = [scene_lines(corpus.list_things(row), list(FAMILIES)[:3], rng) for row in range(2)]
    lines = pack(asked)
    chosen = [choose_tokens(corpus, 0, 200, rng), choose_tokens(corpus, 1, 230, rng)]
    seen = visuals(corpus, [0, 1], chosen)
    table, prefix = llava.model.language_model.embed_tokens, TOY_WORDS.prefix
    with torch.inference_mode():
        decoded = forward(trainee, prefix, seen, lines, early_at=1)
        assert decoded.early.shape == (2, 230, 2)
        logits = iter(predict(trainee, decoded.states, decoded.start, lines.target))
        for i, line in ((row, line) for row in range(2) for line in asked[row]):
            count, ids = len(chosen[i].positions), [*line.asked, line.answer[0]]
            visual = trainee.projector(seen.features[i, :count].float())
            visual = torch.where(torch.from_numpy(chosen[i].sources < 0)[:, None], trainee.newline, visual)
            embeds = torch.cat([table(torch.tensor(prefix)), visual, table(torch.tensor(ids))])
            places = [*range(3), *(3 + chosen[i].positions), *(3 + chosen[i].total + k for k in range(len(ids)))]
            alone = llava.model.language_model(inputs_embeds=embeds[None], position_ids=torch.tensor([places]))
            for expected in llava.lm_head(alone.last_hidden_state[0, -2:]):  # the answer and the end after it
                torch.testing.assert_close(next(logits), expected, atol=1e-4, rtol=1e-3)


def test_the_benchmark_is_what_the_generator_draws():
    """Every 25th image again; splits and the reading of the official files."""
    test, val = (benchmarks.get("gqa").load(DATA, split) for split in ("testdev", "val"))
    assert 1000 <= len(test.questions) <= 1500 and len(val.questions) >= 400
    for name, (split, first, count) in SPLITS.items():
        for index in range(first, first + count, 25):
            file = DATA / "gqa" / "data" / "images" / f"{split}{index:05d}d.jpg"
            assert file.read_bytes() == large_scene(split, index, True).jpeg, name
    images = {q.image for q in test.questions}, {q.image for q in val.questions}
    assert not images[0] & images[1] and len(images[0]) == 150
    test.check_images(test.questions)
    val.check_images(val.questions)


@pytest.mark.training
def test_transformers_gives_the_logits_of_training():
    """Its class and its own preprocessing on a shipped image, against our tiles, run and packed forward."""
    shipped = LlavaNextForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    dataset = benchmarks.get("gqa").load(DATA, "testdev")
    question = next(q for q in dataset.questions if q.image == "test00000d.jpg")
    image = np.asarray(dataset.images.open(question.image))
    ids = NEXT_WORDS.ids
    line = question_line(NEXT_WORDS, PlainQuestion("", question.question, question.answer))
    assert AutoTokenizer.from_pretrained(MODEL)(question.question).input_ids[1:] == [*line.asked[:-2]]
    lines, parts = pack([[line]]), Trainee(shipped)
    parts.newline = shipped.model.image_newline
    prepared = LlavaNextImageProcessorPil.from_pretrained(MODEL)(images=Image.fromarray(image), return_tensors="pt")
    with torch.inference_mode():
        features = tower_states(shipped.model.vision_tower, crops(image))[:, 1:].flatten(0, 1)
        sources = torch.from_numpy(run_sources(arrange(image.shape[1::-1])))
        seen = whole(features[sources.clamp(min=0)][None], sources[None] < 0)
        decoded = forward(parts, NEXT_WORDS.prefix, seen, lines)
        ours = predict(parts, decoded.states, decoded.start, lines.target)[0]
        prompt = [*NEXT_WORDS.prefix, *[ids[IMAGE]] * int(seen.total), *line.asked]
        theirs = shipped(input_ids=torch.tensor([prompt]), **prepared).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
