"""Sweeps, tables and the latency benchmark on the tiny random model."""

import argparse

import pytest
import torch

from eval import job as job_module
from eval import outcomes
from eval.efficiency import latency
from eval.efficiency.latency import Measured, Measurements, chosen_options, ratios, run, table
from eval.efficiency.shapes import SHAPES, random_llava
from eval.papers import spec
from eval.results.statistics import Interval
from eval.sweep import CachingLlava, Setting, sweep
from eval.tables.common import changed, defaults, is_default
from eval.tables.page import insert, latex, markdown
from eval.tables.plots import accuracy_plot
from llava.errors import UserError
from llava.model.checkpoint.original_layout import CLIP_L_336
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.conftest import picture, samples
from tests.eval_fakes import write_gqa


def test_remembered_features_give_the_same_answers(tiny):
    batch = [sample if sample.image is None else _named(sample, i) for i, sample in enumerate(samples())]
    caching = CachingLlava(tiny)
    settings = (("consensusdrop", {}), ("uniform", {}), ("consensusdrop", {"block": "-1", "cls_token": "true"}))
    reducers = [registry.build(name, 7, options) for name, options in settings]
    caching.expect(reducers)
    for reducer in reducers:
        expected = generate(tiny, batch, reducer, max_new_tokens=4)
        for _ in range(2):  # the second time nothing is encoded
            found = generate(caching, batch, reducer, max_new_tokens=4)
            assert [a.token_ids for a in found.answers] == [a.token_ids for a in expected.answers]
            assert found.flops == expected.flops
    assert len(caching._seen) == 4


def test_a_finished_setting_is_not_asked_again(tiny, tmp_path, monkeypatch):
    """A sweep goes on where it stopped; a run of other settings in the same folder would still be refused."""
    data = write_gqa(tmp_path / "data", count=6, images=2)
    settings = [Setting("uniform", 4), Setting("consensusdrop", 4, {"alpha": "0.25"})]
    first = sweep(settings, CachingLlava(tiny), data, "testdev", tmp_path / "out", wandb="disabled")
    assert [len(credits) for credits in first] == [6, 6]
    assert len({folder.name for folder in (tmp_path / "out" / tiny.name / "gqa-testdev").iterdir()}) == 2
    again = CachingLlava(tiny)
    monkeypatch.setattr(outcomes, "generate", None)
    assert sweep(settings, again, data, "testdev", tmp_path / "out", wandb="disabled") == first


def test_a_finished_setting_is_not_used_for_other_pictures_or_other_code(tiny, tmp_path, monkeypatch):
    """A sweep took finished settings by their configuration alone."""
    data = write_gqa(tmp_path / "data", count=6, images=2)
    settings, out = [Setting("uniform", 4)], tmp_path / "out"
    sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4, wandb="disabled")
    (folder,) = (out / tiny.name / "gqa-testdev").iterdir()
    assert (folder / "limit4" / "result.json").is_file() and not (folder / "result.json").exists()
    real = job_module.answer_sources
    monkeypatch.setattr(
        job_module, "answer_sources", lambda *objects: real(*objects) | {"llava/pipeline/decoder.py": "edited"}
    )
    with pytest.raises(UserError, match=r"made by other code: llava/pipeline/decoder\.py changed"):
        sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4)
    monkeypatch.undo()
    picture(9, (32, 32)).save(data / "gqa" / "data" / "images" / "n1.jpg")
    with pytest.raises(UserError, match=r"holds 2 answers to other images"):
        sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4)


def test_remembered_features_stay_within_their_memory(tiny):
    """Every image's features were kept: 1.2 MB each at 7B, 48 GB for VQAv2's images."""
    from eval.feature_cache import bytes_of
    from llava.pipeline.generate import generate
    from llava.reduction import registry

    whole, small = CachingLlava(tiny), CachingLlava(tiny)
    reducer = registry.build("consensusdrop", 4)
    asked = [_named(sample, index) for index, sample in enumerate(samples(6, text_only=()))]
    expected = [generate(whole, [sample], reducer, max_new_tokens=2).answers[0].text for sample in asked]
    one = bytes_of(next(iter(whole._seen.values()))[0])
    small.cache_bytes = 2 * one
    assert [generate(small, [sample], reducer, max_new_tokens=2).answers[0].text for sample in asked] == expected
    assert [name for name, _ in small._seen] == ["p4", "p5"] and small._bytes == 2 * one
    assert len(whole._seen) == 6 and whole._bytes == 6 * one
    # More images in one batch than fit are encoded and forgotten.
    small.cache_bytes = 0
    assert [answer.text for answer in generate(small, asked, reducer, max_new_tokens=2).answers] == expected
    assert not small._seen and small._bytes == 0


