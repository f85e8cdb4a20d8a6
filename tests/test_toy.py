"""How the toy model is made: scenes, questions, vocabulary, packed training, resuming."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from eval import benchmarks
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from lab.toy.benchmarks.__main__ import size
from lab.toy.clip import build_clip, patchify, vision_states
from lab.toy.data import vocabulary
from lab.toy.data.corpus import Corpus, write_scenes
from lab.toy.data.formats import INSTRUCT_WORDS
from lab.toy.data.questions import FAMILIES, ask
from lab.toy.data.regions import BOX_WORDS
from lab.toy.data.scenes import SEEDS, centred, handwritten_digits, large_scene, scene
from lab.toy.data.vocabulary import TOY_WORDS, VIDEO_WORDS
from lab.toy.export import trained_weights
from lab.toy.stages import Settings, Stage, scene_lines
from lab.toy.train import train
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample, build_prompt
from llava.reduction import registry
from tests.test_model import transformers_inputs

pytestmark = pytest.mark.lab

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
    (line,) = scene_lines(SCENES[0].things, ["color"], np.random.default_rng(0))
    text = ask(SCENES[0].things, "color", np.random.default_rng(0), tries=12).text
    sample = Sample("q", text, vocabulary.SHORT_ANSWER, image=object())
    ids = list(build_prompt(sample, TOY_WORDS.tokenizer, "vicuna_v1").ids)
    assert ids == [*TOY_WORDS.prefix, IMAGE_TOKEN_INDEX, *line.asked]


@pytest.mark.parametrize("words", [TOY_WORDS, VIDEO_WORDS, INSTRUCT_WORDS, BOX_WORDS])
def test_vocabularies_grow_behind_the_old_words_and_end_with_the_end_token(words):
    """CLIP's text tower finds the end token by the largest id."""
    old, new = TOY_WORDS.words, words.words
    assert new[: len(old) - 1] == old[:-1] and new[-1] == vocabulary.EOS and len(set(new)) == len(new)
    assert len(words.tokenizer) == len(new) and words.ids[vocabulary.EOS] != 2


@pytest.mark.parametrize("draw", [scene, large_scene])
def test_answers_are_right_by_an_independent_reading(draw):
    """Read the question's words again and answer from the list of things, the image's centre at (96, 96)."""
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(FAMILIES, 0)
    for index, dense in itertools.product(range(12), (False, True)):
        drawn = draw("val", index, dense)
        height, width = drawn.image.shape[:2]
        things = centred(drawn.things, width, height)
        assert [(t.x - 96, t.y - 96) for t in things] == [(t.x - width / 2, t.y - height / 2) for t in drawn.things]
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


class TwoLayers(Stage):
    """Two linear layers that learn to copy their input."""

    name = "copy"
    at_once = 1

    def __init__(self, stop_at=None, steps=12):
        recipe = {"lr": 0.02, "adam_lr": 0.01, "clip": 1.0, "decay": 0.6, "save_every": 4}
        sizes = dict.fromkeys(("validation", "watched", "final", "keep"), 1)
        super().__init__(None, Settings(**recipe, **sizes, steps=steps, images=4, batch=4), None)
        torch.manual_seed(0)
        self.trainee, self.stop_at = torch.nn.Module(), stop_at
        self.trainee.block = torch.nn.Module()
        self.trainee.block.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.trainee.last = torch.nn.Linear(8, 8)

    def loss(self, step, rng):
        if step == self.stop_at:
            raise KeyboardInterrupt
        dtype = self.trainee.last.weight.dtype
        x, noise = torch.tensor(rng.normal(size=(4, 8)), dtype=dtype), torch.randn(4, 8, dtype=dtype)
        return (self.trainee.last(self.trainee.block.layers[0](x)) - x - 0.1 * noise).float().square().mean(), {}

    def validate(self, rows):
        return {"rows": len(rows)}


