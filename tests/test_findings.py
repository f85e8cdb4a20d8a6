"""The papers' analyses: masks of drawn scenes, measures against their definitions, noted scores, worse probes."""

import csv
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from eval import benchmarks, cli
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.sweep import CachingLlava
from lab.findings import fusion, summary
from lab.findings import scores as measures
from lab.findings.fusion import Arm
from lab.toy.data.scenes import Thing
from lab.toy.data.vocabulary import COLOR_NAMES, SHAPES
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry

pytestmark = pytest.mark.lab

NAME = "test00000n"


@pytest.fixture(scope="module")
def toy():
    torch.set_num_threads(1)
    return CachingLlava(load(DEFAULT_MODEL, device="cpu"))


@pytest.fixture(scope="module")
def samples():
    data = benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")
    return [data.sample(question) for question in data.questions[:3]]


@pytest.fixture(scope="module")
def notes(toy, samples):
    return measures.observe(toy, samples)


def noise(*shape):
    return np.random.default_rng(0).random(shape)


# Scenes


@pytest.mark.training
def test_every_question_names_things_that_give_its_answer():
    """A wrong mask would make every measure wrong in silence."""
    for one in measures.questions("val"):
        image = measures.redraw(one.image)
        named = [image.things[n] for n in one.targets]
        if one.family == "count":
            assert len(named) == int(one.answer), one
        elif one.family == "exist":
            assert bool(named) == (one.answer == "yes"), one
        elif one.family == "digit":
            assert [str(thing.digit) for thing in named] == [one.answer], one
        elif one.family == "shape":
            assert [SHAPES[thing.shape] for thing in named] == [one.answer], one
        elif one.family == "color":
            assert [COLOR_NAMES[thing.color] for thing in named] == [one.answer], one
        elif one.family == "relate":
            assert len(named) == 2 and one.answer in {COLOR_NAMES[thing.color] for thing in named}, one
        else:
            assert len(named) == (1 if one.family == "side" else 2), one


def test_masks_cover_the_pixels_of_their_thing():
    """A big shape of one colour: the patches of its mask are near that colour, their neighbours are grey."""
    image, drawn = measures.redraw(NAME), np.asarray(_image(NAME), np.float64)
    patches = drawn.reshape(24, 8, 24, 8, 3).mean((1, 3)).reshape(-1, 3)
    number = next(n for n, thing in enumerate(image.things) if thing.kind == "shape" and thing.big)
    mask, centre = image.patches([number]), image.things[number]
    rows, columns = np.divmod(np.flatnonzero(mask), 24)
    assert abs(rows.mean() * 8 + 4 - centre.y) < 6 and abs(columns.mean() * 8 + 4 - centre.x) < 6
    colourful = np.ptp(patches, axis=1)
    assert colourful[mask].mean() > 2 * colourful[image.owner == -1].mean()


def _image(name):
    from PIL import Image

    return Image.open(DEFAULT_DATA / "gqa" / "data" / "images" / f"{name}.jpg")


def test_a_image_that_differs_from_the_drawing_is_refused(tmp_path):
    folder = tmp_path / "gqa" / "data" / "images"
    folder.mkdir(parents=True)
    shutil.copy(DEFAULT_DATA / "gqa" / "data" / "images" / "test00001n.jpg", folder / f"{NAME}.jpg")
    with pytest.raises(UserError, match=r"test00000n\.jpg is not"):
        measures.redraw(NAME, tmp_path)


def test_noun_phrases():
    red, small = COLOR_NAMES.index("red"), 0
    star = Thing("shape", 0, 0, 10, shape=SHAPES.index("star"), color=red, big=small)
    things = (star, replace(star, big=1), replace(star, kind="frame", shape=-1), Thing("panel", 0, 0, 9, pattern=0))
    assert measures.matching(things, "small red star") == (0,)
    assert measures.matching(things, "red stars") == (0, 1)
    assert measures.matching(things, "red objects") == (0, 1)
    assert measures.matching(things, "red frame") == (2,)
    assert measures.matching(things, "striped panel") == (3,)
    assert measures.matching(things, "tall star") == ()


def test_content_words_of_a_question():
    assert measures.content_words("What color is the small star?") == [False, False, False, False, True, True, False]


# Measures against their definitions


