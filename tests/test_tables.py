"""Sweeps and tables on the tiny random model."""

import pytest

from eval import job as job_module
from eval import outcomes
from eval.papers import spec
from eval.results.statistics import Interval
from eval.sweep import CachingLlava, Setting, sweep
from eval.tables.common import changed, defaults, is_default
from eval.tables.page import insert, latex, markdown
from eval.tables.plots import accuracy_plot
from llava.errors import UserError
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


@pytest.mark.parametrize("method", spec.PAPERS)
def test_the_table_of_an_ablation_has_its_choices_and_the_method_s_defaults(method):
    """A choice that was added, or another default, left the printed table as it was."""
    table, usual = spec.read(spec.find(f"{method}/ablation")), defaults(method)
    expected = [
        (f"{row.group}: {row.title}".strip() if row.group else row.title, is_default(dict(row.options), usual))
        for row in table.rows
    ]
    page = (spec.SCRIPTS.parent / table.page).read_text()
    lines = page.partition(f"<!-- begin {table.marker} -->")[2].partition("<!-- end")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    hint = f"{table.page} is out of date: bash scripts/{method}/ablation.sh --page"
    assert [(row[0], "default" in row[1:]) for row in cells] == expected, hint


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
