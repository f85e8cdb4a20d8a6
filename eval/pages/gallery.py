"""The gallery: one question about one image, and what every method keeps of the image at every budget.

The question is asked without reduction and with every method at every budget, and the page shows what happened to each
patch. Score maps show the scores that several methods rank tokens by; the method's own functions compute them, on the
states that the pipeline gives methods. The page holds everything as compact JSON: arrays as base64, and every
photograph once.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from attnmix.method import AttnMix, text_scores
from consensusdrop.method import ConsensusDrop, fuse, pool_attention
from eval.config import FULL, TOY_BANNER, is_toy
from eval.figures.overlay import (
    DIM,
    FADED,
    GREY,
    NONE,
    PALETTE,
    TINT,
    Ints,
    Panel,
    PatchAssignment,
    colour_groups,
    grids_of,
    panels_of,
    patches_of,
)
from eval.pages import asset, environment, inline_json
from eval.yaml_files import read_yaml
from llava.budget import tokens_of
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Batch
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.processing.prompt import Sample
from llava.reduction import PromptState, Reducer, Step, TowerScore, registry
from llava.reduction.token_layout import TokenLayout, on_padding

Floats = NDArray[np.float32]


SCORES: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("scores.yaml"))


def score_maps(model: Llava, sample: Sample) -> dict[str, Floats]:
    """The scores of a sample's image, by their key in SCORES.

    Returns:
        key -> [N] scores of the visual tokens; NaN for tokens without a score (newline and class tokens).
    """
    maps = {}
    for together in (False, True):
        probe = Probe(budget=1, retention_ratio=0.9, tile_budget="global" if together else "each")
        _, record = prefill(model, [sample], probe)
        for key, views in probe.found.items():
            if SCORES[key]["together"] == together:
                # The scores of all views in one array, at the indices of each view's tokens.
                maps[key] = np.full(record.images[0][0].layout.tokens, np.nan, dtype=np.float32)
                for indices, view in views:
                    maps[key][indices] = view
    return {key: maps[key] for key in SCORES if key in maps}


@dataclass(frozen=True, kw_only=True)
class Probe(Reducer):
    """Not a method: it notes the scores of every view that it is given, and reduces nothing.

    Attributes:
        found: key of SCORES -> for every view the indices of its tokens and their scores.
    """

    name: ClassVar[str] = "probe"
    found: dict[str, list[tuple[Ints, Floats]]] = field(default_factory=dict, compare=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention", ConsensusDrop(budget=1).block),)

    def keeps_all(self, tokens: int) -> bool:
        return False

    def prompt(self, state: PromptState) -> None:
        consensus, attnmix = ConsensusDrop(budget=1), AttnMix(budget=1)
        question = pool_attention(
            *state.text_attention(consensus.probe_layer, consensus.query, consensus.rope, contextual=False),
            consensus.heads,
            consensus.pooling,
        )
        self._note("question", state, question)
        self._note("text", state, text_scores(*state.text(attnmix.text), state.tokens, attnmix.temperature))
        saliency = state.scores[self.scores()[0]]
        choices = {"alpha": consensus.alpha, "cross_top": consensus.cross_top}
        best = fuse(saliency, saliency, consensus.fusion, 1, **choices).amax(1, keepdim=True)
        self._note("cls", state, saliency)
        self._note("fused", state, fuse(saliency, question, consensus.fusion, 1, **choices) / best.clamp(min=1))

    def _note(self, key: str, state: PromptState, values: Tensor) -> None:
        for row, view in enumerate(values.float().cpu().numpy()):
            indices = np.arange(len(view)) if state.members is None else state.members[row].cpu().numpy()
            self.found.setdefault(key, []).append((indices, view))


SHARES = (1 / 3, 2 / 9, 1 / 9, 1 / 18)  # of 576 visual tokens: 192, 128, 64 and 32
BEFORE_DECODER = ("input", "tower", "encoder")


@dataclass(frozen=True, eq=False)
class State:
    """Where every patch is at one point of the way through the model.

    Attributes:
        patches: of the cells of all panels, one panel after another in raster order. Tokens that stand at no cell
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
        states: the untouched image, then one state for each stage that changed something.
        at: the index of the state at each position: after the vision encoder, then on entering each decoder layer.
    """

    method: str
    budget: int
    text: str
    tokens_per_layer: tuple[int, ...]
    states: tuple[State, ...]
    at: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Everything that the page shows.

    Attributes:
        padding: ascending numbers of the cells on padding; empty if there are none or they are not known.
        budgets: ascending.
        methods: in the order of the page.
        options: the options that were given, by method; methods with defaults only are not in it.
        unavailable: (method, budget) -> why it did not run.
        maps: key of SCORES -> values by cell, as in `State`.
        notes: sentences about what is not shown.
    """

    question: str
    instruction: str
    model: str
    device: str
    panels: tuple[Panel, ...]
    padding: Ints
    full: Result
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    options: dict[str, dict[str, str]]
    results: tuple[Result, ...]
    unavailable: dict[tuple[str, int], str]
    maps: dict[str, Floats]
    notes: tuple[str, ...]


