"""Run the cells of a table that have no result yet, in one process or spread over the ranks of a node."""

import contextlib
from collections.abc import Sequence

from tqdm import tqdm

from eval.feature_cache import CachingLlava
from eval.papers.plan import SWEEPS, Line, Where, config_of
from eval.papers.spec import Column
from eval.parallel.placement import Placement
from eval.sweep import UnansweredQuestions, fill, fill_on_ranks, is_finished, reducer_of
from llava.model.builder import device_of, load, parse


def open_model(where: Where, place: Placement | None) -> CachingLlava:
    """The model; on the CPU where the ranks have their own, so that it takes no GPU's memory from them."""
    device = "cpu" if place is not None else where.device
    picture = {key: parse(key, value) for key, value in where.place.picture.items()}
    return CachingLlava(load(where.place.model, where.place.dtype, device, **picture))


def fill_cells(
    lines: Sequence[Line],
    columns: Sequence[Column],
    where: Where,
    model: CachingLlava,
    place: Placement | None,
    what: str,
) -> None:
    """Run what is missing, one benchmark after the other, so that remembered features are of few images.

    A cell with questions that failed has no score; the others go on, and the next call asks these questions again.

    Raises:
        SystemExit: a rank did not finish.
    """
    runnable = [line for line in lines if line.setting is not None]
    configs = [config_of(line, column, where, model) for column in columns for line in runnable]
    kind = device_of(where.device).type
    missing = [config for config in tqdm(configs, desc="look", leave=False) if not is_finished(config, model, kind)]
    if place is not None and missing:  # one cell too: this process holds its model on the CPU
        fill_on_ranks(missing, {**model.loaded_with, "device": where.device}, SWEEPS, place, go_on=True)
        return
    model.expect([reducer_of(line.setting, model.visual_tokens) for line in runnable if line.setting is not None])
    for config in tqdm(missing, desc=what, unit="cell", disable=not missing):
        with contextlib.suppress(UnansweredQuestions):  # the cell is n/a, with the reason
            fill(config, model)
