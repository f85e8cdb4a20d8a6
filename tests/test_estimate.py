"""Expected memory and time before a run, against loaded models, real caches and measured allocations."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch

from eval.config import ROOT, RunConfig, embedded_model
from eval.efficiency import estimate, memory
from eval.efficiency.estimate import Rates, Spread, Workload, measure_rates
from eval.efficiency.memory import QuestionShape, duration, listed, size_text
from eval.efficiency.shapes import narrow, noise_batches, official, random_llava
from eval.parallel.placement import Placement
from eval.run import read_questions
from lab.pages import memory as table
from llava.errors import UserError
from llava.model.builder import load, runtime
from llava.model.checkpoint import files
from llava.model.checkpoint.load import outline_checkpoint
from llava.pipeline.decoder import step
from llava.pipeline.generate import generate, prefill
from llava.processing.video import Video
from llava.reduction import registry
from llava.reduction.budget import require
from tests.allocations import metered_peak, peak_bytes
from tests.checkpoint_files import SAVERS
from tests.conftest import drawn_image, samples
from tests.tiny_checkpoints import make_tiny_llava, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
    save_next_transformers,
    save_qwen_transformers,
    save_video_transformers,
)

META = torch.device("meta")
ALL = {
    **SAVERS,
    "tied": lambda path: save_transformers_layout(path, make_tiny_llava(tied=True)),
    "next, transformers": lambda path: save_next_transformers(path, make_tiny_next("mistral")),
    "video, transformers": lambda path: save_video_transformers(path, make_tiny_video(temporal=False)),
    "qwen 2": lambda path: save_qwen_transformers(path, make_tiny_qwen("2")),
}
TOWERS = ("vision_tower", "image_tower", "video_tower", "visual")
LAYOUTS = {
    "llava": "llava transformers",
    "next": "llava_next original",
    "video": "video_llava original",
    "qwen": "qwen2_5_vl transformers",
}
SPEED = Rates("a test", 1e12, 1e11, 1e10)


def outline(path):
    return runtime(outline_checkpoint(path), META, {})


def shape_of(model, sample) -> QuestionShape:
    """What memory and time depend on in a question whose images are open."""
    images = []
    for image in sample.images:
        video = isinstance(image, Video)
        images.append(memory.layout_of(model, (image.frames[0] if video else image).size, video))
    return QuestionShape(sum(token >= 0 for token in model.prompt(sample).ids), tuple(images), sample.id)


def bytes_of(module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_of_the_loaded_model(tmp_path, name):
    """Every family in every layout, to the byte, without opening a weight."""
    ALL[name](tmp_path)
    expected, real = outline(tmp_path), load(tmp_path, device="cpu", dtype="bfloat16")
    found = memory.weights(expected, 2)
    assert found.total == bytes_of(real.hf_model) and not found.host
    inner = real.hf_model.model
    towers = [getattr(inner, part) for part in TOWERS if hasattr(inner, part)]
    merger = bytes_of(inner.visual.merger) if hasattr(inner, "visual") else 0
    assert found.device["projector"] == (merger or bytes_of(real.projector))
    assert found.device["vision tower"] == sum(map(bytes_of, towers)) - merger
    assert found.device["head"] == (0 if name == "tied" else bytes_of(real.head))
    assert expected.spec == real.spec and expected.vocabulary == real.vocabulary
    assert (expected.conversation, expected.conventions) == (real.conversation, real.conventions)


def test_no_weight_is_read(tmp_path, monkeypatch):
    """Names come from the index or the header; a folder without any weights will do."""
    for name in ("llava original", "qwen2_5_vl transformers"):
        SAVERS[name](tmp_path / name)
        whole = memory.weights(outline(tmp_path / name), 4)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
        for file in (tmp_path / name).glob("*.bin"):
            file.write_bytes(b"no weights")
        monkeypatch.setattr(files, "read_weights", None)
        assert memory.weights(outline(tmp_path / name), 4) == whole


@pytest.mark.parametrize("name", ["full", "fastervlm", "consensusdrop", "fastv", "pyramiddrop"])
@pytest.mark.parametrize(("family", "budget"), [("llava", 6), ("next", 30), ("video", 40), ("qwen", 12)])
def test_cache_and_operations_are_those_of_the_run(tmp_path, family, name, budget):
    SAVERS[LAYOUTS[family]](tmp_path)
    real = load(tmp_path, device="cpu")
    batch = samples(4)
    if family == "video":
        batch[0] = replace(batch[0], image=Video(tuple(drawn_image(frame, (70, 50)) for frame in range(8))))
    if family in ("next", "qwen"):
        batch[1] = replace(batch[1], image=drawn_image(9, (160, 60)))
    by_kept = {"schedule": "kept"} if name in ("fastv", "pyramiddrop") else {}
    reducer = registry.build(name, real.visual_tokens if name == "full" else budget, by_kept)
    answered = generate(real, batch, reducer, max_new_tokens=3)
    empty = outline(tmp_path)
    shapes = [shape_of(empty, sample) for sample in batch]
    prompts = [memory.lengths(empty, reducer, shape) for shape in shapes]
    assert memory.kv_bytes(empty, prompts, 4) == answered.kv_bytes
    assert sum(memory.decoder_operations(empty, prompt) for prompt in prompts) == answered.operations.alone["prefill"]
    towers = sum(memory.tower_operations(empty, reducer, image) for shape in shapes for image in shape.images)
    assert towers == answered.operations.alone["tower"]


def expected_bytes(model, reducer, asked, itemsize: int, new_tokens: int) -> int:
    """The most bytes beside the weights, as `--dry-run` adds them up."""
    shapes = tuple(shape_of(model, sample) for sample in asked)
    cache = memory.kv_bytes(model, [memory.lengths(model, reducer, shape) for shape in shapes], itemsize, new_tokens)
    return memory.activations(model, reducer, shapes, itemsize).peak(cache)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "budget"),
    [("full", None), ("fastervlm", 64), ("consensusdrop", 64), ("cdpruner", 64), ("pyramiddrop", 192)],
)
def test_memory_of_the_toy_model_is_near_what_its_allocator_counts(name, budget):
    """For the tower's peak (few tokens kept), the decoder's (all kept) and the cache's. Its room was left out."""
    model = load(device="cpu")
    batch = [replace(sample, image=drawn_image(i, (300, 200)), image_ids=()) for i, sample in enumerate(samples(6, ()))]
    reducer = registry.build(name, budget or model.visual_tokens)
    answer = partial(generate, model, batch, reducer, max_new_tokens=4, ignore_eos=True)
    answer()
    measured, expected = peak_bytes(answer), expected_bytes(model, reducer, batch, 4, 3)
    assert measured == pytest.approx(expected, rel=0.15), "numpy's pixels are no tensors"
    with torch.inference_mode(), memory.Meter() as metered:
        answer()
    assert metered.peak() == pytest.approx(measured, rel=1e-3), "the meter counts as the allocator does"