def collect(
    model: Llava,
    sample: Sample,
    methods: Sequence[str],
    budgets: Sequence[int | float] = (),
    max_new_tokens: int = 16,
    options: Mapping[str, Mapping[str, str]] | None = None,
) -> Gallery:
    """Run every method at every budget on a sample with one image or video.

    Args:
        methods: names, each once, `full` not among them.
        budgets: visual tokens, or ratios of the image's tokens; () for SHARES.
        options: method -> option -> text; a missing method has its defaults.

    Raises:
        UserError: the sample cannot be asked at all. A method that cannot run at a budget is not an error; it is listed
            with its reason.
    """
    if len(sample.images) != 1 or not sample.question.strip():
        raise UserError("The gallery shows one image or video and a question about it.")
    settings = {name: dict((options or {}).get(name, {})) for name in methods}
    batch = generate(model, [sample], registry.build(FULL, model.visual_tokens), max_new_tokens)
    (layout,), (canvas,) = batch.answers[0].runs, batch.answers[0].canvases
    panels = tuple(panels_of(sample.images[0], layout, canvas))
    full = result_of(FULL, layout.tokens, batch)
    results, unavailable = [], {}
    counts = {tokens_of(one, layout.tokens) if isinstance(one, float) else one for one in budgets or SHARES}
    ascending = tuple(sorted(counts))
    for name in tqdm(methods, desc="methods", disable=None):
        for budget in ascending:
            try:
                batch = generate(model, [sample], registry.build(name, budget, settings[name]), max_new_tokens)
            except UserError as error:
                unavailable[name, budget] = str(error)
            else:
                results.append(result_of(name, budget, batch))
    maps, cells = score_maps(model, sample), cells_of([panel.grid for panel in panels])
    empty = np.zeros(layout.tokens, bool) if canvas is None else on_padding(layout, canvas).numpy()
    without_cls = ConsensusDrop(budget=1).without_cls(model.spec)
    notes = [f"{without_cls[0].upper()}{without_cls[1:]}."] if without_cls else []
    if len(layout.newlines):
        notes.append("The tokens that end the rows of tiles are counted, but stand for no patch and are not drawn.")
    return Gallery(
        question=sample.question,
        instruction=sample.suffix,
        model=model.name,
        device=str(model.device),
        panels=panels,
        padding=np.flatnonzero((cells != NONE) & empty[cells]),
        full=full,
        budgets=ascending,
        methods=tuple(methods),
        options={name: changed for name, changed in settings.items() if changed},
        results=tuple(results),
        unavailable=unavailable,
        maps={key: np.where(cells == NONE, np.float32("nan"), values[cells]) for key, values in maps.items()},
        notes=tuple(notes),
    )


def result_of(method: str, budget: int, batch: Batch) -> Result:
    """The one answer of a batch as the page shows it."""
    (answer,) = batch.answers
    per_layer = answer.accounting.tokens_per_layer
    effective = [position_of(step) for step in answer.trace]
    counts = [sum(one <= position for one in effective) for position in range(len(per_layer) + 1)]  # of steps by then
    lengths = sorted({0, *counts})
    states = tuple(state_of(answer.trace[:length], answer.runs[0]) for length in lengths)
    at = tuple(lengths.index(count) for count in counts)
    return Result(method, budget, answer.text, per_layer, states, at)


def position_of(step: Step) -> int:
    """The first position at which a step has taken effect: 0 after the vision encoder, 1 + L on entering layer L."""
    return 0 if step.place in BEFORE_DECODER else 1 + step.layer


