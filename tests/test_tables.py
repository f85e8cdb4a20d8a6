"""Sweeps and tables on the tiny random model."""

import json
from dataclasses import replace

import pytest

from eval import config as settings_module
from eval import sweep as sweep_module
from eval.answers.reuse import check_table
from eval.feature_cache import bytes_of
from eval.papers import spec
from eval.papers.runs import changed
from eval.sweep import CachingLlava, Setting, folder_of, sweep
from eval.tables.page import insert, markdown
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.conftest import picture, samples
from tests.eval_fakes import write_gqa
from tests.tiny_checkpoints_families import save_qwen_transformers


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
            assert found.operations.total == expected.operations.total
    assert len(caching._seen) == 4


def test_a_model_whose_tower_is_no_clip_is_swept_without_a_memory(tmp_path):
    """The tables of a Qwen-VL ended in a TypeError: its images do not go through CLIP's preprocessing."""
    save_qwen_transformers(tmp_path / "qwen")
    model = load(tmp_path / "qwen", device="cpu")
    caching, reducer = CachingLlava(model), registry.build("divprune", "1/4", visual_tokens=model.visual_tokens)
    caching.expect([reducer])
    plain, swept = (generate(one, samples(2), reducer, max_new_tokens=3).answers for one in (model, caching))
    assert [a.token_ids for a in swept] == [a.token_ids for a in plain]
    assert not caching.remembers_features and not caching.takes_views and caching.remembered == 0


def test_a_finished_setting_is_not_used_for_other_pictures_or_other_code(tiny, tmp_path, monkeypatch):
    """A sweep took finished settings by their configuration alone."""
    data = write_gqa(tmp_path / "data", count=6, images=2)
    settings, out = [Setting("uniform", 4)], tmp_path / "out"
    sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4, wandb="disabled")
    folder = folder_of(out, tiny, "gqa", "testdev", settings[0], data)
    assert (folder / "limit4" / "result.json").is_file() and not (folder / "result.json").exists()
    real = settings_module.answer_sources
    edited = {"llava/pipeline/decoder.py": "edited"}
    monkeypatch.setattr(settings_module, "answer_sources", lambda *objects: real(*objects) | edited)
    with pytest.raises(UserError, match=r"under other settings \(code: llava/pipeline/decoder\.py\)"):
        sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4)
    monkeypatch.undo()
    picture(9, (32, 32)).save(data / "gqa" / "data" / "images" / "n1.jpg")
    with pytest.raises(UserError, match=r"holds 2 answers to other images"):
        sweep(settings, CachingLlava(tiny), data, "testdev", out, limit=4)


def test_remembered_features_stay_within_their_memory(tiny):
    """Every image's features were kept: 1.2 MB each at 7B, 48 GB for VQAv2's images."""
    whole, small = CachingLlava(tiny), CachingLlava(tiny)
    reducer = registry.build("consensusdrop", 4)
    asked = [_named(sample, index) for index, sample in enumerate(samples(6, text_only=()))]
    expected = [generate(whole, [sample], reducer, max_new_tokens=2).answers[0].text for sample in asked]
    one = bytes_of(next(iter(whole._seen.values()))[0])
    small.cache_bytes = 2 * one
    assert [generate(small, [sample], reducer, max_new_tokens=2).answers[0].text for sample in asked] == expected
    assert list(small._seen) == ["p4", "p5"] and small._bytes == 2 * one
    assert len(whole._seen) == 6 and whole._bytes == 6 * one
    # More images in one batch than fit are encoded and forgotten.
    small.cache_bytes = 0
    assert [answer.text for answer in generate(small, asked, reducer, max_new_tokens=2).answers] == expected
    assert not small._seen and small._bytes == 0


def _named(sample, index):
    return replace(sample, image_ids=(f"p{index}",), image=picture(index))


@pytest.mark.parametrize("method", spec.PAPERS)
def test_every_alternative_of_the_ablation_is_a_valid_setting(method):
    rows = spec.read(spec.find(f"{method}/ablation")).rows
    for title in {row.group for row in rows if row.group}:
        group = [changed(row.options, method) for row in rows if row.group == title]
        assert len({registry.build(method, 64, options) for options in group}) == len(group), title
        assert group.count({}) == 1, f"{title}: the default must be one of the rows"


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


def test_a_sweep_logs_the_results_of_its_own_questions(tiny, tmp_path, monkeypatch):
    """The W&B table held the newest result, of whatever limit."""
    data, settings, rows = write_gqa(tmp_path / "data", count=6), [Setting("uniform", 4)], []
    monkeypatch.setattr(sweep_module, "log_table", lambda wandb, settings, folders, found, about: rows.append(found))
    for limit in (None, 2, None):  # the last one asks nothing, and limit2 is the newest result
        sweep(settings, CachingLlava(tiny), data, "testdev", tmp_path / "out", limit=limit, wandb="disabled")
    assert [found[0]["asked"] for found in rows] == [6, 2, 6]


def test_two_data_folders_have_stores_of_their_own(tiny, tmp_path):
    """The folder of a sweep did not tell the data, so one folder's answers stood in the way of the other's."""
    data = [write_gqa(tmp_path / name, count=count) for name, count in (("eval", 6), ("other/eval", 4))]
    names = {folder_of(tmp_path, tiny, "gqa", "testdev", Setting("uniform", 4), one).parent.name for one in data}
    assert len(names) == 2 and all(name.startswith("gqa-testdev-eval-") for name in names)
    default = folder_of(tmp_path, tiny, "gqa", "testdev", Setting("uniform", 4))
    assert default.parent.name == "gqa-testdev"


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