FAMILIES = {  # shape -> (budget, options, whether it is asked about videos)
    "llava-1.5-7b": (72, {}, False),
    "llava-next-7b": (80, {"merge": "spatial", "force": (672, 672)}, False),
    "video-llava-7b": (72, {}, True),
    "qwen2.5-vl-7b": (32, {}, False),
}
# One method for each place in which tokens are dropped; LLaVA-NeXT is asked with all methods.
KINDS = ("full", "tome", "fastervlm", "consensusdrop", "cdpruner", "divprune", "visiondrop", "sparsevlm")
READS = ("hired", "globalcom2", "tome", "flowcut", "autoprune", "prunesid", "vlmpruner")
READ_NUMBERS = {("llava-next-7b", name) for name in READS}


@pytest.mark.table
@pytest.mark.parametrize("shape", FAMILIES)
def test_every_method_needs_what_the_dry_run_says(shape):
    """Within 15 % of the meter at the 7B widths. ConsensusDrop needed 2.4 (LLaVA-NeXT) and 4.8 times (Video-LLaVA) as
    much as it said."""
    budget, options, video = FAMILIES[shape]
    model = random_llava(shape, 1, layers=8, device=META, **options)
    for tower in {model.tower, model.tower_of(video)}:
        if shape.startswith("qwen"):
            del tower.blocks[8:]  # the eighth is the first whose attention sees the whole image
        else:
            del tower.encoder.layers[4:]
    asked, found = noise_batches(model, 1, video)(0), {}
    asked_with = registry.names() if shape == "llava-next-7b" else KINDS
    for name in asked_with:
        tokens = {"full": model.visual_tokens, "none": None}.get(name, budget)
        if (shape, name) in READ_NUMBERS:
            continue
        for options in ({}, {"schedule": "kept"}):
            with suppress(UserError):
                reducer = registry.build(name, tokens, options)
                require(reducer, model.spec)
                found[name] = run_bytes(model, reducer, asked) / expected_bytes(model, reducer, asked, 2, 1)
                break
    if shape == "qwen2.5-vl-7b":  # neither blocks to merge in nor a text tower
        assert set(found) == set(asked_with) - {"tome", "cdpruner"}
    else:
        refused = set(asked_with) - set(found) - {name for family, name in READ_NUMBERS if family == shape}
        assert refused <= {"tome"}, "a video tower cannot merge"
    assert {name: ratio for name, ratio in found.items() if not 0.85 < ratio < 1.15} == {}


