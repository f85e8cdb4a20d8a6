"""The gallery: what is collected of every method, its JSON, and the page in a browser."""

import base64
import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from eval import cli
from eval.config import TOY_BANNER
from eval.figures.overlay import DIM, NONE, draw_answer
from eval.pages import command
from eval.pages.gallery import UNDEFINED, cells_of, collect, map_data, page_data, position_of, render, score_maps
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import registry
from tests import contract
from tests.browser import DESKTOP, PHONE, needs_browser, opened, overflow
from tests.conftest import QUESTIONS, drawn_image
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
    save_next_transformers,
    save_qwen_transformers,
    save_video_transformers,
)

METHODS = [name for name in contract.METHODS if name != "full"]
# On 4 x 4 patches of 15 pixels the image lies on the second and third row.
SAMPLE = Sample("gallery", QUESTIONS[0], image=drawn_image(0, (60, 20)))
EMPTY = {*range(4), *range(12, 16)}
HOSTILE = "is there a star?</script><script>window.broken = 1</script><b>&"


@pytest.fixture(scope="module")
def gallery(tiny):
    return collect(tiny, SAMPLE, METHODS, (4, 8), max_new_tokens=3)


def numbers(text: str) -> list[int]:
    """Whole numbers of the page's data."""
    return np.frombuffer(base64.b64decode(text), "<i4").tolist()


def followed(trace, cells: int) -> dict[int, int]:
    """Slow reference: cell -> the token it ends in, following one patch after another; for steps without overlap."""
    where = {cell: cell for cell in range(cells)}
    for step in trace:
        kept = step.reduction.kept[0].tolist()
        if step.reduction.assignment is not None:
            owner = step.reduction.assignment[0].tolist()
            weight = step.reduction.merge_weight[0].tolist()
            target = {i: o for i, (o, w) in enumerate(zip(owner, weight, strict=True)) if o >= 0 and w != 0}
        else:
            target = {i: order for order, i in enumerate(kept)}
        for order, i in enumerate(kept):
            target.setdefault(i, order)
        where = {cell: target[token] for cell, token in where.items() if token in target}
    return where


# -- collecting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_with_the_states_of_its_answer_or_a_reason(name, gallery, tiny):
    data = {(row["method"], row["budget"]): row for row in json.loads(page_data(gallery))["results"]}
    for budget in (8, 4):
        if (name, budget) in gallery.unavailable:
            assert (name, budget) not in data and gallery.unavailable[name, budget].endswith(".")
            continue
        row = data[name, budget]
        answer = generate(tiny, [SAMPLE], registry.build(name, budget), 3).answers[0]
        assert row["text"] == answer.text and row["tokens_per_layer"] == list(answer.accounting.tokens_per_layer)
        assert len(row["at"]) == 1 + len(row["tokens_per_layer"]) and row["at"] == sorted(row["at"])
        empty = list[int]()
        for position, index in enumerate(row["at"]):
            state = row["states"][index]
            kept = numbers(state["patches"]["kept"])
            if position:
                assert len(kept) == row["tokens_per_layer"][position - 1], "the tokens that enter this layer"
                empty.append(len(EMPTY.intersection(kept)))
            trace = [step for step in answer.trace if position_of(step) <= position]
            if any(step.reduction.merge_matrix is not None for step in trace) or (
                trace and (trace[0].reduction.inputs != 16 or trace[0].place == "input")
            ):
                continue  # overlapping groups and class tokens: tests of compose
            expected = followed(trace, 16)
            token = numbers(state["patches"]["assignment"])
            assert {cell: one for cell, one in enumerate(token) if one >= 0} == expected
        assert answer.accounting.on_padding == sum(empty) / len(empty), "of the tokens that enter each layer"


def test_budgets_ascend_and_one_out_of_reach_is_a_reason(tiny):
    found = collect(tiny, SAMPLE, ["uniform", "random"], (2, 99, 8, 2), 2)
    assert found.budgets == (2, 8, 99) and not found.notes
    assert [(r.method, r.budget) for r in found.results] == [
        ("uniform", 2),
        ("uniform", 8),
        ("random", 2),
        ("random", 8),
    ]
    assert "1 to 16" in found.unavailable["random", 99]
    assert found.full.tokens_per_layer == (16,) * 4
    assert collect(tiny, SAMPLE, ["uniform"], (), 2).budgets == (1, 2, 4, 5), "shares of the image's own tokens"


