"""Everything that a run works with, read and checked before the first question."""

import dataclasses
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import benchmarks
from eval.answers import result_folder
from eval.benchmarks.base import Dataset, Question
from eval.config import RunConfig
from eval.judging.choice import check_judge
from eval.results import cost, provenance
from eval.settings import build_reducer, default_output, device_name, store_settings
from llava.errors import UserError
from llava.reduction.crop_budget import require

if TYPE_CHECKING:
    from eval.feature_cache import CachingLlava
    from llava.model.llava_arch import Llava
    from llava.reduction.reducer import Reducer

# What a method may be off its budget if it does not document its own rounding, in tokens per layer.
ROUNDING = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a run works with once its inputs are read and checked.

    Attributes:
        planned: the questions of this run, answered already or not.
        settings: what the answers depend on.
        started: ISO time; the name of this process in timing.jsonl.
    """

    config: RunConfig
    data: Dataset
    planned: tuple[Question, ...]
    model: Any
    reducer: "Reducer"
    settings: dict[str, Any]
    output: Path
    started: str

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.data.max_new_tokens

    @property
    def results(self) -> Path:
        """Folder of the result and the submission files."""
        return result_folder(self.output, len(self.planned), len(self.data.questions))

    def credits(self, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """What each answer is worth; nothing where the benchmark has no sample score for a single answer."""
        judge = self.data.sample_score
        return [] if judge is None else [judge(q, text) for q, text in zip(questions, texts, strict=True)]

    def off_budget(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """See `eval.results.cost.off_budget`."""
        audits = [line["metadata"]["audit"] for line in lines]
        return cost.off_budget(audits, getattr(self.reducer, "rounding", ROUNDING))


def read_questions(config: RunConfig, model: bool = True, reducer: bool = True) -> tuple[Dataset, str]:
    """The benchmark's questions and the split; checks all that can be wrong before weights are read, cheapest first.

    Args:
        model, reducer: whether the configuration's are used, and checked.
    """
    benchmark = benchmarks.get(config.benchmark)
    split = benchmarks.check_split(benchmark, config.split, Path(config.data))
    if reducer:
        build_reducer(config, visual_tokens=None)
    if model:
        check_device(config.device)
    profile = benchmarks.check_profile(benchmark, config.profile)
    data = benchmark.load(Path(config.data), split, profile, config.source)
    check_judge(data, config.judge)
    data.check_images(data.questions[: config.limit])
    return data, split


def prepare(config: RunConfig, model: Any, reducer: "Reducer | None") -> Job:
    """Read and check everything, the weights last."""
    data, split = read_questions(config, model is None, reducer is None)
    if model is None:
        model = load_model(config)
    if data.pictures.noun == "videos" and not getattr(model, "takes_videos", True):
        raise UserError(
            f"{data.title} asks about videos, and {model.name} takes images only; choose a Video-LLaVA with --model, "
            "or leave --model out for the bundled toy model."
        )
    if reducer is None:
        reducer = build_reducer(config, model.visual_tokens)
        require(reducer, model.spec)
        plain = dataclasses.replace(config, options={}, seed=0, budget=reducer.budget)
        standard = build_reducer(plain, model.visual_tokens)
    else:
        standard = reducer
    seed_everything(config.seed)
    return Job(
        config=config,
        data=data,
        planned=data.questions[: config.limit],
        model=model,
        reducer=reducer,
        settings=store_settings(config, split, data, model, reducer),
        output=Path(config.output or default_output(config, split, model, reducer, standard)),
        started=datetime.now(UTC).isoformat(),
    )


def check_device(name: str) -> None:
    """Refuse a device that is not there before any file is read."""
    from llava.model.builder import device_of

    device_of(name)


def load_model(config: RunConfig) -> "CachingLlava":
    """The model of this run; its libraries are imported here so that every check before it is fast."""
    from llava.model.builder import load

    model = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        text_tower=config.text_tower,
        quantization=config.quantization,
        tensor_parallel=config.tensor_parallel,
        zero=config.zero,
        **config.picture,
    )
    return equip(model, config)


def equip(model: "Llava", config: RunConfig) -> "CachingLlava":
    """A loaded model with what is faster about this run; it remembers what its tower gave for an image."""
    from eval.feature_cache import RUN_BYTES, CachingLlava

    model.shares_prefix = config.share_prefix
    if config.compile:
        from llava.pipeline.faster.compiled_model import compile_model

        model.compiled = compile_model(model)
    return CachingLlava(model, RUN_BYTES)


def seed_everything(seed: int) -> None:
    """Methods draw from their sample's id; this covers whatever else might draw."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def measured_under(job: Job) -> dict[str, Any]:
    """The conditions that belong to every timing."""
    import torch

    device = device_name(job.model)
    return {
        "device": device,
        "hardware": provenance.hardware(device),
        "threads": torch.get_num_threads(),
        "batch_size": job.config.batch_size,
        "dtype": job.config.dtype,
        **({"shared_prefix": True} if getattr(job.model, "shares_prefix", False) else {}),
    }
