"""The main comparison: which settings it runs, what it writes, and what it calls significant."""

import json

import pytest

from eval.answers.reuse import check_table
from eval.results.statistics import Comparison, Interval
from eval.sweep import Setting
from eval.tables import embedded
from llava.errors import UserError
from llava.reduction import registry


def test_every_method_is_asked_at_every_budget_it_can_meet(tiny):
    found = embedded.settings((12, 8), tiny)
    names = {setting.method for setting in found}
    assert names == set(registry.names()) - {"full"}
    for setting in found:
        registry.build(setting.method, setting.budget, setting.options).check(tiny.spec)


def test_a_mean_out_of_reach_is_counted_by_kept_tokens(tiny):
    """FastV cannot have a mean of 2 of 16 tokens on 4 layers: the first layer alone computes on 16 / 4 = 4."""
    assert embedded.setting_of("fastv", 2, tiny) == Setting("fastv", 2, embedded.BY_KEPT)
    assert embedded.setting_of("fastv", 8, tiny) == Setting("fastv", 8, {})


def cell(name, mean, by_kept=False, budget=64):
    sample_score = {f"q{i}": float(i < mean) for i in range(100)}
    return embedded.Cell(
        Setting(name, budget), sample_score, Interval(mean, mean - 1, mean + 1), 64.0, 8e5, 2e9, by_kept, 0.02
    )


def test_standing_counts_only_significant_pairs():
    pairs = {
        ("a", "b"): Comparison(0.1, 0.05, 0.15, 0.01),
        ("a", "c"): Comparison(-0.1, -0.15, -0.05, 0.01),
        ("b", "c"): Comparison(-0.01, -0.05, 0.05, 0.9),
    }
    assert embedded.standing("a", pairs) == (["b"], ["c"])
    assert embedded.standing("b", pairs) == ([], ["a"])


def test_tables_are_written_and_read_well(tmp_path, monkeypatch):
    page = tmp_path / "embedded.md"
    blocks = ["overview", "significance", f"budget {embedded.SHOWN}"]
    page.write_text("\n".join(f"<!-- begin {name} -->\n<!-- end {name} -->" for name in blocks))
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(embedded, "PAGE", page)
    monkeypatch.setattr(embedded, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(embedded, "IMAGES", tmp_path)
    cells = {b: {"uniform": cell("uniform", 80), "fastv": cell("fastv", 40, True)} for b in embedded.BUDGETS}
    embedded.write(cell("full", 96), cells, {f"q{i}": i for i in range(100)})
    text = page.read_text()
    assert "| uniform | 80.0 | 80.0 | 80.0 | 80.0 |" in text and "| fastv ‡ |" in text
    assert "| uniform | 80.0 [79.0, 81.0] | 83.3 % | 64.0 | 20 ms | 0.80 MB | 2.00 | 1 / 0 **top** |" in text
    assert "1 of 1 pairs differ significantly. No method is significantly better than: uniform." in text
    assert "| random | n/a | n/a | n/a | n/a |" in text
    assert (tmp_path / "embedded_cost.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "tables" / "embedded_main.csv").read_text().splitlines()) == 2 + 2 * len(embedded.BUDGETS)
    assert r"\toprule" in (tmp_path / "tables" / "embedded_main.tex").read_text()


def test_tables_without_answers_say_what_to_run(tiny, tmp_path):
    from llava.errors import UserError

    with pytest.raises(UserError, match="embedded answers"):
        embedded.read_cell(Setting("uniform", 8), tiny, tmp_path, {})


def test_runs_of_other_model_files_or_pictures_are_not_put_in_one_table(tmp_path):
    """The tables of the toy models joined whatever results lay in their folders."""

    def folder(name, method, images="same", model_files="new"):
        settings = {"method": method, "model_files": model_files}
        result = {"settings": settings, "labels": "l", "images": images, "asked": 3, "main": "accuracy", "facts": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        return tmp_path / name

    full = folder("full", "full")
    check_table([full, folder("good", "random")], "new")
    with pytest.raises(UserError, match="differ in images: same and other; ask the questions of both again"):
        check_table([full, folder("pictures", "random", images="other")], "new")
    with pytest.raises(UserError, match="differ in model_files: new and old"):
        check_table([full, folder("weights", "random", model_files="old")], "new")
    with pytest.raises(UserError, match="holds answers of other files of the model"):
        check_table([full], "newer")
