"""What the repository ships: the toy model and toy benchmark, their sizes, and that the model really answers."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from eval import benchmarks
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.test_model import transformers_inputs
from toy.benchmarks.__main__ import size
from toy.data.scenes import scene
from toy.data.vocabulary import BOS, EOS, PATTERNS, TOY_WORDS

MODEL = ROOT / "assets" / "tinyllava"


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def dataset():
    return benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")


def test_assets_keep_their_size_limits():
    assert str(MODEL) == DEFAULT_MODEL
    assert size(MODEL) <= 20e6 and size(DEFAULT_DATA) <= 15e6


def test_the_architecture_is_llava_in_small(toy):
    assert toy.visual_tokens == 576 and len(toy.llm.layers) >= 8
    assert toy.conversation == "vicuna_v1" and toy.select_layer == -2
    assert toy.end_ids == {toy.tokenizer.eos_token_id} == {len(toy.tokenizer) - 1}


def test_the_benchmark_has_its_splits(dataset):
    val = benchmarks.get("gqa").load(DEFAULT_DATA, "val")
    assert len(dataset.questions) >= 2000 and len(val.questions) >= 1000
    assert not {q.image for q in dataset.questions} & {q.image for q in val.questions}
    records = json.loads((DEFAULT_DATA / "gqa" / "data" / "testdev_balanced_questions.json").read_text())
    kinds = Counter({record["imageId"]: record["groups"]["global"] for record in records.values()}.values())
    assert kinds["natural"] == kinds["dense"]
    assert len({record["types"]["detailed"] for record in records.values()}) == 9


@pytest.mark.training
@pytest.mark.parametrize(("method", "budget", "least"), [("full", 576, 0.85), ("consensusdrop", 64, 0.75)])
def test_the_toy_model_answers(toy, dataset, method, budget, least):
    """Every 40th question: a broken checkpoint, prompt or preprocessing falls to chance, about 30 %."""
    questions = dataset.questions[::40]
    batch = generate(toy, [dataset.sample(q) for q in questions], registry.build(method, budget), max_new_tokens=4)
    credits = [dataset.sample_score(q, a.text) for q, a in zip(questions, batch.answers, strict=True)]
    assert sum(credits) / len(credits) >= least


def test_the_transformers_class_gives_the_same_logits(toy, dataset):
    """The shipped files are a checkpoint of the transformers layout: its class agrees with the staged forward."""
    from llava.pipeline.prefill import prefill

    sample = dataset.sample(dataset.questions[3])
    state, _ = prefill(toy, [sample], registry.build("full", 576))
    with torch.inference_mode():
        theirs = toy.hf_model(**transformers_inputs(toy, sample)).logits[:, -1]
    torch.testing.assert_close(toy.logits(state.hidden), theirs[:, : toy.vocabulary], atol=1e-4, rtol=0)


def test_the_text_tower_completes_the_clip_model(toy, dataset):
    """Vision tower of the checkpoint plus `text_tower/` is a whole CLIPModel, and it knows what is in a picture."""
    weights = load_file(MODEL / "text_tower" / "model.safetensors")
    clip = CLIPModel(CLIPConfig.from_pretrained(MODEL / "text_tower"))
    vision = {f"vision_model.{name}": tensor for name, tensor in toy.tower.state_dict().items()}
    missing, unexpected = clip.load_state_dict({**weights, **vision}, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    phrases = [f"a {pattern} panel" for pattern in PATTERNS]
    ids = TOY_WORDS.ids
    tokens = torch.tensor([[ids[BOS], *TOY_WORDS.encode(phrase), ids[EOS]] for phrase in phrases])
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
