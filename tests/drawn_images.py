"""What a method is handed of images with chosen signals, without a model; and what it keeps of images in crops."""

from types import SimpleNamespace

import torch

from llava.model.llava_arch import EncodedImage, encoded_image_of
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.pipeline.views import parts_of, shared_fields
from llava.processing.image import AnyresProcessor
from llava.processing.prompt import Sample
from llava.reduction.reducer import EncoderState, Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.states import PromptState
from llava.reduction.token_layout import NEWLINE, ModelSpec, PatchGrid, TokenLayout

Signals = dict[TowerScore, torch.Tensor]


def state_with(features: torch.Tensor, scores: Signals | None = None, **fields) -> EncoderState:
    """Images of a row of patches unless `layout` says otherwise; before the decoder where there are `tokens`."""
    known = {"ids": tuple(map(str, range(len(features)))), "layout": PatchGrid(1, features.shape[1])}
    cls = PromptState if "tokens" in fields else EncoderState
    return cls(features=features, scores=scores or {}, **{**known, **fields})


def arranged(size: tuple[int, int], merge: str = "spatial_unpad") -> TokenLayout:
    """How LLaVA-NeXT's 24 x 24 patches per crop make up the run of an image of this (width, height)."""
    pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    return AnyresProcessor(SimpleNamespace(crop=336), (24, 24), pinpoints, merge=merge).arrange(size)


def image_with(layout: TokenLayout, signals: Signals) -> EncodedImage:
    """Signals [crops, P] over whole crops; features are all zero."""
    crops, patches = next(iter(signals.values())).shape
    return encoded_image_of(Encoded(torch.zeros(crops, patches, 1), signals, layout.grid), layout, keep_cls=False)


def state_of(part) -> EncoderState:
    """What the method is handed of one part of an image."""
    return EncoderState(**shared_fields(None, [Sample("a", "?")], [part]))


def parts_with(reducer: Reducer, layout: TokenLayout, signals: Signals) -> list:
    patches = PatchGrid(*layout.grid)
    spec = ModelSpec(patches.tokens, 4, patches, 24)
    return parts_of(spec, reducer, (0, 0), image_with(layout, signals))


def kept_of(reducer: Reducer, layout: TokenLayout, signals: Signals) -> list[int]:
    """crop * P + patch of what is kept, in the order of the run; -1 for a newline token."""
    places = [layout.newlines] if reducer.newlines == "keep" else []
    for part in parts_with(reducer, layout, signals):
        reduction = None if part.reducer.keeps_all(len(part.indices)) else part.reducer.encoder(state_of(part))
        places.append(part.indices if reduction is None else part.indices[reduction.kept[0]])
    crop, row, column = layout.origins()[torch.cat(places).sort().values].unbind(1)
    rows, columns = layout.grid
    return torch.where(crop == NEWLINE, -1, (crop * rows + row) * columns + column).tolist()


def counts_of(codes: list[int], layout: TokenLayout) -> list[int]:
    """Kept patches of each crop."""
    patches = layout.grid[0] * layout.grid[1]
    crops = torch.tensor([code // patches for code in codes if code >= 0])
    return torch.bincount(crops, minlength=len(layout.crops)).tolist()
