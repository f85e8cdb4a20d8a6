"""A model split over two real ranks answers as the whole one, and neither rank ever holds it whole."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from llava.errors import UserError
from llava.model.builder import load
from llava.model.checkpoint import limits
from llava.model.checkpoint.files import read_json
from llava.model.parallel import group
from llava.model.parallel.choice import Parallel, check_heads, parallel_of
from llava.model.parallel.tensor import split
from tests import spread_work, two_ranks
from tests.anonymous_memory import MB
from tests.spread_work import FAMILIES, LAYOUTS, Rank
from tests.tiny_checkpoints import save_transformers_layout, write_json

CASES = [(family, method) for family, (methods, _) in FAMILIES.items() for method in methods]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("spread")
    spread_work.save_families(path)
    spread_work.save_large(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[Rank]:
    return two_ranks.run("tests.spread_work:split_session", folder)


@pytest.fixture(scope="module")
def whole(folder):
    return spread_work.of_families(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_that_of_the_whole_model(ranks, whole, family):
    """Answer stores hold it: answers of one GPU and of two belong together."""
    assert [rank.families[family][0] for rank in ranks] == [whole[family][0]] * len(ranks)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_answers_are_those_of_the_whole_model(ranks, whole, family, method):
    expected = whole[family][1][method]
    first, second = (rank.families[family][1][method] for rank in ranks)
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.logits, expected.logits, atol=1e-4, rtol=0)
    for found in (first, second):
        assert found.kept == expected.kept
        assert (found.texts, found.tokens) == (expected.texts, expected.tokens)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_accounting_is_that_of_the_whole_model(ranks, whole, family, method):
    expected = whole[family][1][method]
    for rank in ranks:
        found = rank.families[family][1][method]
        assert found.accounts == expected.accounts
        assert found.operations == expected.operations
        assert found.kv_bytes_held == expected.kv_bytes_held


def test_every_method_of_the_cases_reduces(whole):
    """Guards the cases above: a budget of all tokens would make them empty."""
    for family, (methods, _) in FAMILIES.items():
        for method in methods:
            assert method == "full" or all(whole[family][1][method].kept), (family, method)


def test_decoder_and_head_are_split_and_all_else_is_whole(ranks, folder):
    model = load(folder / "llava", device="cpu")
    by_rows, by_columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj", "lm_head")
    for name, weight in model.hf_model.named_parameters():
        parts, shape = [rank.shapes[name] for rank in ranks], list(weight.shape)
        module = name.removesuffix(".weight").rpartition(".")[2]
        in_decoder = name.startswith(("model.language_model.layers.", "lm_head"))
        if not in_decoder or module not in by_rows + by_columns:
            assert [list(part) for part in parts] == [shape, shape], name
            continue
        cut = 0 if module in by_rows else 1
        assert [part[1 - cut] for part in parts] == [shape[1 - cut]] * 2, name
        assert sum(part[cut] for part in parts) == shape[cut], name
        # Heads are shared equally; DeepSpeed deals other channels in groups of 64, which is 64 and 32 of 96.
        assert "self_attn" not in name or parts[0] == parts[1], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_never_holds_the_whole_model(ranks, folder, layout):
    """A dtype change copied every weight of the model on every rank before the first one was cut."""
    cut, kept, layer = sizes(folder)
    for rank in ranks:
        found = rank.memory[layout]
        assert found.peak > cut / 2, "the measurement misses the weights"
        assert found.peak < cut / 2 + kept + layer + 6 * MB
        assert found.end < cut / 2 + kept + 6 * MB


def sizes(folder, itemsize: int = 4) -> tuple[int, int, int]:
    """Bytes of the decoder's layers and head, of everything else, and of one layer; by default in float32."""
    model = load(folder / "transformers", dtype="bfloat16", device="cpu").hf_model
    bytes_of = lambda module: sum(itemsize * weight.numel() for weight in module.parameters())  # noqa: E731
    layers = model.model.language_model.layers
    cut = bytes_of(layers) + bytes_of(model.lm_head)
    return cut, bytes_of(model) - cut, bytes_of(layers[0])


def test_ranks_that_disagree_end_in_a_sentence(ranks):
    for rank in ranks:
        assert "2 ranks" in rank.sentence and "question 7" in rank.sentence and "equal devices" in rank.sentence


