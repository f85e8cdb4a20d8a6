"""How the toy model is made: scenes, questions, vocabulary, packed training, resuming."""

import itertools

import numpy as np
import pytest
import torch

from llava.errors import UserError
from toy.clip import build_clip, patchify, phrase_targets, phrases, vision_states
from toy.data import vocabulary
from toy.data.corpus import Corpus, write_scenes
from toy.data.formats import INSTRUCT_WORDS
from toy.data.questions import FAMILIES, PlainQuestion, ask
from toy.data.scenes import SEEDS, centred, handwritten_digits, large_scene, scene
from toy.data.vocabulary import TOY_WORDS, VIDEO_WORDS
from toy.export import Record, text_only, trained_weights
from toy.packing import Line, attention_mask, pack, whole
from toy.stages import Recipe, Settings, Stage, scene_lines
from toy.train import schedule, train

SCENES = [scene("val", index, dense) for index, dense in itertools.product(range(12), (False, True))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_scenes(folder, "train", 6)
    return Corpus(folder)


@pytest.mark.parametrize("draw", [scene, large_scene])
def test_scenes_are_functions_of_their_seed(draw):
    first, again = draw("val", 0, False), draw("val", 0, False)
    assert again.jpeg == first.jpeg and again.things == first.things
    assert draw("test", 0, False).jpeg != again.jpeg


def test_splits_share_no_digits():
    parts = [{image.tobytes() for image in handwritten_digits(split)[0]} for split in SEEDS]
    assert sum(map(len, parts)) > 1700
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def test_dense_scenes_hold_more_than_a_budget_of_64():
    """Patches of askable things: a natural scene fits the budget of 64 nearly, a dense one does not."""
    natural, dense = (np.mean([asked_patches(s) for s in SCENES[start::2]]) for start in (0, 1))
    assert natural < dense and dense > 100


def asked_patches(one) -> int:
    return sum(int((one.owner == i).sum()) for i, thing in enumerate(one.things) if thing.kind != "panel")


def test_every_word_is_in_the_vocabulary():
    rng = np.random.default_rng(0)
    for drawn, family in itertools.product(SCENES, FAMILIES):
        question = ask(drawn.things, family, rng)
        if question:
            words = question.text.lower().replace("?", " ?").split()
            assert TOY_WORDS.encode(question.text) == [TOY_WORDS.ids[word] for word in words]
            assert TOY_WORDS.tokenizer.decode(TOY_WORDS.encode(question.answer)) == question.answer


def test_the_prompt_of_training_is_the_prompt_of_the_pipeline():
    """Training packs prefix, image and question; the evaluation renders vicuna_v1. They must be the same ids."""
    from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample, build_prompt

    (line,) = scene_lines(SCENES[0].things, ["color"], np.random.default_rng(0))
    text = ask(SCENES[0].things, "color", np.random.default_rng(0), tries=12).text
    sample = Sample("q", text, vocabulary.SHORT_ANSWER, image=object())
    ids = list(build_prompt(sample, TOY_WORDS.tokenizer, "vicuna_v1").ids)
    assert ids == [*TOY_WORDS.prefix, IMAGE_TOKEN_INDEX, *line.asked]


@pytest.mark.parametrize("words", [TOY_WORDS, VIDEO_WORDS, INSTRUCT_WORDS])
def test_vocabularies_grow_behind_the_old_words_and_end_with_the_end_token(words):
    """CLIP's text tower finds the end token by the largest id."""
    old, new = TOY_WORDS.words, words.words
    assert new[: len(old) - 1] == old[:-1] and new[-1] == vocabulary.EOS and len(set(new)) == len(new)
    assert len(words.tokenizer) == len(new) and words.ids[vocabulary.EOS] != 2


@pytest.mark.parametrize("draw", [scene, large_scene])
def test_answers_are_right_by_an_independent_reading(draw):
    """Read the question's words again and answer from the list of things, the picture's centre at (96, 96)."""
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(FAMILIES, 0)
    for index, dense in itertools.product(range(12), (False, True)):
        drawn = draw("val", index, dense)
        things = centred(drawn.things, *drawn.image.shape[1::-1])
        for family in FAMILIES:
            question = ask(things, family, rng)
            if question is not None:
                assert reader(things, family, question.text) == question.answer, question
                seen[family] += 1
    assert min(seen.values()) >= 10, seen


def described(things, words: list[str]):
    """Things that fit a list of words such as ["small", "red", "star"]."""
    found = [t for t in things if t.kind == "shape"]
    for word in words:
        if word in vocabulary.COLORS:
            found = [t for t in found if vocabulary.COLOR_NAMES[t.color] == word]
        elif word in vocabulary.SIZES:
            found = [t for t in found if vocabulary.SIZES[t.big] == word]
        elif word not in ("object", "objects"):
            name = next(s for s in vocabulary.SHAPES if word in (s, vocabulary.PLURALS[s]))
            found = [t for t in found if vocabulary.SHAPES[t.shape] == name]
    return found


NAMES = {*vocabulary.COLORS, *vocabulary.SIZES, *vocabulary.SHAPES, *vocabulary.PLURALS.values(), "object", "objects"}


def reader(things, family: str, text: str) -> str:
    words = text.lower().replace("?", "").split()
    named = [word for word in words if word in NAMES]
    if family == "digit":
        color = next(word for word in words if word in vocabulary.COLORS)
        frame = [t for t in things if t.kind == "frame" and vocabulary.COLOR_NAMES[t.color] == color]
        assert len(frame) == 1
        return str(frame[0].digit)
    if family == "exist" and "panel" in words:
        return "yes" if any(t.pattern >= 0 and vocabulary.PATTERNS[t.pattern] in words for t in things) else "no"
    if family == "exist":
        return "yes" if described(things, named) else "no"
    if family == "count":
        return str(len(described(things, named)))
    if family in ("verify", "choose", "relate"):
        relation = next(w for w in ("left", "right", "above", "below") if w in words)
        at = words.index(relation)
        a = described(things, [w for w in words[:at] if w in NAMES])
        (b,) = described(things, [w for w in words[at:] if w in NAMES])
        side = {
            "left": lambda t: t.x < b.x, "right": lambda t: t.x > b.x,
            "above": lambda t: t.y < b.y, "below": lambda t: t.y > b.y,
        }  # fmt: skip
        if family == "relate":
            (target,) = [t for t in a if t is not b and side[relation](t)]
            return vocabulary.COLOR_NAMES[target.color]
        assert len(a) == 1
        if family == "verify":
            return "yes" if side[relation](a[0]) else "no"
        other = {"left": "right", "above": "below"}[relation]
        return relation if side[relation](a[0]) else other
    (target,) = described(things, named)
    if family == "color":
        return vocabulary.COLOR_NAMES[target.color]
    if family == "shape":
        return vocabulary.SHAPES[target.shape]
    if "left" in words:
        return "left" if target.x < 96 else "right"
    return "top" if target.y < 96 else "bottom"


def test_labels_follow_the_things(corpus):
    labels = corpus.patch_labels(np.arange(6))
    for row in range(6):
        owner = corpus.owners[row].flatten()
        for patch in (0, 100, 300, 575):
            expected = corpus.things[row][owner[patch]] if owner[patch] >= 0 else np.zeros(9)
            assert labels[row, patch].tolist() == expected.tolist()
    things = corpus.list_things(1)
    assert things == scene("train", 1, dense=True).things


def test_phrases_that_only_small_things_make_true_count_less(corpus):
    targets, weights = phrase_targets(np.asarray(corpus.things[:6]))
    keys = list(phrases())
    for row in range(6):
        shapes = [t for t in corpus.list_things(row) if t.kind == "shape"]
        for column, key in enumerate(keys):
            if key[0] == "shape":
                mine = [t for t in shapes if t.shape == key[1]]
                assert targets[row, column] == float(bool(mine))
                assert weights[row, column] == (0.15 if mine and not any(t.big == 1 for t in mine) else 1.0)


def test_patchwise_tower_equals_the_transformers_tower(corpus):
    torch.manual_seed(0)
    clip = build_clip(width=32, layers=3).eval()
    patches = patchify(corpus.images[:2])
    pixels = patches.view(2, 24, 24, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 192, 192)
    with torch.inference_mode():
        penultimate, final = vision_states(clip.vision_model, patches)
        reported = clip.vision_model(pixels, output_hidden_states=True)
    torch.testing.assert_close(penultimate, reported.hidden_states[-2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(final, reported.hidden_states[-1], atol=1e-5, rtol=1e-4)
    keep = torch.tensor([[0, 7, 575], [3, 4, 5]])
    some = patches.gather(1, keep[..., None].expand(-1, -1, 192))
    assert vision_states(clip.vision_model, some, keep)[0].shape == (2, 4, 32)


def test_packed_mask_lets_no_question_see_another():
    lines = pack([[Line("", (5, 6), (7, 8))] * 3])
    mask = attention_mask(whole(torch.zeros(1, 5, 8)), lines, prefix=3)[0, 0]
    prefix = 3 + 5
    second = prefix + 4
    assert mask[second, :prefix].all() and not mask[second, prefix:second].any() and mask[second, second]


class TwoLayers(Stage):
    """Two linear layers that learn to copy their input."""

    name = "copy"
    recipe = Recipe(lr=0.02, adam_lr=0.01, clip=1.0, decay=0.6, save_every=4)
    at_once = 1

    def __init__(self, stop_at=None, steps=12):
        super().__init__(None, Settings(steps, 4, 4, validation=1, watched=1, final=1, keep=1), None)
        torch.manual_seed(0)
        self.trainee, self.stop_at = torch.nn.Module(), stop_at
        self.trainee.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    @staticmethod
    def is_hidden(name):
        return name.startswith("layers.0")

    def loss(self, step, rng):
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.tensor(rng.normal(size=(4, 8)), dtype=torch.bfloat16)
        noise = torch.randn(4, 8, dtype=torch.bfloat16)
        layers = self.trainee.layers
        return (layers[1](layers[0](x)) - x - 0.1 * noise).float().square().mean(), {}

    def validate(self, rows):
        return {"rows": len(rows)}


def toy_training(folder, stop_at=None, steps=12):
    folder.mkdir(exist_ok=True)
    return train(TwoLayers(stop_at, steps), folder).masters


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    expected = toy_training(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path / "cut", stop_at=7)
    resumed = toy_training(tmp_path / "cut")
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    """Once a run with another number of steps went on from it, in the middle of another learning-rate schedule."""
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path, stop_at=7)
    with pytest.raises(UserError, match="other settings"):
        toy_training(tmp_path, steps=20)
    checkpoint = tmp_path / "copy.checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    del saved["settings"]  # as the former trainers saved it
    torch.save(saved, checkpoint)
    with pytest.raises(UserError, match="not recorded"):
        toy_training(tmp_path)


def test_rendering_resumes(tmp_path, monkeypatch):
    write_scenes(tmp_path, "train", 3)
    done = np.load(tmp_path / "done.npy", mmap_mode="r+")
    done[1:] = 0
    del done
    drawn = []
    monkeypatch.setattr("toy.data.corpus.scene", lambda *a, **k: drawn.append(a) or scene(*a, **k))
    write_scenes(tmp_path, "train", 3)
    assert [index for _, index in drawn] == [1, 2]


def test_schedule_warms_up_stays_flat_and_ends_near_zero():
    values = [schedule(step, 1000, warmup=10, decay=0.5) for step in range(1000)]
    assert values[0] == 0.1 and values[10:500] == [1.0] * 490 and values[-1] < 0.01


def test_text_only_baseline_looks_up_then_falls_back():
    said = [("q1", "red"), ("q1", "blue"), ("q1", "blue"), ("q2", "red"), ("q3", "red")]
    asked = {text: Record("color", text, answer, "") for text, answer in (("q1", "blue"), ("never asked", "red"))}
    assert text_only(asked, [PlainQuestion("color", *one) for one in said]) == {"q1": 1.0, "never asked": 1.0}


def test_an_export_without_a_training_says_so(tmp_path):
    """Once a traceback of torch.load."""
    with pytest.raises(UserError, match=r"neither next\.pt nor next\.checkpoint\.pt"):
        trained_weights(tmp_path, "next")


def test_an_unfinished_stage_is_exported_from_its_last_checkpoint(tmp_path):
    masters = toy_training(tmp_path)
    assert all(torch.equal(weight, masters[name]) for name, weight in trained_weights(tmp_path, "copy").items())
