"""The figure of kept tokens in the README: one question, the same budget, several rankings.

python -m eval.figures.kept_tokens --output docs/images/kept_tokens.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval import benchmarks
from eval.benchmarks.base import Dataset, Question
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.figures.overlay import draw_overlay, legend, save_small
from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.reduction import registry

# (caption, method, options)
COLUMNS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("encoder only", "consensusdrop", {"alpha": "1"}),
    ("question only", "consensusdrop", {"alpha": "0"}),
    ("consensusdrop", "consensusdrop", {}),
    ("random", "random", {}),
)
SIDE, GAP, LINE = 288, 12, 26


def draw(model: Llava, questions: Sequence[Question], data: Dataset, budget: int) -> Image.Image:
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
        assert isinstance(image, Image.Image) and data.sample_score is not None  # GQA has images and sample scores
        top = LINE + GAP + row * (SIDE + 3 * LINE)
        reducers = [registry.build("full", model.visual_tokens)]
        reducers += [registry.build(method, budget, options) for _, method, options in COLUMNS]
        for column, reducer in enumerate(reducers):
            answer = generate(model, [sample], reducer, max_new_tokens=8).answers[0]
            overlay = draw_overlay(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), answer.trace)
            left = GAP + column * (SIDE + GAP)
            sheet.paste(overlay, (left, top))
            right = data.sample_score(question, answer.text) == 1
            pen.text((left, top + SIDE + 4), answer.text, fill="#1a7f37" if right else "#b42318", font=bold)
        pen.text((GAP, top + SIDE + LINE), f"{question.question}  (answer: {question.answer})", fill="black", font=font)
    strip = legend()
    sheet.paste(strip, (GAP, height - strip.height - GAP))
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "kept_tokens.png")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--questions", default="", help="comma-separated question ids; default the two of the README")
    args = parser.parse_args()
    try:
        data = benchmarks.get("gqa").load(args.data, "testdev")
        by_id = {question.id: question for question in data.questions}
        wanted = [name for name in args.questions.split(",") if name] or README_QUESTIONS
        if lost := [name for name in wanted if name not in by_id]:
            raise UserError(f"{data.title} has no question {', '.join(lost)}; choose ids from its question file.")
        sheet = draw(load(args.model), [by_id[name] for name in wanted], data, args.budget)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_small(sheet, args.output)
    print(f"Wrote {args.output}.")
    return 0


# One natural scene and one dense one, chosen for being easy to read, not for the answers.
README_QUESTIONS = ["20000019", "20000010"]

if __name__ == "__main__":
    sys.exit(main())
