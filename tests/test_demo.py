"""The demo: both answers and their costs without a web page, then the page in a browser, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import ExifTags, Image

from eval import serving
from eval.config import DEFAULT_MODEL, ROOT, TOY_BANNER
from eval.pages import command
from eval.pages import demo as demo_page
from eval.pages.demo import IDS, SHORT, Way, answer_beside_full, examples, ways_out
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.processing.image import open_image
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.token_layout import ModelSpec, PatchGrid, spec_of, stitched
from tests import contract
from tests.browser import DESKTOP, PHONE, needs_browser, opened, overflow
from tests.conftest import QUESTIONS, drawn_image

SEVERAL_TILES = spec_of(ModelSpec(576, 32, PatchGrid(24, 24), 24, True, True), stitched((2, 2), (24, 24)))

# -- both answers --------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("method", ["consensusdrop", "random", "visiondrop"])
def test_both_answers_are_those_of_the_pipeline(tiny, method):
    image = drawn_image(1)
    found = answer_beside_full(tiny, image, f"  {QUESTIONS[0]}\n", method, 8)
    for side, name, budget in ((found.full, "full", 16), (found.reduced, method, 8)):
        sample = Sample("demo", QUESTIONS[0], SHORT, image)
        batch = generate(tiny, [sample], registry.build(name, budget), demo_page.MAX_NEW_TOKENS)
        (answer,) = batch.answers
        assert (side.name, side.answer.text) == (name, answer.text)
        assert side.answer.accounting == answer.accounting and side.answer.accounting.mean == pytest.approx(budget)
        assert side.gflop == pytest.approx(batch.operations.total / 1e9)
        assert side.overlay.size == (2 * image.width, 2 * image.width), "with the padding"
    assert found.full.overlay.tobytes() != found.reduced.overlay.tobytes()


def test_times_are_taken_in_turns_after_both_have_answered(tiny, monkeypatch):
    """A busy minute would slow one method alone, and the first call of each pays for what is loaded then."""
    calls, asked = [], set()

    def spy(model, samples, reducer, max_new_tokens):
        calls.append((reducer.name, max_new_tokens))
        asked.add(samples[0].message)
        return generate(model, samples, reducer, max_new_tokens)

    monkeypatch.setattr(demo_page, "generate", spy)
    found = answer_beside_full(tiny, drawn_image(1), QUESTIONS[0], "random", 8)
    assert calls == [("full", 128), ("random", 128), *[("full", 1), ("random", 1)] * 3]
    for side in (found.full, found.reduced):
        assert len(side.ttft_ms) == 3 and min(side.ttft_ms) > 0
    answer_beside_full(tiny, drawn_image(1), QUESTIONS[0], "random", 8, short=False, repeats=1)
    assert asked == {QUESTIONS[0], f"{QUESTIONS[0]}\n{SHORT}"}, "short answers only if wanted"


@pytest.mark.parametrize(
    ("question", "method", "budget", "expected"),
    [
        (" \n ", "random", 8, "There is no question"),
        ("a" * 3000, "random", 8, "2,000 .* 3,000"),
        ("a?", "random", 17, "must be 1 to 16"),
        ("a?", "fastv", 1, "fastv .* a mean of 1 "),
    ],
)
def test_mistakes_are_one_sentence(tiny, question, method, budget, expected):
    with pytest.raises(UserError, match=expected):
        answer_beside_full(tiny, drawn_image(1), question, method, budget)


@pytest.mark.parametrize("spec", [None, ModelSpec(576, 32, PatchGrid(24, 24), 24), SEVERAL_TILES])
def test_every_method_answers_at_every_budget_or_something_on_the_page_does(tiny, spec):
    """fastv at 64 said "set fastv.schedule=kept" on a page without options."""
    spec = spec or tiny.spec
    budgets = {16: range(1, 17), 576: (1, 64, 575)}.get(spec.visual_tokens, (64,))
    for method in (name for name in contract.METHODS if name != "full"):
        for budget in budgets:
            asked = Way(method, "", budget)
            ways = [] if asked.fits(spec) else ways_out(spec, asked)
            assert asked.fits(spec) or (ways and asked not in ways), asked
            assert len({str(way) for way in ways}) == len(ways) < 6 and all(way.fits(spec) for way in ways), asked
    assert not Way("fastv", "", 1).fits(tiny.spec)
    assert str(ways_out(tiny.spec, Way("fastv", "", 1))[0]) == "fastv at 1 with schedule=kept"
    assert ways_out(tiny.spec, Way("fastv", "schedul=kept", 9))[0] == Way("fastv", "", 9), "without the misspelt option"
    assert ways_out(tiny.spec, Way("random", "", 9))[0].method == demo_page.METHOD, "refused for another reason"


def test_options_are_those_of_set(tiny, monkeypatch):
    monkeypatch.setattr(demo_page, "MAX_NEW_TOKENS", 1)
    found = answer_beside_full(
        tiny, drawn_image(1), "a?", "fastv", 1, repeats=1, options=" schedule=kept\nfastv.layer=3 "
    )
    assert found.reduced.answer.accounting.tokens_per_layer == (16, 16, 16, 1)
    for options, sentence in (
        ("schedule", "should look like"),
        ("layer=1 fastv.layer=2", "given twice"),
        ("layr=1", "Did you mean 'layer'"),
    ):
        with pytest.raises(UserError, match=sentence):
            answer_beside_full(tiny, drawn_image(1), "a?", "fastv", 8, options=options)
    listed = demo_page.options_table("divprune+fastv")
    assert "`fastv.schedule=mean`: " in listed and "(mean, kept)" in listed and "retention" not in listed


def test_tokens_on_padding_are_in_the_table(tiny, monkeypatch):
    monkeypatch.setattr(demo_page, "MAX_NEW_TOKENS", 1)
    for size, there in (((60, 20), True), ((60, 60), False)):
        compared = answer_beside_full(tiny, drawn_image(1, size), "a?", "random", 8, repeats=1)
        assert ("of them on padding" in demo_page.table(compared, tiny)) == there
        assert compared.full.answer.accounting.on_padding == 8 * there
        assert compared.full.overlay.width == compared.full.overlay.height


@pytest.fixture
def phone_image(tmp_path) -> Path:
    """60 x 44 pixels for a person, stored on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    drawn_image(1).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.jpg", exif=exif)
    return tmp_path / "phone.jpg"


