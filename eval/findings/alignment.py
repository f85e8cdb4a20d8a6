"""AttnMix: are the original text embeddings aligned with the visual tokens that they speak of, wherever these stand?"""

from pathlib import Path

import numpy as np

from eval.findings import figures
from eval.findings.collect import WORD, Collected
from eval.findings.scenes import WORDS
from eval.findings.summary import Table, late_preference, mean
from eval.results.statistics import Interval
from toy.data.vocabulary import COLOR_NAMES, SHAPES

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
# The same for the figure, where there is less room.
WORD_NAMES = {
    "auroc": "true word, against all patches",
    "among things": "true word, against other things",
    "absent word": "word of no thing",
    "absent word among things": "word of no thing, other things",
    "other word": "word of another thing",
}
GROUPS = {"colour words": COLOR_NAMES, "shape words": SHAPES}
WORD_TITLES = {
    "auroc": "a word that is true of something: its patches against all others",
    "among things": "against those of other things",
    "absent word": "control: a word true of nothing, against all others",
    "absent word among things": "against other things",
    "other word": "control: a word true of another thing",
}
FIND = "finds the named things, AUROC"
OTHERS = "same, scores of other questions"
AMONG = "among things, AUROC"
KEPT = "named patches in the top 64, %"
MOVED = "late preference, halves exchanged, points"
BACKWARDS = "late preference, read backwards, points"


def words(drawn: Collected) -> dict[str, dict[str, Interval]]:
    """Group of words -> measure of WORD -> mean over pictures and words, with its interval."""
    found = {}
    for label, group in GROUPS.items():
        places = [WORDS.index(word) for word in group]
        cells = {}
        for column, measure in enumerate(WORD):
            values, pictures = {}, {}
            for number, picture in enumerate(drawn.pictures):
                for place in places:
                    value = drawn.words[number, place, column]
                    if not np.isnan(value):
                        values[f"{picture} {WORDS[place]}"] = float(value)
                        pictures[f"{picture} {WORDS[place]}"] = picture
            cells[measure] = mean(values, pictures)
        found[label] = cells
    return found


def scores(drawn: Collected, exchanged: Collected, backwards: Collected) -> dict[str, dict[str, Interval]]:
    """Score -> measure -> mean with its interval."""
    groups = drawn.picture_of
    found = {}
    for score in drawn.names:
        cells = {
            FIND: mean(drawn.of(score, "auroc"), groups),
            OTHERS: mean(drawn.of(score, "auroc of others"), groups),
            AMONG: mean(drawn.of(score, "among things"), groups),
            "average precision": mean(drawn.of(score, "average precision"), groups),
            "average precision by chance": mean(drawn.of(score, "chance precision"), groups),
            KEPT: mean(drawn.of(score, "recall 64"), groups, 100),
            MOVED: mean(late_preference(drawn, exchanged, score), groups, 100),
            f"{MOVED}, top 64": mean(late_preference(drawn, exchanged, score, "late 64"), groups, 100),
        }
        # Scores before the decoder do not depend on the order of reading, and layer 0 is not read backwards.
        if score.split()[-1] not in ("encoder", "cosine", "probe", "0"):
            cells[BACKWARDS] = mean(late_preference(drawn, backwards, score), groups, 100)
            cells[f"{BACKWARDS}, top 64"] = mean(late_preference(drawn, backwards, score, "late 64"), groups, 100)
        found[score] = cells
    return found


def profile(drawn: Collected, exchanged: Collected, score: str) -> np.ndarray:
    """[24] share of a score in each row of patches, 1 if even; every content counts once in each half."""
    place = drawn.names.index(score)
    here = [number for number, name in enumerate(drawn.pictures) if name in exchanged.pictures]
    # Of the exchanged picture the rows are stored by content; here they are needed by where they stood.
    moved = np.roll(exchanged.rows[:, place].mean(0), 12)
    return 12 * (drawn.rows[here, place].mean(0) + moved)


def report(drawn: Collected, exchanged: Collected, backwards: Collected, out: Path) -> None:
    """Tables and figure of the AttnMix part of the page."""
    table = Table("words", ["the cosine of", *WORD_TITLES.values()])
    by_group = words(drawn)
    for label, cells in by_group.items():
        table.add(label, {WORD_TITLES[measure]: cell for measure, cell in cells.items()})
    table.write(out)
    found = scores(drawn, exchanged, backwards)
    table = Table("attnmix", ["score", FIND, OTHERS, AMONG, KEPT, MOVED, BACKWARDS])
    for score, cells in found.items():
        table.add(SCORES.get(score, score), cells, shown=score in SCORES)
    table.write(out)
    lines = {SCORES[name]: profile(drawn, exchanged, name) for name in ("cosine", "last 1", "question 1", "last 2")}
    compared = {label: {WORD_NAMES[m]: cells[m] for m in WORD_NAMES} for label, cells in by_group.items()}
    late = {
        condition: {SCORES[name]: found[name].get(measure) for name in SCORES}
        for condition, measure in (
            ("halves of the picture exchanged", MOVED),
            ("visual tokens read backwards", BACKWARDS),
        )
    }
    figures.alignment(out / "images" / "findings_attnmix.png", compared, late, lines)