def test_one_image_and_a_question_are_needed(tiny):
    for sample in (
        Sample("a", "two?", image=(drawn_image(0), drawn_image(1))),
        Sample("a", "  ", image=drawn_image(0)),
    ):
        with pytest.raises(UserError, match="one image or video and a question"):
            collect(tiny, sample, ["uniform"], (8,))


# -- score maps ----------------------------------------------------------------------------------------------------

PLAIN = {"weights": "none", "merged_share": 0.0}


@pytest.mark.parametrize(
    ("key", "method", "options"),
    [
        ("cls", "fastervlm", {}),
        ("cls", "consensusdrop", {"alpha": 1.0, **PLAIN}),
        ("question", "consensusdrop", {"alpha": 0.0, **PLAIN}),
        ("fused", "consensusdrop", PLAIN),
        ("text", "attnmix", {"mix": "t2i"}),
    ],
)
def test_the_highest_values_of_a_map_are_what_its_method_keeps(key, method, options, tiny):
    values = score_maps(tiny, SAMPLE)[key]
    reducer = dataclasses.replace(registry.build(method, 5), **options)
    (step,) = generate(tiny, [SAMPLE], reducer, 1).answers[0].trace
    assert sorted(np.argsort(-values, kind="stable")[:5].tolist()) == step.reduction.kept[0].tolist()


def test_the_fused_ranking_is_1_for_a_patch_that_is_first_in_both(tiny):
    values = score_maps(tiny, SAMPLE)
    ranks = {key: np.argsort(np.argsort(-values[key], kind="stable")) for key in ("cls", "question")}
    np.testing.assert_allclose(values["fused"], 1 - (ranks["cls"] + ranks["question"]) / 30, atol=1e-6)


def test_a_few_high_values_do_not_darken_the_map():
    """The scale ends at the 99th percentile; undefined places have their own number."""
    values = np.linspace(0, 1, 500, dtype=np.float32)
    values[-1], values[0] = 100, np.nan
    data = map_data("cls", values)
    steps = np.frombuffer(base64.b64decode(data["values"]), np.uint8)
    assert data["most"] == 100 and data["high"] < 1 and data["low"] == pytest.approx(1 / 499)
    assert steps[0] == UNDEFINED and steps[-1] == 254 and 120 < steps[250] < 135
    flat = map_data("cls", np.full(4, 0.25, np.float32))
    assert set(np.frombuffer(base64.b64decode(flat["values"]), np.uint8)) == {0}


# -- tiles, videos, towers without class token ---------------------------------------------------------------------


def test_tiles_are_shown_beside_the_base_image(tmp_path):
    save_next_transformers(tmp_path / "next", make_tiny_next("mistral"))
    model = load(tmp_path / "next", device="cpu", merge="spatial_unpad")
    sample = Sample("a", QUESTIONS[0], image=drawn_image(0, (120, 50)))
    found = collect(model, sample, ["consensusdrop", "attnmix", "fastv", "visiondrop"], (24,), 2)
    assert [panel.name for panel in found.panels] == ["base image", "tiles"] and not found.unavailable
    assert any("stand for no patch" in note for note in found.notes)
    cells = cells_of([panel.grid for panel in found.panels])
    assert found.full.tokens_per_layer[0] == len(cells) + found.panels[1].grid.shape[0], "and a token for each row"
    for key, values in found.maps.items():
        assert values.shape == cells.shape and np.isfinite(values[cells != NONE]).all(), key
    assert found.maps.keys() == {"cls", "question", "fused", "text"}
    for result in found.results:
        for position, index in enumerate(result.at[1:]):
            assert len(result.states[index].patches.kept) == result.tokens_per_layer[position]
    data = json.loads(page_data(found))
    assert [panel["image"] for panel in data["panels"]] == list(range(len(data["images"])))