def test_auroc_is_the_share_of_pairs_in_order():
    scores, mask = np.round(noise(2, 30) * 8), noise(30) < 0.3
    slow = [
        np.mean([(a > b) + 0.5 * (a == b) for a in row[mask] for b in row[~mask]])  # ties count one half
        for row in scores
    ]
    assert measures.auroc(scores, mask) == pytest.approx(slow)
    among = np.arange(30) < 20
    assert measures.auroc(scores, mask, among) == pytest.approx(measures.auroc(scores[:, :20], mask[:20]))


def test_recall_breadth_and_agreement():
    scores, mask = noise(40), noise(40) < 0.2
    order = np.argsort(-scores)
    assert measures.recall(scores, mask, 10) == pytest.approx(mask[order[:10]].sum() / mask.sum())
    assert measures.chosen(np.zeros(5), 2).tolist() == [True, True, False, False, False]
    even, single = np.ones(50), np.eye(50)[3]
    assert measures.effective_share(np.stack([even, single])) == pytest.approx([1, 1 / 50])
    rows = noise(4, 30)
    top = lambda x: set(np.argsort(-x)[:7])  # noqa: E731
    assert measures.overlap(rows[0], rows[1], 7) == pytest.approx(len(top(rows[0]) & top(rows[1])) / 7)
    slow = [spearmanr(rows[i], rows[k]).statistic for i in range(4) for k in range(4) if i != k]
    assert measures.mean_pairwise(rows) == pytest.approx(np.mean(slow))


# Noted scores


def test_an_observer_drops_nothing_and_notes_what_the_methods_rank_by(toy, samples, notes):
    assert set(notes) == {*measures.score_names(len(toy.llm.layers)), "tokens"}
    reducer = fusion.Arm("fused", 64).reducer()
    generate(toy, samples, reducer, 1)
    seen = np.stack([reducer.seen[sample.id].numpy() for sample in samples])
    assert notes["probe"] == pytest.approx(seen, rel=1e-4)
    observer = measures.Observer(budget=toy.visual_tokens)
    answers = [
        [answer.token_ids for answer in generate(toy, samples, one, 4).answers]
        for one in (observer, registry.build("full", None or toy.visual_tokens))
    ]
    assert answers[0] == answers[1]


def test_rows_of_a_question_are_its_content_and_function_words(samples, notes):
    for row, sample in enumerate(samples):
        share = np.mean(measures.content_words(sample.question))
        both = share * notes["content 3"][row] + (1 - share) * notes["function 3"][row]
        assert notes["question 3"][row] == pytest.approx(both, rel=1e-4)


def test_visual_attention_does_not_depend_on_the_question(toy, samples, notes):
    other = measures.observe(toy, samples[1:2])
    assert notes["visual 4"][0] == pytest.approx(other["visual 4"][0], rel=1e-3)
    assert notes["last 4"][0] != pytest.approx(other["last 4"][0], rel=1e-2)


@pytest.mark.training
def test_reading_backwards_changes_the_decoder_alone(toy, samples, notes):
    """Scores stay in the order of the image: the last token still looks at the named thing."""
    backwards = measures.observe(toy, samples, reverse=True)
    for name in ("encoder", "cosine", "probe"):
        assert backwards[name] == pytest.approx(notes[name], rel=1e-4)
    one = measures.questions()[0]
    mask = measures.redraw(one.image).patches(one.targets)
    assert backwards["last 2"][0] != pytest.approx(notes["last 2"][0], rel=1e-2)
    assert measures.auroc(backwards["last 2"][0], mask) > 0.9


def test_halves_are_exchanged_patch_by_patch():
    moved = np.asarray(measures.exchanged(_image(NAME)))
    whole = np.asarray(_image(NAME))
    assert (moved[:96] == whole[96:]).all() and (moved[96:] == whole[:96]).all()


def test_measures_of_words():
    """A cosine that is its word's mask has AUROC 1; a control word knows nothing of it."""
    image = measures.redraw(NAME)
    masks = np.stack([measures.word_mask(image, word) for word in measures.WORDS])
    found = measures.measure_words(masks.astype(float), image)
    there = masks.any(1)
    assert (found[there, 0] == 1).all() and np.isnan(found[~there]).all()
    assert found[there, 2] == pytest.approx(0.5)  # an absent word's cosine is 0 everywhere


def test_late_preference_is_zero_for_content_and_one_half_for_place():
    late = np.arange(576) >= 288
    content, place = noise(576), late + 1e-9
    asked = (measures.AnnotatedQuestion("q", "color", "", "", "p", (0,)),)

    def one(score, where):
        values = np.full((1, 1, len(measures.MEASURES)), np.nan)
        values[0, 0, measures.MEASURES.index("late")] = measures.share(score)[where].sum()
        empty = np.zeros((0,))
        return measures.Collected(("s",), values, asked, empty, empty, empty)

    drawn, counterpart = one(content, late), one(content, ~late)
    assert summary.position_bias(drawn, counterpart, "s")["q"] == pytest.approx(0)
    drawn, counterpart = one(place, late), one(place[::-1], ~late)  # the score stays late when the content moves
    assert summary.position_bias(drawn, counterpart, "s")["q"] == pytest.approx(0.5)


