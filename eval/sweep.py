"""Many settings over the same questions: one loaded model, tower features computed once per image.

Every setting is an ordinary run with its own answer store, so a sweep can be interrupted and continued, and two sweeps
share the runs they have in common. Times are not comparable with single runs, because the tower's work is remembered;
`timing.jsonl` says so.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from eval import benchmarks, tracking
from eval.answers import current_settings
from eval.answers.jsonl import read_json, read_jsonl, write_json
from eval.answers.reuse import check_reuse
from eval.answers.source_hash import combined
from eval.benchmarks.base import Dataset
from eval.command import exit_on_user_error
from eval.config import RunConfig
from eval.job import prepare
from eval.parallel import placement, ranks
from eval.parallel.control import Control
from eval.parallel.launch import launch
from eval.parallel.placement import Placement
from eval.parallel.ranks import Rank
from eval.run import run
from eval.settings import build_reducer
from llava.errors import UserError
from llava.model.builder import load
from llava.model.encoded_image import EncodedImage, encoded_image_of
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder.clip_encoder import Encoded, encode
from llava.option_names import with_former_names
from llava.reduction import registry
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import TokenLayout

if TYPE_CHECKING:
    from llava.pipeline.accounting import Timer

Credits = dict[str, float]
CELL_SECONDS = 24 * 3600  # a setting is a whole run


@dataclass(frozen=True)
class Setting:
    """One row of a table: a method at a budget with options."""

    method: str
    budget: int | None
    options: dict[str, str] = field(default_factory=dict)


class CachingLlava(Llava):
    """A LLaVA that keeps the tower's output for every image it has seen, in the memory of this process.

    CLS and every score asked for so far are kept for each image, so that methods share one pass of the tower; what a
    method is given, and the operations counted for it, are those of a run of its own.
    """

    remembers_features = True

    def __new__(cls, model: Llava) -> "CachingLlava":
        """Of the model's own family: what this class leaves alone is done as that family does it."""
        own = cls if type(model) is Llava else type(f"{cls.__name__}{type(model).__name__}", (cls, type(model)), {})
        return object.__new__(own)

    def __init__(self, model: Llava):
        self.__dict__.update(model.__dict__)
        self._scores: dict[TowerScore, None] = {}
        self.tiled = isinstance(model, LlavaNext)
        self._seen: dict[object, tuple[Encoded, TokenLayout]] = {}

    def expect(self, reducers: Sequence[Reducer]) -> None:
        """Compute the scores of all these methods from the start; one more score means all images anew."""
        wanted = [
            score for reducer in reducers for score in reducer.tower_scores(self.tiled) if score not in self._scores
        ]
        if wanted:
            self._scores |= dict.fromkeys(wanted)
            self._seen.clear()

    def encode_images(
        self, pictures: Sequence[Any], keys: Sequence[object], reducer: Reducer, timer: "Timer"
    ) -> list[EncodedImage]:
        if "tower" in reducer.acts_in or "input_grid" in reducer.acts_in:
            return super().encode_images(pictures, keys, reducer, timer)
        self.expect([reducer])
        new = [i for i, name in enumerate(keys) if name not in self._seen]
        views = {i: self.views(pictures[i]) for i in new}
        timer.mark("preprocess")
        for temporal in {full.temporal for _, full in views.values()}:
            rows = [i for i in new if views[i][1].temporal == temporal]
            pixels = torch.cat([views[i][0] for i in rows]).to(self.device)
            tower, done = self.tower_of(temporal), 0
            fresh = encode(tower, pixels, self.select_layer, tuple(self._scores), keep_cls=True)
            for i in rows:
                crops, full = views[i]
                self._seen[keys[i]] = fresh.rows(slice(done, done + len(crops))), full
                done += len(crops)
        for_images: Any = self.tower
        depth = len(for_images.encoder.layers)
        found = []
        for name in keys:
            encoded, full = self._seen[name]
            wanted = reducer.tower_scores(full.tiles is not None)
            run = max([self.select_layer % (depth + 1), *(score.block % depth for score in wanted)])
            own = replace(
                encoded,
                features=encoded.features if reducer.keep_cls or full.temporal else encoded.features[:, 1:],
                scores={score: encoded.scores[score] for score in wanted},
                tokens=encoded.tokens[:run],
            )
            found.append(encoded_image_of(own, full, reducer.keep_cls))
        return found


