"""Tower scores of Qwen's vision transformers against loops over transformers' own states, and operations."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from llava.errors import UserError
from llava.model.multimodal_encoder.stock_tower import StockTower
from llava.model.qwen_vl import tower_flops
from llava.reduction import modules, scores
from llava.reduction.scores import WITHOUT_CLS, TowerScore
from llava.transformers_names import vision_arguments

# Rows and columns that windows divide and that they do not, one image within a window, a film, two of one size.
GRIDS = [(1, 8, 12), (1, 4, 4), (1, 10, 6), (2, 6, 8), (1, 8, 12), (1, 2, 14)]
SHARED = {"depth": 4, "num_heads": 4, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}


def tower(family: str, window: int = 8) -> torch.nn.Module:
    """Random weights large enough for attention to have a say; windows of window / 4 x window / 4 groups."""
    torch.manual_seed(1)
    if family == "2.5":
        config = Qwen2_5_VLVisionConfig(
            **SHARED,
            hidden_size=32,
            intermediate_size=40,
            out_hidden_size=24,
            window_size=window,
            fullatt_block_indexes=[1, 3],
        )
        visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    else:
        config = Qwen2VLVisionConfig(**SHARED, embed_dim=32, hidden_size=24, mlp_ratio=2)
        visual = Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    for name, parameter in visual.named_parameters():
        if parameter.dim() > 1:
            # Larger queries and keys: peaked attention.
            spread = 1.5 if "qkv" in name else 1
            torch.nn.init.normal_(parameter, std=spread * parameter[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return visual.eval()


def some_patches(grids=GRIDS) -> torch.Tensor:
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 2 * 2)


@pytest.fixture(params=["2.5", "2"])
def visual(request):
    return tower(request.param)


def scores_of(visual, patches, grids, wanted):
    """Score -> [tokens, ...] of all images together, and the merger's output; a frame counts as an image."""
    stock = StockTower(visual.blocks, visual.config, cls=None, runs=True, last=-2)
    with stock.recording(wanted) as calls:
        output = visual(patches, **vision_arguments(visual, grids, torch.device("cpu")))
    frames = [(rows, columns) for count, rows, columns in grids for _ in range(count)]
    found = stock.scores_of_tokens(calls, frames, 2, torch.device("cpu"))
    return {score: torch.cat(values) for score, values in found.items()}, output.pooler_output


def test_arguments_worked_out_on_the_host_change_nothing(visual):
    patches = some_patches()
    with torch.inference_mode():
        expected = visual(patches, torch.tensor(GRIDS)).pooler_output
        _, found = scores_of(visual, patches, GRIDS, [TowerScore("received_attention")])
    assert expected.std() > 0.1 and torch.equal(found, expected)


# Signals


def inputs_of(visual, index: int, patches: torch.Tensor) -> torch.Tensor:
    """What enters a block in the official forward, [G, 4, D] in the processor's order."""
    seen = []
    handle = visual.blocks[index].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    visual(patches, torch.tensor(GRIDS))
    handle.remove()
    groups = seen[0].unflatten(0, (-1, 4))
    if hasattr(visual, "window_size"):
        order = get_vision_window_index(torch.tensor(GRIDS), 2, visual.window_size, visual.patch_size)[0]
        groups = groups[order.argsort()]
    return groups


