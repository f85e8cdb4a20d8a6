"""Operations of a prefill: beside its oracle, by the textbook, and the most memory; waits of the host."""

import json
from contextlib import suppress
from functools import cache

import pytest
import torch
from torch import nn

import visiondrop.method
from eval.efficiency.counts import Call, OperationCounter, PythonWaits, calls_of, computed, count_prefill, flop_counter
from eval.efficiency.oracle import even_places, flat_oracle, oracle_of
from eval.efficiency.shapes import SHAPES, noise_batches, random_llava
from lab.bench.growth import model_of
from llava.errors import UserError
from llava.model.builder import load
from llava.model.checkpoint.config import CLIP_L_336
from llava.pipeline.generate import prefill
from llava.reduction import registry
from llava.reduction.budget import planned, require
from tests import contract
from tests.allocations import metered_peak
from tests.conftest import samples
from tests.golden import BUDGET, LIMITS, above_oracle, counted_oracle, method, question
from tests.test_every_method import reducing

SLICE = (
    2**21
)  # elements of the largest attention that VisionDrop holds at a time; 2**24 of a real run are too many here
# Methods whose host chooses by values of the device, and why.
READS = {
    "vlmpruner": "each group of candidates depends on those before; on the device that would be thousands of kernels",
    "prunesid": "a few looks whether a loop has ended save hundreds of rounds, and a decomposition waits anyway",
}
LIMITS_OF = json.loads(LIMITS.read_text())
WRITE = "run python -m tests.golden"


@pytest.fixture(scope="module")
def toy():
    return load(device="cpu")


@pytest.fixture(scope="module")
def shapes():
    """The model without its weights, on the device that computes shapes alone."""
    model = load(device="cpu")
    model.hf_model.to("meta")
    model.device = torch.device("meta")
    return model


def waits_of(shapes, reducer) -> list[Call]:
    """Waits of one prefill between the copy of the pixels to the device and the choice of the first token."""
    waits = [call for call in calls_of(shapes, reducer, question()) if call.synchronisations]
    pixels = bool(waits) and waits[0].line.endswith(" encode_images")
    return waits[pixels:]


@pytest.mark.parametrize("name", contract.METHODS)
def test_no_more_operations_above_the_oracle_than_its_limit(name, toy):
    assert name in LIMITS_OF, f"{name} has no limit yet; {WRITE} {name}"
    above = above_oracle(toy, name)
    assert above <= LIMITS_OF[name], (
        f"{name} dispatches {above} operations more than its oracle; if that is intended, {WRITE} {name}"
    )


def test_every_limit_is_one_of_a_method():
    assert set(LIMITS_OF) == set(contract.METHODS), WRITE


@pytest.mark.parametrize("name", contract.METHODS)
def test_the_host_never_waits_after_the_pixels(name, shapes):
    """Shapes are known on the host, and what it sends to the device it sends without waiting.

    A method whose number of tokens, or of tokens inside the tower, depends on the image waits for it, in its own file.
    """
    waits, cls = waits_of(shapes, method(name, shapes.visual_tokens)), registry.method(name)
    own = f"{cls.__module__.replace('.', '/')}.py"
    if name in READS:  # the first wait ends a prefill on this device
        assert len(waits) == 1 and waits[0].line.startswith(own)
        return
    waits = [call for call in waits if not ((cls.image_decides or cls.tower_by_image) and call.line.startswith(own))]
    assert not waits, "\n".join(f"{call.part} {call.line} ({call.name})" for call in waits)


def test_the_exception_is_seen(shapes):
    """With `official`, PruMerge keeps as many tokens as there are outliers: the host must learn their number."""
    waits = waits_of(shapes, registry.build("prumerge", BUDGET, {"official": "true"}))
    assert waits and {call.line.split(":")[0] for call in waits} == {"baselines/prumerge.py"}


def counted(run, device: str = "cpu") -> list[Call]:
    counter = OperationCounter()
    failures = suppress(NotImplementedError, RuntimeError, TypeError)
    with failures, torch.inference_mode(), PythonWaits(counter), counter:
        run(torch.ones(3, 4, device=device))
    counter.mark("prefill")
    return counter.calls


def test_counts_operations_kernels_and_lines():
    found = counted(lambda x: nn.functional.relu(x.transpose(0, 1)) + 1)
    assert [(call.name, call.kernel) for call in found] == [
        ("ones", True),
        ("transpose", False),
        ("relu", True),
        ("add", True),
    ]
    assert all(call.line.startswith("tests/test_dispatched.py:") for call in found)


READINGS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy": lambda x: torch.empty(3, 4).copy_(x),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("run", READINGS.values(), ids=READINGS)
def test_sees_what_makes_the_host_wait(run):
    """On the host itself nothing waits."""
    assert [call.synchronisations for call in counted(run, "meta")].count(True) == 1
    assert not any(call.synchronisations for call in counted(run))


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda x: torch.tensor([1, 2], device=x.device), 1),
        (lambda x: torch.tensor([1, 2]).to(x.device), 1),
        (lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True), 0),
        (lambda x: torch.arange(3, device=x.device) + x[:, 0], 0),
        (lambda x: x[torch.tensor([0, 1])], 1),
    ],
)
def test_sees_copies_that_block(run, waits):
    assert sum(call.synchronisations for call in counted(run, "meta")) == waits


# The oracle: as many tokens in every layer as the method, and nothing read of the image.


