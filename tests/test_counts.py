"""Counts of one prefill against the textbook, and the largest tensor that a method makes."""

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.efficiency.counts import OperationCounter, computed, count_prefill, flop_counter
from eval.efficiency.growth import model_of
from eval.efficiency.shapes import SHAPES, narrow, noise_batches, random_llava
from llava.errors import UserError
from llava.model.checkpoint.config import CLIP_L_336
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from llava.reduction.budget import require
from tests.allocations import metered_peak
from tests.conftest import samples
from visiondrop.method import SLICE

HEADS = 4


@pytest.fixture(scope="module")
def small():
    """576 visual tokens, 4 layers of 128 channels; 3 tower blocks."""
    return random_llava(narrow("llava-1.5-7b", 128, 4), None, "float32")


def textbook(layers, length, patches):
    """Operations of LLaVA-1.5-7B up to the first token, from the papers' formula: 2 per multiply-add."""
    d, m, words = (SHAPES["llava-1.5-7b"]["text"][size] for size in ("hidden_size", "intermediate_size", "vocab_size"))
    decoder = layers * (2 * length * (4 * d * d + 3 * d * m) + 4 * length * length * d)
    v, w, blocks = CLIP_L_336["hidden_size"], CLIP_L_336["intermediate_size"], CLIP_L_336["num_hidden_layers"] - 1
    seen = patches + 1  # the CLS token
    tower = blocks * (2 * seen * (4 * v * v + 2 * v * w) + 4 * seen * seen * v) + 2 * patches * 3 * 14 * 14 * v
    projector = 2 * patches * (v * d + d * d)
    return decoder + tower + projector + 2 * d * words


@pytest.mark.table
def test_counted_operations_are_those_of_the_papers_formula():
    """Within 1 %, at the real width and full depth."""
    model = random_llava("llava-1.5-7b", 1, device=torch.device("meta"))
    asked = noise_batches(model, 1, False)(0)
    text = sum(token >= 0 for token in model.prompt(asked[0]).ids)
    found = computed(model, registry.build("full", 576), asked)
    assert found.flops == pytest.approx(textbook(32, 576 + text, 576), rel=0.01)
    assert found.flops == pytest.approx(found.formula, rel=0.01)
    # 32 layers, keys and values, 32 heads of 128 channels, two bytes.
    assert found.kv_bytes_per_layer == ((576 + text) * 2 * 4096 * 2,) * 32