def turned(states: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Rotary by two axes of [..., d]: the first half of the pairs turns by the row, the second by the column."""
    half, out = states.shape[-1] // 2, states.clone()
    for pair in range(half):
        place, frequency = (row, pair) if pair < half // 2 else (column, pair - half // 2)
        angle = torch.tensor(place * 10000.0 ** (-2 * frequency / half))
        a, b = states[..., pair], states[..., pair + half]
        out[..., pair] = a * angle.cos() - b * angle.sin()
        out[..., pair + half] = b * angle.cos() + a * angle.sin()
    return out


def signals_by_the_book(visual, index: int, patches: torch.Tensor):
    """Received attention with and without a patch's own, keys and whole keys of every group, one frame, head and patch
    after another."""
    block = visual.blocks[index]
    states = block.attn.qkv(block.norm1(inputs_of(visual, index, patches))).unflatten(-1, (3, 4, 8))
    received, others, plain = [], [], states[..., 1, :, :]
    begin = 0
    for frames, rows, columns in GRIDS:
        for _ in range(frames):
            count = rows * columns // 4
            frame = states[begin : begin + count].flatten(0, 1)  # [p, 3, H, d]
            places = [
                (2 * (g // (columns // 2)) + i, 2 * (g % (columns // 2)) + j)
                for g in range(count)
                for i in range(2)
                for j in range(2)
            ]
            query, key = torch.stack([turned(frame[p, :2], *place) for p, place in enumerate(places)]).unbind(1)
            total, own = torch.zeros(len(places)), torch.zeros(len(places))
            for head in range(4):
                for place, row in enumerate(query[:, head]):
                    given = (key[:, head] @ row / 8**0.5).softmax(0)
                    total += given
                    own[place] += given[place]
            received += [group.mean() for group in (total / (4 * len(places))).split(4)]
            others += [group.mean() for group in ((total - own) / (4 * (len(places) - 1))).split(4)]
            begin += count
    return torch.stack(received), torch.stack(others), plain.mean((1, 2)), plain.mean(1).flatten(1)


@pytest.mark.parametrize("block", [1, 3])
def test_signals_equal_the_definition(visual, block, monkeypatch):
    monkeypatch.setattr(scores, "ROWS", 7)  # slices that do not divide the patches
    patches = some_patches()
    kinds = ("received_attention", "received_from_others", "keys", "whole_keys", "received_from_all", *WITHOUT_CLS)
    wanted = [TowerScore(kind, block) for kind in kinds]
    with torch.inference_mode():
        expected = signals_by_the_book(visual, block, patches)
        received = expected[0]
        # Without a class token, all tokens are the patches; the others stand in place of the scores of that token.
        expected = *expected, received, received, received, received.log()
        found, _ = scores_of(visual, patches, GRIDS, wanted)
    for signal, values in zip(wanted, expected, strict=True):
        assert found[signal].dtype == torch.float32
        torch.testing.assert_close(found[signal], values, atol=1e-6 if values.dim() == 1 else 1e-5, rtol=1e-4)
    received = found[wanted[0]][: GRIDS[0][1] * GRIDS[0][2] // 4]
    torch.testing.assert_close(received.sum(), torch.tensor(0.25), atol=1e-6, rtol=0)
    assert received.max() > 1.5 * received.min(), "attention is flat, the comparison would show nothing"


def test_no_full_attention_map_is_held(visual, monkeypatch):
    """The largest tensor that softmax ever sees stays within the bounds on rows and on numbers."""
    seen, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *a, **k: seen.append(self) or softmax(self, *a, **k))
    monkeypatch.setattr(scores, "ROWS", 5)
    monkeypatch.setattr(scores, "WEIGHTS", 2000)
    with torch.inference_mode():
        scores_of(visual, some_patches(), GRIDS, [TowerScore("received_attention")])
    assert seen and max(weights.shape[2] for weights in seen) <= 5
    assert all(weights.numel() <= 2000 or weights.shape[2] == 1 for weights in seen)


def test_signals_move_to_a_block_that_sees_the_whole_image():
    def block_of(visual, *score, **more):
        stock = StockTower(visual.blocks, visual.config, cls=None, runs=True, last=-2)
        return stock.block_of(TowerScore("keys", *score, **more))

    windowed, whole = tower("2.5"), tower("2")
    assert [block_of(windowed, block) for block in (0, 1, 2, 3, -1, -2, -3, -4)] == [1, 1, 3, 3, 3, 3, 1, 1]
    assert [block_of(whole, block) for block in (0, 2, -2)] == [0, 2, 2]
    assert block_of(windowed, 5, depth=24) == 1
    windowed.config.fullatt_block_indexes = [0, 1]
    assert block_of(windowed) == 1, "no such block behind it: the last one there is"


def test_signals_that_cannot_be_had_are_refused():
    stock = StockTower(range(4), SimpleNamespace(), cls=None, runs=True)
    with pytest.raises(UserError, match="Unknown tower score"):
        stock.block_of(TowerScore("values"))
    with pytest.raises(UserError, match="has 4 blocks"):
        stock.block_of(TowerScore("keys", -5))


# Operations


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[0] == 1])
@pytest.mark.parametrize("kind", ["received_attention", "received_from_all", "received_from_others", "keys"])
def test_flops_equal_what_torch_counts(visual, grid, kind):
    """Attention by plain matrix products, which torch's counter sees on every machine."""
    signal, patches = TowerScore(kind), some_patches([grid])
    stock = StockTower(visual.blocks, visual.config, cls=None, runs=True, last=-2)
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        with stock.recording([signal]) as calls:
            visual(patches, **vision_arguments(visual, [grid], torch.device("cpu")))
        tower_and_merger = counter.get_total_flops()
        stock.scores_of_tokens(calls, [grid[1:]], 2, torch.device("cpu"))
    merger = modules.projector_flops(visual.merger, grid[1] * grid[2] // 4)
    assert tower_and_merger == tower_flops(visual, grid[1:]) + merger
    assert counter.get_total_flops() - tower_and_merger == stock.score_flops(calls, grid[1] * grid[2])
