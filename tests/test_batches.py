"""The order of asking, images read ahead of the model, and what is remembered between batches."""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from eval import ask, feature_cache
from eval.ask import Failure, LoadedQuestion, ReadAhead, asking_order
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import Folder
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, RunConfig
from eval.feature_cache import CachingLlava
from eval.run import prepare, run
from eval.sweep import fill
from llava.model.builder import load
from tests.conftest import drawn_image

COUNT = 40


@pytest.fixture(scope="module")
def toy():
    return load(DEFAULT_MODEL, device="cpu")


class Words:
    """A model whose tokens are words."""

    @staticmethod
    def tokenizer(texts, add_special_tokens):
        return SimpleNamespace(input_ids=[text.split() for text in texts])


def questions(lengths):
    return [Question(str(i), "word " * n, "", (f"{i // 3}.png",), "") for i, n in enumerate(lengths)]


def names(items):
    return [item.id for item in items]


def test_questions_of_one_length_stand_together_inside_a_window(monkeypatch):
    monkeypatch.setattr(ask, "WINDOW", 4)
    planned = questions([3, 1, 3, 1, 2, 9, 1, 2])
    assert names(asking_order(planned, planned, Words())) == ["1", "3", "0", "2", "6", "4", "7", "5"]


@pytest.mark.parametrize("done", [1, 3, 6])
def test_the_rest_of_an_interrupted_run_keeps_its_order(monkeypatch, done):
    monkeypatch.setattr(ask, "WINDOW", 4)
    planned = questions([3, 1, 3, 1, 2, 9, 1, 2])
    whole = asking_order(planned, planned, Words())
    left = set(names(whole[done:]))
    pending = [question for question in planned if question.id in left]
    assert asking_order(planned, pending, Words()) == whole[done:]


class Counting(Folder):
    """Notes what is opened."""

    opened: list[str]

    def open(self, name):
        self.opened.append(name)
        return super().open(name)


