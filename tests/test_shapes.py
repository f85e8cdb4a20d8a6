"""Random weights in the shapes of the official models, and what is measured and counted on them: growth and claims."""

import json
from types import SimpleNamespace

import pytest
import torch

from eval.efficiency.counts import Computed
from eval.efficiency.shapes import SHAPES, narrow, noise_batches, random_llava
from lab.bench import claims, growth, stability
from lab.bench.claims import PAGE, Check, Claim, answer, ledger, read
from lab.bench.growth import exponent, grid, main, model_of
from llava.errors import UserError
from llava.model.builder import load
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.pipeline.generate import generate, prefill
from llava.reduction import registry
from llava.reduction.ranking import distinct
from llava.reduction.token_layout import Canvas, single
from tests.conftest import drawn_image, samples


def test_random_model_has_the_real_shape():
    """Built here at a fraction of the size; the numbers in SHAPES are the official configuration's."""
    assert SHAPES["llava-1.5-7b"]["text"]["intermediate_size"] == 11008
    model = random_llava(narrow("llava-1.5-7b", 64, 32, 24), 3, "float32")
    layers = model.llm.layers
    assert model.visual_tokens == 576 and len(layers) == 32
    # Full depth, three layers' weights: the others share them and keep their own place in the cache.
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(32))
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers}) == 3
    # Shared layers had copies of the configuration and stayed on SDPA where the model was set to eager attention.
    assert all(layer.self_attn.config is model.llm.config for layer in layers)
    for method in ("full", "trim"):
        reducer = registry.build(method, 576 if method == "full" else 64)
        answers = generate(model, samples(1), reducer, max_new_tokens=2).answers
        assert answers[0].accounting.mean == reducer.budget


def test_random_weights_are_on_their_device():
    """Shared decoder layers stay shared after the model has moved; "meta" stands for another device here."""
    model = random_llava(narrow("llava-1.5-7b", 64, 32, 24), 2, "float32", 5, device=torch.device("meta"))
    assert {weight.device.type for weight in model.hf_model.parameters()} == {"meta"} == {model.device.type}
    assert len({id(layer.mlp.up_proj.weight) for layer in model.llm.layers}) == 2


@pytest.mark.parametrize(
    ("shape", "tokens", "layers"),
    [
        ("llava-1.5-13b", 576, 40),
        ("llava-next-34b", 2880, 60),
        ("video-llava-7b", 2056, 32),
        ("qwen2.5-vl-7b", 1280, 28),
    ],
)
def test_every_family_runs_at_full_depth_without_memory(shape, tokens, layers):
    """On the meta device, which computes shapes alone; the tokens are those that the papers count (frames with CLS)."""
    reading = {"merge": "spatial", "force": (672, 672)} if "next" in shape else {}
    model = random_llava(shape, 1, device=torch.device("meta"), **reading)
    state, record = prefill(model, noise_batches(model, 1, False)(0), registry.build("full", model.visual_tokens))
    assert [image.inputs for image in record.images[0]] == [tokens] == [model.visual_tokens]
    assert state.visual == [(tokens,)] * layers


# -- how cost grows ------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_known_costs_give_their_powers():
    tokens = (256, 512, 1280, 2560, 11520)
    assert exponent(tokens, [3e-3 * number for number in tokens]) == pytest.approx(1)
    assert exponent(tokens, [2e-6 * number**2 for number in tokens]) == pytest.approx(2)


@pytest.mark.lab
@pytest.mark.parametrize(
    ("tokens", "tiles"), [(256, None), (512, (1, 1)), (1280, (2, 2)), (5120, (1, 19)), (11520, (4, 11))]
)
def test_tiles_give_the_tokens_that_were_asked_for(tokens, tiles):
    assert grid(tokens) == tiles
    assert model_of(tokens, 64, 1, 2, torch.device("meta"), "float32").visual_tokens == tokens
    with pytest.raises(UserError, match="multiples of 256"):
        grid(tokens - 1)