def _named(sample, index):
    from dataclasses import replace

    return replace(sample, image_id=f"p{index}", image=picture(index))


@pytest.mark.parametrize("method", spec.PAPERS)
def test_every_alternative_of_the_ablation_is_a_valid_setting(method):
    usual = defaults(method)
    rows = spec.read(spec.find(f"{method}/ablation")).rows
    for title in {row.group for row in rows if row.group}:
        group = [dict(row.options) for row in rows if row.group == title]
        built = [registry.build(method, 64, changed(options, usual)) for options in group]
        assert len(set(built)) == len(built), title
        assert sum(is_default(options, usual) for options in group) == 1, (
            f"{title}: the default must be one of the rows"
        )


def test_insert_replaces_only_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n")
    insert(page, "x", markdown(["h", "n"], [["r", "1"]]))
    expected = (
        "a\n<!-- begin x -->\n| h | n |\n|---|---:|\n| r | 1 |\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
    )
    assert page.read_text() == expected
    insert(page, "x", markdown(["h", "n"], [["r", "1"]]))
    assert page.read_text() == expected
    with pytest.raises(UserError, match="no markers for 'z'"):
        insert(page, "z", "")


def test_latex_escapes_what_latex_reads():
    text = latex(["method", "64"], [["full", "96 %"], ["a_b", "n/a"], ["c ‡", "1"]])
    assert r"a\_b & -- \\" in text and r"96 \%" in text and r"c $^\ddagger$" in text
    assert text.count(r"\midrule") == 2 and "{lr}" in text


def test_the_plot_is_written(tmp_path):
    curves = {name: {64: Interval(80, 78, 82), 32: Interval(70, 68, 72)} for name in ("a", "b")}
    accuracy_plot(tmp_path / "p.png", Interval(90, 89, 91), curves, 576)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_signals_in_the_tower_count_as_selection():
    full = Measured({"vision": 1.0, "selection": 0.0, "prefill": 8.0}, 400, 1500, 7)
    ours = Measured({"vision": 1.5, "selection": 0.5, "prefill": 2.0}, 100, 500, 7)
    found = ratios(full, ours)
    assert (found["ttft"], found["prefill"], found["kv_bytes"], found["flops"]) == (9 / 4, 4, 4, 3)
    assert found["selection share of ttft"] == 0.5 / 4 and found["selection and signals share of ttft"] == 1 / 4


def test_latency_compares_with_full_in_one_process(tiny_path):
    args = argparse.Namespace(
        method="consensusdrop", budget=4, set=[], model=str(tiny_path), shape=None, distinct=4, dtype="float32",
        device="cpu", batch_size=2, repeats=2, threads=0, measurements=None, layers=None, picture=[],
    )  # fmt: skip
    result = run(args)
    # Per layer 4 of 16 visual tokens; both hold the same text.
    full, reduced = result["methods"]["full"], result["methods"]["consensusdrop"]
    text = full["kv_bytes"] - reduced["kv_bytes"]
    assert text == 2 * 4 * 12 * 2 * 2 * 16 * 4, (
        "samples x layers x dropped tokens x (keys, values) x heads x width x bytes"
    )
    assert reduced["flops"] < full["flops"]
    assert "faster than full" in table(result)


def test_random_model_has_the_real_shape(monkeypatch):
    """Built here at a fraction of the size; the numbers in SHAPES are the official configuration's."""
    assert SHAPES["llava-1.5-7b"]["text"]["intermediate_size"] == 11008
    vision, text = CLIP_L_336, SHAPES["llava-1.5-7b"]["text"]
    heads = {"num_attention_heads": 2}
    small = {
        "family": "llava",
        "vision": {**vision, **heads, "hidden_size": 32, "intermediate_size": 64},
        "text": {**text, **heads, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96},
    }
    monkeypatch.setitem(SHAPES, "small", small)
    model = random_llava("small", 3, "float32")
    layers = model.llm.layers
    assert model.visual_tokens == 576 and len(layers) == 32
    # Full depth, three layers' weights: the others share them and keep their own place in the cache.
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(32))
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers}) == 3
    for method in ("full", "trim"):
        reducer = registry.build(method, 576 if method == "full" else 64)
        answers = generate(model, samples(1), reducer, max_new_tokens=2).answers
        assert answers[0].accounting.mean == reducer.budget