@pytest.fixture
def job(tmp_path):
    for number in range(4):
        drawn_image(number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    images = Counting(tmp_path)
    object.__setattr__(images, "opened", [])
    data = Dataset("test", (), images, "", lambda *_: None, None, lambda _: {})
    return SimpleNamespace(data=data, model=SimpleNamespace())


def test_an_unreadable_image_stays_with_its_questions(job):
    asked = questions([1] * 12)
    with ReadAhead(job) as images:
        found = [one for _, batch in images.batches(iter([asked[:5], asked[5:]])) for one in batch]
    assert [isinstance(one, Failure) for one in found] == [False] * 6 + [True] * 3 + [False] * 3
    assert [one.question.id if isinstance(one, LoadedQuestion) else one.question for one in found] == names(asked)
    assert {one.kind for one in found if isinstance(one, Failure)} == {"image"}
    right = [one for one in found if isinstance(one, LoadedQuestion)]
    assert all(one.sample.image.size == (60, 44) for one in right)
    assert all(one.digest == job.data.images.digest(*one.question.images) for one in right)


@pytest.mark.parametrize(("held", "opened"), [(ask.HELD_BYTES, [0, 1, 3]), (0, [0, 0, 1, 3])])
def test_an_image_is_read_once_for_its_questions_unless_images_take_too_much_memory(job, monkeypatch, held, opened):
    monkeypatch.setattr(ask, "HELD_BYTES", held)
    asked = questions([1] * 12)
    with ReadAhead(job) as images:  # images 0, 0, 1, 3 and 0 again, which may be gone
        list(images.batches(iter([[asked[number]] for number in (0, 2, 3, 9, 1)])))
    assert sorted(job.data.images.opened) == [f"{number}.png" for number in opened]


def test_one_batch_is_read_ahead_and_no_more(job):
    """Reading goes on while the model works, but a run of 10,000 questions does not fill the memory."""
    asked = questions([1] * 6)
    taken = []

    def claims():
        for question in asked:
            taken.append(question.id)
            yield [question]

    with ReadAhead(job) as images:
        stream = images.batches(claims())
        next(stream)
        assert taken == ["0", "1"]
        next(stream)
        assert taken == ["0", "1", "2"]


def test_no_thread_is_left_after_an_interruption(job):
    with pytest.raises(KeyboardInterrupt), ReadAhead(job) as images:
        for _ in images.batches(iter([questions([1])] * 3)):
            raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def answers(output):
    return (output / "answers.jsonl").read_bytes()


def config(output, **changes):
    common = {"data": DEFAULT_DATA, "limit": COUNT, "output": output, "wandb": "disabled", "model": DEFAULT_MODEL}
    return RunConfig("consensusdrop", 64, device="cpu", **{**common, **changes})


# Merging before layer 0; before the projector and between layers; before the projector alone; between layers alone.
@pytest.mark.training
@pytest.mark.parametrize("method", ["consensusdrop", "visiondrop", "attnmix", "fastv"])
def test_answers_are_the_same_bytes_at_every_batch_size(method, toy, tmp_path):
    files = []
    for size in (1, 5):
        changes = {"data": DEFAULT_DATA, "model": DEFAULT_MODEL, "wandb": "disabled", "limit": 12}
        run(RunConfig(method, 128, output=tmp_path / str(size), batch_size=size, **changes), toy)
        files.append(answers(tmp_path / str(size)))
    assert files[0] == files[1] and files[0].count(b"\n") == 12


@pytest.mark.training
def test_time_to_first_token_is_of_batches_that_run_the_tower(toy, tmp_path, monkeypatch):
    """It was of batches all of whose images were new: 1 of 20 in a short run, the very first, with the warm-up in it.

    Methods inside the tower remember nothing and were timed on all of theirs.
    """
    real, timed = ask.generate, []

    def watched(model, samples, *rest, **more):
        found = real(model, samples, *rest, **more)
        if more["max_new_tokens"] == 1:
            timed.append((getattr(model, "remembers_features", False), len(samples), found.timing.ttft))
        return found

    monkeypatch.setattr(ask, "generate", watched)
    first = run(config(tmp_path, batch_size=3), CachingLlava(toy))["timing"]["ttft"]
    assert [row[:2] for row in timed] == [(False, 3)] * 13, "a warm-up and twelve of thirteen full batches"
    times = sorted(seconds for *_, seconds in timed[1:])
    assert first == {"median_ms": pytest.approx(500 * (times[5] + times[6])), "questions": 3, "batches": 12}
    again = run(config(tmp_path, batch_size=3), CachingLlava(toy))["timing"]["ttft"]
    assert again == first and len(timed) == 13, "a run that is only scored again measures nothing"
    fill(prepare(config(tmp_path / "cell", batch_size=3), CachingLlava(toy)))
    assert len(timed) == 13, "a cell of a table measures nothing: the pass took longer than 300 answers on toy NeXT"


@pytest.mark.training
def test_the_tower_sees_every_image_once(toy, tmp_path, monkeypatch):
    real, seen = feature_cache.encode, []

    def counted(tower, pixels, *rest, **more):
        seen.append(len(pixels))
        return real(tower, pixels, *rest, **more)

    monkeypatch.setattr(feature_cache, "encode", counted)
    model = CachingLlava(toy)
    job = prepare(config(tmp_path), model)
    run(config(tmp_path, batch_size=8), model)
    assert sum(seen) == len({question.images for question in job.planned}) < COUNT / 2


@pytest.mark.training
@pytest.mark.parametrize("order", [("ai2d", "chartqa"), ("pope", "noise")])
def test_images_of_the_same_name_are_told_apart(toy, tmp_path, order):
    """Hub tables name their images "0/image", and a copy of POPE names noise as POPE does: one cache took one for the
    other, so ChartQA scored 18.8 for 50.0 in a table, and noise 100.0."""
    noise = tmp_path / "noise"
    shutil.copytree(DEFAULT_DATA / "pope", noise / "pope")
    for number, path in enumerate(sorted((noise / "pope" / "val2014").iterdir())):
        Image.effect_noise((64 + number, 64), 90).convert("RGB").save(path)
    model, found = CachingLlava(toy), []
    for name in order:
        benchmark, data = ("pope", noise) if name == "noise" else (name, DEFAULT_DATA)
        run(config(tmp_path / name, benchmark=benchmark, data=data, limit=16), model)
        alone = run(config(tmp_path / f"{name} alone", benchmark=benchmark, data=data, limit=16), toy)
        found.append(answers(tmp_path / name) == answers(tmp_path / f"{name} alone") and alone["asked"] == 16)
    assert found == [True, True]


def test_a_batch_that_does_not_fit_gives_the_remembered_images_back(toy, tmp_path, monkeypatch):
    run(config(tmp_path / "plain", limit=16, batch_size=4), toy)
    model, real, held = CachingLlava(toy), ask.generate, []

    def full(given, samples, *rest, **more):
        if len(samples) > 4:
            given.encode_images([samples[0].image], ["x"], rest[0], SimpleNamespace(mark=lambda _: None))
            held.append(model._bytes)
            raise torch.OutOfMemoryError
        if len(held) == 1:
            held.append(model._bytes)
        return real(given, samples, *rest, **more)

    monkeypatch.setattr(ask, "generate", full)
    run(config(tmp_path / "divided", limit=16, batch_size=8), model)
    assert held[0] > 0 == held[1]
    assert answers(tmp_path / "divided") == answers(tmp_path / "plain")


def test_views_made_ahead_are_those_of_the_model(toy):
    model = CachingLlava(toy)
    image = drawn_image(1)
    own = toy.views(image)
    model.ready_views = {id(image): (image, (own[0] + 1, own[1]))}
    assert (model.views(image)[0] == own[0] + 1).all()
    assert (model.views(drawn_image(1))[0] == own[0]).all()