def test_collected_numbers_are_kept(toy, tmp_path, monkeypatch):
    first = measures.collect(toy, "as drawn", (NAME,), tmp_path)
    monkeypatch.setattr(measures, "measure_image", lambda *_: pytest.fail("measured twice"))
    again = measures.collect(toy, "as drawn", (NAME,), tmp_path)
    assert np.array_equal(first.values, again.values, equal_nan=True)
    assert first.of("encoder", "auroc") and first.of("encoder", "overlap 64")[first.asked[0].id] == pytest.approx(1)
    assert first.rows[0, 0].sum() == pytest.approx(1, rel=1e-4)


# Worse probes


def test_fields_of_noise():
    white, smooth, late = (fusion.field_of(kind, "q", 24, 24) for kind in ("white", "smooth", "late"))
    for one in (white, smooth, late):
        assert float(one.mean()) == pytest.approx(0, abs=1e-5) and float(one.std()) == pytest.approx(1, rel=1e-4)

    def neighbours(one):
        return np.corrcoef(one.view(24, 24)[:, 1:].flatten(), one.view(24, 24)[:, :-1].flatten())[0, 1]

    assert neighbours(smooth) > 0.9 and abs(neighbours(white)) < 0.15
    assert (late.diff() > 0).all()
    assert torch.equal(white, fusion.field_of("white", "q", 24, 24))
    assert not torch.equal(white, fusion.field_of("white", "r", 24, 24))


def test_a_degraded_probe(toy, samples):
    def run(**changes):
        reducer = fusion.Degraded(budget=32, alpha=0.0, **changes)
        batch = generate(toy, samples, reducer, 4)
        return reducer, [answer.trace[-1].reduction.kept[0].tolist() for answer in batch.answers]

    plain, kept = run()
    usual = generate(toy, samples, registry.build("consensusdrop", 32, {"alpha": "0"}), 4)
    assert kept == [answer.trace[-1].reduction.kept[0].tolist() for answer in usual.answers]
    name = samples[0].id
    infinite, _ = run(noise=float("inf"))
    assert spearmanr(infinite.seen[name], fusion.field_of("white", name, 24, 24)).statistic == pytest.approx(1)
    agree = [spearmanr(plain.seen[name], run(noise=x)[0].seen[name]).statistic for x in (0.5, 4.0)]
    assert 1 > agree[0] > agree[1] > 0


@pytest.mark.training
def test_arms_are_asked_once_and_stored(toy, tmp_path, monkeypatch):
    wanted = [Arm("encoder only", 32), Arm("encoder only", 32, True, "white", 1.0), Arm("fused", 32)]
    first = fusion.answer(toy, wanted, tmp_path, limit=4)
    assert list(first) == [wanted[0], wanted[2]] and wanted[1].canonical_arm == wanted[0]
    assert len(first[wanted[2]].scores) == 4 and first[wanted[0]].auroc == {}
    assert all(x in (0, 1) for x in first[wanted[2]].hit.values())
    monkeypatch.setattr(fusion, "ask", lambda *_: pytest.fail("asked twice"))
    assert fusion.answer(toy, wanted, tmp_path, limit=4) == first


def test_another_layers_probe_ranks_as_the_methods_own_option(toy, samples):
    def kept(reducer):
        return [answer.trace[-1].reduction.kept[0].tolist() for answer in generate(toy, samples, reducer, 1).answers]

    arm = Arm("cross-modal only", 32, probe="contextual", layer=2)
    usual = registry.build("consensusdrop", 32, {"alpha": "0", "probe": "contextual", "probe_layer": "2"})
    assert kept(arm.reducer()) == kept(usual)
    assert kept(arm.reducer()) != kept(replace(arm, layer=1).reducer()) != kept(Arm(arm.ranking, 32).reducer())


