"""The layout of the demo, in Gradio; what it shows comes from `compare`."""

import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from eval.config import FULL, TOY_BANNER, is_toy, method_options
from eval.pages.demo.compare import REPEATS, Comparison, Side, answer_beside_full, methods
from eval.pages.demo.examples import Example
from eval.pages.skeleton import environment
from eval.results.provenance import hardware
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.processing.clip_image import open_image

# The colours of eval.figures.overlay.
LEGEND = (
    "Kept patches are the photograph itself, merged ones are tinted inside the outline of their group, and dropped "
    "ones are dim and grey."
)
METHOD, BUDGET = "consensusdrop", 64
# No fonts from the network; the default colour of hints is too pale to read.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")).set(
    block_info_text_color="*neutral_600"
)
CSS = (Path(__file__).parent / "demo.css").read_text()


def layout(model: Llava, examples: Sequence[Example]) -> gr.Blocks:
    """The page of one loaded model; it opens with the first example, answered."""
    summaries = dict(methods())
    budget_at_first = min(BUDGET, model.visual_tokens)
    example, compared = None, None
    if examples and METHOD in summaries:
        example = examples[0]
        try:
            compared = answer(model, str(example.image), example.question, True, METHOD, budget_at_first, "")
        except UserError as error:  # a budget of another checkpoint, say; a person can ask for less
            print(f"The page opens without an answer: {error}", file=sys.stderr)
    one_at_a_time, asking = threading.Lock(), list[object]()
    with gr.Blocks(title="Visual token reduction", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(
            f"# Visual token reduction\n{model.name}, {model.visual_tokens:,} visual tokens per image, "
            f"{model.spec.layers} decoder layers. Ask about an image: the answer with all visual tokens and the answer "
            "with a method, side by side."
        )
        if is_toy(model.name):
            gr.Markdown(TOY_BANNER, elem_id="toy")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    str(example.image) if example else None,
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=240,
                    elem_id="image",
                )
                asked = example.question if example else None
                question = gr.Textbox(asked, label="Question", elem_id="question", max_length=10_000)
                button = gr.Button("Answer", variant="primary", elem_id="answer")
                short = gr.Checkbox(True, label="Ask for a single word or phrase", elem_id="short")
                method = gr.Dropdown(
                    list(summaries),
                    value=METHOD if METHOD in summaries else None,
                    label="Method",
                    info=summaries.get(METHOD),
                    elem_id="method",
                )
                budget = gr.Slider(
                    1,
                    model.visual_tokens,
                    value=budget_at_first,
                    step=1,
                    label="Budget: visual tokens per image, mean over decoder layers",
                    elem_id="budget",
                )
                options = gr.Textbox(
                    label="Options of the method",
                    info="as after --set: name=value, separated by spaces; vtr show methods NAME lists them",
                    elem_id="options",
                )
            with gr.Column(scale=3, min_width=300):
                problem = gr.Textbox(label="No answer", visible=False, elem_id="problem", lines=2)
                remark = gr.Markdown(visible=False, elem_id="remark")
                with gr.Row():
                    sides = [
                        panel("full", "All visual tokens", compared.full if compared else None),
                        panel("reduced", "Method", compared.reduced if compared else None),
                    ]
                gr.Markdown(LEGEND)
                numbers = gr.HTML(table(compared, model) if compared else None, elem_id="numbers")
        if examples:
            expected = gr.Textbox(label="Correct answer", visible=False)
            gr.Examples(
                [[str(example.image), example.question, example.answer] for example in examples],
                [image, question, expected],
                label="Test images of the toy benchmark, with a question and its correct answer",
            )
        outputs = [remark, problem, *sides[0], *sides[1], numbers]
        nothing: list[Any] = [None] * (len(outputs) - 2)

        def outcome(file: Mapping[str, Any] | None, *entered: Any) -> list[Any]:
            path = file["path"] if file else None
            try:
                return shown(answer(model, path, *entered), model, remark_on(path))
            except UserError as error:
                sentence = str(error)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                sentence = f"The model failed ({type(error).__name__}); the terminal that runs the demo says where."
            return [gr.update(visible=False), gr.update(value=sentence, visible=True), *nothing]

        def ask(*entered: Any) -> Iterator[list[Any]]:
            asking.append(entered)
            try:
                # One question at a time: times would mean nothing otherwise. The lock is not held while this generator
                # waits for Gradio, which drops it where the person has left.
                while not one_at_a_time.acquire(timeout=0.5):
                    sentence = (
                        "Please wait: the model answers one question at a time, and is at somebody else's. "
                        f"{len(asking)} are asked now, yours among them."
                    )
                    yield [gr.update(value=sentence, visible=True), gr.update(visible=False), *nothing]
                try:
                    found = outcome(*entered)
                finally:
                    one_at_a_time.release()
                yield found
            finally:
                asking.remove(entered)

        method.input(
            lambda name: gr.update(info=summaries.get(name)), method, method, queue=False, api_visibility="private"
        )
        inputs = [image, question, short, method, budget, options]
        # Not preprocessed: `answer` reads the image's file, so that a damaged one is an error with a sentence. Gradio
        # has checked its path.
        gr.on(
            [button.click, question.submit],
            ask,
            inputs,
            outputs,
            preprocess=False,
            api_visibility="private",
            concurrency_limit=16,
        )
    blocks.queue(max_size=16, api_open=False)
    return blocks