def test_demo_gallery_and_client_show_a_phone_image_as_a_person_sees_it(tiny, tmp_path, phone_image, monkeypatch):
    """All of them asked about an image on its side."""
    compared = demo_page.answer(tiny, str(phone_image), "a?", True, "random", "", 8)
    (canvas,) = compared.full.answer.canvases
    left, top, right, bottom = canvas.box
    assert right - left > bottom - top
    assert command.sample_of(str(phone_image), "a?", "").image.size == (60, 44)
    seen = []

    def embeddings(model, batch, reducer):
        seen.extend(sample.image.size for sample in batch)
        return [torch.zeros(2, 3) for _ in batch]

    monkeypatch.setattr(serving, "prompt_embeddings", embeddings)
    monkeypatch.setattr(serving, "load_client_model", lambda *_: tiny)
    flags = ["consensusdrop", "8", "--image", str(phone_image), "--question", "a?", "--model", DEFAULT_MODEL]
    assert serving.export_command([str(tmp_path / "prompts.safetensors"), *flags]) == 0 and seen == [(60, 44)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_too_little_memory_is_one_sentence(tiny, monkeypatch, error):
    """That cuBLAS found no memory was a traceback."""

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(demo_page, "generate", full)
    with pytest.raises(UserError, match="memory of cpu"):
        answer_beside_full(tiny, drawn_image(1), "a?", "random", 8)


@pytest.mark.browser
def test_tiles_have_overlays_too():
    model = load(ROOT / "assets" / "tinyllava_next")
    image = open_image(examples()[0].image)
    found = answer_beside_full(model, image, examples()[0].question, "consensusdrop", 160, repeats=1)
    assert found.full.overlay.size == found.reduced.overlay.size and found.full.overlay.width > 2 * image.width
    assert found.reduced.answer.accounting.mean < found.full.answer.accounting.mean


@pytest.mark.browser
def test_the_toy_model_answers_the_examples(tmp_path):
    assert examples(tmp_path) == []
    found = examples()
    assert len(found) == len(IDS)
    model = load(DEFAULT_MODEL)
    for example in found:
        compared = answer_beside_full(
            model, open_image(example.image), example.question, "consensusdrop", 64, repeats=1
        )
        assert compared.full.answer.text.lower() == example.answer, example


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "in use"), ("192.0.2.1", "address"), ("no.such.host.invalid", "")]
)
def test_an_address_that_cannot_be_served_on_is_one_sentence(host, reason, capsys, monkeypatch):
    """It is found before the model is loaded."""
    monkeypatch.setattr(command.signal, "signal", Mock())  # a handler would outlive the test
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert command.demo(["--host", host, "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{host}, port {port} (" in line and reason in line and "--port" in line


# Prints every address that the process looks up or connects to and that is not this machine's.
WATCHED = """
import sys
OWN = ("127.0.0.1", "::1", "localhost", None)
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in OWN:
        print("outside:", args[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and args[0] not in OWN:
        print("outside:", args[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
from eval.pages.command import demo
sys.exit(demo(sys.argv[1:]))
"""


class Demo:
    """The command in a process of its own, with the toy model."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        # A proxy that nobody serves: neither the page nor Gradio may ask it.
        away = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        surroundings = os.environ | away | {"GRADIO_TEMP_DIR": str(folder / "gradio"), "NO_PROXY": "", "no_proxy": ""}
        with self.log.open("w") as log:
            words = [sys.executable, "-c", WATCHED, "--port", str(self.port)]
            self.process = subprocess.Popen(words, cwd=ROOT, env=surroundings, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while "Open http" not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"The demo did not start: {self.text}")
            time.sleep(0.2)

    @property
    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    started = Demo(tmp_path_factory.mktemp("demo"))
    yield started
    started.process.kill()
    started.process.wait()


def errors(page) -> list[str]:
    """What went wrong, without the stream of events that the page closes itself when an answer is there."""
    return [error for error in page.errors if "/gradio_api/queue/data" not in error and "/heartbeat/" not in error]


def ask(page, question: str) -> None:
    """Write the question and press the button; `wait_for_answer` does not take the answer before for the next one."""
    page.evaluate("document.querySelector('#numbers table')?.classList.add('before')")
    page.fill("#question textarea", question)
    page.click("#answer")


def upload(page, path: Path) -> None:
    """Put the file in the place of the image."""
    page.click("#image button[aria-label='Remove Image']")
    page.set_input_files("#image input[type=file]", path)
    page.wait_for_selector("#image button[aria-label='Remove Image']")


def wait_for_answer(page) -> tuple[str, str]:
    page.wait_for_selector("#numbers table:not(.before)", timeout=180_000)
    page.wait_for_selector("#reduced-overlay img")
    return page.input_value("#full-answer textarea"), page.input_value("#reduced-answer textarea")


def wait_for_problem(page, words: str) -> str:
    condition = "words => document.querySelector('#problem textarea')?.value.includes(words)"
    page.wait_for_function(condition, arg=words, timeout=180_000)
    return page.input_value("#problem textarea")


@needs_browser
def test_a_person_asks_about_an_image(demo):
    """Upload, question, method, budget, button; both answers, both overlays, the numbers, and no request elsewhere."""
    example = examples()[0]
    with opened("about:blank") as page:
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(demo.address)
        page.wait_for_selector("#numbers table")
        upload(page, example.image)
        page.click("#method input")
        page.fill("#method input", "fastervlm")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#method').innerText.includes('highest CLS attention')")
        page.fill("#budget input[type=number]", "128")
        page.keyboard.press("Tab")
        ask(page, example.question)
        full, reduced = wait_for_answer(page)
        expected = answer_beside_full(
            load(DEFAULT_MODEL), open_image(example.image), example.question, "fastervlm", 128, repeats=1
        )
        assert (full, reduced) == (expected.full.answer.text, expected.reduced.answer.text)
        numbers = page.inner_text("#numbers")
        assert "fastervlm 128 in 8 layers" in numbers and "TTFT" in numbers and "GFLOP" in numbers
        assert "fastervlm: 128.0 visual tokens" in page.inner_text("#reduced-answer")
        hosts = {url.split("/")[2] for url in requests if url.startswith(("http", "ws"))}
        assert hosts == {f"127.0.0.1:{demo.port}"}
        for size in (DESKTOP, PHONE):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            assert overflow(page) == 0
        assert not errors(page)
    assert "outside:" not in demo.text and "Traceback" not in demo.text


@needs_browser
def test_mistakes_are_shown_as_a_sentence_and_the_page_goes_on(demo, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_text("no image")
    with opened(demo.address, PHONE, dark=True) as page:
        page.wait_for_selector("#numbers table")
        page.click("#image button[aria-label='Remove Image']")
        ask(page, "Is there a red star?")
        wait_for_problem(page, "no image")
        page.set_input_files("#image input[type=file]", damaged)
        page.wait_for_timeout(1000)
        ask(page, "Is there a red star?")
        assert str(tmp_path) not in wait_for_problem(page, "image damaged.png")
        page.click("#image button[aria-label='Remove Image']")
        page.click("text=What color is the ring below the cross?")  # an example
        page.wait_for_selector("#image img")
        ask(page, " ")
        wait_for_problem(page, "no question")
        ask(page, "Is there a red star?")
        wait_for_answer(page)
        assert not page.locator("#problem").is_visible()
        page.click("#method input")
        page.fill("#method input", "divprune+fastv")  # a composition is no entry of the list
        page.keyboard.press("Enter")
        ask(page, "Is there a red star?")
        wait_for_answer(page)
        assert "divprune+fastv:" in page.inner_text("#reduced-answer") and not errors(page)
        page.click("#method input")
        page.fill("#method input", "fastv")
        page.keyboard.press("Enter")
        ask(page, "Is there a red star?")
        wait_for_problem(page, "a mean of 64 ")
        for way, tokens in (("fastv at 73", "72.9"), ("fastv at 64 with schedule=kept", "128.0")):
            page.evaluate("document.querySelector('#numbers table')?.classList.add('before')")
            page.click(f"#ways label:has-text('{way}')")
            wait_for_answer(page)
            assert f"fastv: {tokens} visual tokens" in page.inner_text("#reduced-answer")
            assert not page.locator("#ways").is_visible() and overflow(page) == 0
            if tokens == "72.9":
                page.fill("#budget input[type=number]", "64")
                page.keyboard.press("Tab")
                ask(page, "Is there a red star?")
                wait_for_problem(page, "a mean of 64 ")
        assert page.input_value("#settings textarea, #settings input") == "schedule=kept" and not errors(page)
    assert "Traceback" not in demo.text


@needs_browser
def test_the_page_opens_with_an_answered_example_and_says_that_the_model_is_a_toy(demo):
    """It opened empty, with the button below the window's edge and nothing but "tinyllava" about the model."""
    example = examples()[0]
    with opened(demo.address) as page:
        page.wait_for_function("document.querySelector('#reduced-answer textarea')?.value")
        assert page.input_value("#question textarea") == example.question
        answers = [page.input_value(f"#{side}-answer textarea").lower() for side in ("full", "reduced")]
        assert answers[0] == example.answer and answers[1]
        assert "consensusdrop 64 in 8 layers" in page.inner_text("#numbers")
        assert page.inner_text("#toy").strip() == TOY_BANNER
        button = page.locator("#answer").bounding_box()
        assert button["y"] + button["height"] < DESKTOP[1]
        assert not errors(page)


@needs_browser
def test_files_of_every_kind_after_an_example_was_clicked(demo, tmp_path):
    """An example made Gradio build the image's component anew, without the function that was set on the old one: an
    unreadable upload then showed five badges "Error". A photograph of 48 megapixels was drawn with every pixel, which
    did not end."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    large = Image.effect_noise((800, 600), 60).resize((8000, 6000)).convert("RGB")
    large.save(tmp_path / "large.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:100_000])
    (tmp_path / "notes.png").write_text("no image")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with opened(demo.address) as page:
        page.wait_for_selector("#numbers table")
        page.click("text=What color is the ring below the cross?")
        page.wait_for_function("document.querySelector('#question textarea').value.includes('ring below the cross')")
        for name, sentence in (
            ("notes.png", "image notes.png"),
            ("cut.jpg", "image cut.jpg (image file is truncated"),
            ("bomb.png", "bomb.png is too large"),
        ):
            upload(page, tmp_path / name)
            ask(page, "Is there a red star?")
            wait_for_problem(page, sentence)
            assert page.locator("text=Error").count() == 0
        upload(page, tmp_path / "moving.gif")
        ask(page, "Is there a red star?")
        wait_for_answer(page)
        # Somebody else, who asks while the model is at the large image, waits for it.
        other = page.context.new_page()
        other.goto(demo.address)
        wait_for_answer(other)
        upload(page, tmp_path / "large.jpg")
        ask(page, "Is there a red star?")
        ask(other, "Is there a blue star?")
        wait_for_answer(page)
        drawn = "document.querySelector('#reduced-overlay img').naturalWidth === 1024"
        page.wait_for_function(drawn, polling=200)  # frames, its usual clock, stand still in a page behind another
        wait_for_answer(other)
        assert not errors(page)
    assert "Traceback" not in demo.text


@needs_browser
def test_ctrl_c_ends_the_demo_while_a_page_is_open(demo):
    """The last test with this process: it ends it."""
    with opened(demo.address) as page:
        page.wait_for_selector("#numbers table")
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(60) == 130
    assert "Traceback" not in demo.text and demo.text.splitlines()[-1].startswith("Stopped; ")