@pytest.mark.table
@pytest.mark.parametrize("name", sorted(name for _, name in READ_NUMBERS if not registry.method(name).image_decides))
def test_a_method_that_reads_numbers_needs_what_the_dry_run_says(name):
    """On the CPU, where there are numbers."""
    model = random_llava(narrow("llava-next-7b", 256, 8, 6), 1, "float32", merge="spatial", force=(672, 672))
    kept = {"schedule": "kept"} if name == "vlmpruner" else {}  # two of eight layers see all tokens
    asked, reducer = noise_batches(model, 1, False)(0), registry.build(name, 320, kept)
    assert run_bytes(model, reducer, asked) == pytest.approx(expected_bytes(model, reducer, asked, 4, 1), rel=0.15)


def run_bytes(model, reducer, asked) -> int:
    """The most bytes alive at once in a run of two tokens."""
    if reducer.needs_text_tower:
        _ = model.clip

    def run():
        state, _ = prefill(model, asked, reducer)
        token = model.logits(state.hidden).argmax(-1, keepdim=True)
        model.logits(step(model.llm, state, model.llm.embed_tokens(token)))

    return metered_peak(run)


@pytest.fixture(scope="module")
def toy() -> estimate.Estimate:
    """The bundled toy model at 64 of 576 tokens on a device that was not measured."""
    config = RunConfig("consensusdrop", 64)
    data, _ = read_questions(config)
    model = outline(config.model)
    reducer = registry.build("consensusdrop", 64)
    work = estimate.workload(model, data, data.questions, 8, 128, reducer)
    return estimate.Estimate(model, reducer, work, 8, 128, torch.float32, rates=SPEED)


@pytest.mark.parametrize(("name", "passes"), [("consensusdrop", 1), ("tome", 2)])
def test_an_image_is_seen_once_where_its_features_are_remembered(toy, name, passes):
    """ToMe reduces images inside the tower, so that every batch sees its own again."""
    data, _ = read_questions(RunConfig(name, 64))
    asked = [replace(data.questions[0], id=str(number)) for number in range(8)]
    work = estimate.workload(toy.model, data, asked, 4, 128, registry.build(name, 64))
    assert work.passes == passes and work.steps == 1, "answers are single words, and the end token follows"
    found, none = (replace(toy, work=replace(toy.work, remembers=kept)) for kept in (work.remembers, False))
    assert found.peak - none.peak == (512 << 20 if name == "consensusdrop" else 0)
    assert "remembered images" not in "\n".join(none.lines())


def test_replicas_share_the_questions_and_ranks_of_one_processor_its_speed(toy):
    two = replace(toy, spread=Spread(replicas=2))
    assert two.run_seconds == pytest.approx(toy.run_seconds / 2, rel=0.01) and "on 2 replicas" in "\n".join(two.lines())
    same = replace(toy, spread=Spread(replicas=2, sharing=2))
    assert same.run_seconds == pytest.approx(toy.run_seconds, rel=0.01)
    one = replace(toy, work=replace(toy.work, questions=5, passes=5), spread=Spread(replicas=4))
    assert one.run_seconds == one.seconds["batch"], "one batch is not divided"
    none = replace(toy, work=Workload(toy.work.shapes, 0.0, 10, 10))  # without reference answers
    assert none.seconds["batch"] == none.seconds["ttft"] and "with answers of one token" in "\n".join(none.lines())


def test_zero_keeps_the_decoder_outside_the_device(toy):
    cpu = replace(toy, spread=Spread(zero="cpu"))
    outside = sum(cpu.weights.host.values())
    gathered = cpu.weights.device["gathered"]
    assert outside and cpu.weights.total + outside - gathered == toy.weights.total
    assert cpu.seconds["step"] > toy.seconds["step"], "the decoder comes over the bus for every token"
    alone = replace(toy, spread=Spread(zero="none"))
    assert alone.weights.total == toy.weights.total + gathered, "nothing is saved on one rank"
    halves = replace(toy, spread=Spread(zero="none", zero_ranks=2))
    assert halves.weights.total == toy.weights.total + gathered - outside // 2
    shared = replace(toy, spread=Spread(zero="cpu", zero_ranks=2))
    assert sum(shared.weights.host.values()) == outside // 2 and "for each rank" in shared.lines()[1]


