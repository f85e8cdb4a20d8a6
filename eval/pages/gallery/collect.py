"""Ask one question without reduction and with every method at every budget, and note what became of every patch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from eval.config import FULL
from eval.figures.overlay_tiles import patches_of
from eval.figures.panels import Panel, grids, panels_of
from eval.figures.patches import NONE, Ints, PatchAssignment, colour_groups
from eval.pages.gallery.score_maps import Floats, ScoreMap, score_maps
from llava.budget import tokens_of
from llava.errors import UserError
from llava.pipeline.answer import Batch
from llava.pipeline.generate import generate
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction import Step, registry
from llava.reduction.token_layout import TokenLayout

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava

SHARES = (1 / 3, 2 / 9, 1 / 9, 1 / 18)  # of 576 visual tokens: 192, 128, 64 and 32
BEFORE_DECODER = {"input": 0, "tower": 0, "encoder": 0, "prompt": 1}


@dataclass(frozen=True, eq=False)
class State:
    """Where every patch is at one point of the way through the model.

    Attributes:
        patches: of the cells of all panels, one panel after another in raster order; tokens that stand at no cell
            (newline and class tokens) have the kept patch -1.
        colours: [K], index into PALETTE of every token, -1 for a token of one patch.
    """

    patches: PatchAssignment
    colours: Ints


@dataclass(frozen=True, eq=False)
class Result:
    """One answer.

    Attributes:
        tokens_per_layer: visual tokens that enter each decoder layer.
        seconds: TTFT of this one run.
        states: one for each stage that changed something; the first is the untouched image.
        at: for each position (after the vision encoder, then entering each decoder layer) the index of its state.
    """

    method: str
    budget: int
    text: str
    tokens_per_layer: tuple[int, ...]
    seconds: float
    states: tuple[State, ...]
    at: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean visual tokens per decoder layer."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)


@dataclass(frozen=True, eq=False)
class Gallery:
    """Everything that the page shows.

    Attributes:
        budgets: descending.
        methods: in the order of the page.
        options: of the methods that do not have their defaults.
        unavailable: (method, budget) -> why it did not run.
        maps: values by cell, as in `State`.
        notes: sentences about what is not shown.
    """

    question: str
    instruction: str
    model: str
    device: str
    panels: tuple[Panel, ...]
    full: Result
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    options: dict[str, dict[str, str]]
    results: tuple[Result, ...]
    unavailable: dict[tuple[str, int], str]
    maps: tuple[ScoreMap, ...]
    notes: tuple[str, ...]


def collect(
    model: "Llava",
    sample: Sample,
    methods: Sequence[str],
    budgets: Sequence[int | float] = (),
    max_new_tokens: int = 16,
    options: Mapping[str, Mapping[str, str]] | None = None,
) -> Gallery:
    """Run every method at every budget on a sample with one image or video.

    Args:
        budgets: visual tokens, or ratios of the image's own; () for SHARES.
        options: method -> option -> text; a missing method has its defaults.

    Raises:
        UserError: the sample cannot be asked at all, or a method is not known. A method that cannot run at a budget is
            no error but listed with its reason.
    """
    if len(sample.images) != 1 or not sample.question.strip():
        raise UserError("The gallery shows one image or video and a question about it.")
    if FULL in methods:
        raise UserError(f"{FULL} is on every page; leave it out of the methods.")
    chosen = tuple(dict.fromkeys(methods))
    settings = {name: dict((options or {}).get(name, {})) for name in chosen}
    for name in chosen:  # a wrong name or option is an error, not a method that cannot run
        registry.build(name, model.visual_tokens, settings[name])
    # The first run is slower than all later ones, whatever the method.
    full_reducer = registry.build(FULL, model.visual_tokens)
    generate(model, [sample], full_reducer, max_new_tokens)
    batch = generate(model, [sample], full_reducer, max_new_tokens)
    (layout,) = batch.answers[0].runs
    picture = sample.images[0]
    panels = tuple(panels_of(picture, layout))
    full = result_of(FULL, layout.tokens, batch, picture)
    results, unavailable = [], {}
    counts = {tokens_of(one, layout.tokens) if isinstance(one, float) else one for one in budgets or SHARES}
    descending = tuple(sorted(counts, reverse=True))
    for name in progress(chosen):
        for budget in descending:
            try:
                batch = generate(model, [sample], registry.build(name, budget, settings[name]), max_new_tokens)
            except UserError as error:
                unavailable[name, budget] = str(error)
            else:
                results.append(result_of(name, budget, batch, picture))
    maps, notes = score_maps(model, sample)
    if len(layout.newlines):
        notes.append("The tokens that end the rows of tiles are counted, but stand for no patch and are not drawn.")
    cells = cells_of(panels)
    maps = [ScoreMap(one.key, one.title, one.meaning, by_cell(one.values, cells)) for one in maps]
    return Gallery(
        question=sample.question,
        instruction=sample.suffix,
        model=model.name,
        device=str(model.device),
        panels=panels,
        full=full,
        budgets=descending,
        methods=chosen,
        options={name: found for name, found in settings.items() if found},
        results=tuple(results),
        unavailable=unavailable,
        maps=tuple(maps),
        notes=tuple(notes),
    )


def progress(names: Iterable[str]) -> Iterable[str]:
    """The names, with a bar in a terminal."""
    from tqdm import tqdm

    return tqdm(list(names), desc="methods", disable=None)


def result_of(method: str, budget: int, batch: Batch, picture: Image.Image | Video) -> Result:
    """What the page shows of a batch of one answer."""
    (answer,) = batch.answers
    per_layer = answer.accounting.tokens_per_layer
    counts = [len(cut(answer.trace, position)) for position in range(len(per_layer) + 1)]
    lengths = sorted({0, *counts})
    states = tuple(state_of(answer.trace[:length], answer.runs[0], picture) for length in lengths)
    at = tuple(lengths.index(count) for count in counts)
    return Result(method, budget, answer.text, per_layer, batch.timing.ttft, states, at)


def cut(trace: Sequence[Step], position: int) -> list[Step]:
    """The steps up to a position: 0 is after the vision encoder, 1 + L the way into decoder layer L."""
    return [step for step in trace if position_of(step.place) <= position]


def position_of(place: str) -> int:
    """The first position at which a step has taken effect."""
    return BEFORE_DECODER[place] if place in BEFORE_DECODER else 1 + int(place.removeprefix("layer "))


def state_of(steps: Sequence[Step], layout: TokenLayout, picture: Image.Image | Video) -> State:
    """Where the cells of all panels are after `steps`, the first steps of an answer."""
    patches, numbered = patches_of(steps, layout)
    panels = panels_of(picture, numbered)
    return State(by_cells(patches, cells_of(panels)), colour_groups(patches, grids(panels)))


def cells_of(panels: Sequence[Panel]) -> Ints:
    """The visual token of every cell of all panels, one panel after another; NONE where there is none."""
    return np.concatenate([panel.grid.flatten() for panel in panels])


def by_cells(patches: PatchAssignment, cells: Ints) -> PatchAssignment:
    """The same assignment, with cells in the place of visual tokens."""
    place = np.full(len(patches.assignment), -1)
    shown = cells != NONE
    place[cells[shown]] = np.flatnonzero(shown)
    kept = np.where(patches.kept < 0, -1, place[patches.kept])
    return PatchAssignment(np.where(shown, patches.assignment[cells], -1), kept)


def by_cell(values: Floats, cells: Ints) -> Floats:
    """The value of each cell's visual token, NaN where there is none."""
    return np.where(cells == NONE, np.float32("nan"), values[cells])