# Choices that cannot be met


def test_a_group_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tensor_parallel 2 needs a replica of 2 ranks.*group of 1"):
        load(tmp_path, device="cpu", tensor_parallel=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, None, None), "at least 1, got 0"),
        ((2, "cpu", None), "tensor_parallel 2 and zero 'cpu' both spread"),
        ((2, None, "4bit"), "'4bit' cannot be combined with tensor_parallel 2"),
        ((1, "cpu", "8bit"), "'8bit' cannot be combined with zero 'cpu'"),
        ((1, "disk", None), "none, cpu or nvme=FOLDER, got 'disk'"),
        ((1, "nvme", None), "got 'nvme'"),
        ((1, "cpu=x", None), "got 'cpu=x'"),
    ],
)
def test_contradicting_choices_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        parallel_of(*arguments)


def test_choices_that_can_be_met():
    assert parallel_of(1, None, "8bit") is None
    assert parallel_of(1, "none", None) == Parallel(offload="none")
    assert str(parallel_of(1, "nvme=/a/b=c", None).folder) == "/a/b=c"


def test_heads_that_ranks_cannot_share_are_refused(tiny):
    config = tiny.hf_model.config
    check_heads(config, 2, "tiny")
    with pytest.raises(UserError, match="2 key/value heads, which 4 ranks cannot share"):
        check_heads(config, 4, "tiny")
    with pytest.raises(UserError, match="4 attention heads, which 3 ranks"):
        check_heads(config, 3, "tiny")


def test_a_rank_outside_the_group_is_refused():
    with pytest.raises(UserError, match=r"between 0 and 1.*got 2"):
        group.join(2, 2, "127.0.0.1", 1, "cpu")


def test_without_a_group_there_is_one_rank():
    assert group.size() == 1
    group.leave()


@pytest.mark.parametrize(
    ("parallel", "device", "ranks_here", "on_device", "on_host"),
    [
        # float16 files as float32 on the CPU: everything is copied, the split part once by both ranks together.
        (Parallel(tensor=2), "cpu", 2, lambda cut, kept: 2 * kept + cut, None),
        (Parallel(tensor=2), "cuda", 2, lambda cut, kept: kept + cut / 2, None),
        (Parallel(offload="none"), "cuda", 1, lambda cut, kept: kept + cut, None),
        (Parallel(offload="cpu"), "cuda", 1, lambda cut, kept: kept, lambda cut, kept: cut),
        (Parallel(offload="nvme"), "cuda", 1, lambda cut, kept: kept, lambda cut, kept: 0),
    ],
)
def test_the_memory_of_a_part_is_checked(monkeypatch, tiny, parallel, device, ranks_here, on_device, on_host):
    weights = {name: weight.half() for name, weight in tiny.hf_model.state_dict().items()}
    cut = sum(4 * weight.numel() for name, weight in weights.items() if name.startswith(limits.CUT))
    kept = sum(4 * weight.numel() for weight in weights.values()) - cut
    needed = {torch.device(device): on_device(cut, kept)}
    if on_host is not None:
        needed[torch.device("cpu")] = on_host(cut, kept)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks_here))
    check = (tiny.hf_model.config, weights, torch.float32, torch.device(device), parallel, Path("here"))
    free = dict(needed)
    monkeypatch.setattr(limits, "free_memory", lambda place: free.get(place, 0))
    limits.check_part(*check)
    for place, bytes_needed in needed.items():
        if bytes_needed:
            free = {**needed, place: bytes_needed - 1}
            with pytest.raises(UserError, match=rf"of memory on {place} in float32"):
                limits.check_part(*check)


def test_quantised_files_are_refused(tmp_path):
    save_transformers_layout(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UserError, match="is quantised, and a quantised weight cannot be cut"):
        load(tmp_path, device="cpu", zero="none")
    assert group.size() == 1, "the process has joined no group"


def test_a_decoder_without_a_policy_is_refused():
    llm = SimpleNamespace(layers=[torch.nn.Identity()])
    model = SimpleNamespace(model=SimpleNamespace(language_model=llm))
    with pytest.raises(UserError, match=r"knows the decoder layers LlamaDecoderLayer, .* got Identity"):
        split(model, 2, torch.float32, torch.device(get_accelerator().device_name()))
