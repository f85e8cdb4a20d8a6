"""Every family agrees with the transformers class on the same weights; frames and positions are where they belong."""

import pytest
import torch

from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample
from llava.processing.video import Video
from llava.reduction import registry
from tests.conftest import QUESTIONS, drawn_image
from tests.test_mrope import positions
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
    save_next_transformers,
    save_qwen_transformers,
    save_video_original,
    save_video_transformers,
)
from tests.watch import watched

VIDEO = Video(tuple(drawn_image(frame, (70, 50)) for frame in range(8)))


def logits(model, samples, name="full", budget=None):
    reducer = registry.build(name, budget or model.visual_tokens)
    state, _ = prefill(model, samples, reducer)
    return model.logits(state.hidden)


def ask(*images) -> list[Sample]:
    return [Sample(f"q{i}", QUESTIONS[i], image=image) for i, image in enumerate(images)]


def expanded(model, sample, counts) -> torch.Tensor:
    """[1, L] ids as the stock processors write them: the image token once per visual token."""
    ids, token, counts = [], model.hf_model.config.image_token_id, iter(counts)
    if any(isinstance(image, Video) for image in sample.images):
        token = model.hf_model.config.video_token_id
    for number in model.prompt(sample).ids:
        ids += [token] * next(counts) if number == IMAGE_TOKEN_INDEX else [number]
    return torch.tensor([ids])


@torch.inference_mode()
@pytest.mark.parametrize("size", [(60, 110), (120, 50), (112, 112), (90, 100)])
def test_next_agrees_with_the_transformers_class(tmp_path, size):
    """Under the transformers reading of the resolutions; newline tokens and unpadding included."""
    save_next_transformers(tmp_path, make_tiny_next("mistral"))
    model = load(tmp_path, device="cpu", anyres_rule="transformers")
    (sample,) = ask(drawn_image(3, size))
    pixels, run = model.views(sample.image)
    sizes = torch.tensor([[size[1], size[0]]])
    out = model.hf_model(input_ids=expanded(model, sample, [run.tokens]), pixel_values=pixels[None], image_sizes=sizes)
    expected = out.logits[:, -1, : model.vocabulary]
    torch.testing.assert_close(logits(model, [sample]), expected, atol=2e-4, rtol=0)


@torch.inference_mode()
def test_video_agrees_with_the_transformers_class(tmp_path):
    save_video_transformers(tmp_path, make_tiny_video(temporal=False))
    model = load(tmp_path, device="cpu")
    assert model.conventions["video tower"] == "without temporal attention"
    for sample in ask(VIDEO, drawn_image(2)):
        pixels, run = model.views(sample.image)
        values = {"pixel_values_videos": pixels[None]} if run.temporal else {"pixel_values_images": pixels}
        out = model.hf_model(input_ids=expanded(model, sample, [run.tokens]), **values)
        torch.testing.assert_close(logits(model, [sample]), out.logits[:, -1, : model.vocabulary], atol=2e-4, rtol=0)


def test_methods_act_per_frame_or_over_all_frames(tmp_path):
    """17 tokens of 8 frames each: class tokens only where the method keeps them."""
    save_video_original(tmp_path, make_tiny_video())
    model = load(tmp_path, device="cpu")
    frame = model.views(VIDEO)[1].origins()
    for name, budget, counts in (("fastervlm", 40, [5] * 8), ("visionzip", 40, [5] * 8), ("attnmix", 40, None)):
        _, record = prefill(model, ask(VIDEO), registry.build(name, budget))
        kept = frame[record.steps[0][0].reduction.kept[0]]
        found = torch.bincount(kept[:, 0], minlength=8).tolist()
        assert sum(found) == budget and (counts is None or found == counts)
        assert (kept[:, 1] == -1).sum() == (8 if name == "visionzip" else 0)


def test_assembled_positions_are_those_of_whole_prompts(tmp_path):
    """Text, images of different shapes and padding, against the positions written down prompt by prompt."""
    save_qwen_transformers(tmp_path, make_tiny_qwen())
    model = load(tmp_path, device="cpu")
    batch = ask((drawn_image(0, (200, 120)), drawn_image(1, (90, 160))), drawn_image(2, (150, 150)), None)

    with watched() as found:
        prefill(model, batch, registry.build("full", model.visual_tokens))
    prompts = []
    for i, sample in enumerate(batch):
        parts, number = [0], 0
        for token in model.prompt(sample).ids:
            if token == IMAGE_TOKEN_INDEX:
                parts += [(1, *found.images[i, number].encoded.encoded.grid), 0]
                number += 1
            else:
                parts[-1] += 1
        prompts.append(parts)
    assert torch.equal(found.sequences["embedded"].position, positions(prompts))