class Recorded(TorchDispatchMode):
    """Every operation as (name, whether it is no view): the plainest counter there is."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append((str(function), not function.is_view))
        return function(*args, **(kwargs or {}))


def runnable(method, budget, options, model):
    """The method with these options, or None where it has no such choice or cannot meet the budget."""
    try:
        reducer = registry.build(method, budget, options)
        require(reducer, model.spec)
    except UserError:
        return None
    return reducer


@pytest.mark.parametrize("method", sorted(set(registry.names()) - {"full"}))
def test_counted_operations_are_those_of_the_closed_formula(small, method):
    """Within 1 % for every method, its selection included, on the device that computes."""
    reducer = runnable(method, 288, {}, small) or runnable(method, 288, {"schedule": "kept"}, small)
    found = computed(small, reducer, noise_batches(small, 1, False)(0))
    assert found.flops == pytest.approx(found.formula, rel=0.01)


def test_the_fused_kernel_of_the_cpu_is_counted():
    """torch's counter does not know it: half of a long prefill's operations were missing."""
    query = torch.randn(1, HEADS, 96, 32)
    with torch.inference_mode(), flop_counter() as counter, OperationCounter() as noted:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert counter.get_total_flops() == 4 * HEADS * 96 * 96 * 32
    assert noted.attention == {"scaled_dot_product_flash_attention_for_cpu"}
    assert noted.largest == query.numel()


def test_the_largest_tensor_is_noted():
    with OperationCounter() as noted:
        tensor = torch.zeros(10)
        tensor.expand(1000, 10)
        assert noted.largest == 10, "a view is no new tensor"
        tensor[:, None] * tensor
    assert noted.largest == 100


def test_a_method_that_reads_values_is_counted_where_there_are_some(tiny):
    """The meta device computes shapes alone."""
    asked, reducer = samples(1), registry.build("hired", 8)

    class Readless:
        def __getattr__(self, name):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    found = count_prefill(tiny, reducer, asked, Readless())
    assert found.tokens_per_layer == (8,) * 4
    assert found.waits is None, "a 0 would say that the host waits for nothing; on a CPU there is nothing to wait for"
    with pytest.raises(NotImplementedError):
        count_prefill(Readless(), reducer, asked)


@pytest.mark.table
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "scope", "visiondrop"])
def test_operations_are_those_of_the_measured_model(method):
    """CDPruner was 2,386 above its oracle in a table of shapes: a greedy choice is a plain loop on the meta device."""
    shape = narrow("llava-1.5-7b", 128, 4)
    model = random_llava(shape, None, "float32")
    shapes = random_llava(shape, 1, "float32", device=torch.device("meta"))
    asked, reducer = noise_batches(model, 1, False)(0), registry.build(method, 64)
    found = count_prefill(model, reducer, asked, shapes)
    with torch.inference_mode():
        prefill(model, asked, reducer)  # what depends on sizes alone is made in a first prefill
        with Recorded() as recorded:
            state, _ = prefill(model, asked, reducer)
            model.logits(state.hidden).argmax(-1)
    ours = [name for name, _ in recorded.found]
    # Reading and preparing the image is no work of the device.
    with torch.inference_mode(), Recorded() as before:
        model.views(asked[0].image)
    assert found.operations == len(ours) - len(before.found)
    assert found.kernels == sum(kernel for _, kernel in recorded.found) - sum(kernel for _, kernel in before.found)
    assert found.waits == 1, "the copy of the pixels, seen on the meta device"


@pytest.mark.table
@pytest.mark.parametrize("method", sorted(set(registry.names()) - {"full"}))
def test_no_method_makes_a_tensor_of_tokens_times_tokens_times_heads(method):
    """2,560 visual tokens ranked together, 4 heads: an attention map would have 26 million elements. A table of pairs,
    which methods of diversity use, has a quarter of that; VisionDrop's rows of attention come in slices."""
    tokens = 2560
    model = model_of(tokens, 64 * HEADS, 4, 3, torch.device("cpu"), "float32")
    reducer = next(
        built
        for options in ({"crops": "global"}, {"crops": "global", "schedule": "kept"}, {})
        if (built := runnable(method, tokens // 2, options, model)) is not None
    )
    found = computed(model, reducer, noise_batches(model, 1, False)(0))
    length = tokens + 128  # with the text
    assert found.largest <= max(length * length, SLICE) < HEADS * tokens * tokens


@cache
def peak_at_7b(tokens: int, method: str) -> int:
    """Bytes of a prefill at 7B shapes with 8 decoder layers; tiles of LLaVA-NeXT, or the 8 frames of a video."""
    video, side = tokens == 2056, 336
    options, shape = {}, "video-llava-7b" if video else "llava-next-7b"
    if not video:
        columns = {1152: 1, 2880: 2, 5760: 3, 11520: 19}[tokens]
        rows = (tokens // 576 - 1) // columns
        options = {"merge": "spatial", "force": (columns * side, rows * side)}
    model = random_llava(shape, 1, layers=8, device=torch.device("meta"), **options)
    assert model.visual_tokens == tokens
    reducer, asked = registry.build(method, tokens if method == "full" else tokens // 9), noise_batches(model, 1, video)
    _ = model.clip  # read when it is first asked for
    return metered_peak(lambda: model.logits(prefill(model, asked(0), reducer)[0].hidden))


@pytest.mark.parametrize(
    ("tokens", "method"),
    [(tokens, "consensusdrop") for tokens in (1152, 2880, 5760, 11520, 2056)]
    + [(tokens, method) for tokens in (11520, 2056) for method in ("cdpruner", "holov", "uniform", "random")],
)
def test_no_prompt_is_copied_for_a_tile_or_frame(tokens, method):
    """Each tile got a copy of the whole prompt: ConsensusDrop held 9,826 MB at 11,520 tokens where full holds 2,786,
    and 754 for 508 on a video."""
    assert peak_at_7b(tokens, method) < peak_at_7b(tokens, "full") / 2.5
