"""ConsensusDrop: where fusing the two scores gains, and how good the probe may be before it no longer does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.findings import figures, scenes
from eval.findings.arms import ALPHA, Answered, Arm, answer
from eval.findings.summary import IMAGES, Cell, Table, Values, difference, mean
from eval.sweep import CachingLlava

INFINITE = float("inf")
QUARTER = 671  # questions of the first 76 pictures
# Budget -> how many questions are asked without a handicap; None for all. At 64 tokens docs/consensusdrop.md finds no
# difference.
BUDGETS: dict[int, int | None] = {32: None}
# (budget, half of it for merge targets, kind of noise, levels) of the arms with a worse probe; QUARTER questions each.
DEGRADED: tuple[tuple[int, bool, str, tuple[float, ...]], ...] = (
    (64, False, "smooth", (0.0, 1.0, 2.0, INFINITE)),
    (64, False, "white", (0.0, 1.0, INFINITE)),
    (64, False, "late", (0.0, 2.0)),
    (32, True, "smooth", (0.0, INFINITE)),
    (32, True, "white", (0.0, INFINITE)),
)
OVER_ENCODER, OVER_CROSS = "fused − encoder only", "fused − cross-modal only"
OVER_PROBE = "fused − fused with the probe as it is"


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


def degraded(
    answered: Mapping[Arm, Answered], budget: int, merged: bool, kind: str, levels: Sequence[float]
) -> dict[float, dict[str, Cell]]:
    """Level of noise -> accuracies, differences, and how good the probe is, over the first QUARTER questions."""
    pictures = {one.id: one.picture for one in scenes.questions()}
    ids = {one.id for one in scenes.questions()[:QUARTER]}
    part = lambda values: {name: x for name, x in values.items() if name in ids}  # noqa: E731
    found = {}
    for level in levels:
        arms = {ranking: answered[Arm(ranking, budget, merged, kind, level).key] for ranking in ALPHA}
        cells: dict[str, Cell] = {"AUROC of the probe": mean(part(arms["cross-modal only"].auroc), pictures)}
        for ranking, one in arms.items():
            cells[f"{ranking}, %"] = mean(part(one.scores), pictures, 100)
            cells[f"{ranking}: named patches kept, %"] = mean(part(one.recall), pictures, 100)
            cells[f"{ranking}: every named thing kept in part, %"] = mean(part(one.hit), pictures, 100)
        for title, ranking in ((OVER_ENCODER, "encoder only"), (OVER_CROSS, "cross-modal only")):
            cells[f"{title}, points"] = difference(
                part(arms["fused"].scores), part(arms[ranking].scores), pictures, 100
            )
        plain = answered[Arm("fused", budget, merged)]
        if level:
            cells[f"{OVER_PROBE}, points"] = difference(part(arms["fused"].scores), part(plain.scores), pictures, 100)
        found[level] = cells
    return found


def report(model: CachingLlava, folder: Path, salience: Values) -> None:
    """Tables and figures of where fusion gains.

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
    table.write()
    figures.gains(IMAGES / "findings_fusion_gain.png", found, (OVER_ENCODER, OVER_CROSS))
    arms = [Arm(r, budget, merged, kind, x) for budget, merged, kind, levels in DEGRADED for x in levels for r in ALPHA]
    answered, curves = answer(model, arms, folder, QUARTER), {}
    table = Table(
        "probe_quality",
        [
            "probe",
            "AUROC of the probe",
            *(f"{r}, %" for r in ALPHA),
            *(f"{t}, points" for t in (OVER_ENCODER, OVER_CROSS, OVER_PROBE)),
        ],
    )
    for setting in DEGRADED:
        budget, merged, kind, _ = setting
        curves[setting[:3]] = degraded(answered, *setting)
        for level, cells in curves[setting[:3]].items():
            if level or kind == "smooth":  # without noise all kinds are one
                table.add(probe_label(budget, merged, kind, level), cells)
    table.write()
    figures.quality(IMAGES / "findings_probe_quality.png", curves)


def probe_label(budget: int, merged: bool, kind: str, level: float) -> str:
    """The first cell of a row."""
    setting = f"{budget} tokens{', half merge targets' if merged else ', all ranked'}"
    if not level:
        return f"{setting}: as it is"
    worse = {"late": "late preference"}.get(kind, f"{kind} noise")
    return f"{setting}: {worse}" + (" alone" if level == INFINITE else f" × {level:g}")
