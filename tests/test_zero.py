"""ZeRO-Inference: a decoder in pieces answers as the whole one, on one rank and on two."""

import os

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from llava.errors import UserError
from llava.model.builder import load
from llava.model.checkpoint.files import read_json
from llava.model.checkpoint.hf_model import container_config, hf_class
from llava.model.checkpoint.identify import identify
from llava.model.checkpoint.load import _read_original, _read_transformers
from llava.model.parallel import group
from llava.model.parallel.mapped import mapped_model
from tests import spread_work, two_ranks
from tests.anonymous_memory import MB
from tests.spread_work import FAMILIES, KINDS, METHODS, ZERO_FAMILIES, ZERO_LAYOUTS, Rank
from tests.test_tensor_parallel import sizes

SIZES = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("spread")
    spread_work.save_families(path)
    spread_work.save_large(path)
    return path


@pytest.fixture(scope="module")
def sessions(folder) -> dict[int, list[Rank]]:
    """By number of ranks, what each found."""
    return {size: two_ranks.run("tests.spread_work:zero_session", folder, size) for size in SIZES}


@pytest.fixture(scope="module")
def whole(folder):
    return spread_work.of_families(folder, ZERO_FAMILIES)


def same(found, expected) -> None:
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    assert found.kept == expected.kept
    assert (found.texts, found.tokens) == (expected.texts, expected.tokens)
    assert found.accounts == expected.accounts
    assert found.operations == expected.operations
    assert found.kv_bytes_held == expected.kv_bytes_held


@pytest.mark.parametrize("place", ["none", "cpu"])
@pytest.mark.parametrize("size", SIZES)
def test_answers_are_those_of_the_whole_model(sessions, whole, size, place):
    """Partitions on the device and on the host, on one rank and on two, a method of each kind each time."""
    for rank in sessions[size]:
        families = rank.families if place == "none" else rank.cpu
        assert set(KINDS) <= families["llava"][1].keys()
        for family, (fingerprint, answers) in families.items():
            expected_fingerprint, expected = whole[family]
            assert fingerprint == expected_fingerprint
            for method, found in answers.items():
                same(found, expected[method])


def test_two_ranks_answer_with_every_family_and_every_method(sessions):
    for rank in sessions[2]:
        assert rank.families.keys() == set(ZERO_FAMILIES)
        assert rank.families["llava"][1].keys() == METHODS.keys()


@pytest.mark.parametrize("size", SIZES)
def test_matrices_of_decoder_and_head_are_partitioned_and_all_else_is_whole(sessions, folder, size):
    model = load(folder / "llava", device="cpu")
    for name, weight in model.hf_model.named_parameters():
        partitioned = name.startswith(("model.language_model.layers.", "lm_head")) and weight.dim() > 1
        for rank in sessions[size]:
            if partitioned:
                assert rank.shapes[name] == (0,), name
            elif not name.startswith("model.language_model.layers."):
                assert rank.shapes[name] == tuple(weight.shape), name


@pytest.mark.parametrize("layout", ZERO_LAYOUTS)
def test_a_rank_holds_its_partition_and_one_layer(sessions, folder, layout):
    """DeepSpeed wrote into the mapped files' pages of all ranks but the first, which then belong to the process."""
    cut, kept, layer = sizes(folder, itemsize=2)
    for size in SIZES:
        for rank in sessions[size]:
            found = rank.memory[layout]
            assert found.peak > cut / size, "the measurement misses the weights"
            assert found.peak < cut / size + kept + layer + 8 * MB
            assert found.end < cut / size + kept + 8 * MB


def test_the_trace_does_not_grow(sessions):
    """DeepSpeed records the order of modules, which differs between probe, prefill and decoding."""
    for rank in sessions[2]:
        modules, complete, _ = rank.repeated
        assert len(set(modules)) == 1, "the trace holds the modules of one pass"
        assert all(complete), "decoding fetches weights ahead"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_memory_does_not_grow(folder, size):
    for modules, complete, held in two_ranks.run("tests.spread_work:repeated", folder, size):
        assert len(set(modules)) == 1 and all(complete) and len(held) == 50
        # The decoder has 0.6 MB: a copy of it in every tenth batch would show.
        assert held[-1] - held[len(held) // 2] < 1.5 * MB


@pytest.fixture
def alone(monkeypatch):
    """This process may join a group on the CPU, and has left it afterwards."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("DeepSpeed computes on another device in this process")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    yield
    group.leave()
    assert group.size() == 1


def test_partitions_in_files_need_asynchronous_reading(tmp_path, monkeypatch, folder, alone):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match="libaio-dev, or choose zero cpu"):
        load(folder / "llava", device="cpu", zero=f"nvme={tmp_path}")


def test_a_dtype_that_deepspeed_does_not_know_is_refused(monkeypatch, folder, alone):
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: [torch.float32])
    with pytest.raises(UserError, match=r"on cpu in float32, got bfloat16; choose another --dtype"):
        load(folder / "llava", dtype="bfloat16", device="cpu", zero="cpu")


def test_a_process_joins_one_group_at_a_time(alone):
    group.join_alone(torch.device("cpu"))
    assert group.size() == 1 and os.environ["WORLD_SIZE"] == "1"
    group.join_alone(torch.device("cpu"))  # it is in one already
    with pytest.raises(UserError, match="already rank 0 of a group of 1"):
        group.join(1, 2, "127.0.0.1", 1, "cpu")
    group.leave()
    group.join_alone(torch.device("cpu"))
    kept = torch.arange(6).view(2, 3)
    assert torch.equal(group.gather(kept, 1), kept)


def test_deepspeed_for_another_device_is_refused():
    found = get_accelerator().device_name()
    other = "cuda" if found == "cpu" else "cpu"
    with pytest.raises(UserError, match=f"run on {other}, but DeepSpeed computes on {found}"):
        group.import_deepspeed(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapped_model_is_the_loaded_one(folder, family, dtype):
    """Its weights wait for their cast; buffers, configuration and end token are those of transformers' own loading."""
    made, _, weights = mapped(folder / family, dtype)
    loaded = load(folder / family, dtype=str(dtype).removeprefix("torch."), device="cpu").hf_model
    pointers = {weight.data_ptr() for weight in weights.values()}
    assert {weight.data_ptr() for weight in made.parameters()} <= pointers
    found, expected = dict(made.named_buffers()), dict(loaded.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name
    assert made.config.to_dict() == loaded.config.to_dict()
    assert made.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert made.state_dict().keys() == loaded.state_dict().keys()


def test_a_mapped_model_names_what_is_wrong_with_its_weights(folder):
    key = "model.language_model.norm.weight"
    other = "lm_head.weight"

    def spoil(weights):
        del weights[key]
        weights[other] = weights[other][1:]
        weights["extra"] = weights[other]

    _, report, weights = mapped(folder / "llava", torch.float32, spoil)
    assert report["missing_keys"] == {key}
    assert report["unexpected_keys"] == {"extra"}
    rows, columns = weights[other].shape
    assert report["mismatched_keys"] == [(other, (rows, columns), (rows + 1, columns))]


def mapped(path, dtype, spoil=lambda weights: None) -> tuple[PreTrainedModel, dict, dict]:
    raw = read_json(path / "config.json")
    kind = identify(raw, path)
    files = (_read_original if kind.layout == "original" else _read_transformers)(path, raw, kind)
    spoil(files.weights)
    config = container_config(files.config, kind.family, path)
    build, extra = hf_class(kind, files.weights)
    return (*mapped_model(build, extra, config, files.weights, dtype), files.weights)