def panel(name: str, label: str, known: Side | None) -> tuple[gr.Textbox, gr.Image]:
    """Answer and overlay of one side."""
    label = label_of(known) if known else label
    with gr.Column(min_width=200):
        text = gr.Textbox(
            known.text if known else None, label=label, interactive=False, elem_id=f"{name}-answer", lines=1
        )
        overlay = gr.Image(
            known.overlay if known else None,
            label="Kept tokens",
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id=f"{name}-overlay",
        )
    return text, overlay


def answer(
    model: Llava, path: str | None, question: str, short: bool, method: str | None, budget: float, options: str
) -> Comparison:
    """Check what was entered, and ask.

    Raises:
        UserError: something is missing or wrong.
    """
    if path is None:
        raise UserError("There is no image; drop one, or choose an example.")
    if method is None:
        raise UserError("There is no method; choose one.")
    image = open_image(path, Path(path).name)
    chosen = method_options(method, options.split())
    return answer_beside_full(model, image, question, method, int(budget), chosen, short)


def remark_on(path: str | None) -> str:
    """What to say of an image that was asked about."""
    if path is not None:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False):
                return "The file is an animation or holds several images; the question was asked about the first one."
    return ""


def shown(comparison: Comparison, model: Llava, remark: str) -> list[Any]:
    """Values of the outputs, in their order."""
    full, reduced = comparison.full, comparison.reduced
    return [
        gr.update(value=remark, visible=bool(remark)),
        gr.update(value="", visible=False),
        gr.update(value=full.text, label=label_of(full)),
        full.overlay,
        gr.update(value=reduced.text, label=label_of(reduced)),
        reduced.overlay,
        table(comparison, model),
    ]


def label_of(side: Side) -> str:
    """ "fastv: 64.0 visual tokens"."""
    if side.name == FULL:
        return f"All visual tokens: {side.mean:,.0f}"
    return f"{side.name}: {side.mean:,.1f} visual tokens"


def table(comparison: Comparison, model: Llava) -> str:
    """The costs of both sides as HTML."""
    full, reduced = comparison.full, comparison.reduced

    def row(label: str, text: Any, value: Any = None) -> dict[str, str]:
        ratio = "" if value is None else f"{value(full) / value(reduced):.2f}"
        return {"label": label, "full": text(full), "reduced": text(reduced), "ratio": ratio}

    rows = [
        row("Visual tokens per layer", lambda side: f"{side.mean:,.1f}", lambda side: side.mean),
        row("TTFT, median", lambda side: f"{side.ttft:,.0f} ms", lambda side: side.ttft),
        row("fastest to slowest", times),
        row("KV cache", lambda side: f"{side.kv_bytes / 1e6:,.2f} MB", lambda side: side.kv_bytes),
        row("Operations", lambda side: f"{side.gflop:,.2f} GFLOP", lambda side: side.gflop),
    ]
    layers = [f"{side.name} {runs(side.tokens_per_layer)}" for side in (full, reduced)]
    template = environment(Path(__file__).parent).get_template("numbers.html.j2")
    return template.render(rows=rows, reduced=reduced, layers=layers, repeats=REPEATS, machine=machine(model))


def machine(model: Llava) -> str:
    """What the times were measured on: "cpu (AMD EPYC, 2 threads), float32"."""
    device, count = str(model.device), torch.get_num_threads()
    threads = f", {count} thread{'' if count == 1 else 's'}" if device == "cpu" else ""
    return f"{device} ({hardware(device)}{threads}), {model.loaded_with['dtype']}"


def runs(tokens: Sequence[int]) -> str:
    """ "576 in 2 layers, 64 in 6"."""
    found = [(value, len(list(same))) for value, same in groupby(tokens)]
    words = [f"{value:,} in {count}" for value, count in found]
    words[0] += " layer" if found[0][1] == 1 else " layers"
    return ", ".join(words)


def times(side: Side) -> str:
    """ "109 to 121 ms"."""
    return f"{min(side.ttft_ms):,.0f} to {max(side.ttft_ms):,.0f} ms"
