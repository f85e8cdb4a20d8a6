"""The video tower against what the official module gave, and against CLIP where time is silent."""

from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import TowerMerger, encode
from llava.model.video_llava import LanguageBindVideoTower
from llava.reduction.modules import tower_flops
from llava.reduction.scores import TOWER_SCORES, TowerScore, block_scores

FRAMES = 4
RECORDED = Path(__file__).parent / "data" / "video_llava" / "tower.npz"


def config(**changes) -> CLIPVisionConfig:
    """4 x 4 patches and CLS, 3 blocks, width 32."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**sizes, image_size=28, patch_size=7, hidden_act="quick_gelu", **changes)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that depends on its name alone, so that the official module can be given the same ones."""
    noise = np.random.RandomState(crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + noise / 5
    return noise / 2 if len(shape) == 1 else noise / np.sqrt(shape[-1])


def random_tower(frames: int = FRAMES) -> LanguageBindVideoTower:
    tower = LanguageBindVideoTower(config(), frames)
    tower.load_state_dict({key: torch.from_numpy(drawn(key, value.shape)) for key, value in tower.state_dict().items()})
    return tower.eval()


@pytest.fixture(scope="module")
def tower() -> LanguageBindVideoTower:
    return random_tower()


def pixels(videos: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    return torch.randn(videos * frames, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_the_official_module_gives_the_same():
    """All hidden states of the official module on the same weights and pixels; see tests/data/video_llava/README.md."""
    recorded = np.load(RECORDED)
    tower = random_tower(int(recorded["frames"]))
    images = torch.from_numpy(drawn("pixels", (2 * tower.frames, 3, 28, 28)))
    with torch.inference_mode():
        for index, expected in enumerate(recorded["hidden_states"]):
            features = encode(tower, images, index, keep_cls=True).features
            assert np.abs(features.numpy() - expected).max() < 2e-5, f"hidden state {index}"
            assert np.abs(expected).max() > 1


def test_without_temporal_weights_it_is_plain_clip(tower):
    """The temporal embedding stays in the stream, so it has to be zero too."""
    plain = CLIPVisionModel(config()).eval()
    shared = {key: value for key, value in tower.state_dict().items() if "temporal" not in key}
    plain.load_state_dict(shared)
    silent = random_tower()
    images = pixels()
    with torch.inference_mode():
        for block in silent.encoder.layers:
            block.temporal_attn.out_proj.weight.zero_()
            block.temporal_attn.out_proj.bias.zero_()
        expected = plain(images).last_hidden_state
        assert (silent(images).last_hidden_state - expected).abs().max() > 0.1
        for block in silent.encoder.layers:
            block.temporal_embedding.zero_()
        torch.testing.assert_close(silent(images).last_hidden_state, expected)


@pytest.mark.parametrize("block", [0, 2, -2])
def test_signals_are_those_of_the_spatial_attention(tower, block):
    """This catches signals computed from the block's input, in front of the attention over time."""
    wanted = [TowerScore(kind, block) for kind in TOWER_SCORES]
    images = pixels()
    layer = tower.encoder.layers[block]
    with torch.inference_mode():
        found = encode(tower, images, -2, wanted).scores
        hidden = encode(tower, images, block % 3, keep_cls=True).features
        seen = layer.before_space(hidden)
        plain = SimpleNamespace(layer_norm1=layer.layer_norm1, self_attn=layer.self_attn)
        for signal in wanted:
            expected = block_scores([signal], plain, seen)[signal]
            torch.testing.assert_close(found[signal], expected, atol=2e-5, rtol=1e-4)
            assert (found[signal] - block_scores([signal], plain, hidden)[signal]).abs().max() > 1e-3


def test_operations_are_those_that_torch_counts():
    tower, images = random_tower(), pixels()
    tower.config._attn_implementation = "eager"  # torch does not count its fused kernel on a CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoded = encode(tower, images, -2)
    assert counter.get_total_flops() == len(images) * tower_flops(tower, 16, encoded.tokens)


def test_merging_in_the_tower_is_refused(tower):
    """Merged tokens stand elsewhere in every frame, so attention over time would mix different places."""
    with pytest.raises(UserError, match="merges in the tower cannot run on a video tower"):
        encode(tower, pixels(), -2, merger=TowerMerger(None, None, tower, [0], 1))