@pytest.mark.parametrize(("bits", "ratio"), [("8bit", 0.25), ("4bit", 0.129)])
def test_quantised_weights_are_smaller(toy, bits, ratio):
    whole, small = toy.weights.device, replace(toy, quantization=bits).weights.device
    linears = sum(weight.nbytes for name, weight in toy.model.llm.named_parameters() if "proj" in name)
    assert (small["decoder"] - whole["decoder"] + linears) / linears == pytest.approx(ratio, abs=0.01)
    assert small["vision tower"] == whole["vision tower"]


def test_whether_ranks_fit_beside_each_other_is_said(toy):
    assert replace(toy, free=10**12).lines()[4].startswith("fits: ")
    shared = replace(toy, free=int(1.5 * toy.peak), spread=Spread(replicas=2, sharing=2))
    assert "does not fit: " in shared.lines()[4] and "2 ranks share it; a smaller --batch-size" in shared.lines()[4]


@pytest.mark.table
def test_lines_and_record_say_the_same_and_the_page_is_current(toy):
    record = json.loads(json.dumps(replace(toy, free=10**12).record()))
    assert record["kv_bytes"] == toy.kv_bytes and record["fits"] is True and record["questions"] == 2642
    text, page = "\n".join(toy.lines()), (ROOT / "docs" / "cluster.md").read_text()
    assert f"KV cache {size_text(toy.kv_bytes)} for 8 questions at 64 of 576 visual tokens" in text
    assert "expected: 2,642 questions in at least" in text and "on 1 replica with answers as long as" in text
    assert [line for line in toy.lines()[:4] if line not in page] == [], "lines that do not depend on the machine"


@pytest.mark.table
def test_report_of_a_configuration(monkeypatch):
    """The whole way from flags to lines, on each bundled model; rates are measured in the tests below."""
    monkeypatch.setattr(estimate, "measure_rates", lambda *_: SPEED)
    ranks = Placement((("localhost", (0, 1)),))
    lines = estimate.estimate(RunConfig("cdpruner", 64), ranks).lines()
    assert lines[0].startswith("weights ") and "text tower" in lines[0] and "2 ranks share it" in "\n".join(lines)
    tiled = RunConfig(
        "fastervlm", 320, model=embedded_model("tinyllava_next"), data=ROOT / "assets" / "eval_next", limit=4
    )
    found = estimate.estimate(tiled)
    assert max(max(memory.lengths(found.model, found.reducer, shape)) for shape in found.batch) < 500
    data, _ = read_questions(tiled)
    tokens = [image.tokens for shape in found.work.shapes for image in shape.images]
    real = load(tiled.model, device="cpu")
    assert tokens == [real.views(data.sample(question).image)[1].tokens for question in data.questions[:4]]
    assert min(tokens) < found.model.visual_tokens, "not every image is the largest"
    video = RunConfig(
        "full",
        model=embedded_model("tinyllava_video"),
        benchmark="video_qa",
        data=ROOT / "assets" / "eval_video",
        limit=4,
    )
    assert "at all 2056 visual tokens" in "\n".join(estimate.estimate(video).lines())
    with pytest.raises(UserError, match="takes images only"):
        estimate.estimate(replace(video, model=embedded_model("tinyllava")))


@pytest.mark.table
def test_rates_are_measured_quickly_and_are_plausible():
    rates = measure_rates(torch.device("cpu"), torch.float32, 512, 256, 512)
    assert 1e8 < rates.operations < 1e15 and 1e8 < rates.bandwidth < 1e13
    assert "threads" in rates.device


def test_quantities_in_words():
    assert (duration(0.0031), duration(12.4), duration(300), duration(7600)) == ("3.1 ms", "12 s", "5.0 min", "2.1 h")
    assert listed({"a": 2**30, "b": 2**29, "c": 0}) == "1.50 GiB (a 1.00, b 0.50)"


# -- the table of the official models ------------------------------------------------------------------------------


@pytest.mark.lab
@pytest.mark.table
def test_the_table_of_the_official_models_is_current():
    """The rows of three models; all take a minute."""
    lines = table.table(["LLaVA-1.5-7B", "LLaVA-NeXT-7B", "Qwen2.5-VL-7B"]).splitlines()
    assert set(lines) <= set(table.PAGE.read_text().splitlines()), "run `vtr tables memory`"


@pytest.mark.parametrize(
    ("name", "billions"),
    [("LLaVA-1.5-7B", 7.063), ("LLaVA-1.5-13B", 13.351), ("LLaVA-NeXT-34B", 34.752), ("Qwen2.5-VL-7B", 8.292)],
)
def test_official_models_have_their_official_size(name, billions):
    """The numbers of weights that the hub states for the checkpoints."""
    assert memory.weights(official(name), 1).total / 1e9 == pytest.approx(billions, abs=0.001)