def sweep(
    settings: Sequence[Setting],
    model: CachingLlava,
    data: Path,
    split: str,
    output: Path,
    batch_size: int = 48,
    benchmark: str = "gqa",
    limit: int | None = None,
    wandb: str = "auto",
) -> list[Credits]:
    """Run every setting on the first `limit` questions, or all.

    The sweep is one W&B run with a table of all settings.

    Returns:
        Question id -> sample score, in the order of `settings`.
    """
    folders = [output / split / name_of(setting, model.visual_tokens) for setting in settings]
    model.expect([registry.build(s.method, s.budget or model.visual_tokens, s.options) for s in settings])
    configs = [
        RunConfig(
            setting.method,
            setting.budget,
            benchmark,
            split=split,
            data=data,
            output=folder,
            options=setting.options,
            batch_size=batch_size,
            limit=limit,
            wandb="disabled",
            failed="again",
        )
        for setting, folder in zip(settings, folders, strict=True)
    ]
    missing = [config for config in configs if not is_finished(config, model)]
    place = placement.here() if len(missing) > 1 else None
    if place is not None:
        fill_on_ranks(missing, model, output / split, place)
        missing = []
    for config in tqdm(missing, desc=f"sweep {split}", unit="setting"):
        fill(config, model)
    results = [credits_of(folder, data, split, benchmark, limit) for folder in folders]
    log_table(wandb, settings, folders, {"benchmark": benchmark, "split": split, "model": model.name, "limit": limit})
    return results


def fill(config: RunConfig, model: CachingLlava) -> None:
    """Run one setting; its configuration asks again what failed before.

    Raises:
        UserError: some questions have no answer; a table must not hold their score.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = run(config, model=model, rank=Rank())
    if result["failed"]:
        first = result["failed"][0]
        raise UserError(
            f"{len(result['failed'])} questions have no answer in {config.output} (question {first['question_id']}: "
            f"{first['reason']}); run the same command again to retry them."
        )


def fill_on_ranks(configs: Sequence[RunConfig], model: CachingLlava, folder: Path, place: Placement) -> None:
    """Run settings on several ranks, each of which takes the next one when it is ready; `main` is what they do.

    Raises:
        SystemExit: a rank did not finish; the sentence is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"sweep-{os.getpid()}.json"
    write_json(file, {"model": model.loaded_with, "runs": [plain_config(config) for config in configs]})
    place = place.at_most(len(configs))
    try:
        with tqdm(total=len(configs), desc=f"{folder.name} on {place.describe()}", unit="setting") as bar:

            def show(control: Control) -> None:
                bar.update(control.count("finished", 0) - bar.n)

            code = launch("eval.sweep", [str(file.resolve())], place, CELL_SECONDS, show)
            if code == 0:
                bar.update(len(configs) - bar.n)
    finally:
        file.unlink(missing_ok=True)
    if code:
        raise SystemExit(code)


