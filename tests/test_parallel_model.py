"""A model split or partitioned over real ranks answers as the whole one, and no rank ever holds it whole."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from eval.efficiency.estimate import Estimate, Spread, Workload
from llava.errors import UserError
from llava.model import parallel
from llava.model.builder import load, runtime
from llava.model.checkpoint import load as loading
from llava.model.checkpoint.load import _read, hf_class, outline_checkpoint
from llava.model.parallel import Parallel, check_heads, mapped_model, parallel_of
from llava.reduction import registry
from tests import spread_work, two_ranks
from tests.spread_work import FAMILIES, KINDS, LAYOUTS, MB, METHODS, UNEVEN, ZERO_FAMILIES, ZERO_LAYOUTS, Rank

CASES = [(family, method) for family, (methods, _) in FAMILIES.items() for method in methods]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("spread")
    spread_work.save_families(path)
    spread_work.save_large(path)
    return path


@pytest.fixture(scope="module")
def two(folder) -> list[tuple[Rank, Rank]]:
    return two_ranks.run("tests.spread_work:two_ranks", folder)


@pytest.fixture(scope="module")
def three(folder) -> list[tuple[dict, Rank | None]]:
    return two_ranks.run("tests.spread_work:three_ranks", folder, size=3)


@pytest.fixture(scope="module")
def ranks(two) -> list[Rank]:
    return [split for split, _ in two]


@pytest.fixture(scope="module")
def whole(folder):
    return spread_work.of_families(folder)


def same(found, expected, atol) -> None:
    torch.testing.assert_close(found.logits, expected.logits, atol=atol, rtol=1e-5)
    for field in ("kept", "texts", "tokens", "accounts", "operations", "kv_bytes_held"):
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.process
@pytest.mark.parametrize(("family", "method"), CASES)
def test_answers_and_accounting_are_those_of_the_whole_model(ranks, whole, family, method):
    first, second = (rank.families[family][1][method] for rank in ranks)
    assert torch.equal(first.logits, second.logits)
    for found in (first, second):
        same(found, whole[family][1][method], atol=1e-5)
    # Answer stores hold the fingerprint: answers of one GPU and of two belong together.
    assert [rank.families[family][0] for rank in ranks] == [whole[family][0]] * len(ranks)
    # A budget of all tokens would make the case empty.
    assert method == "full" or all(whole[family][1][method].kept)


@pytest.mark.process
def test_three_ranks_with_unequal_numbers_of_heads_answer_as_one(three, whole):
    """Heads had to be dealt equally, so no bundled checkpoint, with its five heads, could be split."""
    for families, _ in three:
        for family in UNEVEN:
            for method, found in families[family][1].items():
                same(found, whole[family][1][method], atol=1e-5)


@pytest.mark.process
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


@pytest.mark.process
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


@pytest.mark.process
def test_ranks_that_disagree_end_in_a_sentence(ranks):
    for rank in ranks:
        assert "2 ranks" in rank.sentence and "question 7" in rank.sentence and "equal devices" in rank.sentence


# Choices that cannot be met


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, None, None), "at least 1, got 0"),
        ((2, None, None), "tensor_parallel 2 .*group of 1"),
        ((2, "cpu", None), "tensor_parallel 2 and zero 'cpu'"),
        ((2, None, "4bit"), "'4bit' cannot be combined with tensor_parallel 2"),
        ((1, "cpu", "8bit"), "'8bit' .* zero 'cpu'"),
        ((1, "disk", None), "none or cpu, got 'disk'"),
    ],
)
def test_choices_that_cannot_be_met_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        parallel_of(*arguments)


def test_more_ranks_than_heads_and_another_device_are_refused(tiny):
    config = tiny.hf_model.config
    check_heads(config, 2, "tiny")
    with pytest.raises(UserError, match="2 key/value heads, too few for 3 ranks"):
        check_heads(config, 3, "tiny")
    found = get_accelerator().device_name()
    other = "cuda" if found == "cpu" else "cpu"
    with pytest.raises(UserError, match=f"run on {other}, but DeepSpeed computes on {found}"):
        parallel.import_deepspeed(other)


@pytest.mark.parametrize(
    ("parallel", "device", "ranks_here", "on_device", "on_host"),
    [
        # float16 files as float32 on the CPU: everything is copied, the split part once by both ranks together.
        (Parallel(tensor=2), "cpu", 2, lambda cut, kept: 2 * kept + cut, None),
        (Parallel(tensor=2), "cuda", 2, lambda cut, kept: kept + cut / 2, None),
        (Parallel(offload="none"), "cuda", 1, lambda cut, kept: kept + cut, None),
        (Parallel(offload="cpu"), "cuda", 1, lambda cut, kept: kept, lambda cut, kept: cut),
    ],
)
def test_the_memory_of_a_part_is_checked(monkeypatch, tiny, parallel, device, ranks_here, on_device, on_host):
    weights = {name: weight.half() for name, weight in tiny.hf_model.state_dict().items()}
    cut = sum(4 * weight.numel() for name, weight in weights.items() if name.startswith(loading.CUT))
    kept = sum(4 * weight.numel() for weight in weights.values()) - cut
    needed = {torch.device(device): on_device(cut, kept)}
    if on_host is not None:
        needed[torch.device("cpu")] = on_host(cut, kept)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks_here))
    given = (weights, torch.float32, torch.device(device), Path("here"))
    check = partial(loading.check_memory, *given, parallel=parallel)
    free = dict(needed)
    monkeypatch.setattr(loading, "free_memory", lambda place: free.get(place, 0))
    check()
    for place, bytes_needed in needed.items():
        if bytes_needed:
            free = {**needed, place: bytes_needed - 1}
            with pytest.raises(UserError, match=rf"on {place} in float32"):
                check()


SIZES = (1, 2)


@pytest.fixture(scope="module")
def sessions(two, three) -> dict[int, list[Rank]]:
    """By number of ranks, what each found."""
    return {1: [three[2][1]], 2: [zero for _, zero in two]}


@pytest.fixture(scope="module")
def whole_zero(folder):
    return spread_work.of_families(folder, ZERO_FAMILIES)


@pytest.mark.process
@pytest.mark.parametrize("place", ["none", "cpu"])
@pytest.mark.parametrize("size", SIZES)
def test_partitions_answer_as_the_whole_model(sessions, whole_zero, size, place):
    """Partitions on the device and on the host, on one rank and on two, a method of each kind each time."""
    for rank in sessions[size]:
        families = rank.families if place == "none" else rank.cpu
        assert set(KINDS) <= families["llava"][1].keys()
        if size == 2 and place == "none":
            assert families.keys() == set(ZERO_FAMILIES) and families["llava"][1].keys() == METHODS.keys()
        for family, (fingerprint, answers, _) in families.items():
            expected_fingerprint, expected, _ = whole_zero[family]
            assert fingerprint == expected_fingerprint
            for method, found in answers.items():
                same(found, expected[method], atol=1e-5)


@pytest.mark.process
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


@pytest.mark.process
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


@pytest.mark.process
@pytest.mark.parametrize("zero", [None, "none", "cpu"])
def test_the_dry_run_knows_the_weights_of_a_rank(ranks, sessions, folder, zero):
    found = [rank.cpu if zero == "cpu" else rank.families for rank in (ranks if zero is None else sessions[2])]
    spread = Spread(tensor_parallel=2) if zero is None else Spread(zero=zero, zero_ranks=2)
    for family in found[0]:
        model = runtime(outline_checkpoint(folder / family), torch.device("meta"), {})
        full, work = registry.build("full", model.visual_tokens), Workload((), 0.0, 1, 1)
        expected = Estimate(model, full, work, 1, 1, torch.float32, spread=spread).weights
        (first, partitions), second = (rank[family][2] for rank in found)
        if family == "toy":
            # Of five heads the first rank has three, of 416 columns the second one 224.
            assert max(first, second[0]) < expected.total < 1.05 * first
        elif zero is None:
            assert first == expected.total, "of 96 columns the first rank has 64"
        else:
            vectors = sum(weight.nbytes for weight in model.llm.layers.parameters() if weight.dim() == 1)
            # Norms and biases are partitioned too until the first pass gathers them; what comes then is estimated.
            kept = expected.total - expected.device["gathered"] + sum(expected.host.values())
            assert (first + partitions + sum(second)) / 2 == kept - vectors / 2


@pytest.mark.process
def test_the_trace_does_not_grow(sessions):
    """DeepSpeed records the order of modules, which differs between probe, prefill and decoding."""
    for rank in sessions[2]:
        modules, complete, _ = rank.repeated
        assert len(set(modules)) == 1, "the trace holds the modules of one pass"
        assert all(complete), "decoding fetches weights ahead"


@pytest.fixture
def alone(monkeypatch):
    """This process may join a group on the CPU, and has left it afterwards."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("DeepSpeed computes on another device in this process")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    yield
    parallel.leave()
    assert parallel.group_size() == 1