def test_an_arm_is_one_with_another_only_if_its_answers_are():
    probe = Arm("fused", 64, False, probe="contextual", layer=2)
    assert replace(probe, kind="smooth").canonical_arm == probe.canonical_arm == probe
    assert replace(probe, kind="smooth", noise=1.0).canonical_arm == replace(probe, kind="smooth", noise=1.0)
    assert replace(probe, ranking="encoder only", noise=1.0).canonical_arm == Arm("encoder only", 64, False)
    assert (
        len({replace(probe, layer=3).canonical_arm, replace(probe, probe="static").canonical_arm, probe.canonical_arm})
        == 3
    )


def test_probes_are_compared_on_whole_images():
    asked = measures.questions()
    first = {one.image for one in asked[: fusion.ASKED]}
    assert len(first) == 76 and asked[fusion.ASKED].image not in first
    ids = [one.id for one in asked[: fusion.ASKED]]

    def answered(right, auroc=None):
        """The first `right` questions are answered rightly."""
        scores = {name: float(n < right) for n, name in enumerate(ids)}
        return fusion.Answered(scores, {} if auroc is None else dict.fromkeys(ids, auroc), {ids[0]: 1.0})

    default, other = Arm("fused", 64, False), Arm("fused", 64, False, probe="contextual", layer=2)
    known = {
        default: answered(fusion.ASKED, 0.9),
        other: answered(600, 0.8),
        replace(other, ranking="cross-modal only"): answered(500, 0.8),
        replace(default, ranking="encoder only"): answered(400),
    }
    cells = fusion.measured(known, other)
    percent = 100 / fusion.ASKED
    assert cells["AUROC of the probe"].mean == pytest.approx(0.8)
    assert cells["encoder only, %"].mean == pytest.approx(400 * percent)
    titles = (fusion.OVER_ENCODER, fusion.OVER_CROSS, fusion.OVER_PROBE)
    differences = [cells[f"{title}, points"].difference for title in titles]
    assert differences == pytest.approx([200 * percent, 100 * percent, (600 - fusion.ASKED) * percent])
    known[replace(default, ranking="cross-modal only")] = answered(1, 0.9)
    assert f"{fusion.OVER_PROBE}, points" not in fusion.measured(known, default)


def test_groups_of_questions_by_size_and_salience():
    names = [one.id for one in measures.questions() if one.targets]
    groups = fusion.groups_of({name: n / len(names) for n, name in enumerate(names)})
    thirds = [groups[f"salience of the named things: {level}"] for level in ("low", "middle", "high")]
    assert set().union(*thirds) == set(names) and sum(map(len, thirds)) == len(names)
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 2
    families = [ids for label, ids in groups.items() if label.startswith("family")]
    assert sum(map(len, families)) == len(groups["all"]) == len(measures.questions())


# Page and command


@pytest.mark.training
def test_only_page_writes_the_files_of_the_page(tmp_path, monkeypatch):
    """`vtr findings attnmix --folder F --images 2` put two images' numbers into the page's figures and files."""
    docs, folder, scores = tmp_path / "docs", tmp_path / "f", {"findings_scores.csv"}
    monkeypatch.setattr(summary, "DOCS", docs)
    monkeypatch.setattr(sys, "argv", ["vtr"])

    def written(out):
        return {path.name for kind in ("images", "tables") for path in (out / kind).glob("*")}

    arguments = ["--folder", str(folder), "--images", "2"]
    assert cli.main(["findings", "attnmix", *arguments]) == 0
    assert written(folder) == scores | {"findings_attnmix.png", "findings_words.csv"} and not docs.exists()
    assert cli.main(["findings", "visiondrop", *arguments, "--page"]) == 0
    assert written(docs) == scores | {"findings_visiondrop.png", "findings_visiondrop_differences.csv"}
    assert len(written(folder)) == 3


def test_the_pages_show_all_figures_and_files_that_exist():
    docs = ROOT / "docs"
    text = "".join((docs / f"{paper}.md").read_text() for paper in ("attnmix", "visiondrop", "consensusdrop"))
    for path in [*docs.glob("images/findings_*"), *docs.glob("tables/findings_*")]:
        assert path.relative_to(docs).as_posix() in text, path.name


def test_the_largest_late_preference_on_the_page_is_that_of_the_file():
    """The page said that no layer exceeds 5 points; `content 6` has 5.57."""
    with open(ROOT / "docs" / "tables" / "findings_scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if re.fullmatch("late preference, [a-z ]+, points", row["measure"])]
    text = [row for row in rows if not row["row"].startswith(("visual", "viewers"))]
    largest = max(text, key=lambda row: abs(float(row["value"])))
    found = f"largest is {float(largest['value']):.1f} points, `{largest['row']}`"
    assert found in " ".join((ROOT / "docs" / "attnmix.md").read_text().split())
