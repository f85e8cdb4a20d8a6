"""The demo in Gradio: one question answered twice, with all visual tokens and with a method, side by side."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import gradio as gr
import torch
from PIL import Image

from eval import benchmarks
from eval.benchmarks.llava_files import SHORT
from eval.config import DEFAULT_DATA, FULL, TOY_BANNER, is_toy
from eval.figures.overlay import draw_answer
from eval.pages import asset, environment
from eval.results.report import hardware
from llava.budget import RETENTION_RATIO, WITHOUT_BUDGET
from llava.errors import MethodError, UserError, is_out_of_memory, release_memory
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer
from llava.pipeline.generate import generate
from llava.processing.image import open_image
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.reducer import options_of
from llava.reduction.token_layout import ModelSpec

REPEATS = 3
MAX_NEW_TOKENS = 128
LONGEST_QUESTION = 2_000


@dataclass(frozen=True)
class Side:
    """One of the two answers.

    Attributes:
        name: of the method.
        ttft_ms: every measured time to the first token, in milliseconds.
        gflop: billions of operations up to the first token.
        overlay: the image with its kept, merged and dropped patches.
    """

    name: str
    answer: Answer
    ttft_ms: tuple[float, ...]
    gflop: float
    overlay: Image.Image


@dataclass(frozen=True)
class Comparison:
    full: Side
    reduced: Side


# Rows of the table of costs: label, format, and the number, of which the last column shows the ratio.
COSTS: tuple[tuple[str, str, Callable[[Side], float]], ...] = (
    ("Visual tokens per layer", "{:,.1f}", lambda side: side.answer.accounting.mean),
    ("TTFT, median", "{:,.0f} ms", lambda side: median(side.ttft_ms)),
    ("KV cache", "{:,.2f} MB", lambda side: side.answer.accounting.kv_bytes / 1e6),
    ("Operations", "{:,.2f} GFLOP", lambda side: side.gflop),
)


def answer_beside_full(
    model: Llava,
    image: Image.Image,
    question: str,
    method: str,
    budget: int,
    short: bool = True,
    repeats: int = REPEATS,
    options: str = "",
) -> Comparison:
    """Ask one question with all visual tokens and with a method.

    Both answer once, which also warms them up. Then they take turns, `repeats` times each, to measure the time to the
    first token: vision, selection and prefill, from prepared pixels and token ids.

    Args:
        budget: visual tokens to keep, as the mean over decoder layers.
        short: ask for a single word or phrase.
        options: options of the method, such as "schedule=kept layer=3".

    Raises:
        UserError: no question, an unknown method or option, a budget that the method cannot meet, or too little memory.
    """
    question = question.strip()
    if not question:
        raise UserError("There is no question; write one.")
    if len(question) > LONGEST_QUESTION:
        raise UserError(
            f"A question may have {LONGEST_QUESTION:,} characters, this one has {len(question):,}; shorten it."
        )
    sample = Sample("demo", question, SHORT if short else "", image)
    reducers = [registry.build(FULL, model.visual_tokens), registry.build(method, budget, options_in(options, method))]
    require(reducers[1], model.spec)
    try:
        batches = [generate(model, [sample], reducer, MAX_NEW_TOKENS) for reducer in reducers]
        times: list[list[float]] = [[] for _ in reducers]
        for _ in range(repeats):
            for measured, reducer in zip(times, reducers, strict=True):
                measured.append(1000 * generate(model, [sample], reducer, max_new_tokens=1).timing.ttft)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release_memory(error)
        raise UserError(
            f"The question does not fit into the memory of {model.device}; take a smaller image, or start the demo "
            "with a smaller model or --dtype float16."
        ) from error
    sides = []
    for reducer, batch, measured in zip(reducers, batches, times, strict=True):
        (one,) = batch.answers
        (overlay,) = draw_answer(sample, one)
        sides.append(Side(reducer.name, one, tuple(measured), batch.operations.total / 1e9, overlay))
    return Comparison(*sides)


# Questions of the toy GQA: about one image with few objects and three with many. They were chosen because they are easy
# to read, not by their answers.
IDS = ("20000019", "20000010", "20000036", "20000054")


@dataclass(frozen=True)
class Example:
    """A question with its correct answer."""

    image: Path
    question: str
    answer: str


def examples(data: Path = DEFAULT_DATA) -> list[Example]:
    """The questions, in the order of IDS; none if the toy benchmarks are not installed."""
    benchmark = benchmarks.get("gqa")
    if not benchmark.is_in(data):
        return []
    known = {question.id: question for question in benchmark.load(data, "testdev").questions}
    images = data / "gqa" / "data" / "images"
    chosen = [known[name] for name in IDS]
    return [Example(images / str(question.image), question.question, question.answer) for question in chosen]


def options_in(text: str, method: str) -> dict[str, str]:
    """Read options as a person writes them, separated by spaces or lines: "schedule=kept fastv.layer=3".

    Raises:
        UserError: the text is not of this form, or has an option twice.
    """
    options = dict[str, str]()
    for setting in text.split():
        name, equals, value = setting.removeprefix(f"{method}.").partition("=")
        if not (name and equals):
            raise UserError(f"Options should look like schedule=kept layer=3, got {setting!r}.")
        if name in options:
            raise UserError(f"The option {name} is given twice; leave one out.")
        options[name] = value
    return options


def options_table(method: str) -> str:
    """The options of a method as a list in Markdown."""
    lines = [f"Options of {method}, written as `name=value`, with their defaults:", ""]
    for name, known in options_of(registry.method(method)).items():
        if name.rpartition("__")[2] != RETENTION_RATIO:  # the budget is the slider's
            choices = f" ({', '.join(known.metadata['choices'])})" if known.metadata["choices"] else ""
            default = ",".join(map(str, known.default)) if isinstance(known.default, tuple) else known.default
            lines.append(f"- `{name.replace('__', '.')}={default}`: {known.metadata['doc']}{choices}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Way:
    """One way to ask: a method with its options and budget."""

    method: str
    options: str
    budget: int

    def __str__(self) -> str:
        return f"{self.method} at {self.budget}" + f" with {self.options}" * bool(self.options)

    def fits(self, spec: ModelSpec) -> bool:
        """Whether a model of these sizes can run the method with these options and this budget."""
        try:
            require(registry.build(self.method, self.budget, options_in(self.options, self.method)), spec)
        except UserError:
            return False
        return True


def ways_out(spec: ModelSpec, asked: Way) -> list[Way]:
    """Ways that work in place of one that could not be answered, with as little changed as possible.

    Returns:
        The method without options, with another value of one option, and at the nearest budgets below and above that
        work. If there are none, the method that the page opens with.
    """
    ways = list[Way]()
    if not asked.fits(spec):
        ways = [way for way in (replace(asked, options=""), *other_options(asked)) if way != asked and way.fits(spec)]
        ways += [way for step in (-1, 1) if (way := nearest(spec, asked, step))]
    return ways or [way for way in [Way(METHOD, "", min(BUDGET, spec.visual_tokens))] if way != asked]


def other_options(asked: Way) -> Iterator[Way]:
    """The method with every other value of every option that has a list of values."""
    try:
        known, given = options_of(registry.method(asked.method)), options_in(asked.options, asked.method)
    except UserError:
        return
    for name, option in known.items():
        for choice in option.metadata["choices"] or ():
            changed = given | {name.replace("__", "."): choice}
            yield replace(asked, options=" ".join(f"{key}={value}" for key, value in changed.items()))


def nearest(spec: ModelSpec, asked: Way, step: int) -> Way | None:
    """The method at the nearest budget below (step -1) or above (1) that works.

    The steps grow with the distance, so a budget far away that works may be missed.
    """
    last, away = 0, 1
    while 1 <= asked.budget + step * away <= spec.visual_tokens:
        if replace(asked, budget=asked.budget + step * away).fits(spec):
            closer = (replace(asked, budget=asked.budget + step * n) for n in range(last + 1, away + 1))
            return next(way for way in closer if way.fits(spec))
        last, away = away, max(away + 1, away * 11 // 10)
    return None


# The colours of eval.figures.overlay.
LEGEND = (
    "Kept patches are the photograph itself, merged ones are tinted inside the outline of their group, and dropped "
    "ones are dim and grey. Hatched patches are the padding that makes the image a square."
)
METHOD, BUDGET = "consensusdrop", 64
LABELS = "All visual tokens", "Method"  # titles before there are answers
# Local fonts only, and darker hints, because the default colour is too pale to read.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")).set(
    block_info_text_color="*neutral_600"
)
CSS = asset("demo.css")


def layout(model: Llava, examples: Sequence[Example]) -> gr.Blocks:
    """The page of one loaded model; it opens with the first example, answered."""
    summaries = {name: registry.method(name).summary for name in registry.names() if name not in WITHOUT_BUDGET}
    budget_at_first = min(BUDGET, model.visual_tokens)
    example, compared = examples[0] if examples else None, None
    if example:
        try:
            compared = answer(model, str(example.image), example.question, True, METHOD, "", budget_at_first)
        except UserError as error:  # for example, the checkpoint cannot meet the budget; a person can choose another
            print(f"The page opens without an answer: {error}", file=sys.stderr)
    blocks = gr.Blocks(title="Visual token reduction", analytics_enabled=False, delete_cache=(3600, 86400))
    with blocks:
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
                    value=METHOD,
                    label="Method",
                    info=summaries[METHOD],
                    allow_custom_value=True,  # a composition
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
                with gr.Accordion("Options", open=False, elem_id="options") as drawer:
                    options = gr.Textbox(
                        "",  # not None, which is not a text
                        label="Of the method; empty for its defaults",
                        placeholder="name=value name=value",
                        max_length=500,
                        elem_id="settings",
                    )
                    known = gr.Markdown(options_table(METHOD))
            with gr.Column(scale=3, min_width=300):
                problem = gr.Textbox(label="No answer", visible=False, elem_id="problem", lines=2)
                ways = gr.Radio([], label="Ask one of these instead", visible=False, elem_id="ways")
                with gr.Row():
                    sides = [panel(*one) for one in zip(("full", "reduced"), LABELS, strict=True)]
                gr.Markdown(LEGEND)
                numbers = gr.HTML(elem_id="numbers")
        if examples:
            expected = gr.Textbox(label="Correct answer", visible=False)
            gr.Examples(
                [[str(example.image), example.question, example.answer] for example in examples],
                [image, question, expected],
                label="Test images of the toy benchmark, with a question and its correct answer",
                elem_id="examples",
            )
        outputs = [problem, ways, *sides[0], *sides[1], numbers]

        def ask(file: Mapping[str, Any] | None, *entered: Any) -> list[Any]:
            try:
                return shown(answer(model, file["path"] if file else None, *entered), model)
            except UserError as error:
                *_, name, settings, budget = entered
                asked = Way(name, settings, int(budget))
                helpful = isinstance(error, MethodError) or not asked.fits(model.spec)
                return refused(str(error), ways_out(model.spec, asked) if helpful else [])
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                sentence = f"The model failed ({type(error).__name__}); the terminal that runs the demo says where."
                return refused(sentence, [])

        if compared:
            blocks.load(partial(shown, compared, model), None, outputs, api_visibility="private")
        method.input(
            lambda name: [gr.update(info=summaries.get(name, "")), "", listed(name)],
            method,
            [method, options, known],
            queue=False,
            api_visibility="private",
        )
        inputs = [image, question, short, method, options, budget]
        # Inputs are not preprocessed: `answer` reads the image's file, whose path Gradio has checked, so that a damaged
        # one gives a helpful error. Questions are answered one at a time, because parallel ones would distort the
        # times; a waiting page shows its place in the queue.
        once: dict[str, Any] = {"preprocess": False, "api_visibility": "private", "concurrency_limit": 1}
        gr.on([button.click, question.submit, options.submit], ask, inputs, outputs, **once)
        chosen = [method, options, budget, drawer, known]
        ways.input(
            lambda text: taken(Way(*json.loads(text)), summaries), ways, chosen, queue=False, api_visibility="private"
        ).then(ask, inputs, outputs, **once)
    blocks.queue(max_size=16, api_open=False)
    return blocks


def panel(name: str, label: str) -> tuple[gr.Textbox, gr.Image]:
    """The elements for the answer and the overlay of one side."""
    with gr.Column(min_width=200):
        text = gr.Textbox(label=label, interactive=False, elem_id=f"{name}-answer", lines=1)
        overlay = gr.Image(
            label="Kept tokens",
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id=f"{name}-overlay",
        )
    return text, overlay


def refused(sentence: str, ways: Sequence[Way]) -> list[Any]:
    """Values of the outputs if there is no answer."""
    choices = [(str(way), json.dumps(astuple(way))) for way in ways]
    offer = gr.update(choices=choices, value=None, visible=bool(choices))
    values: list[Any] = [gr.update(value=sentence, visible=True), offer]
    for label in LABELS:  # the labels of an earlier answer would name another method
        values += [gr.update(value="", label=label), None]
    return [*values, None]


def taken(way: Way, summaries: Mapping[str, str]) -> list[Any]:
    """Values of the elements that a person would have set to ask this way."""
    name = gr.update(value=way.method, info=summaries.get(way.method, ""))
    return [name, way.options, way.budget, gr.update(open=bool(way.options)), listed(way.method)]


def listed(method: str) -> str:
    """The options of a method in Markdown; "" for an unknown name, such as one that is still being typed."""
    try:
        return options_table(method)
    except UserError:
        return ""


def answer(
    model: Llava, path: str | None, question: str, short: bool, method: str, options: str, budget: float
) -> Comparison:
    """Check what was entered, and ask.

    Raises:
        UserError: something is missing or wrong.
    """
    if path is None:
        raise UserError("There is no image; drop one, or choose an example.")
    image = open_image(path, Path(path).name, upright=True)
    return answer_beside_full(model, image, question, method, int(budget), short, options=options)


def shown(compared: Comparison, model: Llava) -> list[Any]:
    """Values of the outputs, in their order."""
    values: list[Any] = [gr.update(value="", visible=False), gr.update(choices=[], visible=False)]
    for side in (compared.full, compared.reduced):
        mean = side.answer.accounting.mean
        label = f"All visual tokens: {mean:,.0f}" if side.name == FULL else f"{side.name}: {mean:,.1f} visual tokens"
        values += [gr.update(value=side.answer.text, label=label), side.overlay]
    return [*values, table(compared, model)]


def table(compared: Comparison, model: Llava) -> str:
    """The costs of both sides as HTML."""
    sides = (compared.full, compared.reduced)
    rows = [
        (
            label,
            [form.format(number(side)) for side in sides],
            f"{number(compared.full) / number(compared.reduced):.2f}",
        )
        for label, form, number in COSTS
    ]
    spread = [f"{min(side.ttft_ms):,.0f} to {max(side.ttft_ms):,.0f} ms" for side in sides]
    rows.insert(2, ("fastest to slowest", spread, ""))  # under the median
    empty = [side.answer.accounting.on_padding for side in sides]
    if any(empty):
        rows.insert(1, ("of them on padding", [f"{tokens:,.1f}" for tokens in empty], ""))
    layers = [f"{side.name} {runs(side.answer.accounting.tokens_per_layer)}" for side in sides]
    template = environment().get_template("numbers.html.j2")
    return template.render(rows=rows, reduced=compared.reduced, layers=layers, repeats=REPEATS, machine=machine(model))


def machine(model: Llava) -> str:
    """The machine that the times were measured on: "cpu (AMD EPYC, 2 threads), float32"."""
    device, count = str(model.device), torch.get_num_threads()
    threads = f", {count} thread{'' if count == 1 else 's'}" if device == "cpu" else ""
    return f"{device} ({hardware(device)}{threads}), {model.loaded_with['dtype']}"


def runs(tokens: Sequence[int]) -> str:
    """ "576 in 2 layers, 64 in 6"."""
    (first, count), *others = [(value, len(list(same))) for value, same in groupby(tokens)]
    return ", ".join([f"{first:,} in {count} layer{'' if count == 1 else 's'}", *(f"{v:,} in {n}" for v, n in others)])
