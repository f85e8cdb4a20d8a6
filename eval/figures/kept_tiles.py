"""The figures of kept tokens in docs/models.md: one question about a tiled image and one about a video.

python -m eval.figures.kept_tiles
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval import benchmarks
from eval.config import ROOT
from eval.figures.overlay import legend, save_small
from eval.figures.overlay_tiles import draw_answer
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry

IMAGES = ROOT / "docs" / "images"
GAP, LINE = 12, 24


@dataclass(frozen=True)
class Figure:
    """One sheet: what several methods keep of one image.

    Attributes:
        methods: name -> options, at `budget`; "full" comes first by itself.
    """

    file: str
    model: Path
    data: Path
    benchmark: str
    split: str
    budget: int
    methods: dict[str, dict[str, str]]


FIGURES = (
    Figure(
        "kept_tiles.png",
        ROOT / "assets/tinyllava_next",
        ROOT / "assets/eval_next",
        "gqa",
        "testdev",
        320,
        {"consensusdrop": {}, "globalcom2": {}, "divprune": {}},
    ),
    Figure(
        "kept_frames.png",
        ROOT / "assets/tinyllava_video",
        ROOT / "assets/eval_video",
        "video_qa",
        "test",
        136,
        {"consensusdrop": {}, "attnmix": {}, "fastervlm": {}},
    ),
)


def sheet(figure: Figure) -> Image.Image:
    """Methods below each other, each with what it keeps of the set's first question and what the model then answers."""
    data = benchmarks.get(figure.benchmark).load(figure.data, figure.split)
    assert data.sample_score is not None  # the benchmarks of FIGURES have one
    question = data.questions[0]
    model, sample = load(figure.model), data.sample(question)
    rows = []
    for name, options in {"full": {}, **figure.methods}.items():
        budget = model.visual_tokens if name == "full" else figure.budget
        answer = generate(model, [sample], registry.build(name, budget, options), max_new_tokens=8).answers[0]
        (drawn,) = draw_answer(sample, answer)
        right = data.sample_score(question, answer.text) == 1
        rows.append((f"{name}, {answer.accounting.mean:.0f} tokens: ", answer.text, right, drawn))
    width = max(drawn.width for *_, drawn in rows) + 2 * GAP
    strip = legend()
    height = LINE + GAP + sum(drawn.height + LINE + GAP for *_, drawn in rows) + strip.height + GAP
    page = Image.new("RGB", (width, height), "white")
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(15)
    pen.text((GAP, 4), f"{question.question}  (answer: {question.answer})", fill="black", font=font)
    top = LINE + GAP
    for caption, text, right, drawn in rows:
        pen.text((GAP, top), caption, fill="black", font=bold)
        place = GAP + pen.textlength(caption, font=bold)
        pen.text((place, top), text, fill="#1a7f37" if right else "#b42318", font=bold)
        page.paste(drawn, (GAP, top + LINE))
        top += drawn.height + LINE + GAP
    page.paste(strip, (GAP, top))
    return page


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for figure in FIGURES:
        save_small(sheet(figure), IMAGES / figure.file)
        print(f"Wrote {(IMAGES / figure.file).relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
