"""Time to first token of a table's methods: in turns in one process, on the first question of the first benchmark."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.answers.source_hash import answer_sources, combined
from eval.config import plain
from eval.efficiency.measure import Measurements, measure
from eval.feature_cache import without_memory
from eval.papers.plan import Line, Where, split_of
from eval.papers.spec import Column
from eval.results.report import hardware
from eval.sweep import dataset, reducer_of
from llava.model.llava_arch import Llava


@dataclass(frozen=True)
class Time:
    """Seconds to the first token of one question: vision, selection and prefill, without preprocessing.

    Attributes:
        about: what was measured, in a sentence.
    """

    ttft: float
    about: str


def times_of(
    lines: Sequence[Line], column: Column, where: Where, model: Llava, repeats: int, path: Path
) -> dict[int, Time]:
    """Index of a line -> its time; nothing without repeats.

    Args:
        path: measurements are kept here, so that an interrupted table goes on.
    """
    if not repeats:
        return {}
    data = dataset(column.benchmark, where.data, split_of(column, where))
    sample = data.sample(data.questions[0])
    reducers = {
        str(index): reducer_of(line.setting, model.visual_tokens)
        for index, line in enumerate(lines)
        if line.setting is not None
    }
    device = str(model.device)
    settings = {
        "model": model.name,
        "model_files": model.fingerprint,
        "picture": model.conventions,
        "question": sample.message,
        "images": list(sample.image_ids),
        "benchmark": column.benchmark,
        "device": device,
        "hardware": hardware(device),
        "dtype": where.place.dtype,
        "threads": torch.get_num_threads(),
        "code": combined(answer_sources(model, *reducers.values())),
        "methods": {name: plain(reducer) for name, reducer in reducers.items()},
    }
    if path.is_file() and json.loads(path.read_text().partition("\n")[0]) != settings:
        path.unlink()  # of another model, machine or code
    found = measure(without_memory(model), reducers, lambda turn: [sample], repeats, Measurements(path, settings))
    about = (
        f"TTFT: median of {repeats} prefills of one question after a warm-up, methods in turns in one process, "
        f"on {device} ({hardware(device)}), {where.place.dtype}."
    )
    return {int(name): Time(one.ttft, about) for name, one in found.items() if one is not None}
