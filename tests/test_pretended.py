"""Guards of what a GPU asks for, on the pretended devices of tests/pretended.py, for every method and family."""

import copy
import dataclasses
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from attnmix.method import best_split
from baselines.prunesid import ROUNDS
from llava import reduce
from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.merging import Reduction, member_weights
from llava.reduction.reducer import Reducer
from tests import contract, stock_inputs
from tests.conftest import QUESTIONS, drawn_image
from tests.pretended import MixedDevicesError, pretended
from tests.tiny_checkpoints import save_text_tower, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
    save_next_transformers,
    save_qwen_transformers,
    save_video_transformers,
)

# How much a tile keeps depends on its values, and with it the shape of everything behind; what VLM-Pruner keeps depends
# on what it kept just before. Read once per image, or a few times for all images until PruneSID's loops end: file and
# function.
READS = {
    "hired": ("baselines/hired.py", "crop_shares"),
    "globalcom2": ("baselines/globalcom2.py", "crop_shares"),
    "vlmpruner": ("baselines/vlmpruner.py", "reduce"),
    "prunesid": ("baselines/prunesid.py",),
}
# One method for each place, and those that read most of the tower.
SOME = ("full", "consensusdrop", "visiondrop", "divprune", "fastv", "cdpruner", "hiprune", "vlmpruner", "autoprune")
# Sums in any order that have one value: of whole numbers, or of one number for each place.
EXACT = ("baselines/tome.py", "llava/model/multimodal_encoder/clip_encoder.py", "baselines/prumerge.py")
FIRST_TOKEN = "tolist at llava/pipeline/generate.py"  # the one wait of a decoding step


def save(family: str, folder: Path) -> Path | None:
    """A tiny checkpoint; returns the folder of a text tower, where there is one beside it."""
    if family == "llava":
        save_transformers_layout(folder, text_tower=True)
    elif family == "next":
        save_text_tower(folder / "text_tower", save_next_transformers(folder, make_tiny_next()))
        return folder / "text_tower"
    elif family == "video":
        save_video_transformers(folder, make_tiny_video())
    else:
        save_qwen_transformers(folder, make_tiny_qwen(family.removeprefix("qwen")))
    return None


@pytest.fixture(scope="module", params=stock_inputs.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family, tmp_path_factory) -> dict[str, Llava]:
    """One model on the CPU and on both pretended devices."""
    folder = tmp_path_factory.mktemp(family) / "model"
    text_tower = save(family, folder)
    loaded = {"cpu": load(folder, device="cpu", text_tower=text_tower)}
    with pytest.MonkeyPatch.context() as patch, pretended():
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads do not know of the pretended devices
        for place in ("cuda:0", "cuda:1"):
            loaded[place] = load(folder, device=place, text_tower=text_tower)
            if family in ("llava", "next"):
                assert loaded[place].clip is not None  # read at the first question that needs it
    return loaded


def questions(model: Llava, count: int) -> list[Sample]:
    """Images of different shapes, or a video among images."""
    images = [drawn_image(0, (60, 44)), drawn_image(1, (60, 110)), drawn_image(2, (112, 50))]
    if model.takes_videos:
        images[0] = Video(tuple(drawn_image(10 + frame, (70, 50)) for frame in range(8)))
    return [Sample(f"q{i}", QUESTIONS[i], image=images[i]) for i in range(count)]


@pytest.fixture(scope="module")
def found(models) -> dict[str, Reducer | None]:
    """What `reducing` found for this family."""
    return {}


def reducing(name: str, model: Llava, found: dict[str, Reducer | None]) -> Reducer | None:
    """The method at the first budget below all tokens at which it answers here; None where it is refused at all."""
    if name in found:
        return found[name]
    total, found[name] = model.visual_tokens, None
    for budget in (total,) if name == "full" else (total // 4, total // 3, total // 2, 24, 32):
        try:
            reducer = registry.build(name, budget)
            require(reducer, model.spec)
            generate(model, questions(model, 1), reducer, 1)
        except UserError:
            continue
        found[name] = reducer
        break
    return found[name]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "count"), [("cuda:0", 3), ("cuda:1", 1)])