def test_frames_of_a_video_are_panels(tmp_path):
    save_video_transformers(tmp_path / "video", make_tiny_video())
    model = load(tmp_path / "video", device="cpu")
    sample = Sample("a", QUESTIONS[0], image=Video(tuple(drawn_image(number) for number in range(8))))
    found = collect(model, sample, ["consensusdrop", "fastv", "downsample"], (64,), 2)
    assert [panel.name for panel in found.panels] == [f"frame {number}" for number in range(1, 9)]
    assert len(json.loads(page_data(found))["images"]) == 8 and not found.unavailable
    assert all(np.isfinite(values).all() for values in found.maps.values()) and len(found.maps) == 4


def test_a_tower_without_class_token_has_all_maps(tmp_path):
    save_qwen_transformers(tmp_path / "qwen", make_tiny_qwen())
    model = load(tmp_path / "qwen", device="cpu")
    found = collect(
        model, Sample("a", QUESTIONS[0], image=drawn_image(0, (112, 56))), ["visiondrop", "fastervlm"], (4,), 2
    )
    assert len(found.maps) == 4 and len(found.notes) == 1 and "has no CLS token" in found.notes[0]
    (panel,) = found.panels
    assert panel.image.size == (112, 56) and panel.grid.shape[1] == 2 * panel.grid.shape[0]
    assert not len(found.padding) and "on padding" not in render(found, "").split("<script>")[0]


# -- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(gallery, tmp_path_factory):
    file = tmp_path_factory.mktemp("gallery") / "gallery.html"
    hostile = dataclasses.replace(
        gallery, question=HOSTILE, instruction="<i>short</i>", full=dataclasses.replace(gallery.full, text=HOSTILE)
    )
    file.write_text(render(hostile, "vtr gallery '<x>'"))
    return file


def shown(page) -> list[str]:
    """Names of the cards that are in sight, the full answer's first."""
    return page.eval_on_selector_all(".card:not([hidden])", "cards => cards.map(card => card.dataset.method)")


def drawn(page, method: str) -> str:
    """The pixels of a card's first canvas, as text."""
    return page.evaluate(f"""document.querySelector('[data-method="{method}"] canvas').toDataURL()""")


def ready(page) -> None:
    page.wait_for_selector("body[data-ready]", timeout=120_000)


@pytest.fixture
def page(page_file):
    """The gallery in a window; a test that leaves an error in the console fails."""
    with opened(page_file) as page:
        ready(page)
        yield page
        assert not page.errors


@needs_browser
def test_another_answer_than_that_of_full_is_no_mistake_and_a_toy_is_called_one(gallery, tmp_path):
    """A right answer stood in red with a cross because the toy model's `full` was wrong, and nothing but the word
    "tinyllava" in the last line said what had answered."""
    first, second, *rest = gallery.results
    right = dataclasses.replace(first, text="blue"), dataclasses.replace(second, text="red")
    toy = dataclasses.replace(gallery, model="tinyllava", full=dataclasses.replace(gallery.full, text="red"))
    (tmp_path / "page.html").write_text(render(dataclasses.replace(toy, results=(*right, *rest)), "vtr gallery"))
    with opened(tmp_path / "page.html") as page:
        ready(page)
        assert page.inner_text(".banner") == TOY_BANNER
        page.click("#methods-text")
        page.click("#all")
        marks = page.locator(".answer span")
        texts = {text.partition(" ")[2] for text in marks.all_inner_texts()}
        assert texts <= {"same answer", "other answer"} and "other answer" in texts
        colours = marks.evaluate_all("spans => spans.map(span => getComputedStyle(span).color)")
        quiet = page.eval_on_selector("footer", "one => getComputedStyle(one).color")
        assert set(colours) == {quiet}
    assert TOY_BANNER not in render(gallery, "vtr gallery")


