"""The analyses of attention scores: what the three papers say of them, measured where the true places are known.

AttnMix: are the original text embeddings aligned with the visual tokens that they speak of, wherever these stand?
VisionDrop: the spatial, causal and semantic misalignment of text-guided attention, by decoder layer. ConsensusDrop: how
broad the encoder's saliency and the cross-modal one are, and how far they agree.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.findings.scores import WORD, WORDS, Collected
from eval.findings.summary import (
    LEVEL,
    Cell,
    Cells,
    Table,
    centre,
    difference,
    draw_cells,
    draw_line,
    legend_below,
    mean,
    means,
    name_rows,
    position_bias,
    sheet,
)
from eval.results.statistics import Interval
from eval.tables.page import COLOURS, MARKERS
from toy.data.vocabulary import COLOR_NAMES, SHAPES

# AttnMix.

# Scores that the page compares, with what it calls them.
SCORES = {
    "cosine": "text embeddings (AttnMix's text score)",
    "probe": "static probe (ConsensusDrop)",
    "encoder": "CLS attention, no text",
    "last 1": "last token's attention, layer 1",
    "last 2": "last token's attention, layer 2",
    "last 4": "last token's attention, layer 4",
    "question 1": "question's attention, layer 1",
    "question 2": "question's attention, layer 2",
    "question 4": "question's attention, layer 4",
}
PROFILED = ("cosine", "last 1", "question 1", "last 2")
GROUPS = {"colour words": COLOR_NAMES, "shape words": SHAPES}
# Measure of a word -> its title in the table, and in the figure, where there is less room.
WORD_TITLES = {
    "auroc": ("a word that is true of something: its patches against all others", "true word, against all patches"),
    "among things": ("against those of other things", "true word, against other things"),
    "absent word": ("control: a word true of nothing, against all others", "word of no thing"),
    "absent word among things": ("against other things", "word of no thing, other things"),
    "other word": ("control: a word true of another thing", "word of another thing"),
}
FIND = "finds the named things, AUROC"
OTHERS = "same, scores of other questions"
AMONG = "among things, AUROC"
KEPT = "named patches in the top 64, %"
MOVED = "late preference, halves exchanged, points"
BACKWARDS = "late preference, read backwards, points"
# Title -> measure and scale, as of `means`.
ALIGNMENT = {
    FIND: ("auroc", 1),
    OTHERS: ("auroc of others", 1),
    AMONG: ("among things", 1),
    "average precision": ("average precision", 1),
    "average precision by chance": ("chance precision", 1),
    KEPT: ("recall 64", 100),
}


def words(drawn: Collected) -> dict[str, dict[str, Interval]]:
    """Group of words -> measure of WORD -> mean over pictures and words, with its interval."""
    measured: dict[str, dict[str, Interval]] = {}
    for label, group in GROUPS.items():
        picture_of = {f"{picture} {word}": picture for picture in drawn.pictures for word in group}
        table = drawn.words[:, [WORDS.index(word) for word in group]].reshape(len(picture_of), len(WORD))
        measured[label] = {
            measure: mean({name: float(x) for name, x in zip(picture_of, values, strict=True) if x == x}, picture_of)
            for measure, values in zip(WORD, table.T, strict=True)
        }
    return measured


def scores(drawn: Collected, exchanged: Collected, backwards: Collected) -> dict[str, dict[str, Interval]]:
    """Score -> measure -> mean with its interval."""
    measured = {}
    for score in drawn.names:
        cells = means(drawn, score, ALIGNMENT)
        counterparts = {MOVED: exchanged}
        # Scores before the decoder do not depend on the order of reading, and layer 0 is not read backwards.
        if score.split()[-1] not in ("encoder", "cosine", "probe", "0"):
            counterparts[BACKWARDS] = backwards
        for title, counterpart in counterparts.items():
            for measure, part in (("late", ""), ("late 64", ", top 64")):
                values = position_bias(drawn, counterpart, score, measure)
                cells[f"{title}{part}"] = mean(values, drawn.picture_of, 100)
        measured[score] = cells
    return measured


def profile(drawn: Collected, exchanged: Collected, score: str) -> np.ndarray:
    """[24] share of a score in each row of patches, 1 if even; every content counts once in each half."""
    place = drawn.names.index(score)
    here = [number for number, name in enumerate(drawn.pictures) if name in exchanged.pictures]
    # Of the exchanged picture the rows are stored by content; here they are needed by where they stood.
    moved = np.roll(exchanged.rows[:, place].mean(0), 12)
    shares: np.ndarray = 12 * (drawn.rows[here, place].mean(0) + moved)
    return shares


def report_alignment(drawn: Collected, exchanged: Collected, backwards: Collected, out: Path) -> None:
    """Tables and figure of the AttnMix part of the page."""
    by_group = words(drawn)
    table = Table("words", ["the cosine of", *(title for title, _ in WORD_TITLES.values())])
    for label, cells in by_group.items():
        table.add(label, {WORD_TITLES[measure][0]: cell for measure, cell in cells.items()})
    table.write(out)
    measured = scores(drawn, exchanged, backwards)
    table = Table("attnmix", ["score", FIND, OTHERS, AMONG, KEPT, MOVED, BACKWARDS])
    for score, cells in measured.items():
        table.add(SCORES.get(score, score), cells, shown=score in SCORES)
    table.write(out)
    biases = {
        condition: {label: measured[name].get(title) for name, label in SCORES.items()}
        for condition, title in (
            ("halves of the picture exchanged", MOVED),
            ("visual tokens read backwards", BACKWARDS),
        )
    }
    profiles = {SCORES[name]: profile(drawn, exchanged, name) for name in PROFILED}
    draw_alignment(out / "images" / "findings_attnmix.png", by_group, biases, profiles)


def draw_alignment(
    path: Path,
    by_group: Mapping[str, Cells],
    biases: Mapping[str, Mapping[str, Cell | None]],
    profiles: Mapping[str, NDArray[np.float64]],
) -> None:
    """Three panels for AttnMix.

    Args:
        by_group: group of words -> measure of WORD -> AUROC.
        biases: condition -> score -> late preference in points, None where it is 0 by definition.
        profiles: score -> [24] its share in every row of patches, 1 if even.
    """
    with sheet(path, 3, 15, 4.4, width_ratios=(1.1, 1.25, 1.1)) as (left, middle, right):
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
        names = list(SCORES.values())
        for index, (condition, by_score) in enumerate(biases.items()):
            known = {place: cell for place, name in enumerate(names) if (cell := by_score[name]) is not None}
            places = np.array([*known]) + 0.16 * (2 * index - 1)
            draw_cells(middle, list(known.values()), places, index, condition)
        name_rows(middle, names, 0)
        middle.set(xlabel="late preference, points (0: none)", title="Does the same content score more when late?")
        middle.legend(loc="lower right")
        for index, (label, rows) in enumerate(profiles.items()):
            style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 3, "linewidth": 1.8}
            right.plot(range(1, 25), rows, label=label, **style)
        right.axhline(1, **LEVEL)
        right.set(xlabel="row of patches, top to bottom", ylabel="share of the score (1: even)", ylim=(0, None))
        right.set_title("Score by row; each content once in each half")
        right.legend()


# VisionDrop.

# The kinds of attention, with what the page calls them; "encoder" is the visual-only score of the first stage.
KINDS = {
    "last": "text: last token",
    "question": "text: question, mean",
    "visual": "visual only (VisionDrop)",
    "viewers": "visual only, per viewer",
}
PAGE_LAYERS = (1, 2, 4, 6)  # FastV's layer of 32 scaled, and VisionDrop's stages of 8 layers
NAMED, LIFT = "named patches against others, AUROC", "attention on named patches, times their area"
LATE, LATE_TOP = "late preference, points", "late preference of the top 64, points"
AGREE = "rank agreement of two questions about a picture"
NAMED_OTHERS = "named patches, scores of other questions, AUROC"
KINDS_AGREE = "rank agreement of content and function words"
# Title -> measure and scale, as of `means`.
MISALIGNMENT = {
    NAMED: ("auroc", 1),
    NAMED_OTHERS: ("auroc of others", 1),
    LIFT: ("lift", 1),
    KEPT: ("recall 64", 100),
}
USE = {"attention on the image, share": ("mass", 1), "effective share of tokens": ("effective", 1)}
# Title, measure and value by chance of each panel of the figure.
PANELS: tuple[tuple[str, str, float | None], ...] = (
    ("spatial: named patches, AUROC", NAMED, 0.5),
    ("spatial: named patches in the top 64, %", KEPT, 100 * 64 / 576),
    ("causal: late preference of the top 64, points", LATE_TOP, 0.0),
    ("semantic: rank agreement of two questions (1: alike)", AGREE, None),
)


def by_layer(drawn: Collected, backwards: Collected, exchanged: Collected) -> dict[str, dict[str, Interval]]:
    """Score -> measure -> mean with its interval, for every score of every layer and the encoder's."""
    measured = {}
    for score in drawn.names:
        kind, _, layer = score.partition(" ")
        # Reading backwards does not change what comes before the decoder; there the picture's halves are exchanged.
        counterpart = exchanged if layer in ("", "0") else backwards
        cells = means(drawn, score, MISALIGNMENT)
        for title, measure in ((LATE, "late"), (LATE_TOP, "late 64")):
            cells[title] = mean(position_bias(drawn, counterpart, score, measure), drawn.picture_of, 100)
        cells[AGREE] = agreement(drawn, score)
        cells |= means(drawn, score, USE)
        if kind == "content":  # question -> rank correlation of the attention of its content and its function words
            values = {one.id: float(x) for one, x in zip(drawn.asked, drawn.kinds[:, int(layer)], strict=True)}
            cells[KINDS_AGREE] = mean({name: x for name, x in values.items() if not np.isnan(x)}, drawn.picture_of)
        measured[score] = cells
    return measured


