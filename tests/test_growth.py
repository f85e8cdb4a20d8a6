"""How cost grows: the fits against costs that are known, and one small run."""

import json

import pytest
import torch

from eval.efficiency import growth
from eval.efficiency.growth import Size, fit_costs, grid, main, model_of
from llava.errors import UserError
from llava.reduction import registry

TOKENS = (256, 512, 1280, 2560, 11520)


def test_known_costs_give_their_powers():
    linear = fit_costs(TOKENS, [3e-3 * tokens for tokens in TOKENS])
    assert (linear.exponent, linear.last, linear.quadratic) == (pytest.approx(1), pytest.approx(1), pytest.approx(0))
    square = fit_costs(TOKENS, [2e-6 * tokens**2 for tokens in TOKENS])
    assert (square.exponent, square.quadratic) == (pytest.approx(2), pytest.approx(1))
    both = fit_costs(TOKENS, [tokens + tokens**2 / 11520 for tokens in TOKENS])
    assert both.quadratic == pytest.approx(0.5) and 1 < both.exponent < both.last < 2


def test_a_constant_part_hides_in_the_first_points_only():
    found = fit_costs(TOKENS, [1000 + tokens for tokens in TOKENS])
    assert found.exponent < found.last < 1 and found.quadratic == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("costs", [[1, 2], [1, 0, 2]])
def test_costs_that_cannot_be_fitted_are_refused(costs):
    with pytest.raises(ValueError, match="three or more positive costs"):
        fit_costs(TOKENS[: len(costs)], costs)


@pytest.mark.parametrize(
    ("tokens", "tiles"), [(256, None), (512, (1, 1)), (1280, (2, 2)), (5120, (1, 19)), (11520, (4, 11))]
)
def test_tiles_give_the_tokens_that_were_asked_for(tokens, tiles):
    assert grid(tokens) == tiles
    assert model_of(tokens, Size(64, 1, 2), torch.device("meta"), "float32").visual_tokens == tokens


def test_methods_have_their_default_options():
    """`crops=global` was measured as their most expensive case, while the default held six times as much memory."""
    model = model_of(512, Size(64, 1, 2), torch.device("meta"), "float32")
    assert growth.reducer_of("consensusdrop", 128, model) == registry.build("consensusdrop", 128)
    assert growth.reducer_of("full", 128, model) == registry.build("full", 512)


@pytest.mark.parametrize("tokens", [0, 255, 300])
def test_other_numbers_of_tokens_are_refused(tokens):
    with pytest.raises(UserError, match="multiples of 256"):
        grid(tokens)


@pytest.mark.table
def test_a_run_measures_fits_and_draws(tmp_path, capsys):
    """Also a method that takes tiles one by one only."""
    flags = ["--methods", "full,downsample,fastervlm", "--tokens", "256,512,768", "--batch-size", "1,2"]
    small = ["--width", "64", "--layers", "1", "--blocks", "2", "--repeats", "1", "--device", "cpu"]
    files = ["--json", str(tmp_path / "r" / "g.json"), "--plot", str(tmp_path / "r" / "g.png")]
    assert main([*flags, "--budget", "48", *small, *files]) == 0
    said = capsys.readouterr().out
    assert "quadratic at the end" in said and "batch 2" in said
    points = json.loads((tmp_path / "r" / "g.json").read_text())["points"]
    assert [(p["method"], p["tokens"], p["batch"]) for p in points][-1] == ("fastervlm", 256, 2) and len(points) == 12
    assert all(point["ttft"] > 0 for point in points)
    assert (tmp_path / "r" / "g.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_tiles_cannot_share_is_refused_before_anything_is_measured(capsys, monkeypatch):
    """The run ended at its third size: 64 tokens are no whole number for each of three tiles."""
    measured = []
    monkeypatch.setattr(growth, "measure", lambda *_: measured.append(1))
    flags = ["--methods", "fastervlm,downsample", "--tokens", "256,512,768", "--budget", "64", "--width", "64"]
    assert main([*flags, "--layers", "1", "--blocks", "2", "--repeats", "1", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "At 768 visual tokens: downsample" in said and "divisible by 3 tiles, got 64" in said
    assert not measured


def test_a_width_without_whole_heads_is_refused(capsys):
    assert main(["--width", "100"]) == 2
    assert "multiple of 64" in capsys.readouterr().err
