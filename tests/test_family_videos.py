"""Questions about videos for the Qwen-VL families, against stock `generate`.

transformers' video processors need torchvision. Without it a stand-in makes patches, and all the rest is the same.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BatchFeature, is_torchvision_available
from transformers.video_utils import VideoMetadata

from eval import __main__ as cli
from eval.figures.overlay import draw_overlay
from llava.errors import UserError
from llava.hf import checkpoint_model
from llava.hf.checkpoint_model import FamilyModel
from llava.model.builder import load
from llava.model.qwen_vl import QwenVL
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.processing.video import Video, read_video
from llava.reduction import registry
from tests.conftest import QUESTIONS, drawn_image
from tests.family_checkpoints import FILMED, save_family
from tests.test_video import write

ROOT = Path(__file__).resolve().parent.parent


class VideoPatches:
    """In place of a video processor: every frame becomes 56 x 84 pixels, and two frames 4 x 6 patches."""

    merge_size = temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self):
        self.told = []

    def __call__(self, videos, video_metadata, do_sample_frames, **_):
        assert not do_sample_frames
        self.told += video_metadata
        frames = [np.stack([np.asarray(one.convert("RGB").resize((84, 56))) for one in video]) for video in videos]
        patches = [torch.tensor(pixels / 255 - 0.5).float().reshape(-1, 1176) for pixels in frames]
        grids = torch.tensor([[len(pixels) // 2, 4, 6] for pixels in frames])
        about = [VideoMetadata(**one) for one in video_metadata]
        return BatchFeature(
            {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids, "video_metadata": about}
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> folder, the model that was saved, and the model as it is loaded for videos."""

    @cache
    def one(name):
        folder = tmp_path_factory.mktemp("filmed") / name
        stock, model = save_family(name, folder), load(folder, device="cpu", videos=True)
        if not is_torchvision_available():
            model.processor.video_processor = VideoPatches()
        return folder, stock, model

    return one


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> list[Sample]:
    """Two videos, an image and a text."""
    file = read_video(write(tmp_path_factory.mktemp("film") / "film.mp4", 30))
    drawn = Video(tuple(drawn_image(frame, (90, 60)) for frame in range(8)))
    shown = (file, drawn, drawn_image(3, (112, 112)), None)
    return [Sample(f"q{i}", QUESTIONS[i], image=image) for i, image in enumerate(shown)]


def ask(model, samples, method="full", budget=None):
    return generate(model, samples, registry.build(method, budget or model.visual_tokens), 6).answers


@pytest.mark.parametrize("name", FILMED)
def test_all_tokens_give_the_answers_of_stock_generate(saved, batch, name):
    """A batch of videos, an image and a text; each one alone by the stock model."""
    _, stock, model = saved(name)
    answers = ask(model, batch)
    for sample, answer in zip(batch, answers, strict=True):
        inputs = model.inputs([sample])
        never = list(range(model.vocabulary, model.head.out_features))
        ids = stock.generate(**inputs, max_new_tokens=6, suppress_tokens=never)[0][inputs["input_ids"].shape[1] :]
        end = model.tokenizer.eos_token_id
        assert answer.token_ids == tuple(ids[: [*ids.tolist(), end].index(end)].tolist())
        video = isinstance(sample.image, Video)
        tokens = int((inputs["input_ids"] == model.token("video" if video else "image")).sum())
        assert answer.accounting.tokens_per_layer == (tokens,) * 4
        assert len(answer.runs) == len(sample.images) and answer.accounting.images == 1
        assert not video or len(answer.runs[0].crops) == 4  # a token shows two of the eight frames
    assert len({answer.token_ids for answer in answers}) > 1


@pytest.mark.parametrize("name", FILMED)
@pytest.mark.parametrize("method", ["vidcom2", "evs", "consensusdrop"])
def test_a_video_has_one_budget(saved, batch, name, method):
    """Exactly the budget over all frames, and a batch gives what each question gives."""
    model = saved(name)[2]
    answers = ask(model, batch[:2], method, 10)
    for sample, answer in zip(batch[:2], answers, strict=True):
        assert draw_overlay(sample.image, answer.trace, answer.runs[0]).size  # 4 panels of 8 frames were an error
        assert answer.accounting.tokens_per_layer == (10,) * 4 and answer.accounting.images == 1
        assert ask(model, [sample], method, 10)[0].token_ids == answer.token_ids


def test_the_processor_is_told_when_frames_were_shown(saved, batch, monkeypatch):
    """Qwen3-VL writes the times into the prompt, and Qwen2.5-VL makes positions of them."""
    video = batch[0].image
    assert video.indices == (0, 4, 8, 12, 16, 20, 24, 29) and (video.total, video.rate) == (30, 10.0)
    model = saved("qwen2_5_vl")[2]
    assert model.inputs(batch[:1])["second_per_grid_ts"].tolist() == [2 / (8 / 30 * 10)]
    processor, written = saved("qwen3_vl")[2].processor, []
    original = processor.replace_video_token

    def replaced(*arguments, **options):
        written.append(original(*arguments, **options))
        return written[-1]

    monkeypatch.setattr(processor, "replace_video_token", replaced)
    saved("qwen3_vl")[2].inputs(batch[:1])
    (text,) = written
    assert [part.split(" seconds")[0] for part in text.split("<") if " seconds" in part] == ["0.2", "1.0", "1.8", "2.6"]


def test_qwen2_5_has_another_class_for_videos(saved):
    """Images are answered as before; it was refused for videos."""
    folder = saved("qwen2_5_vl")[0]
    assert isinstance(load(folder, device="cpu"), QwenVL)
    assert isinstance(saved("qwen2_5_vl")[2], FamilyModel) and saved("qwen2_5_vl")[2].loaded_with["videos"]


def test_without_torchvision_videos_are_refused(saved, batch, monkeypatch):
    model = saved("qwen3_vl")[2]
    monkeypatch.setattr(model.processor, "video_processor", None)
    with pytest.raises(UserError, match="prepares videos with the package torchvision"):
        model.inputs(batch[:1])
    assert ask(model, batch[2:])


@pytest.mark.parametrize("name", FILMED)
def test_a_benchmark_of_videos(saved, name, tmp_path, monkeypatch, capsys):
    """From `vtr eval` to its result; Qwen-VL was told to choose a Video-LLaVA."""
    folder, _, model = saved(name)
    monkeypatch.setattr(checkpoint_model, "read_processor", lambda *_: model.processor)
    words = ["--benchmark", "video_qa", "--data", str(ROOT / "assets" / "eval_video"), "--model", str(folder)]
    words += ["--method", "vidcom2", "--budget", "9", "--limit", "3", "--device", "cpu", "--max-new-tokens", "3"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--wandb", "disabled"]) == 0
    result = json.loads((tmp_path / "out" / "limit3" / "result.json").read_text())
    assert result["accounting"]["entering_per_layer"] == [9.0] * 4
    assert Path(result["settings"]["model"]).name == name