def agreement(drawn: Collected, score: str) -> Interval:
    """Mean rank correlation of the score between two questions about a picture."""
    column = drawn.agreement[:, drawn.names.index(score)]
    values = {name: float(x) for name, x in zip(drawn.pictures, column, strict=True) if not np.isnan(x)}
    return mean(values, {name: name for name in drawn.pictures})


def claims(drawn: Collected, layers: Sequence[int]) -> dict[str, Cell]:
    """Text-guided minus visual-only attention of the same layer: which of the two finds the named things better."""
    pairs = [(f"last {n}", other) for n in layers for other in (f"visual {n}", f"viewers {n}", "encoder")]
    return {
        f"{a} − {b}": difference(drawn.of(a, "recall 64"), drawn.of(b, "recall 64"), drawn.picture_of, 100)
        for a, b in pairs
    }


def report_misalignment(drawn: Collected, exchanged: Collected, backwards: Collected, out: Path) -> None:
    """Tables and figure of the VisionDrop part of the page."""
    measured = by_layer(drawn, backwards, exchanged)
    spatial = Table("visiondrop", ["attention, layer", NAMED, LIFT, KEPT, LATE_TOP, AGREE, NAMED_OTHERS])
    spatial.add("CLS attention (first stage)", measured["encoder"])
    shown = {f"{kind} {layer}" for kind in KINDS for layer in PAGE_LAYERS}
    for score, cells in measured.items():
        kind, _, layer = score.partition(" ")
        if score != "encoder":
            spatial.add(f"{KINDS[kind]}, {layer}" if kind in KINDS else score, cells, shown=score in shown)
    spatial.write(out)
    table = Table("visiondrop_differences", ["named patches in the top 64", "difference, points"])
    for label, cell in claims(drawn, PAGE_LAYERS).items():
        table.add(label, {"difference, points": cell})
    table.write(out)
    draw_misalignment(out / "images" / "findings_visiondrop.png", measured)