@pytest.mark.lab
@pytest.mark.table
def test_a_run_measures_fits_and_draws(tmp_path, capsys):
    """Also a method that takes tiles one by one only."""
    flags = ["--methods", "full,downsample,fastervlm", "--tokens", "256,512,768", "--budget", "48", "--device", "cpu"]
    small = ["--width", "64", "--layers", "1", "--blocks", "2", "--repeats", "1"]
    files = ["--json", str(tmp_path / "r" / "g.json"), "--plot", str(tmp_path / "r" / "g.png")]
    assert main([*flags, *small, *files]) == 0
    assert "of the last three" in capsys.readouterr().out
    points = json.loads((tmp_path / "r" / "g.json").read_text())["points"]
    assert (points[-1]["method"], points[-1]["tokens"]) == ("fastervlm", 768) and len(points) == 9
    assert all(point["ttft"] > 0 for point in points)
    assert (tmp_path / "r" / "g.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.lab
def test_what_cannot_be_measured_is_refused_before_anything_is(capsys, monkeypatch):
    """The run ended at its third size: 64 tokens are no whole number for each of three tiles."""
    measured = []
    monkeypatch.setattr(growth, "measure", lambda *_: measured.append(1))
    flags = ["--methods", "fastervlm,downsample", "--tokens", "256,512,768", "--budget", "64", "--width", "64"]
    assert main([*flags, "--layers", "1", "--blocks", "2", "--repeats", "1", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "At 768 visual tokens: downsample" in said and "divisible by 3 tiles, got 64" in said
    assert main(["--width", "100"]) == 2
    assert "multiple of 64" in capsys.readouterr().err and not measured


# -- published claims ----------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_every_claim_stands_on_the_page():
    page = PAGE.read_text()
    for claim in read():
        line = next(line for line in page.splitlines() if line.startswith(f"| {claim.claim} |"))
        assert f"| {claim.status} |" in line and claim.source in line


@pytest.mark.lab
def test_quantities_are_ratios_of_what_was_counted(monkeypatch):
    full, ours = (Computed(f, f, (1,), (kv, kv), 1) for f, kv in ((8 * 10**12, 30 * 10**6), (2 * 10**12, 5 * 10**6)))
    monkeypatch.setattr(claims, "computed_by", lambda shape, method, *_: full if method == "full" else ours)
    check = {"shape": "s", "method": "m", "budget": 1}
    found = {quantity: answer(Check(**check, quantity=quantity)) for quantity in claims.QUANTITIES}
    assert found == {"flops": 4, "flops_saved": 75, "tflops": 2, "kv": 6}
    about = {"id": "a", "claim": "c", "source": "s", "trust": "low", "note": "n"}
    claim = Claim(**about, status="empirical", check=Check(**check, quantity="flops"))
    assert "4.00 times fewer operations, counted | empirical" in ledger([claim])
    with pytest.raises(ValueError, match="unless it is open"):
        Claim(**about, status="open", ours="2 times")


@pytest.mark.lab
@pytest.mark.table
def test_visiondrop_at_320_of_2880_has_the_published_reduction_of_operations():
    """6 times in the abstract; counted at full depth on the meta device."""
    claim = next(claim for claim in read() if claim.id == "visiondrop-next-flops")
    assert claim.check is not None and claim.published == 6.0
    assert 6.0 <= answer(claim.check) < 7.0


# -- half precision ------------------------------------------------------------------------------------------------


def test_rounding_decides_the_near_duplicates_that_vispruner_removes():
    """Noise of float32's own rounding in the features changes about half of the diverse tokens: no wider type helps."""
    model = load(device="cpu")
    pixels = torch.stack([model.image_processor(drawn_image(seed, (336, 336))) for seed in range(4)])
    with torch.inference_mode():
        features = encode(model.tower, pixels, model.select_layer).features
        kept, moved = (distinct(one, 32) for one in (features, features * (1 + 1e-6 * torch.randn_like(features))))
    shares = [len(set(a.tolist()) - set(b.tolist())) / 32 for a, b in zip(kept, moved, strict=True)]
    assert min(shares) > 0.1, shares


def answered(text, *kept, layout=None, canvas=None):
    """An answer with one step for each list of kept places."""
    steps = [SimpleNamespace(reduction=SimpleNamespace(kept=torch.tensor([one]), inputs=16)) for one in kept]
    return SimpleNamespace(text=text, trace=steps, runs=(layout,), canvases=(canvas,))


def test_kept_tokens_are_compared_after_every_step():
    """V2Drop ends with one token. It alone was compared: bfloat16 kept "0 %" on an H100, and "100 %" on a CPU.

    After two stages the indices of the second are places among those that the first one left.
    """
    one = answered("", [1, 4, 6, 9], [0, 3])
    assert stability.survivors(one) == {(0, 1), (0, 4), (0, 6), (0, 9), (1, 1), (1, 9)}
    assert stability.kept_share([one], [answered("", [1, 4, 6, 9], [2, 3])]) == pytest.approx(5 / 6)
    assert stability.kept_share([answered("")], [answered("")]) == 1, "without a step nothing is lost"


def test_tokens_on_padding_are_counted_beside_all_padding():
    """4 x 4 patches of a picture that is half as high as wide: the rows 0 and 3 are padding."""
    about = {"layout": single(4, 4), "canvas": Canvas((32, 32), (0, 8, 32, 24))}
    assert stability.padding_shares([answered("", [1, 5, 6, 9], **about)]) == (0.25, 0.5)
    assert stability.padding_shares([answered("", [1, 5, 6, 9], [0, 1], **about)]) == (2 / 6, 0.5)
    assert stability.padding_shares([answered("", **about)]) == (0.5, 0.5), "a method without a step keeps them all"


@pytest.mark.lab
def test_the_table_of_stability_says_what_changes(capsys):
    """Batch, noise and precision change nothing where nothing is chosen; noise and bfloat16 move DivPrune's tokens."""
    words = ["--methods", "full,divprune,fastv", "--budget", "32,128", "--questions", "3", "--device", "cpu"]
    assert stability.main(words) == 0
    printed = capsys.readouterr().out
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in printed.splitlines())
        if len(cells) > 8
    }
    assert rows["full"][0] == "576" and rows["full"][2:] == ["0.0 (0)"] * 4 + [""]
    assert (rows["divprune"][0], rows["fastv"][0]) == ("32", "128"), "FastV cannot reach 32 on 8 layers"
    assert rows["divprune"][2] == "0.0 (0)" and float(rows["divprune"][5].split()[0]) > 1
    assert rows["divprune"][6] == "dtype"
    assert stability.main([*words[:2], "--budget", "32"]) == 2
    assert "Add a larger budget to --budget, or leave fastv out of --methods." in capsys.readouterr().err
    exact = torch.full((1, 4, 8), 3.0)
    noisy = stability.with_noise(None, None, exact)
    assert 1e-7 < (noisy - exact).abs().mean() < 1e-5 and torch.equal(noisy, stability.with_noise(None, None, exact))
