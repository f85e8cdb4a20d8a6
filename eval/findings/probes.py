"""ConsensusDrop: how good the probe may be before fusing it with the encoder's saliency gains: noise, other layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from eval.findings import figures, scenes
from eval.findings.arms import ALPHA, Answered, Arm, answer
from eval.findings.fusion import OVER_CROSS, OVER_ENCODER
from eval.findings.summary import Cell, Table, difference, mean
from eval.sweep import CachingLlava

INFINITE = float("inf")
ASKED = 671  # questions in every arm: those of the first 76 pictures
# (budget, half of it for merge targets, kind of noise, levels) of the arms with a worse probe.
NOISE: tuple[tuple[int, bool, str, tuple[float, ...]], ...] = (
    (64, False, "smooth", (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, INFINITE)),
    (64, False, "white", (0.0, 1.0, 2.0, 4.0, INFINITE)),
    (64, False, "late", (0.0, 1.0, 2.0, 4.0)),
    (32, True, "smooth", (0.0, 2.0, INFINITE)),
    (32, True, "white", (0.0, 2.0, INFINITE)),
)
# (inputs, decoder layer) of the probes without noise, at 64 tokens, all ranked; the first is the default.
PROBES = (
    ("static", 0),
    ("static", 1),
    ("static", 2),
    ("contextual", 1),
    ("contextual", 2),
    ("contextual", 3),
    ("contextual", 4),
)
OVER_PROBE = "fused − fused with the probe as it is"
COLUMNS = (
    "AUROC of the probe",
    *(f"{ranking}, %" for ranking in ALPHA),
    *(f"{title}, points" for title in (OVER_ENCODER, OVER_CROSS, OVER_PROBE)),
)


def noisy_arms() -> list[Arm]:
    """The fused arms of NOISE, each once."""
    arms = [Arm("fused", budget, merged, kind, x) for budget, merged, kind, levels in NOISE for x in levels]
    return list(dict.fromkeys(arm.key for arm in arms))


def layer_arms() -> list[Arm]:
    """The fused arms of PROBES."""
    return [Arm("fused", 64, False, probe=probe, layer=layer) for probe, layer in PROBES]


def measured(answered: Mapping[Arm, Answered], arm: Arm) -> dict[str, Cell]:
    """Accuracies, differences, and how good the probe is, over the first ASKED questions."""
    pictures = {one.id: one.picture for one in scenes.questions()}
    ids = {one.id for one in scenes.questions()[:ASKED]}
    part = lambda values: {name: x for name, x in values.items() if name in ids}  # noqa: E731
    by_ranking = {ranking: answered[replace(arm, ranking=ranking).key] for ranking in ALPHA}
    cells: dict[str, Cell] = {"AUROC of the probe": mean(part(by_ranking["cross-modal only"].auroc), pictures)}
    for ranking, one in by_ranking.items():
        cells[f"{ranking}, %"] = mean(part(one.scores), pictures, 100)
        cells[f"{ranking}: named patches kept, %"] = mean(part(one.recall), pictures, 100)
        cells[f"{ranking}: every named thing kept in part, %"] = mean(part(one.hit), pictures, 100)
    fused, plain = by_ranking["fused"], Arm("fused", arm.budget, arm.merged)
    for title, ranking in ((OVER_ENCODER, "encoder only"), (OVER_CROSS, "cross-modal only")):
        cells[f"{title}, points"] = difference(part(fused.scores), part(by_ranking[ranking].scores), pictures, 100)
    if arm.key != plain:
        cells[f"{OVER_PROBE}, points"] = difference(part(fused.scores), part(answered[plain].scores), pictures, 100)
    return cells


def report(model: CachingLlava, folder: Path, out: Path) -> None:
    """Tables of noisy probes and of other layers' probes, and the figure of both."""
    noisy, layers = noisy_arms(), layer_arms()
    arms = [replace(arm, ranking=ranking) for arm in [*noisy, *layers] for ranking in ALPHA]
    answered = answer(model, arms, folder, ASKED)
    found = {arm: measured(answered, arm) for arm in dict.fromkeys([*noisy, *layers])}
    table = Table("probe_quality", ["probe", *COLUMNS])
    for arm in noisy:
        table.add(noise_label(arm), found[arm])
    table.write(out)
    table = Table("probe_layers", ["probe", *COLUMNS])
    for arm in layers:
        table.add(layer_label(arm), found[arm])
    table.write(out)
    curves = {
        kind: [found[Arm("fused", budget, merged, kind, x).key] for x in levels]
        for budget, merged, kind, levels in NOISE
        if (budget, merged) == (64, False)
    }
    figures.quality(
        out / "images" / "findings_probe_quality.png",
        curves,
        {f"{arm.probe}\n{arm.layer}": found[arm] for arm in layers},
    )


def noise_label(arm: Arm) -> str:
    """The first cell of a row."""
    setting = f"{arm.budget} tokens{', half merge targets' if arm.merged else ', all ranked'}"
    if not arm.noise:
        return f"{setting}: as it is"
    worse = {"late": "late preference"}.get(arm.kind, f"{arm.kind} noise")
    return f"{setting}: {worse}" + (" alone" if arm.noise == INFINITE else f" × {arm.noise:g}")


def layer_label(arm: Arm) -> str:
    """The first cell of a row."""
    return f"{arm.probe}, layer {arm.layer}" + (" (as it is)" if arm.key == Arm(arm.ranking, 64, False) else "")