def test_a_dtype_that_deepspeed_does_not_know_is_refused(monkeypatch, folder, alone):
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: [torch.float32])
    with pytest.raises(UserError, match=r"on cpu in float32, got bfloat16; choose another --dtype"):
        load(folder / "llava", dtype="bfloat16", device="cpu", zero="cpu")


def test_ranks_wait_for_each_other_while_the_first_one_scores(alone):
    """The others waited ten minutes at the end, and a judge takes longer."""
    parallel.join_alone(torch.device("cpu"))
    group = torch.distributed.group.WORLD
    assert group is not None and group._get_backend(torch.device("cpu")).options._timeout == parallel.PATIENCE


def test_a_process_joins_one_group_at_a_time(alone):
    parallel.join_alone(torch.device("cpu"))
    assert parallel.group_size() == 1 and os.environ["WORLD_SIZE"] == "1"
    parallel.join_alone(torch.device("cpu"))  # it is in one already
    with pytest.raises(UserError, match="already rank 0 of a group of 1"):
        parallel.join(1, 2, "127.0.0.1", 1, "cpu")
    parallel.leave()
    parallel.join_alone(torch.device("cpu"))
    kept = torch.arange(6).view(2, 3)
    assert torch.equal(parallel.gather(kept, 1), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapped_model_is_the_loaded_one(folder, family, dtype):
    """Its weights wait for their cast; buffers, configuration and end token are those of transformers' own loading."""
    files = _read(folder / family, None, with_weights=True)
    build, extra = hf_class(files.kind.family, files.frames)
    made = mapped_model(build, extra, files.config, files.weights, dtype)
    loaded = load(folder / family, dtype=str(dtype).removeprefix("torch."), device="cpu").hf_model
    pointers = {weight.data_ptr() for weight in files.weights.values()}
    assert {weight.data_ptr() for weight in made.parameters()} <= pointers
    found, expected = dict(made.named_buffers()), dict(loaded.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name
    assert made.config.to_dict() == loaded.config.to_dict()
    assert made.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert made.state_dict().keys() == loaded.state_dict().keys()
