"""The real engine on two tensor-parallel ranks, each of which computes half of the tower's heads."""

import json
import os
import subprocess

import pytest
import torch

from eval.config import ROOT
from eval.efficiency.shapes import narrow
from lab.bench.serving import save_random
from llava.serving.engine_model import ENVIRONMENT

ENGINE = """
import json, sys
import numpy as np, torch
from PIL import Image
from llava.serving.engine_model import import_vllm

def kept(worker):
    model, pixels = worker.get_model(), torch.randn(6, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = torch.stack(model.engine_tower.clip_images(list(pixels), [(56, 56)] * 6))
    return model.attentions()[0].attn.num_heads, tokens.tolist()

if __name__ == "__main__":
    vllm, (folder, method, ranks, slot) = import_vllm(), sys.argv[1:]
    more = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "tensor_parallel_size": int(ranks)}
    engine = vllm.LLM(folder, hf_overrides={"vtr": {"method": method, "budget": 6}}, **more)
    noise = np.random.default_rng(0).integers(0, 255, (6, 56, 56, 3), np.uint8)
    ids = [1, 5, int(slot), 7, 9]
    asked = [{"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(one)}} for one in noise]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    outputs = engine.generate(asked, sampling, use_tqdm=False)
    made = [(len(asked.prompt_token_ids), asked.outputs[0]) for asked in outputs]
    answers = [(length, one.token_ids, one.cumulative_logprob) for length, one in made]
    print("FOUND", json.dumps([engine.collective_rpc(kept), answers]))
"""


@pytest.mark.slow
@pytest.mark.lab
@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_two_ranks_keep_the_tokens_of_one(tmp_path, vllm_python, method):
    """Scores of half of the heads chose other tokens on each rank, so more than one was refused."""
    save_random(narrow("llava-1.5-7b", 256, 2, 3, 56), tmp_path / "model", "float32")
    slot = json.loads((tmp_path / "model" / "config.json").read_text())["image_token_index"]
    (tmp_path / "ask.py").write_text(ENGINE)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **ENVIRONMENT}
    found = []
    for ranks in (1, 2):
        command = [vllm_python, tmp_path / "ask.py", tmp_path / "model", method, str(ranks), str(slot)]
        out = subprocess.run(command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
        found += [json.loads(line.split(" ", 1)[1]) for line in out.stdout.splitlines() if line.startswith("FOUND")]
    ([(heads, tokens)], answers), ([(first, tokens_first), (second, tokens_second)], split) = found
    assert first == second == heads // 2 and tokens_first == tokens_second
    torch.testing.assert_close(torch.tensor(tokens_first), torch.tensor(tokens), rtol=0, atol=1e-4)
    assert [one[:2] for one in split] == [one[:2] for one in answers] and {one[0] for one in answers} == {10}
    torch.testing.assert_close([one[2] for one in split], [one[2] for one in answers], rtol=0, atol=1e-4)