@needs_browser
def test_the_sliders_change_what_is_drawn_by_keyboard_and_by_mouse(page):
    assert page.locator("#budget-text").inner_text() == "8 of 16 tokens (50.0 %)"
    before = drawn(page, "consensusdrop")
    page.focus("#budget")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#budget-text").inner_text() == "4 of 16 tokens (25.0 %)"
    after = drawn(page, "consensusdrop")
    assert after != before
    # Mouse: a click at the right end of the slider is the largest budget. It was the smallest.
    box = page.locator("#budget").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    assert page.locator("#budget-text").inner_text().startswith("8 of 16")
    assert drawn(page, "consensusdrop") == before

    assert page.locator("#layer-text").inner_text() == "before decoder layer 3"
    last = drawn(page, "visiondrop")
    page.focus("#layer")
    page.keyboard.press("Home")
    assert page.locator("#layer-text").inner_text() == "after the vision encoder"
    first = drawn(page, "visiondrop")
    assert first != last and "0 dropped" in page.locator('[data-method="attnmix"] .counts').inner_text()
    box = page.locator("#layer").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    assert drawn(page, "visiondrop") == last
    assert page.locator("#layer").get_attribute("aria-valuetext") == "before decoder layer 3"


@needs_browser
def test_methods_are_chosen_and_the_layer_slider_needs_one_that_changes(page, gallery):
    assert shown(page) == ["full", "attnmix", "consensusdrop", "visiondrop"]
    page.click("summary")
    page.click("#none")
    assert shown(page) == ["full"]
    page.check('input[value="fastervlm"]')
    assert shown(page) == ["full", "fastervlm"] and page.is_disabled("#layer")
    page.focus('input[value="pyramiddrop"]')
    page.keyboard.press("Space")
    assert shown(page) == ["full", "fastervlm", "pyramiddrop"] and page.is_enabled("#layer")
    assert page.locator("#layer-why").inner_text() == "The layer changes pyramiddrop."
    page.click("#all")
    assert len(shown(page)) == 1 + len(gallery.methods)
    assert page.locator("#methods-text").inner_text() == f"{len(METHODS)} of {len(METHODS)} shown"
    for (method, budget), reason in gallery.unavailable.items():
        if budget == 8:
            assert reason in page.locator(f'[data-method="{method}"] .reason').inner_text()


@needs_browser
def test_a_score_map_lies_on_the_image_and_on_request_on_the_methods_too(page):
    plain, method = drawn(page, "full"), drawn(page, "attnmix")
    assert not page.is_visible("#opacity") and not page.is_visible("#scale")
    page.select_option("#map", "question")
    coloured = drawn(page, "full")
    assert coloured != plain and drawn(page, "attnmix") == method
    assert "question attention" in page.locator("#map-meaning").inner_text() and page.is_visible("#scale")
    page.focus("#opacity")
    page.keyboard.press("Home")
    assert page.locator("#opacity-text").inner_text() == "10 %" and drawn(page, "full") not in (plain, coloured)
    page.check("#map-everywhere")
    assert drawn(page, "attnmix") != method
    page.select_option("#map", "")
    assert drawn(page, "full") == plain and drawn(page, "attnmix") == method


