"""Analyse ConsensusDrop's fusion: where it gains over a single score, and how good a probe must be for that.

Questions are answered under ConsensusDrop with one score, the other, or both; with its default probe, and with probes
that are made worse in steps: noise, a preference for late tokens, no question at all, other layers. The package of the
method is used as it is, except that its cross-modal saliency is replaced. Answers are stored per arm.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from consensusdrop.method import MERGED_SHARE, ConsensusDrop
from eval import benchmarks
from eval.answers.jsonl import read_json, write_json
from eval.config import DEFAULT_DATA
from eval.feature_cache import CachingLlava
from eval.tables import COLOURS
from lab.findings.scores import auroc, digest, questions, redraw
from lab.findings.summary import (
    LEVEL,
    Cell,
    Cells,
    Values,
    bars,
    centre,
    difference,
    draw_cells,
    draw_line,
    legend_below,
    mean,
    sheet,
    write_rows,
)
from llava.pipeline.generate import generate
from llava.reduction import PromptState

INFINITE = float("inf")  # level of noise that leaves nothing of the probe
CELLS = 6  # cells of the smooth field along each side; one is four patches wide, like an object


@dataclass(frozen=True, kw_only=True)
class Degraded(ConsensusDrop):
    """ConsensusDrop with a probe that is made worse. Not in the registry.

    The logarithm of the cross-modal saliency is scaled to mean 0 and deviation 1 over the tokens of an image. Then
    `noise` times a field of the same scale is added. The field is drawn from the question's id, so that a question has
    the same field at every level and in every setting.

    Attributes:
        kind: what the field is. "white": a normal number for each token. "smooth": 6 x 6 normal numbers, interpolated,
            so that the probe prefers wrong regions instead of scattered tokens. "late": a token's place in the
            sequence.
        noise: factor of the field; infinite noise ranks by the field only.
        seen: question id -> [576] saliency by which the tokens were ranked.
    """

    kind: str = "white"
    noise: float = 0.0
    seen: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def cross_saliency(self, state: PromptState) -> Tensor:
        cross = super().cross_saliency(state)
        if self.noise:
            rows, columns = state.layout.rows, state.layout.columns
            noise = torch.stack([field_of(self.kind, name, rows, columns) for name in state.ids]).to(cross.device)
            worse = noise if self.noise == INFINITE else standard(cross.log()) + self.noise * noise
            cross = worse.exp()  # at least 0, as every rule of fusion expects
        self.seen.update(zip(state.ids, cross, strict=True))
        return cross


def field_of(kind: str, name: str, rows: int, columns: int) -> Tensor:
    """[rows * columns] the field of a kind for the question with this name; mean 0, deviation 1."""
    if kind == "late":
        return standard(torch.arange(rows * columns, dtype=torch.float32))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)
    if kind == "white":
        return standard(torch.randn(rows * columns, generator=generator))
    coarse = torch.randn(1, 1, CELLS, CELLS, generator=generator)
    return standard(functional.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True).flatten())


def standard(values: Tensor) -> Tensor:
    """[..., N] scaled to mean 0 and standard deviation 1."""
    return (values - values.mean(-1, keepdim=True)) / values.std(-1, keepdim=True)


BATCH = 48
ALPHA = {"fused": 0.5, "encoder only": 1.0, "cross-modal only": 0.0}


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        ranking: a key of ALPHA.
        merged: whether half of the budget goes to farthest-point merge targets, as by default, or all to the ranking.
        kind, noise: how the probe is made worse, see Degraded.
        probe, layer: the inputs of the probe and the decoder layer that it uses, see ConsensusDrop.
    """

    ranking: str
    budget: int
    merged: bool = True
    kind: str = "white"
    noise: float = 0.0
    probe: str = "static"
    layer: int = 0

    def reducer(self) -> Degraded:
        return Degraded(
            budget=self.budget,
            alpha=ALPHA[self.ranking],
            merged_share=MERGED_SHARE if self.merged else 0.0,
            kind=self.kind,
            noise=self.noise,
            probe=self.probe,
            probe_layer=self.layer,
        )

    @property
    def canonical_arm(self) -> "Arm":
        """The one arm that stands for all with the same answers.

        Without noise its kind has no effect, and if only the encoder ranks, nothing of the probe has.
        """
        if self.ranking == "encoder only":
            return Arm(self.ranking, self.budget, self.merged)
        return self if self.noise else replace(self, kind="white")


