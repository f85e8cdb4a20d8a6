"""The bundled toy checkpoints are complete for `AutoProcessor` of transformers, and their exports write all of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

from eval.config import DEFAULT_MODEL, ROOT
from llava import load, reduce
from llava.pipeline.generate import generate
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample
from llava.reduction import registry
from toy.export import EXPORTS, export

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
    ours = load(folder, device="cpu", **({"reading": "transformers"} if name == "tinyllava_next" else {}))
    sample = Sample("q", QUESTION, suffix="", image=image)
    prompt = ours.prompt(sample)
    inputs = processor(images=image, text=prompt.text, return_tensors="pt")
    text = [token for token in inputs["input_ids"][0].tolist() if token != model.config.image_token_id]
    assert text == [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
    for method, budget in (("full", ours.visual_tokens), ("fastervlm", 64)):
        (answer,) = generate(ours, [sample], registry.build(method, budget), max_new_tokens=4).answers
        with reduce(model, method, budget) as reduced:
            ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        assert reduced.accounting == [answer.accounting]
        assert processor.decode(ids, skip_special_tokens=True).strip() == answer.text
    full = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(full, skip_special_tokens=True).strip() in ("Yes", "No", "yes", "no")


def test_the_toy_video_processor_counts_tokens_as_the_model_does():
    """AutoProcessor of Video-LLaVA needs torchvision; its rule is checked without."""
    folder = ASSETS / "tinyllava_video"
    config = AutoConfig.from_pretrained(folder)
    fields = json.loads((folder / "processor_config.json").read_text())
    assert fields.pop("processor_class") == "VideoLlavaProcessor"
    processor, size = object.__new__(VideoLlavaProcessor), config.vision_config.image_size
    vars(processor).update(fields)
    image = processor.replace_image_token({"pixel_values": torch.zeros(1, 3, size, size)}, 0)
    assert image == "<image>" * config.image_seq_length
    frames = config.video_seq_length // (config.image_seq_length + 1)
    video = processor.replace_video_token({"pixel_values_videos": torch.zeros(1, frames, 3, size, size)}, 0)
    assert video == "<video>" * config.video_seq_length
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert {fields["image_token"], fields["video_token"]} == set(tokenizer["extra_special_tokens"])


STAGES = {
    "language": "tinyllava",
    "instruct": "tinyllava_instruct",
    "next": "tinyllava_next",
    "video": "tinyllava_video",
}


@pytest.mark.parametrize("stage", EXPORTS)
def test_an_export_writes_every_file_that_is_shipped(stage, tmp_path, monkeypatch):
    """The exports wrote no processor_config.json. The model is the shipped one, nothing is trained."""
    shipped = ASSETS / STAGES[stage]
    model = AutoModelForImageTextToText.from_pretrained(shipped)
    monkeypatch.setitem(EXPORTS, stage, replace(EXPORTS[stage], text_tower=lambda *_: None))
    monkeypatch.setattr("toy.export.load_trained", lambda *_: model)
    export(stage, tmp_path, Path(DEFAULT_MODEL), tmp_path)
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {file.name for file in shipped.iterdir()} - {"README.md", "text_tower"}
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_text() == (shipped / file).read_text(), file
