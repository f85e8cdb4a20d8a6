"""The plug-in's classes for vLLM against stand-ins for the engine's modules: prompts, positions, attention."""

import dataclasses
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from eval.config import DEFAULT_MODEL
from llava.errors import UserError
from llava.model.multimodal_encoder.stock_tower import Call
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import until_decoder
from llava.reduction import registry
from llava.reduction.registry import build
from llava.reduction.token_layout import single
from llava.serving.engine_method import handed_over, served_by
from tests import contract
from tests.conftest import samples
from tests.engine_stand_in import engine_tower
from tests.stock_families import make

STOCK = {"LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "InternS1ForConditionalGeneration"}
STOCK |= {"Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"}


class _Mapper:
    def __or__(self, other: object) -> "_Mapper":
        return self


class _Update(SimpleNamespace):
    """A PromptReplacement or PromptUpdateDetails."""

    def __init__(self, *args: Any, **given: Any):
        super().__init__(**dict(zip(("modality", "target", "replacement"), args, strict=False)), **given)

    @classmethod
    def from_seq(cls, ids: list[int]) -> "_Update":
        return cls(full=ids, is_embed=None)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llava.serving.plugin with stand-ins for all that it imports of the engine."""

    class Engine(ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in STOCK:
                return type(
                    name,
                    (),
                    {
                        "hf_to_vllm_mapper": _Mapper(),
                        "_processor_factory": SimpleNamespace(info=None, dummy_inputs=None, processor=None),
                    },
                )
            if name == "MULTIMODAL_REGISTRY":
                return SimpleNamespace(register_processor=lambda *args, **more: lambda model: model)
            return {"WeightsMapper": lambda **given: _Mapper()}.get(name, _Update)

    folders = ("", ".config", ".distributed", ".model_executor", ".model_executor.models", ".multimodal", ".v1")
    models = ("interns1", "llava", "llava_next", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
    files = [f".model_executor.models.{name}" for name in models]
    files += [".model_executor.models.utils", ".multimodal.processing", ".platforms", ".v1.worker"]
    for name in (*folders, *files, ".v1.worker.gpu_model_runner"):
        monkeypatch.setitem(sys.modules, f"vllm{name}", Engine(f"vllm{name}"))
    monkeypatch.delitem(sys.modules, "llava.serving.plugin", raising=False)
    yield importlib.import_module("llava.serving.plugin")
    sys.modules.pop("llava.serving.plugin", None)


def feature(offset: int, kept: int, grid: list[int]) -> Any:
    return SimpleNamespace(
        modality="image",
        mm_position=SimpleNamespace(offset=offset, length=kept),
        data={"image_grid_thw": SimpleNamespace(data=torch.tensor(grid))},
    )


def test_positions_of_kept_tokens_are_those_of_the_whole_prompt(plugin: Any) -> None:
    model = make("qwen3_vl").eval()
    image = model.config.image_token_id
    grids, kept = [[1, 8, 12], [1, 8, 8]], [[0, 5, 7, 23], [3, 15]]  # of 24 and of 16 tokens
    whole = [9, 5, *[image] * 24, 6, 10, 5, *[image] * 16, 6, 11]
    short = [9, 5, *[image] * 4, 6, 10, 5, *[image] * 2, 6, 11]
    ids = torch.tensor([whole])
    expected = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == image).int(), image_grid_thw=torch.tensor(grids)
    )[0][:, 0]
    starts = [2, 29]
    stays = [place for place, token in enumerate(whole) if token != image]
    stays = sorted([*stays, *(start + one for start, own in zip(starts, kept, strict=True) for one in own)])

    engine = plugin.QwenModel.__new__(plugin.QwenModel)
    engine.served, engine.config = SimpleNamespace(merge=2), SimpleNamespace(image_token_id=image)
    features = [feature(9, 2, grids[1]), feature(2, 4, grids[0])]
    first, delta = engine.get_mrope_input_positions(short, features)
    assert delta == int(expected.max()) + 1 - len(short)
    embeddings = []
    for own, (_, _, columns) in zip(kept, grids, strict=True):
        places = torch.tensor([[0, one // (columns // 2), one % (columns // 2)] for one in own]).float()
        embeddings.append(torch.cat([torch.randn(len(own), 8), places], 1))
    out, positions, again = engine.recompute_mrope_positions(short, embeddings, first, 0)
    assert [tuple(one.shape) for one in out] == [(4, 8), (2, 8)]
    assert torch.equal(positions, expected[:, stays]) and again == delta
    # The second image in a later part of the prefill.
    _, later, _ = engine.recompute_mrope_positions(short, embeddings[1:], positions.clone(), 7)
    assert torch.equal(later, positions)


def test_videos_are_refused(plugin: Any) -> None:
    """The engine itself shows one when it measures memory, and ended, as it had no share to prune it to."""
    engine = plugin.QwenModel.__new__(plugin.QwenModel)
    engine.served = SimpleNamespace(merge=2)
    assert engine._postprocess_video_embeds_evs("whole", None) == "whole"
    video = feature(1, 4, [2, 4, 4])
    video.modality = "video"
    with pytest.raises(UserError, match="Videos are not reduced here"):
        engine.get_mrope_input_positions([1, 2, 3], [video])


def test_a_prompt_gets_as_many_image_tokens_as_the_method_keeps(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = SimpleNamespace(
        anyres=None, side=4, layout=lambda tokens: single(4, 4), kept=lambda layout: build("divprune", 5).budget
    )
    monkeypatch.setattr(plugin, "served_by", lambda config: served)
    text = _Update(full=[1, *[7] * 16, 2], is_embed=lambda ids: torch.tensor(ids) == 7)
    stock = lambda items, given, out: [_Update("image", 7, lambda number: text), _Update("video", 8, [8])]  # noqa: E731
    info = SimpleNamespace(get_hf_config=lambda: None)
    image, video = plugin.prompt_updates(stock, info, None, None, None)
    assert image.replacement(0).full == [1, *[7] * 5, 2] and video.replacement == [8]
    # vLLM 0.26: text, and a tokenizer to compare it by; the plug-in called the comparison without one.
    info.get_tokenizer = lambda: SimpleNamespace(encode=lambda words, add_special_tokens: [*map(int, words)])
    text.full, text.is_embed = (
        "1" + "7" * 16 + "2",
        lambda tokenizer, ids: torch.tensor(ids) == tokenizer.encode("7", 0)[0],
    )
    assert image.replacement(0).full == [1, *[7] * 5, 2]
    text.full = [7] * 15
    with pytest.raises(UserError, match="15 tokens"):
        image.replacement(0)


@pytest.mark.parametrize("first", ["tokens", "images"])
def test_queries_and_keys_are_cut_image_by_image(first: str) -> None:
    query, key, projected = torch.randn(3, 1, 10, 2, 4)
    attention = SimpleNamespace(num_heads=2, num_kv_heads=2, scale=0.5)
    flat = projected.flatten(2)
    flat = flat.transpose(0, 1) if first == "tokens" else flat
    parts = handed_over(attention, flat, query, key, key, cu_seqlens=torch.tensor([0, 4, 10]))
    assert len(parts) == 2
    for (own, keys, before, mask, scale), cut in zip(parts, (slice(0, 4), slice(4, 10)), strict=True):
        assert mask is None and scale == 0.5
        for part, wanted in ((own, query), (keys, key), (before, projected)):
            assert torch.equal(part, wanted[:, cut].transpose(1, 2))
    handed_over(attention, flat, query, key, key, max_seqlen=torch.tensor(10), sequence_lengths=None)
    with pytest.raises(UserError, match="sequence_lengths"):  # in place of cu_seqlens: two images were one
        handed_over(attention, flat, query, key, key, sequence_lengths=torch.tensor([4, 6]))


def test_a_tower_divided_among_ranks_is_read_whole(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank scored by its own heads, and so kept other tokens."""
    tower = engine_tower("visionzip", 6)
    heads = tower.engine_model.config.vision_config.num_attention_heads
    whole = torch.rand(3, 2, heads, 5, 8)
    own, other = whole.split(heads // 2, 2)
    tower.group = SimpleNamespace(all_gather=lambda part, dim: torch.cat([part, other], dim))
    for part in (own, whole):  # InternVL's ranks have all heads
        assert torch.equal(torch.stack(tower.all_heads(Call(*part, None, 1.0))[:3]), whole)
    monkeypatch.setattr(plugin, "served_by", lambda config: tower.served)
    settings = SimpleNamespace(hf_config=None, multimodal_config=SimpleNamespace(mm_encoder_tp_mode="data"))
    with pytest.raises(UserError, match="gives each rank some of the images"):
        plugin.QwenModel(vllm_config=SimpleNamespace(model_config=settings))


def test_an_engine_refuses_gaps_between_positions_of_llava() -> None:
    config = AutoConfig.from_pretrained(DEFAULT_MODEL)
    config.vtr = {"method": "divprune", "budget": 64, "options": {"positions": "original"}}
    with pytest.raises(
        UserError, match=r"An engine numbers a prompt without gaps; divprune\.positions=original does not\."
    ):
        served_by(config)


@pytest.mark.parametrize("method", contract.METHODS)
@torch.inference_mode()
def test_an_image_becomes_the_same_tokens_inside_an_engine(method, tiny):
    """Tower scores come from what a stand-in of the engine's attention is given; the pipeline computes its own."""
    batch = [sample for sample in samples() if sample.images]
    try:
        tower = engine_tower(method, 6, positions="renumber")
    except UserError as error:
        assert "send prompt embeddings" in str(error) or "vLLM has one length" in str(error) or method == "full"
        return
    found = tower.clip_images([tiny.image_processor(sample.image)[None] for sample in batch], [(0, 0)] * len(batch))
    # A prompt of the engine is an image alone, named by its number; it matters to methods that draw.
    named = [dataclasses.replace(sample, id=str(number)) for number, sample in enumerate(batch)]
    sequence = until_decoder(
        tiny, named, registry.build(method, 6, {"positions": "renumber"}), Timer(tiny.device)
    ).start
    for row, (own, (start, stop)) in enumerate(zip(found, sequence.images, strict=True)):
        before = sequence.padding(row)
        torch.testing.assert_close(own, sequence.hidden[row, before + start : before + stop], atol=1e-5, rtol=1e-5)