def draw_misalignment(path: Path, measured: Mapping[str, Cells]) -> None:
    """Measures over decoder layers, a panel of PANELS each.

    Args:
        measured: score, such as "last 3" -> measure -> value; "encoder" is drawn as a level.
    """
    with sheet(path, len(PANELS), 17, 4.2) as axes:
        for panel, (title, measure, chance) in zip(axes, PANELS, strict=True):
            for index, (kind, label) in enumerate(KINDS.items()):
                of_kind = [name for name in measured if name.partition(" ")[0] == kind]
                layers = [int(name.split()[1]) for name in of_kind]
                draw_line(panel, layers, [measured[name][measure] for name in of_kind], index, label)
            panel.axhline(centre(measured["encoder"][measure]), color=COLOURS[4], linewidth=1.5, label="CLS attention")
            if chance is not None:
                panel.axhline(chance, label="chance", **LEVEL)
            panel.autoscale_view()  # a level just inside the old limits would lie on the panel's edge
            panel.set(title=title, xlabel="decoder layer")
        legend_below(axes[0], 6)


# ConsensusDrop.

SALIENCIES = {
    "encoder": "encoder saliency (CLS attention)",
    "probe": "cross-modal saliency (static probe)",
    "cosine": "text embeddings (AttnMix's text score)",
    "question 2": "question's attention, layer 2",
    "last 2": "last token's attention, layer 2",
}
BREADTH, GINI = "effective share of tokens, %", "Gini coefficient"
AGREES, SHARED = "rank correlation with the encoder", "top 64 shared with the encoder, %"
OTHERS_KEPT = "same, scores of other questions, %"
# Title -> measure and scale, as of `means`.
SALIENCY = {BREADTH: ("effective", 100), GINI: ("gini", 1)}
FOUND = {KEPT: ("recall 64", 100), OTHERS_KEPT: ("recall 64 of others", 100)}
WITH_ENCODER = {
    AGREES: ("spearman", 1),
    "top 32 shared with the encoder, %": ("overlap 32", 100),
    SHARED: ("overlap 64", 100),
    "top 128 shared with the encoder, %": ("overlap 128", 100),
}


def report_saliency(drawn: Collected, out: Path) -> None:
    """The table of breadth and agreement."""
    table = Table("consensusdrop", ["score", BREADTH, GINI, AGREES, SHARED, AGREE, KEPT, OTHERS_KEPT])
    for score, label in SALIENCIES.items():
        cells = means(drawn, score, SALIENCY) | {AGREE: agreement(drawn, score)} | means(drawn, score, FOUND)
        if score != "encoder":
            cells |= means(drawn, score, WITH_ENCODER)
        table.add(label, cells)
    table.write(out)