@needs_browser
def test_canvases_show_what_the_overlay_of_the_figures_shows(tiny, tmp_path):
    """One grey image, so that a pixel in the middle of a patch has a colour of the overlay; a wide one is padded."""
    grey = Image.new("RGB", (400, 180), (200, 200, 200))
    sample = dataclasses.replace(SAMPLE, image=grey)
    names = ["consensusdrop", "fastervlm", "visionzip", "tome", "pyramiddrop"]
    found = collect(tiny, sample, names, (8,), 2)
    (tmp_path / "page.html").write_text(render(found, "vtr gallery"))
    seen = set()
    with opened(tmp_path / "page.html") as page:
        ready(page)
        for result in found.results:
            (answer,) = generate(tiny, [sample], registry.build(result.method, 8), 2).answers
            (overlay,) = draw_answer(sample, answer)
            wanted = np.asarray(overlay.reduce(overlay.width // 400)).astype(int)
            address = drawn(page, result.method)
            made = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
            assert overlay.width == overlay.height and made.width == made.height
            for y in (150, 250):
                for x in (50, 150, 250, 350):
                    pixel = made.getpixel((x * made.width // 400, y * made.height // 400))
                    assert pixel == pytest.approx(wanted[y, x], abs=3), (result.method, x, y)
                    seen.add(pixel)
        assert (200, 200, 200) in seen and (round(200 * DIM),) * 3 in seen and len(seen) > 3, "and two tints"


@needs_browser
def test_the_pointer_names_the_patch_and_its_score(page, gallery):
    (result,) = [result for result in gallery.results if (result.method, result.budget) == ("fastervlm", 8)]
    kept = set(result.states[-1].patches.kept.tolist())
    page.click("#methods-text")
    page.check('input[value="fastervlm"]')
    page.select_option("#map", "cls")
    canvas = page.locator('[data-method="fastervlm"] canvas')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for cell in range(16):
        row, column = divmod(cell, 4)
        page.mouse.move(box["x"] + (column + 0.5) / 4 * box["width"], box["y"] + (row + 0.5) / 4 * box["height"])
        title = canvas.get_attribute("title")
        role = f"{'padding; ' if cell in EMPTY else ''}{'kept' if cell in kept else 'dropped'}"
        assert title.startswith(f"row {row}, column {column}; {role}; CLS attention "), title
    card = page.inner_text('[data-method="fastervlm"] .counts')
    assert card.endswith(f"dropped. {len(kept & EMPTY)} of 8 tokens on padding."), "cropped away unseen"
    assert page.inner_text('[data-method="full"] .counts').endswith("0 dropped. 8 of 16 tokens on padding.")
    assert " ms" not in page.inner_text("body"), "of one run, as if it had been measured"


@needs_browser
@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["light desktop", "dark phone"])
def test_texts_are_escaped_and_the_page_fits_in_light_and_dark(page_file, size, dark):
    with opened(page_file, size, dark) as page:
        ready(page)
        assert page.evaluate("window.broken") is None and page.locator("h1").inner_text() == HOSTILE
        assert page.locator('[data-method="full"] .answer').inner_text() == HOSTILE
        assert "<i>short</i>" in page.locator("footer").inner_text()
        assert overflow(page) == 0
        for control in page.query_selector_all("input, select"):
            assert control.evaluate("one => one.labels.length && one.labels[0].textContent.trim().length"), control
        for canvas in page.query_selector_all(".card:not([hidden]) canvas"):
            assert "kept" in canvas.get_attribute("aria-label")
        page.click("#methods-text")  # an <output> there would swallow the click
        page.click("#all")
        page.select_option("#map", "cls")
        assert overflow(page) == 0 and not page.errors
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in background.removeprefix("rgb(").rstrip(")").split(",")) > 3 * 128
        assert light != dark


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_one_small_file_and_names_itself_in_it(tiny_path, tmp_path, capsys):
    drawn_image(0).save(tmp_path / "photo.png")
    file = tmp_path / "new" / "page.html"
    arguments = [str(tmp_path / "photo.png"), "is there a star?", "--model", str(tiny_path), "--device", "cpu"]
    arguments += ["--methods", "uniform,full,random", "--budgets", "1/2,4", "--output", str(file)]
    assert command.gallery(arguments) == 0
    text = file.read_text()
    printed = capsys.readouterr()
    assert "2 methods at 2 budgets, 4 answers, 0 not possible" in printed.out
    assert printed.err.startswith("full is on every page"), "it was dropped without a word"
    assert "vtr gallery" in text and "--methods uniform,full,random" in text and len(text) < 100_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["photo.jpg"], "Ask something about photo.jpg"),
        (["missing.jpg", "a?"], "No image at missing.jpg"),
        (["missing.mp4", "a?"], "missing.mp4"),
        (["--methods", "consensusdrp"], "Did you mean 'consensusdrop'"),
        (["--methods", "full"], "names no method to show beside full"),
        (["--set", "consensusdrop.alpa=1"], "Did you mean 'alpha'"),
        (["--budgets", "64,x"], "got 'x'"),
        (["--output", "."], "is a folder"),
    ],
)
def test_mistakes_end_in_a_sentence_before_a_model_is_loaded(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr("llava.model.builder.load", lambda *_: pytest.fail("loaded a model"))
    monkeypatch.setattr(sys, "argv", ["vtr"])
    assert cli.main(["gallery", *arguments]) == 2
    assert sentence in capsys.readouterr().err
