"""Draw which tokens of an image methods keep: the figures in the README and in docs/methods.md.

python -m lab.pages.kept --output docs/images
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval import benchmarks
from eval.command import exit_on_user_error
from eval.config import FULL
from eval.figures.overlay import draw_answer, legend, save_small
from eval.yaml_files import read_yaml
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.places import ASSETS, WORK, check_checkout
from llava.reduction import registry

COLOURS = {True: "#1a7f37", False: "#b42318"}  # whether an answer is right -> its colour
GAP = 12  # pixels


@dataclass(frozen=True)
class Figure:
    """One sheet that shows what several methods keep of some images.

    Attributes:
        file: file name of the sheet.
        model, data: folders below ASSETS.
        questions: ids of the questions.
        budget: visual tokens that the methods keep.
        methods: caption, name and options of each; "full" is added as the first.
        columns: number of cells in a row.
    """

    file: str
    model: str
    data: str
    benchmark: str
    split: str
    questions: list[str]
    budget: int
    methods: list[tuple[str, str, dict[str, str]]]
    columns: int = 1


FIGURES = [Figure(**fields) for fields in read_yaml(Path(__file__).with_name("kept.yaml"))]


def draw(figure: Figure) -> Image.Image:
    """A heading for every question, and below it a cell for each method: what it keeps and what the model answers."""
    data, model = benchmarks.get(figure.benchmark).load(ASSETS / figure.data, figure.split), load(ASSETS / figure.model)
    assert data.sample_score is not None  # the toy benchmarks have one
    reducers = {FULL: registry.build(FULL, model.visual_tokens)}
    reducers |= {caption: registry.build(name, figure.budget, options) for caption, name, options in figure.methods}
    cells = []  # question, caption, answer, whether it is right, overlay
    for question in (one for one in data.questions if one.id in figure.questions):
        sample = data.sample(question)
        for caption, reducer in reducers.items():
            (answer,) = generate(model, [sample], reducer, max_new_tokens=8).answers
            (overlay,) = draw_answer(sample, answer)
            right = data.sample_score(question, answer.text) == 1
            cells.append((question, f"{caption}, {answer.accounting.mean:.0f} tokens: ", answer.text, right, overlay))
    width, height = cells[0][-1].size
    across = figure.columns * (width + GAP) + GAP
    size = max(15, across // 90)
    font, line = ImageFont.load_default(size), round(1.6 * size)
    rows, strip = len(cells) // figure.columns, legend()
    down = len(figure.questions) * line + rows * (line + height + GAP) + strip.height + GAP
    sheet = Image.new("RGB", (across, down), "white")
    pen, top, asked = ImageDraw.Draw(sheet), GAP // 2, None
    for number, (question, caption, text, right, overlay) in enumerate(cells):
        column = number % figure.columns
        if question is not asked:
            heading = f"{question.question}  (answer: {question.answer})"
            pen.text((GAP, top), heading, fill="black", font=font)
            top, asked = top + line, question
        left = GAP + column * (width + GAP)
        pen.text((left, top), caption, fill="black", font=font)
        pen.text((left + pen.textlength(caption, font=font), top), text, fill=COLOURS[right], font=font)
        sheet.paste(overlay, (left, top + line))
        top += (line + height + GAP) * (column == figure.columns - 1)
    sheet.paste(strip, (GAP, top))
    return sheet


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK / "docs" / "images", help="folder of the figures")
    folder = parser.parse_args(arguments).output
    check_checkout(parser.prog)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        save_small(draw(figure), folder / figure.file)
        print(f"Wrote {folder / figure.file}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
