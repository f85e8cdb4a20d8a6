"""What a method is handed of a batch: parts of pictures with budgets, and what all states have in common."""

from collections.abc import Sequence as Samples
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.pipeline.encoded_images import Part, Picture
from llava.pipeline.sequence import Row
from llava.processing.sample import Sample
from llava.reduction.crop_budget import divided, over_crops, shares
from llava.reduction.joining import Piece
from llava.reduction.patch_grid import Layout
from llava.reduction.reducer import ModelFacts, Reducer
from llava.reduction.reduction import Reduction
from llava.reduction.scores import Signal
from llava.reduction.token_layout import Arrangement


class _Alike:
    """Equal for arrangements that are alike, for the cache."""

    def __init__(self, arrangement: Arrangement):
        self.arrangement = arrangement

    def __hash__(self) -> int:
        return hash(self.arrangement.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self.arrangement.key == other.arrangement.key


def facts_of(facts: ModelFacts, arrangement: Arrangement) -> ModelFacts:
    """The model's facts with one picture's own tokens and crops."""
    return _facts_of(facts, _Alike(arrangement))


@lru_cache(maxsize=1024)
def _facts_of(facts: ModelFacts, alike: _Alike) -> ModelFacts:
    arrangement = alike.arrangement
    several = len(arrangement.crops) > 1
    return replace(
        facts,
        visual_tokens=arrangement.tokens,
        layout=replace(arrangement.layout, has_cls=False),
        crops=tuple(Layout(crop.rows, crop.columns) for crop in arrangement.crops) if several else (),
        newlines=len(arrangement.newlines),
    )


def parts_of(model, reducer: Reducer, image: Row, picture: Picture) -> list[Part]:
    """What a method sees of one image; crops that may keep nothing are left out."""
    facts, count = facts_of(model.facts(), picture.full), len(picture.arrangement.crops)
    reducer = reducer.for_picture(facts)
    if divided(reducer, count):
        given = shares(reducer, picture.full, picture.encoded.signals)
        return [
            Part(image, picture, (number,), reducer.sized(share), facts.crop(number))
            for number, share in enumerate(given)
            if share
        ]
    ((sized, facts),) = over_crops(reducer, facts)
    return [Part(image, picture, tuple(range(count)), sized, facts)]


def rest_of(reducer: Reducer, picture: Picture, device: torch.device) -> list[Piece]:
    """The newline tokens of a picture, where the method keeps them."""
    places = picture.arrangement.newlines.to(device)
    if reducer.newlines == "drop" or not len(places):
        return []
    last = len(picture.arrangement.crops) if picture.arrangement.temporal else 1
    return [Piece(places, Reduction(torch.arange(len(places), device=device)[None], len(places)), last)]


def names_of(samples: Samples[Sample], parts: Samples[Part]) -> tuple[str, ...]:
    """One name per part: the sample's own, numbered from the second image on, and by crop."""
    names = []
    for part in parts:
        sample, number = part.image
        name = samples[sample].id if number == 0 else f"{samples[sample].id}#{number + 1}"
        crops = len(part.picture.arrangement.crops)
        names.append(f"{name}/{part.numbers[0]}" if len(part.numbers) < crops else name)
    return tuple(names)


def shared_fields(model, samples: Samples[Sample], parts: list[Part]) -> dict:
    """What the states of stages 1 and 2 have in common; all parts are of one group."""
    first = parts[0]
    signals = [part.signals() for part in parts]
    merged = [part.picture.encoded.merged for part in parts]
    return {
        "ids": names_of(samples, parts),
        "facts": first.facts,
        "layout": first.layout,
        "signals": {signal: torch.stack([row[signal] for row in signals]) for signal in signals[0]},
        "merged": None if merged[0] is None else _stacked(merged, [part.numbers[0] for part in parts]),
        "questions": tuple(samples[part.image[0]].question for part in parts),
        "messages": tuple(samples[part.image[0]].message for part in parts),
        "clip": model.clip if first.reducer.needs_text_tower else None,
        "thumbnail": lambda signal: torch.stack([_overviews(part, signal) for part in parts]),
    }


def _overviews(part: Part, signal: Signal) -> Tensor:
    return torch.cat([overview(part.picture, number, signal) for number in part.numbers])


def overview(picture: Picture, number: int, signal: Signal) -> Tensor:
    """[n] values that the first crop's signal [P] has at the patches of crop `number`, between its patches bilinear.

    The first crop is the whole picture, stretched over its grid; the stitched tiles without their padding are the same.
    Without tiles, and for the first crop itself, the crop's own values.
    """
    arrangement = picture.arrangement
    if number == 0 or arrangement.tiles is None:
        return picture.crop_signal(signal, number)
    tiles, (heights, widths) = arrangement.crops[1:], arrangement.tile_sides()
    table = picture.encoded.signals[signal][0].unflatten(0, arrangement.grid)
    size = (sum(heights), sum(widths))
    whole = F.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    row, column = divmod(number - 1, len(widths))
    top, left = sum(heights[:row]), sum(widths[:column])
    return whole[top : top + tiles[number - 1].rows, left : left + tiles[number - 1].columns].flatten()


def _stacked(merged: list[Reduction], rows: list[int]) -> Reduction:
    """Row `rows[i]` of `merged[i]`, together; all merge by owner."""
    ones = [reduction.only(row) for reduction, row in zip(merged, rows, strict=True)]
    cat = lambda name: torch.cat([getattr(one, name) for one in ones])  # noqa: E731
    return Reduction(cat("anchor"), ones[0].inputs, cat("owner"), cat("weight"))
