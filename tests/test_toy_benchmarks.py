"""The toy benchmarks: written twice the same, read by every benchmark's reader, right answers, links, size."""

import io
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from eval import benchmarks
from eval.benchmarks.hub import open_table
from eval.config import ROOT
from lab.toy.benchmarks import (
    LINKED,
    STRING,
    choices,
    gqa_and_videos,
    linked,
    objects,
    picture,
    refcoco,
    words,
    write_card,
    write_table,
)
from lab.toy.benchmarks.__main__ import main
from lab.toy.benchmarks.choices import ROUND, ROW_QUALITY
from lab.toy.data.formats import LETTERS
from lab.toy.data.vocabulary import COLOR_NAMES, COLORS

pytestmark = pytest.mark.lab

DATA = ROOT / "assets" / "eval"

# Benchmark -> the questions of its default split that there are at least.
LEAST = {
    **dict.fromkeys(("flickr30k", "nocaps"), 20),
    **dict.fromkeys(("activitynet_qa", "docvqa", "infovqa", "scienceqa"), 40),
    **dict.fromkeys(("ai2d", "chartqa", "llava_bench", "mmmu", "realworldqa"), 60),
    **{"mmstar": 72, "mmvet": 90},
    **dict.fromkeys(("mmbench", "mmbench_cn", "msrvtt_qa", "msvd_qa", "ocrbench"), 100),
    **dict.fromkeys(("mme", "seed_img"), 140),
    **dict.fromkeys(("seed", "vizwiz", "vqav2"), 150),
    **dict.fromkeys(("textvqa", "tgif_qa"), 200),
    "pope": 280,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables are not read from what another run left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(name: str, split: str = "", profile: str = "", source: str = "auto"):
    benchmark = benchmarks.get(name)
    return benchmark.load(DATA, split or benchmark.splits[0], profile or benchmark.profiles[0], source)


@pytest.mark.parametrize("name", LEAST)
def test_every_split_and_profile_loads_complete(name):
    benchmark = benchmarks.get(name)
    for split in benchmark.splits:
        for profile in benchmark.profiles:
            dataset = load(name, split, profile)
            dataset.check_images(dataset.questions)
            assert dataset.questions and len({question.id for question in dataset.questions}) == len(dataset.questions)
            if (split, profile) == (benchmark.splits[0], benchmark.profiles[0]):
                assert len(dataset.questions) >= LEAST[name]


def test_writing_again_gives_the_same_bytes(tmp_path):
    words.write_mmvet(tmp_path)
    gqa_and_videos.write_zero_shot_sets(tmp_path, ROOT / "assets" / "eval_video" / "video_qa")
    refcoco.write(tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix in (".json", ".jsonl", ".jpg")]
    assert len(files) == 52
    for file in files:
        assert file.read_bytes() == (DATA / file.relative_to(tmp_path)).read_bytes(), file


def test_sets_that_link_to_gqa_are_refused_without_it(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--only", "pope"]) == 2
    assert "--only gqa" in capsys.readouterr().err


def test_a_changed_table_is_read_again(tmp_path):
    """datasets 5.2 gives what it read first from a folder whose README.md lists its files."""
    folder = tmp_path / "hub" / "me" / "set"
    for count in (2, 3):
        write_table(folder / "all.parquet", {"x": STRING}, [{"x": "a"}] * count)
        write_card(folder, {"default": {"test": "all.parquet"}})
        assert len(open_table(tmp_path, ["me/set"], None, "test")) == count


def test_links_stay_in_the_repository():
    links = [path for path in DATA.rglob("*") if path.is_symlink()]
    assert len(links) > 10
    for path in links:
        assert not path.readlink().is_absolute() and path.exists(), path
        assert path.resolve().is_relative_to((ROOT / "assets").resolve()), path


@pytest.mark.parametrize("name", ["ai2d", "mmbench", "mmbench_cn", "mmstar", "seed_img"])
def test_each_letter_is_right_about_equally_often(name):
    answers = Counter(question.answer for question in load(name).questions)
    assert set(answers) == set(LETTERS[:4])
    assert max(answers.values()) <= 1.25 * min(answers.values())


def test_pope_and_mme_have_as_many_yes_as_no():
    for name in ("pope", "mme"):
        answers = Counter(question.answer.lower() for question in load(name).questions)
        assert answers["yes"] == answers["no"] == sum(answers.values()) / 2


def test_pope_objects_are_there_or_not():
    asked = defaultdict(set)
    images = {one.file: one for one in linked(300)}
    for category in choices.CATEGORIES:
        for line in (DATA / "pope" / "coco" / f"coco_pope_{category}.json").read_text().splitlines():
            row = json.loads(line)
            name = row["text"].removeprefix("Is there a ").removesuffix(" in the image?")
            assert (name in objects(images[row["image"]])) == (row["label"] == "yes"), row
            asked[category, row["image"]].add(name)
    # The rules differ: what is common is not what goes together with the objects of an image.
    images = {image for _, image in asked}
    assert any(asked["popular", image] != asked["adversarial", image] for image in images)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_rows_are_shifts_of_one_another(name):
    groups = defaultdict(list)
    for question in load(name).questions:
        first, *options = question.question.split("\n")[-5:] if "\nD. " in question.question else ["", "", ""]
        groups[int(question.official or question.id) % ROUND].append((first, options, question.answer))
    assert sum(len(rows) == 4 for rows in groups.values()) >= 25
    for rows in (rows for rows in groups.values() if len(rows) == 4):
        texts = {options[LETTERS.index(answer)].partition(". ")[2] for _, options, answer in rows}
        assert len(texts) == 1 and {answer for _, _, answer in rows} == set("ABCD")


def test_small_copies_keep_the_colours_of_small_things():
    """A palette by median cut once turned a blue cross grey."""
    names = np.array(list(COLORS.values()))
    for one in (picture(LINKED + row, dense) for row in range(4) for dense in (False, True)):
        for file in (one.compressed(ROW_QUALITY), one.png):
            pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
            for thing in (thing for thing in one.things if thing.kind == "shape"):
                reach = thing.side // 2
                rows, columns = (slice(max(0, int(c) - reach), int(c) + reach) for c in (thing.y, thing.x))
                near = ((pixels[rows, columns, None] - names) ** 2).sum(-1)
                # Some of the thing's pixels are nearly of its own colour.
                assert (near.argmin(-1)[near.min(-1) < 60**2] == thing.color).any(), COLOR_NAMES[thing.color]


def test_right_answers_score_full():
    """Short answers that people agree on are right in the metric of the set."""
    for name, split in (("textvqa", "val"), ("vizwiz", "val"), ("vqav2", "val"), ("docvqa", "val")):
        dataset = load(name, split)
        texts = {question.id: question.answer for question in dataset.questions}
        score = dataset.score(list(texts), texts)
        assert score.values[score.main] == pytest.approx(100), name


def test_only_the_folders_of_the_readme_are_there():
    told = (DATA / "README.md").read_text()
    for folder in (path for path in DATA.iterdir() if path.is_dir()):
        assert f"`{folder.name}/" in told, folder
    assert not list(DATA.rglob(".*"))
