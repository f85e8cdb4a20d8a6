"""ConsensusDrop: how broad the encoder's saliency and the cross-modal one are, and how far they agree."""

from pathlib import Path

from eval.findings.collect import Collected
from eval.findings.misalignment import agreement
from eval.findings.summary import Cell, Table, mean

SCORES = {
    "encoder": "encoder saliency (CLS attention)",
    "probe": "cross-modal saliency (static probe)",
    "cosine": "text embeddings (AttnMix's text score)",
    "question 2": "question's attention, layer 2",
    "last 2": "last token's attention, layer 2",
}
BREADTH, GINI = "effective share of tokens, %", "Gini coefficient"
AGREES = "rank correlation with the encoder"
OVERLAP = {count: f"top {count} shared with the encoder, %" for count in (32, 64, 128)}
AWARE = "rank agreement of two questions about a picture"
OWN, OTHERS = "named patches in the top 64, %", "same, scores of other questions, %"


def table_of(drawn: Collected) -> dict[str, dict[str, Cell]]:
    """Score -> measure -> mean with its interval."""
    groups, found = drawn.picture_of, {}
    for score in SCORES:
        cells: dict[str, Cell] = {
            BREADTH: mean(drawn.of(score, "effective"), groups, 100),
            GINI: mean(drawn.of(score, "gini"), groups),
            AWARE: mean(agreement(drawn, score), {name: name for name in drawn.pictures}),
            OWN: mean(drawn.of(score, "recall 64"), groups, 100),
            OTHERS: mean(drawn.of(score, "recall 64 of others"), groups, 100),
        }
        if score != "encoder":
            cells[AGREES] = mean(drawn.of(score, "spearman"), groups)
            for count, title in OVERLAP.items():
                cells[title] = mean(drawn.of(score, f"overlap {count}"), groups, 100)
        found[score] = cells
    return found


def report(drawn: Collected, out: Path) -> dict[str, dict[str, Cell]]:
    """The table of breadth and agreement."""
    found = table_of(drawn)
    table = Table("consensusdrop", ["score", BREADTH, GINI, AGREES, OVERLAP[64], AWARE, OWN, OTHERS])
    for score, cells in found.items():
        table.add(SCORES[score], cells)
    table.write(out)
    return found