def test_random_next_has_tiles_and_as_many_layers_as_asked(monkeypatch):
    """The shape of the speed benchmark at a fraction of the size: 2,880 tokens in the papers' convention."""
    text = {**SHAPES["llava-next-mistral-7b"]["text"], "hidden_size": 64, "intermediate_size": 96}
    vision = {
        **CLIP_L_336,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    small = {
        "family": "llava_next",
        "vision": vision,
        "text": {**text, "num_attention_heads": 8, "num_key_value_heads": 2},
    }
    monkeypatch.setitem(SHAPES, "small", small)
    model = random_llava("small", None, "float32", 2, merge="spatial", force=(672, 672))
    assert len(model.llm.layers) == 2 and model.visual_tokens == 2880
    (answer,) = generate(model, samples(1), registry.build("fastervlm", 320), max_new_tokens=1).answers
    assert answer.accounting.mean == 320 and answer.accounting.visual_tokens == 2880


def test_measurements_are_kept_and_belong_to_their_settings(tmp_path):
    """An interrupted benchmark continues from its file; a file under other settings is refused and left as it is."""
    path, row = tmp_path / "measured.jsonl", {"seconds": {"prefill": 1.0}}
    Measurements(path, {"budget": 64}).add(0, "full", row)
    assert Measurements(path, {"budget": 64}).found == {(0, "full"): row}
    before = path.read_text()
    with pytest.raises(UserError, match="other settings"):
        Measurements(path, {"budget": 32})
    assert path.read_text() == before


def test_latency_takes_options_with_and_without_the_method():
    """`python -m eval` takes --set METHOD.KEY=VALUE; latency once took KEY=VALUE alone."""
    one = {"consensusdrop": {"alpha": "0.5"}}
    assert chosen_options(["alpha=0.5"], ["consensusdrop"]) == one
    assert chosen_options(["consensusdrop.alpha=0.5"], ["consensusdrop"]) == one
    assert chosen_options(["consensusdrop.alpha=0.5"], ["all"]) == one
    assert chosen_options(["consensusdrop.alpha=0.5"], ["consensusdrop", "visionzip"]) == one
    both = {"fastv": {"layer": "3"}, "dart": {"layer": "3"}}
    assert chosen_options(["layer=3"], ["fastv", "dart"]) == both


@pytest.mark.parametrize(
    ("settings", "methods", "message"),
    [
        (["alpha=1"], ["all"], "names no method"),
        (["visionzip.alpha=1"], ["consensusdrop"], "for method 'visionzip'"),
        (["alpha=1", "consensusdrop.alpha=2"], ["consensusdrop"], "given twice"),
        (["alpha"], ["consensusdrop"], "should look like"),
    ],
)
def test_latency_refuses_options_that_would_go_nowhere(settings, methods, message):
    """With --method all, options were silently dropped."""
    with pytest.raises(UserError, match=message):
        chosen_options(settings, methods)


def test_latency_puts_random_weights_on_the_device(monkeypatch):
    """`--shape ... --device cuda` ignored the device and timed the CPU."""
    placed = []

    def build(*_, device, **__):
        placed.append(device)
        raise UserError("built")

    monkeypatch.setattr(latency, "random_llava", build)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = ["--method", "full", "--budget", "64", "--shape", "llava-1.5-7b", "--device"]
    assert latency.main([*arguments, "cuda"]) == 2
    assert [device.type for device in placed] == ["cuda"]


def test_latency_refuses_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--method", "full", "--budget", "64", "--shape", "llava-1.5-7b", "--device"]
    assert latency.main([*arguments, "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert latency.main([*arguments, "gpu0"]) == 2
    assert "got 'gpu0'" in capsys.readouterr().err


def test_random_weights_are_on_their_device(monkeypatch):
    """Shared decoder layers stay shared after the model has moved; "meta" stands for another device here."""
    text = {**SHAPES["llava-1.5-7b"]["text"], "hidden_size": 64, "intermediate_size": 96}
    small = {
        "family": "llava",
        "vision": {**CLIP_L_336, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64},
        "text": {**text, "num_attention_heads": 2, "num_key_value_heads": 2},
    }
    monkeypatch.setitem(SHAPES, "small", small)
    model = random_llava("small", 2, "float32", 5, device=torch.device("meta"))
    assert {weight.device.type for weight in model.hf_model.parameters()} == {"meta"} == {model.device.type}
    assert len({id(layer.mlp.up_proj.weight) for layer in model.llm.layers}) == 2


def test_a_setting_that_was_interrupted_after_a_failure_goes_on(tiny, tmp_path):
    """The sweep asked the failed questions alone, and ended because the others had not been asked."""
    data = write_gqa(tmp_path / "data", count=6)
    image = data / "gqa" / "data" / "images" / "n0.jpg"
    whole, setting, out = image.read_bytes(), Setting("uniform", 4), tmp_path / "out"
    image.write_bytes(whole[:100])
    with pytest.raises(UserError, match="1 questions have no answer"):
        sweep([setting], CachingLlava(tiny), data, "testdev", out, limit=3, wandb="disabled")
    image.write_bytes(whole)
    (found,) = sweep([setting], CachingLlava(tiny), data, "testdev", out, wandb="disabled")
    assert len(found) == 6
