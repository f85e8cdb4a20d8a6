"""Sweeps and tables on the tiny random model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval import benchmarks
from eval import config as settings_module
from eval.answers import source_hash
from eval.answers.reuse import check_table
from eval.config import DEFAULT_DATA, RunConfig, build_reducer
from eval.feature_cache import CachingLlava, bytes_of
from eval.papers import spec
from eval.papers.runs import changed
from eval.run import prepare
from eval.sweep import fill, folder_of, is_complete
from eval.tables import insert, markdown
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.conftest import drawn_image, samples
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


def cell(model, data, folder, **changes) -> RunConfig:
    """A run of one setting, as tables make them."""
    config = RunConfig("uniform", 4, split="testdev", data=data, failed="again", wandb="disabled", **changes)
    return replace(config, output=folder_of_gqa(folder, config, model))


def folder_of_gqa(folder, config, model) -> Path:
    """The folder of a run on GQA, as tables name it."""
    data = benchmarks.get("gqa").load(config.data, "testdev")
    return folder_of(folder, config, data, model, build_reducer(config, model.visual_tokens))


def is_finished(config, model) -> bool:
    return is_complete(prepare(config, model))


def test_a_finished_setting_is_not_used_for_other_images_or_other_code(tiny, tmp_path, monkeypatch):
    """A sweep took finished settings by their configuration alone."""
    data, model = write_gqa(tmp_path / "data", count=6, images=2), CachingLlava(tiny)
    config = cell(model, data, tmp_path / "out", limit=4)
    assert not is_finished(config, model)
    fill(prepare(config, model))
    assert is_finished(config, model) and not is_finished(replace(config, limit=5), model)
    real = settings_module.answer_sources
    edited = {"llava/pipeline/decoder.py": "edited"}
    for module in (settings_module, source_hash):  # as in a process that imported other code
        monkeypatch.setattr(module, "answer_sources", lambda *objects, **more: real(*objects, **more) | edited)
    assert not is_finished(config, model)
    with pytest.raises(UserError, match=r"\(code: llava/pipeline/decoder\.py\)"):
        fill(prepare(config, model))
    monkeypatch.undo()
    drawn_image(9, (32, 32)).save(data / "gqa" / "data" / "images" / "n1.jpg")
    with pytest.raises(UserError, match="2 answers to other images"):
        is_finished(config, model)


def cut_answers(folder):
    path = folder / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:2]))


def tear_answers(folder):
    path = folder / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def answers_of_another_store(folder):
    path = folder / "answers.jsonl"
    lines = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(line | {"answer_id": "x" * 22}) + "\n" for line in lines))


def result_without_locks(folder):
    result = json.loads((folder / "result.json").read_text())
    remark = f"the file system of {folder} has no locks (No locks available): a second run would not have been noticed"
    (folder / "result.json").write_text(json.dumps(result | {"remarks": [remark]}))


LOSSES = {
    "answers": cut_answers,
    "the end of the last answer": tear_answers,
    "the file of answers": lambda folder: (folder / "answers.jsonl").unlink(),
    "submission": lambda folder: (folder / "predictions.json").unlink(),
    "result": lambda folder: (folder / "result.json").unlink(),
    "locks": result_without_locks,
    **{
        f"result: {text[:12]!r}": lambda folder, text=text: (folder / "result.json").write_bytes(text)
        for text in (b"", b'{"asked": 6', bytes(300), b"\xff", b"[]", b"{}", b'{"asked": "6"}', b"null")
    },
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sweep_writes_again_what_a_finished_run_has_lost(tiny, tmp_path, loss):
    """It believed the result alone, every time: answers and submission stayed lost, a damaged result was a traceback,
    and the remark of a moment without locks stayed for good."""
    data, model = write_gqa(tmp_path / "data", count=6, images=2), CachingLlava(tiny)
    config = cell(model, data, tmp_path / "out")
    fill(prepare(config, model))
    folder = Path(config.output)
    files = ("answers.jsonl", "settings.json", "predictions.json")
    before = [(folder / name).read_bytes() for name in files]
    first = json.loads((folder / "result.json").read_text())
    assert is_finished(config, model)
    LOSSES[loss](folder)
    assert not is_finished(config, model)
    fill(prepare(config, model))
    assert is_finished(config, model) and [(folder / name).read_bytes() for name in files] == before
    again = json.loads((folder / "result.json").read_text())
    assert all(
        again[key] == first[key] for key in ("metrics", "asked", "accounting", "settings", "labels", "submission")
    )
    # A batch of which some answers were asked again has no time.
    assert again["timing"]["questions"] == 6 or "of 6 questions" in again["remarks"].pop()
    assert again["remarks"] == []


def test_a_sweep_leaves_the_answers_of_another_store_alone(tiny, tmp_path):
    """They counted as those of the run."""
    data, model = write_gqa(tmp_path / "data", count=6, images=2), CachingLlava(tiny)
    config = cell(model, data, tmp_path / "out")
    fill(prepare(config, model))
    answers_of_another_store(Path(config.output))
    assert not is_finished(config, model)
    with pytest.raises(UserError, match="another store"):
        fill(prepare(config, model))


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
    return replace(sample, image_ids=(f"p{index}",), image=drawn_image(index))


@pytest.mark.parametrize("method", ["consensusdrop", "visiondrop", "attnmix"])
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


def test_views_made_ahead_are_never_taken_for_those_of_another_image(tiny, tmp_path):
    """They were found by the id of an image that was gone: the next run on the model could get another one's views."""
    data, model = write_gqa(tmp_path / "data", count=6), CachingLlava(tiny)
    fill(prepare(cell(model, data, tmp_path / "out"), model))
    assert model.ready_views and all(id(image) == name for name, (image, _) in model.ready_views.items())