def toy_training(folder, stop_at=None, steps=12):
    folder.mkdir(exist_ok=True)
    return train(TwoLayers(stop_at, steps), folder).masters


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    """Its checkpoint, which an export takes too, is refused under other settings: once a run with another number of
    steps went on in the middle of another learning-rate schedule."""
    expected = toy_training(tmp_path / "whole")
    with pytest.raises(UserError, match=r"neither copy\.pt nor copy\.checkpoint\.pt"):
        trained_weights(tmp_path, "copy")
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path / "cut", stop_at=7)
    with pytest.raises(UserError, match="other settings"):
        toy_training(tmp_path / "cut", steps=20)
    resumed = toy_training(tmp_path / "cut")
    exported = trained_weights(tmp_path / "cut", "copy")
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]) and torch.equal(weight, exported[name]), name


# -- what is shipped -----------------------------------------------------------------------------------------------


def test_assets_keep_their_size_limits():
    limits = {"eval": 16e6, "eval_next": 15e6, "eval_video": 15e6, "tinyllava_instruct": 9e6, "tinyllava_boxes": 9e6}
    limits |= dict.fromkeys(("tinyllava", "tinyllava_next", "tinyllava_video"), 20e6)
    assert not [name for name, limit in limits.items() if size(ROOT / "assets" / name) > limit]


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def dataset():
    return benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")


@pytest.mark.training
@pytest.mark.parametrize(("method", "budget", "least"), [("full", 576, 0.85), ("consensusdrop", 64, 0.75)])
def test_the_toy_model_answers(toy, dataset, method, budget, least):
    """Every 40th question: a broken checkpoint, prompt or preprocessing falls to chance, about 30 %."""
    questions = dataset.questions[::40]
    batch = generate(toy, [dataset.sample(q) for q in questions], registry.build(method, budget), max_new_tokens=4)
    sample_scores = [dataset.sample_score(q, a.text) for q, a in zip(questions, batch.answers, strict=True)]
    assert sum(sample_scores) / len(sample_scores) >= least


def test_the_transformers_class_gives_the_same_logits(toy, dataset):
    """The shipped files are a checkpoint of the transformers layout: its class agrees with the staged forward."""
    sample = dataset.sample(dataset.questions[3])
    state, _ = prefill(toy, [sample], registry.build("full", 576))
    with torch.inference_mode():
        theirs = toy.hf_model(**transformers_inputs(toy, sample)).logits[:, -1]
    torch.testing.assert_close(toy.logits(state.hidden), theirs[:, : toy.vocabulary], atol=1e-4, rtol=0)


def test_the_text_tower_completes_the_clip_model(toy, dataset):
    """Vision tower of the checkpoint plus `text_tower/` is a whole CLIPModel, and it knows what is in an image."""
    tower = Path(DEFAULT_MODEL) / "text_tower"
    weights, clip = load_file(tower / "model.safetensors"), CLIPModel(CLIPConfig.from_pretrained(tower))
    vision = {f"vision_model.{name}": tensor for name, tensor in toy.tower.state_dict().items()}
    missing, unexpected = clip.load_state_dict({**weights, **vision}, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    panels = [f"a {pattern} panel" for pattern in vocabulary.PATTERNS]
    start, end = TOY_WORDS.ids[vocabulary.BOS], TOY_WORDS.ids[vocabulary.EOS]
    tokens = torch.tensor([[start, *TOY_WORDS.encode(phrase), end] for phrase in panels])
    right = total = 0
    with torch.inference_mode():
        for index in range(16):
            patterns = {thing.pattern for thing in scene("test", index, False).things if thing.kind == "panel"}
            if len(patterns) != 1:
                continue
            name = f"test{index:05d}n.jpg"
            question = next(q for q in dataset.questions if q.image == name)
            pixels = toy.image_processor(dataset.sample(question).image)[None]
            similarity = clip(input_ids=tokens, pixel_values=pixels).logits_per_image[0]
            right += int(similarity.argmax()) in patterns
            total += 1
    assert total >= 5 and right / total >= 0.7