@pytest.mark.parametrize("name", contract.METHODS)
def test_a_device_keeps_and_answers_as_the_cpu_and_never_waits_before_the_first_token(
    name, place, count, family, models, found
):
    if family == "qwen2.5" and name not in SOME:
        return  # its tower takes seconds on a pretended device, and Qwen2-VL runs all methods
    reducer = reducing(name, models["cpu"], found)
    if reducer is None:
        return  # refused on this family, which tests/test_every_method.py looks at
    batch = questions(models["cpu"], count)
    expected = generate(models["cpu"], batch, reducer, 3)
    with pretended() as device:
        there = generate(models[place], batch, reducer, 3)
        waits = list(takewhile(lambda wait: not wait.startswith(FIRST_TOKEN), device.waits))
    known = [wait for wait in waits if all(part in wait for part in READS.get(name, ("none",)))]
    assert len(known) <= (4 * ROUNDS if name == "prunesid" else count)  # two loops, images and tiles of two shapes
    # Where the image decides how many tokens are kept, or stay inside the tower, the method's own file waits for it.
    cls = registry.method(name)
    own = f"{cls.__module__.replace('.', '/')}.py" if cls.image_decides or cls.tower_by_image else "nothing"
    unwanted = sorted({wait for wait in waits if wait not in known and own not in wait})
    assert not unwanted, f"{name} on {place}: the host waits for {'; '.join(unwanted)}"
    unordered = {one for one in device.unordered if not any(file in one for file in EXACT)}
    assert not unordered, f"{name} keeps other tokens from run to run: {'; '.join(sorted(unordered))}"
    for ours, theirs in zip(there.answers, expected.answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        kept = [[step.reduction.kept.tolist() for step in answer.trace] for answer in (ours, theirs)]
        assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", stock_inputs.FAMILIES)
def test_reduce_on_a_device_answers_as_on_the_cpu(family):
    case = stock_inputs.stock(family)
    inputs, options = case.batch(), {"budget": 8} if family != "video" else {"budget": 12}
    name = "visiondrop"
    with reduce(case.model, name, **options):
        expected = case.generate(inputs)
    for place in ("cuda:0", "cuda:1"):
        with pretended():
            model = copy.deepcopy(case.model).to(place)
            there = {key: value.to(place) for key, value in inputs.items()}
            with reduce(model, name, **options):
                found = dataclasses.replace(case, model=model).generate(there)
            assert found.device == torch.device(place)
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("drops", [False, True])
def test_merging_in_a_fixed_order_gives_the_sums_of_the_cpu(drops):
    """On a GPU the additions of scatter_add_ have no order: ranks that share a model kept different tokens."""
    tokens, weight = torch.randn(2, 12, 8), torch.rand(2, 12)
    assignment = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, -1 if drops else 3, 3, 1, 0], [0, 1, 2, 3] * 3])
    saliency = torch.rand(2, 12)
    kept = torch.arange(4).expand(2, -1)
    expected = Reduction(kept, 12, assignment, weight, drops=drops).apply(tokens)
    shares = [member_weights(rule, assignment.clamp(min=0), kept, saliency) for rule in ("saliency", "mean")]
    with pretended():
        there = [one.to("cuda:1") for one in (tokens, kept, assignment, weight, saliency)]
        found = Reduction(there[1], 12, there[2], there[3], drops=drops).apply(there[0]).cpu()
        weights = [
            member_weights(rule, there[2].clamp(min=0), there[1], there[4]).cpu() for rule in ("saliency", "mean")
        ]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights, shares, atol=1e-6, rtol=1e-6)


def test_sums_without_a_fixed_order_are_seen_and_attnmix_splits_without_one():
    """On a GPU a running sum of one row has no fixed order: AttnMix's split could differ from rank to rank."""
    scores = torch.rand(2, 3, 40).sort(descending=True).values
    expected = best_split(*scores)
    with pretended() as device:
        there = scores.to("cuda:1")
        assert best_split(there[0], there[1]).cpu().equal(expected)
        place = torch.zeros(1, 40, dtype=torch.long, device="cuda:1")
        there[0, :1].long().cumsum(1)
        place.scatter_add(1, place, place)
        there[0].index_put((place[0, :3],), there[1])
        assert not device.unordered
        there[0, :1].cumsum(1)
        there[0, :1].scatter_add(1, place, there[1, :1])
        there[0].index_put((place[0, :3],), there[1], accumulate=True)
    assert [one.split()[0] for one in device.unordered] == ["cumsum", "scatter_add", "index_put"]
    assert all("test_sums_without_a_fixed_order" in one for one in device.unordered)


def test_attention_is_not_cudnns():
    """Random weights and `reduce` do not come from `load`, which switched it off."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_pretended_devices_see_what_a_gpu_would_not_take():
    """Each guard, planted: tensors of two devices, an index of the host, a read, a mask, a blocking copy."""
    rows = torch.arange(6.0).view(3, 2)
    with pretended() as device:
        there = rows.to("cuda:1", non_blocking=True)
        assert there.device == torch.device("cuda:1") and not device.waits
        assert torch.zeros(1, device="cuda").device == torch.device("cuda:0"), "the current one"
        for other in (rows, rows.to("cuda:0", non_blocking=True)):
            with pytest.raises(MixedDevicesError, match=r"aten\.add\.Tensor got tensors on .*test_pretended\.py"):
                there + other
        assert not device.waits
        planted = {
            "index by a tensor of the host": lambda: there[torch.tensor([0, 2])],
            "__getitem__ by a list": lambda: there[[0, 2]],
            "_local_scalar_dense": lambda: float(there.sum()),
            "tolist": lambda: there.tolist(),
            "index by a mask": lambda: there[there[:, 0] > 1],
            "nonzero": lambda: there.nonzero(),
            "blocking copy to the device of (3, 2)": lambda: rows.to("cuda:1"),
            "copy to the host of (3, 2)": lambda: there.cpu(),
            "repeat_interleave without output_size": lambda: there.repeat_interleave(
                torch.ones(3, dtype=torch.int64).to("cuda:1", non_blocking=True), 0
            ),
            "cuda.synchronize": torch.cuda.synchronize,
        }
        for said, plant in planted.items():
            device.waits.clear()
            plant()
            assert any(wait.startswith(said) and "tests/test_pretended.py" in wait for wait in device.waits), said