@dataclass(frozen=True)
class Answered:
    """Question id -> number, of all questions or of those that name something in the image.

    Attributes:
        scores: sample score, 0 to 1.
        auroc: how well the probe finds the named things; {} if it is not used.
        hit: 1 if at least one patch of every named thing is kept, merge targets included, else 0.
    """

    scores: dict[str, float]
    auroc: dict[str, float]
    hit: dict[str, float]


def answer(model: CachingLlava, arms: Iterable[Arm], folder: Path, limit: int | None = None) -> dict[Arm, Answered]:
    """Ask all questions of the test split, or the first `limit`, in every arm.

    Finished arms are read from `folder`.

    Returns:
        `canonical_arm` of each arm -> its answers.
    """
    keys = list(dict.fromkeys(arm.canonical_arm for arm in arms))
    model.expect([arm.reducer() for arm in keys])
    answered = {}
    for arm in tqdm(keys, desc="arms", file=sys.stderr):
        name = "_".join(map(str, astuple(arm))).replace(" ", "-")
        file = folder / f"arms-{digest(model, arm.reducer())}" / f"{name}_{limit or 'all'}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(ask(model, arm, limit)))
        answered[arm] = Answered(**read_json(file))
    return answered


def ask(model: CachingLlava, arm: Arm, limit: int | None) -> Answered:
    """Ask the questions in one arm."""
    data = benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")
    assert data.sample_score is not None
    reducer, scores = arm.reducer(), {}
    kept: dict[str, list[int]] = {}
    asked = data.questions[:limit]
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        answers = generate(model, [data.sample(question) for question in batch], reducer, data.max_new_tokens).answers
        for question, given in zip(batch, answers, strict=True):
            scores[question.id] = data.sample_score(question, given.text)
            kept[question.id] = given.trace[-1].reduction.kept[0].tolist()
    answered = Answered(scores, {}, {})
    for one in questions():
        image = redraw(one.image)
        mask = image.patches(one.targets)
        if one.id not in scores or not mask.any():
            continue
        if one.id in reducer.seen:
            answered.auroc[one.id] = float(auroc(reducer.seen[one.id].double().numpy(), mask))
        owners = image.owner[kept[one.id]]
        answered.hit[one.id] = float({n for n in one.targets if n in image.owner} <= set(owners.tolist()))
    return answered


BUDGET = 32  # at 64 tokens docs/consensusdrop.md finds no difference
OVER_ENCODER, OVER_CROSS = "fused − encoder only", "fused − cross-modal only"


def groups_of(salience: Values) -> dict[str, set[str]]:
    """Label -> question ids: all, by family, by kind of scene, and in thirds by size and salience of the named things.

    Args:
        salience: question id -> AUROC of the encoder's saliency for the named things.
    """
    asked = questions()
    groups = {"all": {one.id for one in asked}}
    for family in dict.fromkeys(one.family for one in asked):
        groups[f"family: {family}"] = {one.id for one in asked if one.family == family}
    for label, ending in (("natural", "n"), ("dense", "d")):
        groups[f"scene: {label}"] = {one.id for one in asked if one.image.endswith(ending)}
    patches = {one.id: float(redraw(one.image).patches(one.targets).sum()) for one in asked}
    size = {name: count for name, count in patches.items() if count}
    known = {name: salience[name] for name in size if name in salience}
    for title, values in (("size of the named things", size), ("salience of the named things", known)):
        first, second = np.quantile(list(values.values()), (1 / 3, 2 / 3))
        groups[f"{title}: low"] = {name for name, x in values.items() if x <= first}
        groups[f"{title}: middle"] = {name for name, x in values.items() if first < x <= second}
        groups[f"{title}: high"] = {name for name, x in values.items() if x > second}
    return groups


