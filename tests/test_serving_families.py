"""The real engine beside transformers: families whose projector makes one token of several patches."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.config import ROOT
from llava.hf.reduce import reduce
from llava.model.builder import load
from llava.processing.prompt import Sample
from llava.serving.engine_model import ENVIRONMENT
from tests.family_checkpoints import save_family
from tests.stock_families import MODELS, turned

MEAN = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
ENGINE = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from llava.serving import register
if __name__ == "__main__":
    register()
    given = json.loads(sys.argv[1])
    more = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_logprobs": 400, "block_size": 32}
    engine = LLM(model=given["model"], hf_overrides={"vtr": given["vtr"]}, enable_prefix_caching=False, **more)
    asked = [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.open(path).convert("RGB")}}
        for ids, path in given["asked"]
    ]
    answers = engine.generate(asked, SamplingParams(temperature=0, max_tokens=1, logprobs=-1), use_tqdm=False)
    found = [answer.outputs[0].logprobs[0] for answer in answers]
    print("FOUND", json.dumps([[one[token].logprob for token in range(len(one))] for one in found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, method", [("qwen3_vl", "vispruner"), ("internvl3", "visionzip")])
def test_first_tokens_on_the_real_engine_are_those_of_reduce(tmp_path, monkeypatch, name, method):
    python = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm") / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with vLLM: source scripts/serve_setup.sh makes .venv-vllm")
    qwen, text = name == "qwen3_vl", MODELS[name][1]["text_config"]
    wide = {"head_dim": 32} | (turned(8, 4, 4) if qwen else {"hidden_size": 128})  # the engine's kernels need 32
    for key, value in wide.items():
        monkeypatch.setitem(text, key, value)
    save_family(name, tmp_path / "model")
    stored = tmp_path / "model" / "preprocessor_config.json"
    if qwen:  # the engine normalises pixels by this file alone
        stored.write_text(json.dumps(json.loads(stored.read_text()) | MEAN))
    model = load(tmp_path / "model", device="cpu")
    options = {"positions": "original"} if qwen else {}
    slot, draw, asked, expected = model.token("image"), np.random.default_rng(0), [], []
    for number, size in enumerate([(112, 112), (84, 140)] if qwen else [(112, 112), (112, 224)]):  # nothing is resized
        path = tmp_path / f"{number}.png"
        Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
        given = model.inputs([Sample("0", "what color is it", image=Image.open(path))])
        with reduce(model.hf_model, method, 8, **options):
            expected.append(model.hf_model(**given).logits[0, -1].log_softmax(-1))
        ids = given["input_ids"][0].tolist()
        short = [token for before, token in zip([-1, *ids], ids, strict=False) if token != slot or before != slot]
        # Of InternVL3's image the engine writes the tokens around it itself.
        around = () if qwen else {short[short.index(slot) - 1], short[short.index(slot) + 1]}
        asked.append(([token for token in short if token not in around], str(path)))
    words = {"model": str(tmp_path / "model"), "asked": asked}
    words["vtr"] = {"method": method, "budget": 8, "options": options}
    (tmp_path / "ask.py").write_text(ENGINE)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **ENVIRONMENT}
    out = subprocess.run(
        [python, tmp_path / "ask.py", json.dumps(words)], env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(next(line for line in out.stdout.splitlines() if line.startswith("FOUND")).split(" ", 1)[1])
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours[: len(theirs)], rtol=0, atol=5e-5)