def asked(model, reducer, batch=None) -> tuple[list[tuple[int, ...]], list[list[list[int]]]]:
    """Tokens in every layer of each sample, and the kept tokens of each that has an image."""
    state, record = prefill(model, batch or samples(), reducer)
    kept = [[step.reduction.kept.tolist() for step in steps] for steps in record.steps if steps]
    return [account.tokens_per_layer for account in record.accounting(state)], kept


@pytest.mark.parametrize("name", contract.METHODS)
def test_as_many_tokens_in_every_layer_and_the_same_places_of_every_image(name, tiny):
    reducer = reducing(name, tiny)
    batch = samples(1) if planned(reducer, tiny.spec) is None else samples()
    oracle = counted_oracle(tiny, reducer, batch)
    tokens, kept = asked(tiny, oracle, batch)
    assert tokens == asked(tiny, reducer, batch)[0]
    assert all(places == kept[0] for places in kept)
    assert not oracle.tower_scores(tiled=True)


def test_the_flat_oracle_has_the_budget_in_every_layer(tiny):
    assert asked(tiny, flat_oracle(5))[0][0] == (5,) * len(tiny.llm.layers)


def test_places_are_evenly_spaced_and_made_once():
    places = even_places(2, 16, 6, torch.device("cpu"))
    assert places.tolist() == [[0, 2, 5, 8, 10, 13]] * 2
    assert even_places(2, 16, 6, torch.device("cpu")) is places


def test_a_method_whose_tokens_depend_on_the_image_has_no_oracle(tiny):
    with pytest.raises(UserError, match="depends on the image"):
        oracle_of(registry.build("trim", 8, {"adaptive": "true"}), tiny.spec)


# Counts of one prefill against the textbook.


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


def test_the_fused_kernel_of_the_cpu_is_counted_and_the_largest_tensor_noted():
    """torch's counter does not know the kernel: half of a long prefill's operations were missing."""
    query = torch.randn(1, 4, 96, 32)
    with torch.inference_mode(), flop_counter() as counter, OperationCounter() as noted:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert noted.largest == query.numel()
        query.expand(1000, 4, 96, 32)
        assert noted.largest == query.numel(), "a view is no new tensor"
    assert counter.get_total_flops() == 4 * 4 * 96 * 96 * 32
    assert noted.attention == {"scaled_dot_product_flash_attention_for_cpu"}


def test_a_method_that_reads_values_is_counted_where_there_are_some(tiny):
    """The meta device computes shapes alone."""
    asked, reducer = samples(1), registry.build("hired", 8)

    class Readless:
        def __getattr__(self, name):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    found = count_prefill(tiny, reducer, asked, Readless())
    assert found.tokens_per_layer == (8,) * 4
    assert found.synchronisations is None, (
        "a 0 would say that the host waits for nothing; on a CPU there is nothing to wait for"
    )
    with pytest.raises(NotImplementedError):
        count_prefill(Readless(), reducer, asked)


@pytest.mark.table
@pytest.mark.parametrize("method", sorted(set(contract.METHODS) - {"full"}))
def test_no_method_makes_a_tensor_of_tokens_times_tokens_times_heads(method, monkeypatch):
    """1,280 visual tokens ranked together, 4 heads: an attention map would have 6.6 million elements. A table of pairs,
    which methods of diversity use, has a quarter of that; VisionDrop's rows of attention come in slices."""
    monkeypatch.setattr(visiondrop.method, "SLICE", SLICE)
    tokens, heads = 1280, 4
    model = model_of(tokens, 64 * heads, 4, 3, torch.device("cpu"), "float32")
    kept = {"schedule": "kept"} if "schedule" in registry.options_of(registry.method(method)) else {}
    for options in ({"tile_budget": "global", **kept}, {}):  # some methods treat each tile alone
        with suppress(UserError):
            reducer = registry.build(method, tokens // 2, options)
            require(reducer, model.spec)
            break
    found = computed(model, reducer, noise_batches(model, 1, False)(0))
    length = tokens + 128  # with the text
    assert found.largest <= max(length * length, SLICE) < heads * tokens * tokens


@cache
def peak_at_7b(tokens: int, method: str) -> int:
    """Bytes of a prefill at 7B shapes with 8 decoder layers; tiles of LLaVA-NeXT, or the 8 frames of a video."""
    video = tokens == 2056
    options = {} if video else {"merge": "spatial", "force": (tokens // 576 // 2 * 336, 2 * 336)}
    shape = "video-llava-7b" if video else "llava-next-7b"
    model = random_llava(shape, 1, layers=8, device=torch.device("meta"), **options)
    assert model.visual_tokens == tokens
    reducer, asked = registry.build(method, tokens if method == "full" else tokens // 9), noise_batches(model, 1, video)
    _ = model.clip  # read when it is first asked for
    return metered_peak(lambda: model.logits(prefill(model, asked(0), reducer)[0].hidden))


@pytest.mark.parametrize("tokens", [2880, 12096, 2056])
@pytest.mark.parametrize("method", ["consensusdrop", "cdpruner", "holov", "random"])
def test_no_prompt_is_copied_for_a_tile_or_frame(tokens, method):
    """Each tile got a copy of the whole prompt: ConsensusDrop held 9,826 MB at 11,520 tokens where full holds 2,786,
    and 754 for 508 on a video."""
    assert peak_at_7b(tokens, method) < peak_at_7b(tokens, "full") / 2.5