def plain_config(config: RunConfig) -> dict[str, Any]:
    """A configuration in JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@exit_on_user_error
def main(words: Sequence[str]) -> int:
    """What a rank does: load the model, then run one setting of the file after the other."""
    rank, content = ranks.current(), read_json(Path(words[0]))
    model = CachingLlava(load(**content["model"]))
    configs = [RunConfig(**{**entry, "data": Path(entry["data"])}) for entry in content["runs"]]
    model.expect([build_reducer(config, model.visual_tokens) for config in configs])
    while (number := rank.claim("settings")) < len(configs):
        rank.report(ranks.ASKING, [f"of {configs[number].output}"])
        fill(configs[number], model)
        rank.count("finished")
    return 0


def log_table(wandb: str, settings: Sequence[Setting], folders: Sequence[Path], about: dict[str, object]) -> None:
    """Log a finished sweep as one W&B run; the same sweep in the same folder continues its run."""
    if not folders:
        return
    found = [json.loads(newest_result(folder).read_text()) for folder in folders]
    digest = hashlib.sha256(json.dumps([folder.name for folder in folders]).encode()).hexdigest()[:8]
    config = about | {"settings": len(settings), "methods": sorted({setting.method for setting in settings})}
    tracker = tracking.start(
        wandb,
        folders[0].parent,
        config,
        job_type="sweep",
        tags=["sweep", about["benchmark"], about["split"], about["model"]],
        id_file=f"wandb_id-{digest}",
    )
    rows = [
        (setting.method, result["budget"], describe(setting), *tracking.headline(result, folder))
        for setting, result, folder in zip(settings, found, folders, strict=True)
    ]
    tracker.table("settings", ("method", "budget", "options", *tracking.HEADLINE), rows)
    tracker.close(failed=False)


def newest_result(folder: Path) -> Path:
    """The result that was written last in a run's folder, of all questions or of the first (in limitN/)."""
    return max(
        [*folder.glob("result.json"), *folder.glob("limit*/result.json")], key=lambda path: path.stat().st_mtime_ns
    )


def is_finished(config: RunConfig, model: Llava) -> bool:
    """Whether this very run is complete in its folder: same settings, code, prompts and images, all its questions.

    Raises:
        UserError: its answers belong to other prompts or images.
    """
    folder = Path(config.output or "")
    if not (folder / "settings.json").is_file():
        return False
    job = prepare(config, model, None)
    path = job.results / "result.json"
    if not path.is_file():
        return False
    result = json.loads(path.read_text())
    if result["asked"] < len(job.planned) or current_settings(result["settings"]) != job.settings:
        return False
    if result.get("code") != combined(job.sources) or result.get("code_unknown"):
        return False
    answers = {row["question_id"]: row for _, row in read_jsonl(folder / "answers.jsonl")}
    check_reuse(job.data, job.planned, answers, folder)
    return True


def describe(setting: Setting) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.options.items())


def name_of(setting: Setting, tokens: int) -> str:
    """A folder name that tells the setting, and by a hash the whole configuration: defaults may change in between."""
    reducer = registry.build(setting.method, setting.budget or tokens, setting.options)
    # Former names, so that a sweep finds the folders of earlier ones.
    whole = json.dumps(with_former_names(dataclasses.asdict(reducer)), sort_keys=True) + reducer.version
    tail = "".join(f",{key}={value}" for key, value in sorted(setting.options.items()))
    return f"{setting.method}-{reducer.budget}{tail}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def credits_of(folder: Path, data: Path, split: str, benchmark: str = "gqa", limit: int | None = None) -> Credits:
    """Question id -> sample score, from a finished run's answers to the first `limit` questions, or all."""
    questions = {question.id: question for question in _dataset(benchmark, data, split).questions[:limit]}
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    judge = _dataset(benchmark, data, split).sample_score
    if judge is None:
        raise UserError(
            f"{benchmark} has no score for a single answer, which a sweep compares; take another benchmark."
        )
    asked = [line for line in lines if line["question_id"] in questions]
    return {line["question_id"]: judge(questions[line["question_id"]], line["text"]) for line in asked}


_DATASETS: dict[tuple[str, Path, str], Dataset] = {}


def _dataset(benchmark: str, data: Path, split: str) -> Dataset:
    key = (benchmark, data, split)
    if key not in _DATASETS:
        found = benchmarks.get(benchmark)
        _DATASETS[key] = found.load(data, split, benchmarks.check_profile(found, None), "auto")
    return _DATASETS[key]