def report_gains(model: CachingLlava, folder: Path, out: Path, salience: Values) -> None:
    """Write the points that fusion gains over each score alone, by group of questions, as a table and a figure.

    Args:
        salience: question id -> AUROC of the encoder's saliency for the named things, if known.
    """
    answered = answer(model, [Arm(ranking, BUDGET) for ranking in ALPHA], folder)
    fused, encoder, cross = (answered[Arm(ranking, BUDGET)].scores for ranking in ALPHA)
    images = {one.id: one.image for one in questions()}
    gains = {}
    for label, ids in groups_of(salience).items():
        own = {name: fused[name] for name in ids}
        gains[f"{label} ({len(ids)})"] = {
            f"{title}, {BUDGET} tokens, points": difference(own, other, images, 100)
            for title, other in ((OVER_ENCODER, encoder), (OVER_CROSS, cross))
        }
    write_rows(out, "fusion_gain", gains)
    with sheet(out / "images" / "findings_fusion_gain.png", 2, 12, 5.6, sharey=True) as axes:
        for panel, title in zip(axes, next(iter(gains.values())), strict=True):
            draw_cells(panel, [cells[title] for cells in gains.values()], np.arange(len(gains)), 0, "", 5)
            panel.axvline(0, **LEVEL)
            panel.set_xlabel(title)
        axes[0].set_yticks(range(len(gains)), list(gains))
        axes[0].invert_yaxis()


# How good the probe may be.

ASKED = 671  # questions in every arm: those of the first 76 images
# The arms with a worse probe: budget, whether half of it goes to merge targets, kind of noise, levels of noise.
NOISE: tuple[tuple[int, bool, str, tuple[float, ...]], ...] = (
    (64, False, "smooth", (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, INFINITE)),
    (64, False, "white", (0.0, 1.0, 2.0, 4.0, INFINITE)),
    (64, False, "late", (0.0, 1.0, 2.0, 4.0)),
    (32, True, "smooth", (0.0, 2.0, INFINITE)),
    (32, True, "white", (0.0, 2.0, INFINITE)),
)
RANKINGS = ("fused", "cross-modal only", "encoder only")  # in the order of the figure
# Names of changes of the probe that are not noise.
KIND_NAMES = {"late": "late preference", "other layers": "other layers, no noise"}
OVER_PROBE = "fused − fused with the probe as it is"

# The fused arms of NOISE, each once; and the arms of other probes without noise, of which the first is the default.
NOISY = list(
    dict.fromkeys(
        Arm("fused", budget, merged, kind, x).canonical_arm for budget, merged, kind, levels in NOISE for x in levels
    )
)
LAYERS = [Arm("fused", 64, False, layer=layer) for layer in range(3)]
LAYERS += [Arm("fused", 64, False, probe="contextual", layer=layer) for layer in range(1, 5)]


def measured(answered: Mapping[Arm, Answered], arm: Arm) -> dict[str, Cell]:
    """Title -> value of one setting: accuracies, differences between rankings, and how good the probe is."""
    images = {one.id: one.image for one in questions()}
    by_ranking = {ranking: answered[replace(arm, ranking=ranking).canonical_arm] for ranking in ALPHA}
    cells: dict[str, Cell] = {"AUROC of the probe": mean(by_ranking["cross-modal only"].auroc, images)}
    for ranking, one in by_ranking.items():
        cells[f"{ranking}, %"] = mean(one.scores, images, 100)
        cells[f"{ranking}: every named thing kept in part, %"] = mean(one.hit, images, 100)
    plain = Arm("fused", arm.budget, arm.merged)
    compared = {OVER_ENCODER: by_ranking["encoder only"], OVER_CROSS: by_ranking["cross-modal only"]}
    if arm.canonical_arm != plain:
        compared[OVER_PROBE] = answered[plain]
    for title, other in compared.items():
        cells[f"{title}, points"] = difference(by_ranking["fused"].scores, other.scores, images, 100)
    return cells


def report_probes(model: CachingLlava, folder: Path, out: Path) -> None:
    """Write the tables of noisy probes and of other layers' probes, and the figure of both."""
    arms = [replace(arm, ranking=ranking) for arm in [*NOISY, *LAYERS] for ranking in ALPHA]
    answered = answer(model, arms, folder, ASKED)
    cells_of = {arm: measured(answered, arm) for arm in [*NOISY, *LAYERS]}
    write_rows(out, "probe_quality", {noise_label(arm): cells_of[arm] for arm in NOISY})
    layers = {}
    for arm in LAYERS:
        default = arm.canonical_arm == Arm(arm.ranking, 64, False)
        layers[f"{arm.probe}, layer {arm.layer}" + (" (as it is)" if default else "")] = cells_of[arm]
    write_rows(out, "probe_layers", layers)
    curves = {
        kind: [cells_of[Arm("fused", budget, merged, kind, x).canonical_arm] for x in levels]
        for budget, merged, kind, levels in NOISE
        if (budget, merged) == (64, False)
    }
    draw_quality(
        out / "images" / "findings_probe_quality.png",
        curves,
        {f"{arm.probe}\n{arm.layer}": cells_of[arm] for arm in LAYERS},
    )


