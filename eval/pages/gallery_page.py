"""The gallery: one question about one image, and what every method keeps of the image at every budget.

The question is asked without reduction and with every method at every budget, and what became of every patch is noted.
Score maps show what several methods rank by; each is computed by the function of the method it belongs to, on the
states that the pipeline gives methods. The page holds all of it as compact JSON: arrays as base64, every photograph
once.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
    grids,
    panels_of,
    patches_of,
)
from eval.pages import asset, environment, inline_json
from llava.budget import tokens_of
from llava.errors import UserError
from llava.pipeline.accounting import Batch
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import PromptState, Reducer, Step, TowerScore, option, registry
from llava.reduction.token_layout import TokenLayout

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """A score of every visual token.

    Attributes:
        key: short name.
        title: for readers.
        meaning: what a value is, and for which methods it decides.
        values: [N], NaN where the score is not defined (newline and class tokens).
    """

    key: str
    title: str
    meaning: str
    values: Floats


@dataclass(frozen=True, eq=False)
class Kind:
    """What is known of a score before it is computed.

    Attributes:
        together: of a tiled image or a video: computed over all tiles or frames at once, else within each.
    """

    title: str
    meaning: str
    together: bool = False


KINDS = {
    "cls": Kind(
        "CLS attention",
        "attention of the vision tower's class token to the patch, mean over heads; ranks in FasterVLM, and in part in "
        "ConsensusDrop and AttnMix",
    ),
    "question": Kind(
        "question attention",
        "attention of the question's words to the patch, with the projections of decoder layer 0; the cross-modal "
        "score of ConsensusDrop",
    ),
    "fused": Kind(
        "fused ranking",
        "ConsensusDrop's fusion of the ranks by CLS attention and by question attention; 1 is first in both",
    ),
    "text": Kind(
        "text similarity",
        "largest share of the patch in a question word's similarity to all patches; the text score of AttnMix",
        together=True,
    ),
}


def score_maps(model: "Llava", sample: Sample) -> tuple[list[ScoreMap], list[str]]:
    """The scores of a sample's image, and a sentence for each that this model does not have."""
    values_of: dict[str, Floats] = {}
    for together in (False, True):
        probe = Probe(budget=1, retention_ratio=0.9, crops="global" if together else "each", cls=model.spec.has_cls)
        _, record = prefill(model, [sample], probe)
        for key in (key for key in probe.found if KINDS[key].together == together):
            # All in one array: a score of each view, at the indices of the view's tokens.
            values = np.full(record.images[0][0].layout.tokens, np.nan, dtype=np.float32)
            for indices, view in probe.found[key]:
                values[indices] = view
            values_of[key] = values
    maps = [ScoreMap(key, kind.title, kind.meaning, values_of[key]) for key, kind in KINDS.items() if key in values_of]
    missing = [
        f"No {kind.title}: the vision tower of {model.name} has no class token."
        for key, kind in KINDS.items()
        if key not in values_of
    ]
    return maps, missing


