"""The data of the gallery's page as compact JSON: arrays as base64, every photograph once."""

import base64
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.figures.overlay import DIM, FADED, GREY, TINT
from eval.figures.panels import Panel
from eval.figures.patches import PALETTE, Ints, PatchAssignment
from eval.pages.gallery.collect import Gallery, Result, State
from eval.pages.gallery.score_maps import ScoreMap
from llava.reduction import registry

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
    found: dict[str, Any] = {
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
    return json.dumps(found, separators=(",", ":"))


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