def test_a_setting_that_was_interrupted_after_a_failure_goes_on(tiny, tmp_path):
    """The sweep asked the failed questions alone, and ended because the others had not been asked."""
    data, model = write_gqa(tmp_path / "data", count=6), CachingLlava(tiny)
    image = data / "gqa" / "data" / "images" / "n0.jpg"
    whole, config = image.read_bytes(), cell(model, data, tmp_path / "out")
    image.write_bytes(whole[:100])
    with pytest.raises(UserError, match="1 questions"):
        fill(prepare(replace(config, limit=3), model))
    image.write_bytes(whole)
    fill(prepare(config, model))
    assert is_finished(config, model)


def test_two_data_folders_have_stores_of_their_own(tiny, tmp_path):
    """The folder of a sweep did not tell the data, so one folder's answers stood in the way of the other's."""
    one, two = (write_gqa(tmp_path / name, count=count) for name, count in (("eval", 6), ("other/eval", 4)))
    config = cell(tiny, one, tmp_path)
    names = {config.output.parent.name, cell(tiny, two, tmp_path).output.parent.name}
    assert len(names) == 2 and all(name.startswith("gqa-testdev-eval-") for name in names)
    default = folder_of_gqa(tmp_path, replace(config, data=DEFAULT_DATA), tiny)
    assert default.parent.name == "gqa-testdev"


def test_runs_of_other_model_files_or_images_are_not_put_in_one_table(tmp_path):
    """The tables of the toy models joined whatever results lay in their folders."""

    def folder(name, method, images="same", model_files="new"):
        settings = {"method": method, "model_files": model_files}
        result = {"settings": settings, "labels": "l", "images": images, "asked": 3, "main": "accuracy"}
        result |= {"facts": {}, "metrics": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        return tmp_path / name

    full = folder("full", "full")
    check_table([full, folder("good", "random")], "new")
    with pytest.raises(UserError, match="images: same and other"):
        check_table([full, folder("images", "random", images="other")], "new")
    with pytest.raises(UserError, match="model_files: new and old"):
        check_table([full, folder("weights", "random", model_files="old")], "new")
    with pytest.raises(UserError, match="full holds answers of other files"):
        check_table([full], "newer")
