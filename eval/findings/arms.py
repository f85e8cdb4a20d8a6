"""Answers under ConsensusDrop with one score, the other, or both, from a good to a useless probe; stored per arm."""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from consensusdrop.method import MERGED_SHARE
from eval import benchmarks
from eval.answers.jsonl import read_json, write_json
from eval.answers.source_hash import answer_sources, combined
from eval.config import DEFAULT_DATA
from eval.findings import measures, scenes
from eval.findings.degraded import Degraded
from eval.sweep import CachingLlava
from llava.pipeline.generate import generate

BATCH = 48
ALPHA = {"fused": 0.5, "encoder only": 1.0, "cross-modal only": 0.0}


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        ranking: a key of ALPHA.
        merged: half of the budget goes to farthest-point merge targets, as by default; else all of it to the ranking.
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
    def key(self) -> "Arm":
        """The arm whose answers are the same: without noise its kind has no effect, without a probe nothing of it."""
        if self.ranking == "encoder only":
            return Arm(self.ranking, self.budget, self.merged)
        return self if self.noise else replace(self, kind="white")


@dataclass(frozen=True)
class Answered:
    """Question id -> number, of all questions or of those that name something in the picture.

    Attributes:
        scores: sample score, 0 to 1.
        auroc: how well the probe finds the named things; {} where it is not used.
        recall: share of the patches of the named things that are kept, merge targets included.
        hit: 1 if of every named thing at least one patch is kept, else 0.
    """

    scores: dict[str, float]
    auroc: dict[str, float]
    recall: dict[str, float]
    hit: dict[str, float]


def answer(model: CachingLlava, arms: Iterable[Arm], folder: Path, limit: int | None = None) -> dict[Arm, Answered]:
    """Ask all questions of the test split, or at least the first `limit`, in every arm.

    Finished arms are read from `folder`.

    Returns:
        The arm's `key` -> its answers.
    """
    keys = list(dict.fromkeys(arm.key for arm in arms))
    model.expect([arm.reducer() for arm in keys])
    found = {}
    for arm in tqdm(keys, desc="arms", file=sys.stderr):
        home = folder / f"arms-{digest(model, arm)}"
        file = stored(home, arm, limit)
        if file is None:
            file = home / f"{name_of(arm)}{'' if limit is None else f'-{limit}'}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(ask(model, arm, limit)))
        found[arm] = Answered(**read_json(file))
    return found


def stored(home: Path, arm: Arm, limit: int | None) -> Path | None:
    """The file with an arm's answers to at least the first `limit` questions, or all; None if there is none."""
    name = name_of(arm)
    if (whole := home / f"{name}.json").is_file():
        return whole
    known = {int(file.stem[len(name) + 1 :]): file for file in home.glob(f"{name}-*.json")}
    enough = [count for count in known if limit is not None and count >= limit]
    return known[min(enough)] if enough else None


def name_of(arm: Arm) -> str:
    """A file name. The default probe is not part of it, so answers from before there were others stay valid."""
    values = [value for name, value in asdict(arm).items() if name not in ("probe", "layer")]
    if (arm.probe, arm.layer) != (Arm.probe, Arm.layer):
        values += [arm.probe, arm.layer]
    return json.dumps(values).strip("[]").replace('"', "").replace(", ", "_").replace(" ", "-")


def digest(model: CachingLlava, arm: Arm) -> str:
    """Changes with the weights and with all code that the answers depend on."""
    parts = [model.fingerprint, combined(answer_sources(model, arm.reducer()))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


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
    found = Answered(scores, {}, {}, {})
    for one in scenes.questions():
        picture = scenes.redraw(one.picture)
        mask = picture.patches(one.targets)
        if one.id not in scores or not mask.any():
            continue
        if one.id in reducer.seen:
            found.auroc[one.id] = float(measures.auroc(reducer.seen[one.id].double().numpy(), mask))
        owners = picture.owner[kept[one.id]]
        found.recall[one.id] = float(mask[kept[one.id]].sum() / mask.sum())
        found.hit[one.id] = float({n for n in one.targets if n in picture.owner} <= set(owners.tolist()))
    return found
