"""Choices of reading pictures and budgets as shares, from the command line to the result."""

import json

import pytest

from eval.__main__ import main
from eval.config import count_or_share, pairs
from llava.errors import UserError
from llava.model.builder import parse
from tests.eval_fakes import write_gqa
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers, save_qwen_transformers


@pytest.mark.parametrize(("text", "expected"), [("64", (64, None)), ("1/9", (None, 1 / 9)), (None, (None, None))])
def test_a_budget_is_a_number_or_a_share(text, expected):
    assert count_or_share("--budget", text) == expected


@pytest.mark.parametrize("text", ["1/0", "3/2", "0/9", "a/b", "1/", "/9", "0.5"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(UserError, match="--budget should be"):
        count_or_share("--budget", text)


def test_choices_are_parsed_and_refused():
    assert pairs("--picture", ["merge=spatial", "force=672x672"]) == {"merge": "spatial", "force": "672x672"}
    assert (
        parse("force", "672x336") == (672, 336) and parse("flip", "7") == 7 and parse("merge", "spatial") == "spatial"
    )
    for wrong in (["merge"], ["=spatial"], ["merge="]):
        with pytest.raises(UserError, match="should look like merge=spatial"):
            pairs("--picture", wrong)
    with pytest.raises(UserError, match="given twice"):
        pairs("--picture", ["merge=spatial", "merge=spatial_unpad"])
    for name, value in (("force", "672"), ("force", "ax3"), ("flip", "on")):
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


def test_a_share_keeps_that_part_of_each_picture(tmp_path):
    save_qwen_transformers(tmp_path / "qwen")
    result = run(tmp_path, "--method", "divprune", "--budget", "1/4", "--model", str(tmp_path / "qwen"))
    before = result["audit"]["visual_tokens_before"]
    assert result["audit"]["mean_tokens_per_layer"] == before / 4 and result["settings"]["config"]["share"] == 0.25


def test_unknown_choices_end_in_one_sentence(tmp_path, tiny_path, capsys):
    write_gqa(tmp_path, count=2)
    known = ["--method", "full", "--data", str(tmp_path), "--wandb", "disabled"]
    assert main([*known, "--model", str(tiny_path), "--picture", "merge=spatial"]) == 2
    assert "leaves no choice of merge" in capsys.readouterr().err
    save_next_transformers(tmp_path / "next", make_tiny_next())
    assert main([*known, "--model", str(tmp_path / "next"), "--picture", "merg=spatial"]) == 2
    assert "Did you mean 'merge'" in capsys.readouterr().err