def state_of(steps: Sequence[Step], layout: TokenLayout) -> State:
    """Where the cells of all panels are after `steps`, the first steps of an answer."""
    patches, numbered = patches_of(steps, layout)
    grids = grids_of(numbered)
    cells = cells_of(grids)
    place = np.full(len(patches.assignment), -1)  # cell of each visual token
    shown = cells != NONE
    place[cells[shown]] = np.flatnonzero(shown)
    kept = np.where(patches.kept < 0, -1, place[patches.kept])
    by_cell = PatchAssignment(np.where(shown, patches.assignment[cells], -1), kept)
    return State(by_cell, colour_groups(patches, grids))


def cells_of(grids: Sequence[Ints]) -> Ints:
    """The visual token of every cell of all panels, one panel after another; NONE if there is none."""
    return np.concatenate([grid.flatten() for grid in grids])


LONGEST_SIDE = 768  # pixels of a photograph in the page, since a panel is never drawn much larger
STEPS = 255  # number of colours of a score
UNDEFINED = 255  # stands for a score that is not defined


def page_data(gallery: Gallery) -> str:
    """The JSON that gallery.js reads."""
    photographs = {id(panel.image): panel.image for panel in gallery.panels}
    content: dict[str, Any] = {
        "style": {"grey": GREY, "dim": DIM, "faded": FADED, "tint": TINT, "palette": PALETTE},
        "images": [data_uri(image) for image in photographs.values()],
        "panels": [
            {
                "name": panel.name,
                "image": list(photographs).index(id(panel.image)),
                "rows": panel.grid.shape[0],
                "columns": panel.grid.shape[1],
            }
            for panel in gallery.panels
        ],
        "padding": gallery.padding,
        "maps": [map_data(key, values) for key, values in gallery.maps.items()],
        "budgets": gallery.budgets,
        "tokens": gallery.full.tokens_per_layer[0],
        "methods": [
            {"name": name, "summary": registry.method(name).summary, "options": gallery.options.get(name, {})}
            for name in gallery.methods
        ],
        "full": gallery.full,
        "results": gallery.results,
        "unavailable": [
            {"method": method, "budget": budget, "reason": reason}
            for (method, budget), reason in gallery.unavailable.items()
        ],
    }
    return json.dumps(content, separators=(",", ":"), default=encoded)


def encoded(value: Any) -> Any:
    """Encode what JSON does not know: arrays as base64 of 32-bit little-endian integers, dataclasses as objects."""
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.astype("<i4").tobytes()).decode()
    return vars(value)


def map_data(key: str, values: Floats) -> dict[str, Any]:
    """Values as steps of the colour scale. It ends at the 99th percentile, since few patches have most of a score."""
    defined = values[np.isfinite(values)]
    low, high, most = float(defined.min()), float(np.quantile(defined, 0.99)), float(defined.max())
    if high <= low:
        high = most
    share = (values - low) / (high - low or 1)
    steps = np.where(np.isfinite(share), np.clip(share, 0, 1) * (STEPS - 1), UNDEFINED)
    return {
        "key": key,
        "title": SCORES[key]["title"],
        "meaning": SCORES[key]["meaning"],
        "low": low,
        "high": high,
        "most": most,
        "values": base64.b64encode(steps.round().astype(np.uint8).tobytes()).decode(),
    }


def data_uri(image: Image.Image) -> str:
    """The photograph as the data URI of a JPEG, its longer side at most LONGEST_SIDE."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


MANY = 7  # with more methods than this, only those of SHOWN are shown at first
SHOWN = ("consensusdrop", "visiondrop", "attnmix")


def render(gallery: Gallery, command: str) -> str:
    """The whole page as HTML.

    Args:
        command: the command that made the page, which the page names.
    """
    few = len(gallery.methods) <= MANY
    shown = [name for name in gallery.methods if few or name in SHOWN] or list(gallery.methods[:MANY])
    template = environment().get_template("gallery.html.j2")
    return template.render(
        style=asset("style.css") + asset("gallery.css"),
        script=asset("gallery.js"),
        gallery=gallery,
        scores=SCORES,
        banner=TOY_BANNER if is_toy(gallery.model) else "",
        shown=shown,
        data=inline_json(page_data(gallery)),
        command=command,
    )
