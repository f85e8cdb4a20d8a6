"""One image or video after the vision tower: features of its tiles, and the layout of its visual tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.reduction.reduction import Reduction, ViewReduction, join
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import PatchGrid, TokenLayout, single


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image or video after the tower.

    Attributes:
        encoded: of its crops: features [C, n, D], scores [C, P, ...].
        arrangement: of what the tower gave, class tokens among it where the method keeps them.
        full: of what the model takes without any reduction.
        inputs: tokens that the method starts from, those that it reduces inside the tower among them.
        step: where and how tokens were reduced up to here, if they were.
    """

    encoded: Encoded
    arrangement: TokenLayout
    full: TokenLayout
    inputs: int
    step: tuple[str, Reduction] | None = None

    @cached_property
    def whole(self) -> bool:
        """One crop whose tokens are the run as they are."""
        return len(self.arrangement.crops) == 1 and not len(self.arrangement.newlines)

    @property
    def extra_cls(self) -> bool:
        """The class tokens are there for the method alone; the model itself drops them."""
        return self.arrangement.crops[0].cls is not None and self.full.crops[0].cls is None

    def crop_features(self, number: int, with_cls: bool) -> Tensor:
        """[n, D] features of a crop's patches, after its class token if that is wanted."""
        crop, features = self.arrangement.crops[number], self.encoded.features[number]
        cls = int(crop.cls is not None)
        patches = features[cls:]
        if len(patches) != len(crop.patches):
            patches = patches[crop.patches.to(features.device)]
        return torch.cat([features[:cls], patches]) if with_cls and cls else patches

    def tile_score(self, score: TowerScore, number: int) -> Tensor:
        """[n, ...] values of a score at a crop's patches."""
        values, patches = self.encoded.scores[score][number], self.arrangement.crops[number].patches
        return values if len(values) == len(patches) else values[patches.to(values.device)]


def encoded_image_of(
    encoded: Encoded, full: TokenLayout, keep_cls: bool, grid: tuple[int, int] | None = None
) -> EncodedImage:
    """What the tower gave for the crops of one image, as a run.

    Args:
        full: the run that the model takes without any reduction.
        keep_cls: the features have their class tokens in front.
        grid: the coarser patch grid that every crop was shrunk to.
    """
    start = full.with_cls() if keep_cls else full
    if grid is not None and grid != full.grid:
        pieces = [ViewReduction(crop.indices, coarse(crop.layout, grid)) for crop in full.crops]
        whole = len(pieces) == 1
        step = ("input", pieces[0].reduction if whole else join(pieces, full.tokens)[0])
        return EncodedImage(encoded, full.shrunk(grid), full, start.tokens, step)
    merged = encoded.merged
    if merged is None:
        return EncodedImage(encoded, start, full, start.tokens)
    if len(full.crops) == 1:
        left = single(1, merged.kept.shape[1])
        return EncodedImage(encoded, left, full, start.tokens, ("tower", merged))
    pieces = [
        ViewReduction(crop.indices.to(merged.kept.device), merged.only(number))
        for number, crop in enumerate(full.crops)
    ]
    reduction, order = join(pieces, full.tokens)
    return EncodedImage(encoded, full.left(merged.kept.shape[1], order.cpu()), full, start.tokens, ("tower", reduction))


def coarse(layout: PatchGrid, grid: tuple[int, int]) -> Reduction:
    """The record of a smaller image: every original patch is averaged into the coarse patch that covers it."""
    rows, columns = grid
    row = torch.arange(layout.rows) * rows // layout.rows
    column = torch.arange(layout.columns) * columns // layout.columns
    owner = (row[:, None] * columns + column).flatten()
    centre_row = ((torch.arange(rows) * 2 + 1) * layout.rows) // (2 * rows)
    centre_column = ((torch.arange(columns) * 2 + 1) * layout.columns) // (2 * columns)
    anchor = (centre_row[:, None] * layout.columns + centre_column).flatten()
    share = 1.0 / torch.bincount(owner, minlength=rows * columns).float()
    return Reduction(anchor[None], layout.tokens, owner[None], share[owner][None])
