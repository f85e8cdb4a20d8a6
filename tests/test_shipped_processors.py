"""The bundled toy checkpoints are complete for `AutoProcessor` of transformers, and their exports write all of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval.config import DEFAULT_MODEL, ROOT
from lab.toy.export import EXPORTS, export
from llava import load, reduce
from llava.pipeline.generate import generate
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample
from llava.reduction import registry

ASSETS = ROOT / "assets"
QUESTION = "Is there a pink square in the image?\nAnswer the question using a single word or phrase."
IMAGES = {
    "tinyllava": ASSETS / "eval/pope/val2014/test00000d.jpg",
    "tinyllava_instruct": ASSETS / "eval/pope/val2014/test00000d.jpg",
    "tinyllava_next": ASSETS / "eval_next/gqa/data/images/test00001d.jpg",
}


@pytest.mark.training
@pytest.mark.parametrize("name", sorted(IMAGES))
def test_a_toy_checkpoint_runs_with_its_own_processor(name):
    """The toy model shipped no processor_config.json: patch_size was None, and the README's example failed on it."""
    folder, image = ASSETS / name, Image.open(IMAGES[name])
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder, device="cpu", **({"anyres_rule": "transformers"} if name == "tinyllava_next" else {}))
    sample = Sample("q", QUESTION, suffix="", image=image)
    prompt = ours.prompt(sample)
    inputs = processor(images=image, text=prompt.text, return_tensors="pt")
    text = [token for token in inputs["input_ids"][0].tolist() if token != model.config.image_token_id]
    assert text == [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
    for method, budget in (("full", ours.visual_tokens), ("fastervlm", 64)):
        (answer,) = generate(ours, [sample], registry.build(method, budget), max_new_tokens=4).answers
        with reduce(model, method, budget) as reduced:
            ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        (counted,) = (replace(one, on_padding=None) for one in reduced.accounting)  # the pixels do not say
        assert counted == replace(answer.accounting, on_padding=None)
        assert processor.decode(ids, skip_special_tokens=True).strip() == answer.text
    full = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(full, skip_special_tokens=True).strip() in ("Yes", "No", "yes", "no")


STAGES = {
    "language": "tinyllava",
    "instruct": "tinyllava_instruct",
    "boxes": "tinyllava_boxes",
    "next": "tinyllava_next",
    "video": "tinyllava_video",
}


@pytest.mark.lab
@pytest.mark.parametrize("stage", EXPORTS)
def test_an_export_writes_every_file_that_is_shipped(stage, tmp_path, monkeypatch):
    """The exports wrote no processor_config.json. The model is the shipped one, nothing is trained."""
    shipped = ASSETS / STAGES[stage]
    model = AutoModelForImageTextToText.from_pretrained(shipped)
    monkeypatch.setitem(EXPORTS, stage, replace(EXPORTS[stage], text_tower=lambda *_: None))
    monkeypatch.setattr("lab.toy.export.load_trained", lambda *_: model)
    export(stage, tmp_path, Path(DEFAULT_MODEL), tmp_path)
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {file.name for file in shipped.iterdir()} - {"README.md", "text_tower"}
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_text() == (shipped / file).read_text(), file
