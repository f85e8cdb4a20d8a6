"""Test what the papers claim about attention scores on scenes whose objects' true places are known.

AttnMix: are text embeddings aligned with the visual tokens of the things that they name, wherever these stand?
VisionDrop: how far is text-guided attention misaligned spatially, causally and semantically in each decoder layer?
ConsensusDrop: how broad are the encoder's and the cross-modal saliency, and how far do they agree? One table of all
scores answers these questions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.statistics import Interval
from eval.tables import COLOURS, MARKERS
from eval.yaml_files import read_yaml
from lab.findings.scores import WORD, WORDS, Collected
from lab.findings.summary import (
    LEVEL,
    Cell,
    Cells,
    centre,
    difference,
    draw_cells,
    draw_line,
    legend_below,
    mean,
    name_rows,
    position_bias,
    sheet,
    write_rows,
)
from lab.toy.data.vocabulary import COLOR_NAMES, SHAPES

# All scores.

NAMED, KEPT = "finds the named things, AUROC", "named patches in the top 64, %"
# Title -> a measure of scores.MEASURES and a factor.
TITLES = {
    NAMED: ("auroc", 1),
    "same, scores of other questions": ("auroc of others", 1),
    KEPT: ("recall 64", 100),
    "effective share of tokens, %": ("effective", 100),
    "top 64 shared with the encoder, %": ("overlap 64", 100),
}
MOVED, BACKWARDS = "late preference, halves exchanged, points", "late preference, read backwards, points"
TOP = ", top 64"  # follows the two titles above: the late preference of the 64 highest scores
AGREE = "rank agreement of two questions about an image"


def measured(drawn: Collected, exchanged: Collected, backwards: Collected) -> dict[str, dict[str, Interval]]:
    """Score -> measure -> mean with its interval."""
    table = {}
    for place, score in enumerate(drawn.names):
        cells = {title: mean(drawn.of(score, name), drawn.image_of, scale) for title, (name, scale) in TITLES.items()}
        counterparts = {MOVED: exchanged}
        # Scores before the decoder do not depend on the reading order, and layer 0 is not measured backwards.
        if score.split()[-1] not in ("encoder", "cosine", "probe", "0"):
            counterparts[BACKWARDS] = backwards
        for title, counterpart in counterparts.items():
            for name, part in (("late", ""), ("late 64", TOP)):
                bias = position_bias(drawn, counterpart, score, name)
                cells[title + part] = mean(bias, drawn.image_of, 100)
        pairs = zip(drawn.images, drawn.agreement[:, place], strict=True)
        agreement = {name: float(x) for name, x in pairs if not np.isnan(x)}
        cells[AGREE] = mean(agreement, {name: name for name in drawn.images})
        table[score] = cells
    return table


# AttnMix.

# Names on the page of scores, of kinds of attention, and of measures of a word (in the table, and in the figure).
NAMES: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("names.yaml"))
SCORES, KINDS, WORD_TITLES = NAMES["scores"], NAMES["kinds"], NAMES["words"]
GROUPS = {"colour words": COLOR_NAMES, "shape words": SHAPES}


def words(drawn: Collected) -> dict[str, dict[str, Interval]]:
    """Group of words -> measure of WORD -> mean over images and words, with its interval."""
    measured: dict[str, dict[str, Interval]] = {}
    for label, group in GROUPS.items():
        image_of = {f"{image} {word}": image for image in drawn.images for word in group}
        table = drawn.words[:, [WORDS.index(word) for word in group]].reshape(len(image_of), len(WORD))
        measured[label] = {
            measure: mean({name: float(x) for name, x in zip(image_of, values, strict=True) if x == x}, image_of)
            for measure, values in zip(WORD, table.T, strict=True)
        }
    return measured


def profile(drawn: Collected, exchanged: Collected, score: str) -> np.ndarray:
    """[24] share of a score in each row of patches, 1 if even. Every content counts once in each half of the image."""
    place = drawn.names.index(score)
    here = [number for number, name in enumerate(drawn.images) if name in exchanged.images]
    # The rows of an exchanged image are stored by content; this moves them back to where they stood.
    moved = np.roll(exchanged.rows[:, place].mean(0), 12)
    shares: np.ndarray = 12 * (drawn.rows[here, place].mean(0) + moved)
    return shares


def report_alignment(table: Mapping[str, Cells], drawn: Collected, exchanged: Collected, out: Path) -> None:
    """Write the table of words and the figure of the AttnMix part of the page.

    The figure has three panels: how well words find their things, the late preference of SCORES, and four by row.

    Args:
        table: what `measured` returns.
    """
    by_group = words(drawn)
    titled = {
        label: {WORD_TITLES[measure][0]: cell for measure, cell in cells.items()} for label, cells in by_group.items()
    }
    write_rows(out, "words", titled)
    figure = out / "images" / "findings_attnmix.png"
    with sheet(figure, 3, 15, 4.4, width_ratios=(1.1, 1.25, 1.1)) as (left, middle, right):
        for index, (label, cells) in enumerate(by_group.items()):
            places = np.arange(len(WORD_TITLES)) + 0.12 * (2 * index - 1)
            draw_cells(left, [cells[measure] for measure in WORD_TITLES], places, index, label)
        name_rows(left, [name for _, name in WORD_TITLES.values()], 0.5)
        left.set(
            xlim=(0.2, 1.03),
            xlabel="AUROC of the cosine (0.5: chance)",
            title="Does a word's embedding find its object?",
        )
        left.legend(loc="lower right")
        conditions = (("halves of the image exchanged", MOVED), ("visual tokens read backwards", BACKWARDS))
        for index, (condition, title) in enumerate(conditions):
            known = {place: table[name][title] for place, name in enumerate(SCORES) if title in table[name]}
            places = np.array([*known]) + 0.16 * (2 * index - 1)
            draw_cells(middle, list(known.values()), places, index, condition)
        name_rows(middle, list(SCORES.values()), 0)
        middle.set(xlabel="late preference, points (0: none)", title="Does the same content score more when late?")
        middle.legend(loc="lower right")
        for index, score in enumerate(("cosine", "last 1", "question 1", "last 2")):
            style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 3, "linewidth": 1.8}
            right.plot(range(1, 25), profile(drawn, exchanged, score), label=SCORES[score], **style)
        right.axhline(1, **LEVEL)
        right.set(xlabel="row of patches, top to bottom", ylabel="share of the score (1: even)", ylim=(0, None))
        right.set_title("Score by row; each content once in each half")
        right.legend()


# VisionDrop.

PAGE_LAYERS = (1, 2, 4, 6)  # FastV's layer of 32, scaled to 8 layers, and VisionDrop's stages for 8 layers
# Title, measure and chance level of each panel of the figure.
PANELS: tuple[tuple[str, str, float | None], ...] = (
    ("spatial: named patches, AUROC", NAMED, 0.5),
    ("spatial: named patches in the top 64, %", KEPT, 100 * 64 / 576),
    ("causal: late preference of the top 64, points", BACKWARDS + TOP, 0.0),
    ("semantic: rank agreement of two questions (1: alike)", AGREE, None),
)


def report_misalignment(table: Mapping[str, Cells], drawn: Collected, out: Path) -> None:
    """Write the paired differences and the figure of the VisionDrop part of the page.

    The figure shows measures over decoder layers, one for each panel of PANELS; "encoder" is drawn as a level.

    Args:
        table: what `measured` returns.
    """
    # Text-guided minus visual-only attention of the same layer: which of the two finds the named things better?
    pairs = [(f"last {n}", other) for n in PAGE_LAYERS for other in (f"visual {n}", f"viewers {n}", "encoder")]
    kept = {score: drawn.of(score, "recall 64") for pair in pairs for score in pair}
    differences = {
        f"{a} − {b}": {"difference, points": difference(kept[a], kept[b], drawn.image_of, 100)} for a, b in pairs
    }
    write_rows(out, "visiondrop_differences", differences)
    with sheet(out / "images" / "findings_visiondrop.png", len(PANELS), 17, 4.2) as axes:
        for panel, (title, measure, chance) in zip(axes, PANELS, strict=True):
            for index, (kind, label) in enumerate(KINDS.items()):
                layers = [int(name.split()[1]) for name in table if name.partition(" ")[0] == kind]
                draw_line(panel, layers, [value_at(table[f"{kind} {n}"], measure) for n in layers], index, label)
            level = centre(value_at(table["encoder"], measure))
            panel.axhline(level, color=COLOURS[4], linewidth=1.5, label="CLS attention")
            if chance is not None:
                panel.axhline(chance, label="chance", **LEVEL)
            panel.autoscale_view()  # a level just inside the old limits would lie on the panel's edge
            panel.set(title=title, xlabel="decoder layer")
        legend_below(axes[0], 6)


def value_at(cells: Cells, measure: str) -> Cell:
    """A measure of a score. A score that was not read backwards gives its late preference with exchanged halves."""
    return cells.get(measure, cells[MOVED + TOP])
