"""VisionDrop: the spatial, causal and semantic misalignment of text-guided attention, by decoder layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.findings import figures
from eval.findings.collect import Collected
from eval.findings.summary import Cell, Table, difference, late_preference, mean
from eval.results.statistics import Interval

# The kinds of attention, with what the page calls them; "encoder" is the visual-only score of the first stage.
KINDS = {
    "last": "text: last token",
    "question": "text: question, mean",
    "visual": "visual only (VisionDrop)",
    "viewers": "visual only, per viewer",
}
PAGE_LAYERS = (1, 2, 4, 6)  # FastV's layer of 32 scaled, and VisionDrop's stages of 8 layers
FIND, KEPT = "named patches against others, AUROC", "named patches in the top 64, %"
LIFT = "attention on named patches, times their area"
LATE, LATE_TOP = "late preference, points", "late preference of the top 64, points"
AGREE = "rank agreement of two questions about a picture"
OTHERS = "named patches, scores of other questions, AUROC"
KINDS_AGREE = "rank agreement of content and function words"

# Title, measure and value by chance of each panel of the figure.
PANELS: tuple[tuple[str, str, float | None], ...] = (
    ("spatial: named patches, AUROC", FIND, 0.5),
    ("spatial: named patches in the top 64, %", KEPT, 100 * 64 / 576),
    ("causal: late preference of the top 64, points", LATE_TOP, 0.0),
    ("semantic: rank agreement of two questions (1: alike)", AGREE, None),
)


def by_layer(drawn: Collected, backwards: Collected, exchanged: Collected) -> dict[str, dict[str, Interval]]:
    """Score -> measure -> mean with its interval, for every score of every layer and the encoder's."""
    groups = drawn.picture_of
    found = {}
    for score in drawn.names:
        kind, _, layer = score.partition(" ")
        # Reading backwards does not change what comes before the decoder; there the picture's halves are exchanged.
        counterpart = exchanged if layer in ("", "0") else backwards
        cells = {
            FIND: mean(drawn.of(score, "auroc"), groups),
            OTHERS: mean(drawn.of(score, "auroc of others"), groups),
            LIFT: mean(drawn.of(score, "lift"), groups),
            KEPT: mean(drawn.of(score, "recall 64"), groups, 100),
            LATE: mean(late_preference(drawn, counterpart, score), groups, 100),
            LATE_TOP: mean(late_preference(drawn, counterpart, score, "late 64"), groups, 100),
            AGREE: mean(agreement(drawn, score), {name: name for name in drawn.pictures}),
            "attention on the image, share": mean(drawn.of(score, "mass"), groups),
            "effective share of tokens": mean(drawn.of(score, "effective"), groups),
        }
        if kind == "content":
            cells[KINDS_AGREE] = mean(words_agree(drawn, int(layer)), groups)
        found[score] = cells
    return found


def agreement(drawn: Collected, score: str) -> dict[str, float]:
    """Picture -> mean rank correlation of the score between its questions."""
    column = drawn.agreement[:, drawn.names.index(score)]
    return {name: float(x) for name, x in zip(drawn.pictures, column, strict=True) if not np.isnan(x)}


def words_agree(drawn: Collected, layer: int) -> dict[str, float]:
    """Question id -> rank correlation of the attention of its content and of its function words."""
    column = drawn.kinds[:, layer]
    return {one.id: float(x) for one, x in zip(drawn.asked, column, strict=True) if not np.isnan(x)}


def claims(drawn: Collected, layers: Sequence[int]) -> dict[str, Cell]:
    """Text-guided minus visual-only attention of the same layer: which of the two finds the named things better."""
    groups = drawn.picture_of
    found: dict[str, Cell] = {}
    for layer in layers:
        for kind in ("visual", "viewers"):
            a, b = f"last {layer}", f"{kind} {layer}"
            found[f"{a} − {b}"] = difference(drawn.of(a, "recall 64"), drawn.of(b, "recall 64"), groups, 100)
        a = f"last {layer}"
        found[f"{a} − encoder"] = difference(drawn.of(a, "recall 64"), drawn.of("encoder", "recall 64"), groups, 100)
    return found


def report(drawn: Collected, exchanged: Collected, backwards: Collected, out: Path) -> None:
    """Tables and figure of the VisionDrop part of the page."""
    found = by_layer(drawn, backwards, exchanged)
    spatial = Table("visiondrop", ["attention, layer", FIND, LIFT, KEPT, LATE_TOP, AGREE, OTHERS])
    spatial.add("CLS attention (first stage)", found["encoder"])
    shown = {f"{kind} {layer}" for kind in KINDS for layer in PAGE_LAYERS}
    for score, cells in found.items():
        kind, _, layer = score.partition(" ")
        if score != "encoder":
            spatial.add(f"{KINDS[kind]}, {layer}" if kind in KINDS else score, cells, shown=score in shown)
    spatial.write(out)
    table = Table("visiondrop_differences", ["named patches in the top 64", "difference, points"])
    for label, cell in claims(drawn, PAGE_LAYERS).items():
        table.add(label, {"difference, points": cell})
    table.write(out)
    figures.misalignment(out / "images" / "findings_visiondrop.png", found, KINDS, PANELS)
