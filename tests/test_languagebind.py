"""The video tower against loops over positions and frames, and against what the official module gave."""

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.model.multimodal_encoder.languagebind import LanguageBindVideoTower
from llava.reduction.flops import tower_flops
from llava.reduction.scores import TOWER_SCORES, BlockInput, TowerScore, tower_score

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


def hidden_states(videos: int = 2, frames: int = FRAMES, tokens: int = 17) -> torch.Tensor:
    return torch.randn(videos * frames, tokens, 32, generator=torch.Generator().manual_seed(1))


# The definition, in float64 and with loops.


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def norm(rows: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
    centred = rows - rows.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return scaled * array(layer.weight) + array(layer.bias)


def linear(rows: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    return rows @ array(layer.weight).T + array(layer.bias)


def attention(rows: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    """[L, D] -> [L, D], every row attends every row."""
    heads, width = layer.num_heads, layer.head_dim
    query, key, value = (linear(rows, part) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    joined = np.zeros_like(rows)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / np.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        joined[:, part] = weights / weights.sum(-1, keepdims=True) @ value[:, part]
    return linear(joined, layer.out_proj)


def time_by_the_book(hidden: np.ndarray, block: torch.nn.Module, frames: int) -> np.ndarray:
    result = hidden.copy()
    for video in range(len(hidden) // frames):
        for position in range(hidden.shape[1]):
            rows = np.stack([hidden[video * frames + frame, position] for frame in range(frames)])
            if frames != 1:
                rows = rows + array(block.temporal_embedding)[0]
            rows = rows + attention(norm(rows, block.temporal_layer_norm1), block.temporal_attn)
            for frame in range(frames):
                result[video * frames + frame, position] = rows[frame]
    return result


def block_by_the_book(hidden: np.ndarray, block: torch.nn.Module, frames: int) -> np.ndarray:
    result = time_by_the_book(hidden, block, frames)
    for frame, rows in enumerate(result):
        rows = rows + attention(norm(rows, block.layer_norm1), block.self_attn)
        inner = linear(norm(rows, block.layer_norm2), block.mlp.fc1)
        result[frame] = rows + linear(inner / (1 + np.exp(-1.702 * inner)), block.mlp.fc2)
    return result


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("videos", [1, 3])
def test_a_block_follows_the_definition(frames, videos):
    block = random_tower(frames).encoder.layers[1]
    hidden = hidden_states(videos, frames)
    with torch.inference_mode():
        before, after = block.before_space(hidden), block(hidden, None)
    assert before.shape == after.shape == hidden.shape
    assert np.abs(array(before) - time_by_the_book(array(hidden), block, frames)).max() < 1e-5
    assert np.abs(array(after) - block_by_the_book(array(hidden), block, frames)).max() < 2e-5


def test_selected_features_follow_the_definition_with_cls(tower):
    """Video-LLaVA takes the input of the last block, CLS of every frame in front."""
    with torch.inference_mode():
        encoded = encode(tower, pixels(), -2, keep_cls=True)
        hidden = array(tower.pre_layrnorm(tower.embeddings(pixels())))
        without = encode(tower, pixels(), -2)
    for block in tower.encoder.layers[:-1]:
        hidden = block_by_the_book(hidden, block, FRAMES)
    assert encoded.features.shape == (2 * FRAMES, 17, 32)
    assert np.abs(array(encoded.features) - hidden).max() < 5e-5
    assert torch.equal(without.features, encoded.features[:, 1:])


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


def test_keys_are_clips_and_the_temporal_ones(tower):
    plain = set(CLIPVisionModel(config()).state_dict())
    parts = [f"temporal_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")]
    parts += ["temporal_attn.out_proj.weight", "temporal_attn.out_proj.bias"]
    parts += ["temporal_layer_norm1.weight", "temporal_layer_norm1.bias", "temporal_embedding"]
    temporal = {f"encoder.layers.{block}.{part}" for block in range(3) for part in parts}
    assert set(tower.state_dict()) == plain | temporal
    assert tower.state_dict()["encoder.layers.2.temporal_embedding"].shape == (1, FRAMES, 32)


def test_a_token_reaches_its_own_position_in_its_own_video_only(tower):
    hidden = hidden_states()
    changed = hidden.clone()
    changed[2, 5, 0] += 3  # of one channel only: the norm takes out what all have in common
    block = tower.encoder.layers[0]
    with torch.inference_mode():
        moved = (block.before_space(changed) - block.before_space(hidden)).abs().amax(-1) > 1e-4
    expected = torch.zeros(2 * FRAMES, 17, dtype=torch.bool)
    expected[:FRAMES, 5] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("block", [0, 2, -2])
def test_signals_are_those_of_the_spatial_attention(tower, block):
    """This catches signals computed from the block's input, in front of the attention over time."""
    wanted = [TowerScore(kind, block) for kind in TOWER_SCORES]
    images = pixels()
    layer = tower.encoder.layers[block]
    with torch.inference_mode():
        found = encode(tower, images, -2, wanted).scores
        hidden = encode(tower, images, block % 3, keep_cls=True).features
        seen = torch.from_numpy(time_by_the_book(array(hidden), layer, FRAMES)).float()
        for signal in wanted:
            expected = tower_score(signal, BlockInput(layer, seen))
            torch.testing.assert_close(found[signal], expected, atol=2e-5, rtol=1e-4)
            assert (found[signal] - tower_score(signal, BlockInput(layer, hidden))).abs().max() > 1e-3


def test_operations_are_those_that_torch_counts():
    tower, images = random_tower(), pixels()
    tower.config._attn_implementation = "eager"  # torch does not count its fused kernel on a CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoded = encode(tower, images, -2)
    assert counter.get_total_flops() == len(images) * tower_flops(tower, 16, encoded.tokens)


def test_frames_that_make_no_whole_videos_are_refused(tower):
    with pytest.raises(UserError, match="takes 4 frames per video, but got 6 frames in total"):
        encode(tower, pixels(1, 6), -2)
    with pytest.raises(UserError, match="at least one frame, got 0"):
        LanguageBindVideoTower(config(), 0)


def test_merging_in_the_tower_is_refused(tower):
    """Merged tokens stand elsewhere in every frame, so attention over time would mix different places."""
    with pytest.raises(UserError, match="merges in the tower cannot run on a video tower"):
        encode(tower, pixels(), -2, merging=[0], merge_at=lambda *parts: None)


def test_a_fresh_temporal_embedding_is_drawn_as_officially():
    wide = LanguageBindVideoTower(config(), 8)
    drawn_std = torch.cat([layer.temporal_embedding.flatten() for layer in wide.encoder.layers]).std()
    assert abs(drawn_std.item() - 32**-0.5) < 0.02