@dataclass(frozen=True, kw_only=True)
class Probe(Reducer):
    """Not a method: notes the scores of every view that it is given, and reduces nothing."""

    name: ClassVar[str] = "probe"
    cls: bool = option(True, "the tower has a class token")
    found: dict[str, list[tuple[Ints, Floats]]] = field(default_factory=dict, compare=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention", ConsensusDrop(budget=1).block),) if self.cls else ()

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
        if self.cls:
            saliency = state.scores[self.scores()[0]]
            choices = {"alpha": consensus.alpha, "cross_top": consensus.cross_top}
            best = fuse(saliency, saliency, consensus.fusion, 1, **choices).amax(1, keepdim=True)
            self._note("cls", state, saliency)
            self._note("fused", state, fuse(saliency, question, consensus.fusion, 1, **choices) / best.clamp(min=1))

    def _note(self, key: str, state: PromptState, values: Tensor) -> None:
        for row, view in enumerate(values.float().cpu().numpy()):
            indices = np.arange(len(view)) if state.members is None else state.members[row].cpu().numpy()
            self.found.setdefault(key, []).append((indices, view))


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


LONGEST_SIDE = 768  # pixels of a photograph in the page; a panel is never drawn much larger
STEPS = 255  # of a score's colour
UNDEFINED = 255  # where a score is not defined


def page_data(gallery: Gallery) -> str:
    """The JSON that gallery.js reads."""
    photos: dict[int, int] = {}
    images: list[str] = []
    for panel in gallery.panels:
        if id(panel.image) not in photos:
            photos[id(panel.image)] = len(images)
            images.append(data_uri(panel.image))
    content: dict[str, Any] = {
        "style": {"grey": GREY, "dim": DIM, "faded": FADED, "tint": TINT, "palette": PALETTE},
        "images": images,
        "panels": [panel_data(panel, photos[id(panel.image)]) for panel in gallery.panels],
        "maps": [map_data(one) for one in gallery.maps],
        "budgets": gallery.budgets,
        "tokens": gallery.full.tokens_per_layer[0],
        "methods": [
            {"name": name, "summary": registry.method(name).summary, "options": gallery.options.get(name, {})}
            for name in gallery.methods
        ],
        "full": result_data(gallery.full),
        "results": [result_data(result) for result in gallery.results],
        "unavailable": [
            {"method": method, "budget": budget, "reason": reason}
            for (method, budget), reason in gallery.unavailable.items()
        ],
    }
    return json.dumps(content, separators=(",", ":"))


def panel_data(panel: Panel, photo: int) -> dict[str, Any]:
    """Shape of the grid, and which of the photographs lies under it."""
    rows, columns = panel.grid.shape
    return {"name": panel.name, "image": photo, "rows": rows, "columns": columns, "square": panel.square}


def result_data(result: Result) -> dict[str, Any]:
    """One answer with its states."""
    return {
        "method": result.method,
        "budget": result.budget,
        "text": result.text,
        "perLayer": result.tokens_per_layer,
        "ms": round(1000 * result.seconds, 1),
        "at": result.at,
        "states": [state_data(state) for state in result.states],
    }


def state_data(state: State) -> dict[str, Any]:
    """`kept` (cell of each token); `assignment` (token of each cell) and `colours` only where patches are merged."""
    data: dict[str, Any] = {"kept": packed(state.patches.kept)}
    if not np.array_equal(state.patches.assignment, pruned(state.patches)):
        data["assignment"] = packed(state.patches.assignment)
        data["colours"] = "".join("-" if colour < 0 else str(colour) for colour in state.colours)
    return data


def pruned(patches: PatchAssignment) -> Ints:
    """The assignment of the same tokens if each were its kept patch alone."""
    assignment = np.full(len(patches.assignment), -1)
    shown = patches.kept >= 0
    assignment[patches.kept[shown]] = np.flatnonzero(shown)
    return assignment


def map_data(score: ScoreMap) -> dict[str, Any]:
    """Values in steps of the colour scale, which ends at the 99th percentile: a few patches take most of a score."""
    defined = score.values[np.isfinite(score.values)]
    low, high, most = float(defined.min()), float(np.quantile(defined, 0.99)), float(defined.max())
    if high <= low:
        high = most
    share = (score.values - low) / (high - low if high > low else 1)
    steps = np.where(np.isfinite(share), np.clip(share, 0, 1) * (STEPS - 1), UNDEFINED)
    return {
        "key": score.key,
        "title": score.title,
        "meaning": score.meaning,
        "low": low,
        "high": high,
        "most": most,
        "values": base64.b64encode(steps.round().astype(np.uint8).tobytes()).decode(),
    }


def packed(values: NDArray[np.int64]) -> str:
    """Whole numbers from -1 as base64 of 32-bit little-endian numbers, or of 16-bit ones after "s"."""
    short = values.size == 0 or values.max() < 2**15
    text = base64.b64encode(values.astype("<i2" if short else "<i4").tobytes()).decode()
    return "s" + text if short else "l" + text


def data_uri(image: Image.Image) -> str:
    """The photograph as PNG or, where that is smaller, as JPEG."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    files = {}
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        stream = io.BytesIO()
        image.save(stream, kind, **settings)
        files[kind] = stream.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


MANY = 7  # of more methods only those of SHOWN are shown at first
SHOWN = ("consensusdrop", "visiondrop", "attnmix")


def render(gallery: Gallery, command: str) -> str:
    """The page.

    Args:
        command: that made the page, for the reader.
    """
    few = len(gallery.methods) <= MANY
    shown = [name for name in gallery.methods if few or name in SHOWN] or list(gallery.methods[:MANY])
    return (
        environment()
        .get_template("gallery.html.j2")
        .render(
            style=asset("style.css") + asset("gallery.css"),
            script=asset("gallery.js"),
            gallery=gallery,
            banner=TOY_BANNER if is_toy(gallery.model) else "",
            shown=shown,
            data=inline_json(page_data(gallery)),
            command=command,
        )
    )