def noise_label(arm: Arm) -> str:
    """The first cell of an arm's row in the table of noisy probes."""
    setting = f"{arm.budget} tokens{', half merge targets' if arm.merged else ', all ranked'}"
    if not arm.noise:
        return f"{setting}: as it is"
    worse = KIND_NAMES.get(arm.kind, f"{arm.kind} noise")
    return f"{setting}: {worse}" + (" alone" if arm.noise == INFINITE else f" × {arm.noise:g}")


def draw_quality(path: Path, noisy: Mapping[str, Sequence[Cells]], layers: Mapping[str, Cells]) -> None:
    """Draw the accuracy of the three rankings by the AUROC of the probe, by its layer, and by what is kept.

    Args:
        noisy: kind of noise -> cells, from no noise to the most.
        layers: probe -> cells.
    """
    with sheet(path, 2, 12, 9.2, rows=2) as (smooth, white, by_layer, shares):
        for panel, kind in ((smooth, "smooth"), (white, "white")):
            draw_accuracies(panel, [centre(cells["AUROC of the probe"]) for cells in noisy[kind]], noisy[kind])
            panel.invert_xaxis()
            panel.set_title(f"A probe with {kind} noise, 64 tokens, all by rank")
            panel.set_xlabel("AUROC of the probe on the named things (left: as it is, right: noise alone)")
        draw_accuracies(by_layer, range(len(layers)), list(layers.values()), 0.1, linestyle="none")
        qualities = [f"{centre(cells['AUROC of the probe']):.2f}" for cells in layers.values()]
        by_layer.set_xticks(range(len(layers)), [f"{name}\n{x}" for name, x in zip(layers, qualities, strict=True)])
        by_layer.set_xlabel("inputs of the probe, its decoder layer, its AUROC")
        by_layer.set_title("Probes of other layers, no noise, 64 tokens, all by rank")
        low, high = smooth.get_ylim()[0], max(panel.get_ylim()[1] for panel in (smooth, white, by_layer))
        for panel in (smooth, white):
            panel.set_ylim(low, high)
        draw_kept(shares, {**noisy, "other layers": list(layers.values())})
        legend_below(smooth, 3)


def draw_accuracies(panel: Any, x: Sequence[float], rows: Sequence[Cells], apart: float = 0, **style: Any) -> None:
    """Draw the accuracy of each ranking at places x. The encoder's, which no probe changes, is a level with a band.

    Args:
        apart: by how much the two other rankings are moved to the left and right of x.
    """
    for index, (ranking, side) in enumerate(zip(RANKINGS[:2], (-apart, apart), strict=True)):
        draw_line(
            panel, [place + side for place in x], [cells[f"{ranking}, %"] for cells in rows], index, ranking, **style
        )
    level = rows[0][f"{RANKINGS[2]}, %"]
    panel.axhline(centre(level), color=COLOURS[2], linewidth=1.6, label=f"{RANKINGS[2]} (band: 95 %)", zorder=1)
    below, above = bars([level])[:, 0]
    panel.axhspan(centre(level) - below, centre(level) + above, color=COLOURS[2], alpha=0.12, linewidth=0, zorder=0)
    panel.autoscale_view()
    panel.set_ylabel("accuracy, %")


def draw_kept(panel: Any, kinds: Mapping[str, Sequence[Cells]]) -> None:
    """Draw accuracy against the share of questions with a patch of every named thing kept; kinds differ by marker."""
    for marker, (kind, rows) in zip("os^D", kinds.items(), strict=True):
        for index, ranking in enumerate(RANKINGS):
            x = [centre(cells[f"{ranking}: every named thing kept in part, %"]) for cells in rows]
            y = [centre(cells[f"{ranking}, %"]) for cells in rows]
            panel.scatter(x, y, color=COLOURS[index], marker=marker, s=26, alpha=0.8)
        panel.scatter([], [], color="grey", marker=marker, s=26, label=KIND_NAMES.get(kind, f"{kind} noise"))
    panel.set(xlabel="questions with at least one patch of every named thing kept, %", ylabel="accuracy, %")
    panel.set_title("What accuracy follows: all arms of 64 tokens")
    panel.legend(loc="lower right")
