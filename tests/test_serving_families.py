"""The real engine beside transformers: families whose projector makes one token of several patches."""

import json
import os
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.config import ROOT
from llava.hf.checkpoint_model import read_processor
from llava.hf.reduce import reduce
from llava.processing.prompt import Sample
from llava.reduction.registry import build
from llava.serving.client import load_client_model, prompt_embeddings
from llava.serving.engine_model import ENVIRONMENT
from tests.family_checkpoints import SAVED, save_family
from tests.stock_families import AXES, MODELS, turned

MEAN = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
ENGINE = """
import json, sys
from PIL import Image
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from llava.serving import register
if __name__ == "__main__":
    register()
    given = json.loads(sys.argv[1])
    more = {"max_model_len": 512, "enforce_eager": True, "max_logprobs": 400, "block_size": 32}
    more |= given["more"]
    engine = LLM(model=given["model"], enable_prefix_caching=True, **more)
    sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, ignore_eos=True)
    for ids, paths in given["asked"]:  # one after the other: each finds the blocks of those before
        images = [Image.open(path).convert("RGB") for path in paths]
        asked = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
        if "embeds" in given:
            asked = {"prompt_embeds": load_file(given["embeds"])[ids]}
        (answer,) = engine.generate([asked], sampling, use_tqdm=False)
        steps = [[step[token].logprob for token in range(len(step))] for step in answer.outputs[0].logprobs]
        print("FOUND", json.dumps([steps, answer.num_cached_tokens, answer.prompt_token_ids]))
"""
# Of the text part, what the engine's kernels need: heads of 32 channels.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"num_attention_heads": 2, "rope_parameters": AXES["rope_parameters"] | {"mrope_section": [8, 4, 4]}},
    "qwen3_vl": {"head_dim": 32} | turned(8, 4, 4),
    "qwen3_5": {"head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128} | turned(8, 4, 4),
    "internvl3": {"head_dim": 32, "hidden_size": 128},
}


def answers_of_engine(folder, python, **given):
    """For each request, log-probabilities [steps, V], how many tokens the engine found in its cache, and its ids."""
    (folder / "ask.py").write_text(ENGINE)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **ENVIRONMENT}
    command = [python, folder / "ask.py", json.dumps({"model": str(folder / "model"), **given})]
    out = subprocess.run(command, env=variables, cwd=folder, stdout=subprocess.PIPE, text=True)
    return [json.loads(line.split(" ", 1)[1]) for line in out.stdout.splitlines() if line.startswith("FOUND")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, method",
    [("qwen2_5_vl", "visionzip"), ("qwen3_vl", "vispruner"), ("qwen3_5", "divprune"), ("internvl3", "visionzip")],
)
def test_the_real_engine_gives_log_probabilities_of_reduce(tmp_path, vllm_python, monkeypatch, name, method):
    """Also where a prompt begins with blocks of one before it, whose border lies inside an image."""
    for key, value in WIDE[name].items():
        monkeypatch.setitem(MODELS[name][1]["text_config"], key, value)
    _, tokens, _, *settings = SAVED["qwen3_vl"]
    monkeypatch.setitem(SAVED, "qwen3_5", SAVED["qwen3_vl"])
    monkeypatch.setitem(SAVED, "qwen2_5_vl", (SAVED["qwen3_vl"][0], tokens, "Qwen2_5_VLProcessor", *settings))
    model = save_family(name, tmp_path / "model")
    qwen, stored = name != "internvl3", tmp_path / "model" / "preprocessor_config.json"
    if qwen:  # the engine normalises pixels by this file alone
        stored.write_text(json.dumps(json.loads(stored.read_text()) | MEAN))
    processor = read_processor(tmp_path / "model", type(model))
    options = {"positions": "original"} if qwen else {}
    slot, draw, paths, asked, expected = model.config.image_token_id, np.random.default_rng(0), [], [], []
    for number, size in enumerate([(112, 112), (84, 140) if qwen else (112, 224), (112, 112), (112, 112)]):
        paths.append(str(tmp_path / f"{number}.png"))  # none is resized
        Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(paths[-1])
    same, changed = paths[:3], [*paths[:2], paths[3]]
    for words, own in (("what color", same), ("what color", same), ("where", same), ("what color", changed)):
        turn = [*({"type": "image"} for _ in own), {"type": "text", "text": f"{words} is it"}]
        text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        given = processor(text=[text], images=[list(map(Image.open, own))], return_tensors="pt")
        with reduce(model, method, 9, **options):
            more = {"eos_token_id": -1, "output_logits": True, "return_dict_in_generate": True}
            steps = model.generate(**given, max_new_tokens=3, **more).logits
        expected.append(torch.cat(steps).log_softmax(-1))
        ids = given["input_ids"][0].tolist()
        short = [token for before, token in zip([-1, *ids], ids, strict=False) if token != slot or before != slot]
        # Of InternVL3's image the engine writes the tokens around it itself.
        around = () if qwen else {short[short.index(slot) - 1], short[short.index(slot) + 1]}
        asked.append(([token for token in short if token not in around], own))
    # On a CPU, the engine's linear attention takes bfloat16 alone; its blocks hold more tokens than these prompts have.
    dtype, atol, shared = ("bfloat16", 2e-2, 0) if name == "qwen3_5" else ("float32", 5e-5, 32)
    more = {"hf_overrides": {"vtr": {"method": method, "budget": 9, "options": options}}, "dtype": dtype}
    found = answers_of_engine(tmp_path, vllm_python, more=more, asked=asked)
    for ours, (theirs, cached, ids) in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours[:, : len(theirs[0])], rtol=0, atol=atol)
        assert not cached or ids[cached - 1] == ids[cached] == slot
    assert [cached for _, cached, _ in found] == [0, shared, shared, 0]


@pytest.mark.slow
def test_internvl_by_embeddings_gives_log_probabilities_of_reduce(tmp_path, vllm_python, monkeypatch):
    """Three tiles in two images, reduced by the question."""
    for key, value in WIDE["internvl3"].items():
        monkeypatch.setitem(MODELS["internvl3"][1]["text_config"], key, value)
    model, draw = save_family("internvl3", tmp_path / "model"), np.random.default_rng(0)
    front = load_client_model(tmp_path / "model", reducer := build("consensusdrop", 9), device="cpu")
    asked, expected = [], []
    for number, (words, shape) in enumerate([("what color", (112, 112, 3)), ("where", (112, 224, 3))]):
        image = Image.fromarray(draw.integers(0, 255, shape, np.uint8))
        asked.append(sample := Sample(str(number), words, image=image))
        with reduce(model, "consensusdrop", 9, questions=[words], tokenizer=front.processor):
            more = {"eos_token_id": -1, "output_logits": True, "return_dict_in_generate": True}
            steps = model.generate(**front.inputs([sample]), max_new_tokens=3, **more).logits
        expected.append(torch.cat(steps).log_softmax(-1))
    made = prompt_embeddings(front, asked, reducer)
    save_file({str(number): own.clone() for number, own in enumerate(made)}, tmp_path / "made.safetensors")
    more = {"enable_prompt_embeds": True, "limit_mm_per_prompt": {"image": 0}, "dtype": "float32"}
    requests = [(str(number), []) for number in range(len(made))]
    given = {"more": more, "asked": requests, "embeds": str(tmp_path / "made.safetensors")}
    for ours, (theirs, *_) in zip(expected, answers_of_engine(tmp_path, vllm_python, **given), strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours[:, : len(theirs[0])], rtol=0, atol=5e-5)
