"""ConsensusDrop: where fusing the two scores gains, by group of questions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eval.findings import figures, scenes
from eval.findings.arms import ALPHA, Answered, Arm, answer
from eval.findings.summary import Cell, Table, Values, difference
from eval.sweep import CachingLlava

# Budget -> how many questions are asked without a handicap; None for all. At 64 tokens docs/consensusdrop.md finds no
# difference.
BUDGETS: dict[int, int | None] = {32: None}
OVER_ENCODER, OVER_CROSS = "fused − encoder only", "fused − cross-modal only"


def groups_of(salience: Values, limit: int | None = None) -> dict[str, set[str]]:
    """Label -> question ids: families, scenes, and thirds by size and by salience of the named things.

    Args:
        salience: question id -> how well the encoder's saliency finds the named things, AUROC.
    """
    asked = scenes.questions()[:limit]
    found = {"all": {one.id for one in asked}}
    for family in dict.fromkeys(one.family for one in asked):
        found[f"family: {family}"] = {one.id for one in asked if one.family == family}
    for label, dense in (("natural", False), ("dense", True)):
        found[f"scene: {label}"] = {one.id for one in asked if scenes.redraw(one.picture).dense == dense}
    patches = {one.id: float(scenes.redraw(one.picture).patches(one.targets).sum()) for one in asked}
    size = {name: count for name, count in patches.items() if count}
    known = {name: salience[name] for name in size if name in salience}
    for title, values in (("size of the named things", size), ("salience of the named things", known)):
        first, second = np.quantile(list(values.values()), (1 / 3, 2 / 3))
        found[f"{title}: low"] = {name for name, x in values.items() if x <= first}
        found[f"{title}: middle"] = {name for name, x in values.items() if first < x <= second}
        found[f"{title}: high"] = {name for name, x in values.items() if x > second}
    return found


def gains(answered: Mapping[Arm, Answered], budget: int, groups: Mapping[str, set[str]]) -> dict[str, dict[str, Cell]]:
    """Group -> points by which fusion beats each score alone."""
    pictures = {one.id: one.picture for one in scenes.questions()}
    fused, encoder, cross = (answered[Arm(ranking, budget)].scores for ranking in ALPHA)
    found: dict[str, dict[str, Cell]] = {}
    for label, ids in groups.items():
        part = lambda scores, ids=ids: {name: scores[name] for name in ids}  # noqa: E731
        found[label] = {
            OVER_ENCODER: difference(part(fused), part(encoder), pictures, 100),
            OVER_CROSS: difference(part(fused), part(cross), pictures, 100),
        }
    return found


def report(model: CachingLlava, folder: Path, out: Path, salience: Values) -> None:
    """Table and figure of where fusion gains.

    Args:
        salience: question id -> AUROC of the encoder's saliency on the named things, of the pictures where it is known.
    """
    found: dict[int, dict[str, dict[str, Cell]]] = {}
    sizes: dict[int, dict[str, int]] = {}
    for budget, limit in BUDGETS.items():
        undisturbed = answer(model, [Arm(ranking, budget) for ranking in ALPHA], folder, limit)
        groups = groups_of(salience, limit)
        found[budget] = gains(undisturbed, budget, groups)
        sizes[budget] = {name: len(ids) for name, ids in groups.items()}
    titles = {
        (title, budget): f"{title}, {budget} tokens, points"
        for budget in BUDGETS
        for title in (OVER_ENCODER, OVER_CROSS)
    }
    table = Table("fusion_gain", ["questions", *titles.values()])
    for label in next(iter(found.values())):
        cells = {titles[title, budget]: found[budget][label][title] for title, budget in titles}
        table.add(f"{label} ({', '.join(str(sizes[budget][label]) for budget in BUDGETS)})", cells)
    table.write(out)
    figures.gains(out / "images" / "findings_fusion_gain.png", found, (OVER_ENCODER, OVER_CROSS))
