"""Choices of reading pictures and budgets as shares, from the command line to the result."""

import json

import pytest

from eval.__main__ import main
from eval.config import pairs
from llava.budget import count_or_ratio
from llava.errors import UserError
from llava.model.builder import parse
from llava.reduction import registry
from tests.eval_fakes import write_gqa
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers, save_qwen_transformers


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64", 64), (64, 64), ("1/9", 1 / 9), ("0.111", 0.111), (0.111, 0.111), (".5", 0.5), ("1.0", 1.0), ("2/2", 1.0)],
)
def test_a_budget_is_a_number_or_a_ratio(text, expected):
    """`--budget 0.111` was refused although --help promised a ratio; `--retention 0.111` was another way to say it."""
    assert count_or_ratio(text) == expected and type(count_or_ratio(text)) is type(expected)


@pytest.mark.parametrize(
    "text", ["1/0", "3/2", "0/9", "a/b", "1/", "/9", "16.5", "0.0", "-1", "0", "1e9", 6.5, True, None, "9" * 5000]
)
def test_what_is_neither_is_refused(text):
    with pytest.raises(ValueError, match="should be a"):
        count_or_ratio(text)


def test_choices_are_parsed_and_refused():
    assert pairs("--picture", ["merge=spatial", "force=672x672"]) == {"merge": "spatial", "force": "672x672"}
    assert [parse("force", "672x336"), parse("min_pixels", "7"), parse("merge", "a")] == [(672, 336), 7, "a"]
    for wrong in (["merge"], ["=spatial"], ["merge="]):
        with pytest.raises(UserError, match="should look like merge=spatial"):
            pairs("--picture", wrong)
    with pytest.raises(UserError, match="given twice"):
        pairs("--picture", ["merge=spatial", "merge=spatial_unpad"])
    for name, value in (("force", "672"), ("force", "ax3"), ("min_pixels", "on")):
        with pytest.raises(UserError, match=f"{name} should be"):
            parse(name, value)


def run(tmp_path, *arguments: str) -> dict:
    write_gqa(tmp_path, count=6)
    output = tmp_path / "out"
    code = main(
        [*arguments, "--data", str(tmp_path), "--output", str(output), "--wandb", "disabled", "--device", "cpu"]
    )
    assert code == 0
    return json.loads((output / "result.json").read_text())


def test_the_convention_of_tiles_is_part_of_the_result(tmp_path):
    save_next_transformers(tmp_path / "next", make_tiny_next())
    arguments = ("--method", "fastervlm", "--budget", "20", "--model", str(tmp_path / "next"))
    result = run(tmp_path, *arguments, "--picture", "merge=spatial", "--picture", "force=112x112")
    assert result["settings"]["picture"] == {"merge": "spatial", "pinpoints": "original", "tiles": "112x112"}
    assert result["audit"]["mean_tokens_per_layer"] == 20 and result["audit"]["visual_tokens_before"] == 80


@pytest.mark.parametrize(
    "flags",
    [
        ["--budget", "1/4"],
        ["--budget", "0.25"],
        ["--set", "divprune.retention_ratio=0.25"],
        ["--set", "retention_ratio=0.25"],
    ],
)
def test_a_ratio_keeps_that_part_of_each_picture(tmp_path, flags):
    save_qwen_transformers(tmp_path / "qwen")
    result = run(tmp_path, "--method", "divprune", *flags, "--model", str(tmp_path / "qwen"))
    before = result["audit"]["visual_tokens_before"]
    assert result["audit"]["mean_tokens_per_layer"] == before / 4
    assert result["settings"]["config"]["retention_ratio"] == result["config"]["retention_ratio"] == 0.25


@pytest.mark.parametrize(
    "flags",
    [
        ["--budget", "8", "--set", "random.retention_ratio=0.5"],
        ["--budget", "8", "--set", "retention_ratio=0.5"],
        ["--budget", "1/2", "--set", "random.retention_ratio=0.5"],
        ["--budget", "0.5", "--set", "random.retention_ratio=0.5"],
    ],
)
def test_a_budget_beside_a_ratio_is_refused(tmp_path, capsys, flags):
    """`--budget 64 --set random.retention_ratio=0.5` printed "random at 64" and kept 288 tokens."""
    write_gqa(tmp_path, count=2)
    assert main(["--method", "random", *flags, "--data", str(tmp_path), "--wandb", "disabled"]) == 2
    err = capsys.readouterr().err
    assert "both given" in err and "leave one out" in err and err.count("\n") == 1


def test_the_registry_refuses_a_budget_beside_a_ratio():
    """`reduce(model, "random", budget=8, retention_ratio=0.5)` kept 16 tokens."""
    with pytest.raises(UserError, match=r"A budget \(8\) and a retention_ratio \(0\.5\) are both given"):
        registry.build("random", 8, {"retention_ratio": 0.5})
    reducer = registry.build("random", None, {"retention_ratio": "0.5"}, visual_tokens=33)
    assert (reducer.budget, reducer.retention_ratio) == (17, 0.5)
    assert registry.build("random", 8, {"retention_ratio": 0.0}).budget == 8
    with pytest.raises(UserError, match="full keeps all"):
        registry.build("full", None, {"retention_ratio": 0.5}, visual_tokens=32)


def test_unknown_choices_end_in_one_sentence(tmp_path, tiny_path, capsys):
    write_gqa(tmp_path, count=2)
    known = ["--method", "full", "--data", str(tmp_path), "--wandb", "disabled"]
    assert main([*known, "--model", str(tiny_path), "--picture", "merge=spatial"]) == 2
    assert "leaves no choice of merge" in capsys.readouterr().err
    save_next_transformers(tmp_path / "next", make_tiny_next())
    assert main([*known, "--model", str(tmp_path / "next"), "--picture", "merg=spatial"]) == 2
    assert "Did you mean 'merge'" in capsys.readouterr().err
