"""Draw what methods keep of an image: the figure in the README, and those of docs/methods.md.

python -m eval.figures.kept tokens --output docs/images/kept_tokens.png   # one question, several rankings
python -m eval.figures.kept tiles                                         # a tiled image and a video
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval import benchmarks
from eval.benchmarks.base import Dataset, Question
from eval.command import exit_on_user_error
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.figures.overlay import draw_answer, draw_overlay, legend, save_small
from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction import registry

IMAGES = ROOT / "docs" / "images"
COLOURS = {True: "#1a7f37", False: "#b42318"}  # of a right and of a wrong answer
Method = tuple[str, str, dict[str, str]]  # caption, name, options


def answers(
    model: Llava, data: Dataset, question: Question, sample: Sample, methods: Iterable[Method], budget: int
) -> Iterator[tuple[Answer, str]]:
    """The answer with all visual tokens and with each method, and the colour that says whether it is right."""
    assert data.sample_score is not None  # the toy benchmarks have one
    reducers = [registry.build("full", model.visual_tokens)]
    reducers += [registry.build(name, budget, options) for _, name, options in methods]
    for reducer in reducers:
        (answer,) = generate(model, [sample], reducer, max_new_tokens=8).answers
        yield answer, COLOURS[data.sample_score(question, answer.text) == 1]


# One question, several rankings.

COLUMNS: tuple[Method, ...] = (
    ("encoder only", "consensusdrop", {"alpha": "1"}),
    ("question only", "consensusdrop", {"alpha": "0"}),
    ("consensusdrop", "consensusdrop", {}),
    ("random", "random", {}),
)
# One natural scene and one dense one, chosen for being easy to read, not for the answers.
README_QUESTIONS = ["20000019", "20000010"]
SIDE, GAP, LINE = 288, 12, 26


def draw_tokens(model: Llava, questions: Sequence[Question], data: Dataset, budget: int) -> Image.Image:
    """A row per question: the image, then what each method keeps and answers."""
    width = (len(COLUMNS) + 1) * (SIDE + GAP) + GAP
    height = len(questions) * (SIDE + 3 * LINE) + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(15), ImageFont.load_default(17)
    for column, caption in enumerate(["all 576 tokens", *(f"{name}, {budget} tokens" for name, _, _ in COLUMNS)]):
        pen.text((GAP + column * (SIDE + GAP), 6), caption, fill="black", font=bold)
    for row, question in enumerate(questions):
        sample = data.sample(question)
        (image,) = sample.images
        assert isinstance(image, Image.Image)
        top = LINE + GAP + row * (SIDE + 3 * LINE)
        for column, (answer, colour) in enumerate(answers(model, data, question, sample, COLUMNS, budget)):
            left = GAP + column * (SIDE + GAP)
            large = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(draw_overlay(large, answer.trace, answer.runs[0]), (left, top))
            pen.text((left, top + SIDE + 4), answer.text, fill=colour, font=bold)
        pen.text((GAP, top + SIDE + LINE), f"{question.question}  (answer: {question.answer})", fill="black", font=font)
    strip = legend()
    sheet.paste(strip, (GAP, height - strip.height - GAP))
    return sheet


# A tiled image and a video.

TILE_LINE = 24


@dataclass(frozen=True)
class Figure:
    """One sheet: what several methods keep of one image.

    Attributes:
        methods: at `budget`; "full" comes first by itself.
    """

    file: str
    model: Path
    data: Path
    benchmark: str
    split: str
    budget: int
    methods: tuple[str, ...]


ASSETS = ROOT / "assets"
FIGURES = (
    Figure(
        "kept_tiles.png", ASSETS / "tinyllava_next", ASSETS / "eval_next", "gqa", "testdev", 320,
        ("consensusdrop", "globalcom2", "divprune"),
    ),
    Figure(
        "kept_frames.png", ASSETS / "tinyllava_video", ASSETS / "eval_video", "video_qa", "test", 136,
        ("consensusdrop", "attnmix", "fastervlm"),
    ),
)  # fmt: skip


def draw_tiles(figure: Figure) -> Image.Image:
    """Methods below each other, each with what it keeps of the set's first question and what the model then answers."""
    data, model = benchmarks.get(figure.benchmark).load(figure.data, figure.split), load(figure.model)
    question = data.questions[0]
    sample = data.sample(question)
    methods: list[tuple[str, str, dict[str, Any]]] = [("", name, {}) for name in figure.methods]
    rows = []
    for name, (answer, colour) in zip(
        ("full", *figure.methods), answers(model, data, question, sample, methods, figure.budget), strict=True
    ):
        (drawn,) = draw_answer(sample, answer)
        rows.append((f"{name}, {answer.accounting.mean:.0f} tokens: ", answer.text, colour, drawn))
    width = max(drawn.width for *_, drawn in rows) + 2 * GAP
    strip = legend()
    height = TILE_LINE + GAP + sum(drawn.height + TILE_LINE + GAP for *_, drawn in rows) + strip.height + GAP
    page = Image.new("RGB", (width, height), "white")
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(15)
    pen.text((GAP, 4), f"{question.question}  (answer: {question.answer})", fill="black", font=font)
    top = TILE_LINE + GAP
    for caption, text, colour, drawn in rows:
        pen.text((GAP, top), caption, fill="black", font=bold)
        pen.text((GAP + pen.textlength(caption, font=bold), top), text, fill=colour, font=bold)
        page.paste(drawn, (GAP, top + TILE_LINE))
        top += drawn.height + TILE_LINE + GAP
    page.paste(strip, (GAP, top))
    return page


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    tokens = figures.add_parser("tokens", help="the figure of the README")
    tokens.add_argument("--output", type=Path, default=IMAGES / "kept_tokens.png")
    tokens.add_argument("--model", default=DEFAULT_MODEL)
    tokens.add_argument("--data", type=Path, default=DEFAULT_DATA)
    tokens.add_argument("--budget", type=int, default=64)
    tokens.add_argument("--questions", default="", help="comma-separated question ids; default the two of the README")
    figures.add_parser("tiles", help="the figures of docs/methods.md")
    args = parser.parse_args(arguments)
    if args.figure == "tiles":
        for figure in FIGURES:
            save_small(draw_tiles(figure), IMAGES / figure.file)
            print(f"Wrote {(IMAGES / figure.file).relative_to(ROOT)}.")
        return 0
    data = benchmarks.get("gqa").load(args.data, "testdev")
    by_id = {question.id: question for question in data.questions}
    wanted = [name for name in args.questions.split(",") if name] or README_QUESTIONS
    if lost := [name for name in wanted if name not in by_id]:
        raise UserError(f"{data.title} has no question {', '.join(lost)}; choose ids from its question file.")
    sheet = draw_tokens(load(args.model), [by_id[name] for name in wanted], data, args.budget)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_small(sheet, args.output)
    print(f"Wrote {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
