"""What a method knows about the model before any image is processed."""

from dataclasses import dataclass, replace
from functools import lru_cache

from llava.reduction.token_layout import PatchGrid, TokenLayout


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the model, for its reference image size or, by `spec_of`, for one image.

    Attributes:
        visual_tokens: visual tokens of one image before any reduction.
        layers: decoder layers.
        layout: patch grid of the visual tokens.
        tower_blocks: blocks of the vision tower.
        has_cls: the scores of the tower's class token can be read; False where it has none, or its family does not.
        has_text_tower: the CLIP text tower that belongs to the vision tower is available.
        crops: patch grid of each tile of an image with several tiles, without class tokens.
        newlines: newline tokens among the visual tokens.
        most_newlines: the most newline tokens that an image can have in this model.
    """

    visual_tokens: int
    layers: int
    layout: PatchGrid
    tower_blocks: int
    has_cls: bool = True
    has_text_tower: bool = False
    crops: tuple[PatchGrid, ...] = ()
    newlines: int = 0
    most_newlines: int = 0

    @property
    def patches(self) -> int:
        """The visual tokens that a method before the decoder chooses among: no class tokens, no newline tokens."""
        return sum(crop.tokens for crop in self.crops) if self.crops else self.visual_tokens - self.newlines

    def crop(self, number: int) -> "ModelSpec":
        """The model as if one tile were the whole image."""
        layout = self.crops[number]
        return replace(self, visual_tokens=layout.tokens, layout=layout, crops=(), newlines=0)


@lru_cache(maxsize=1024)
def spec_of(spec: ModelSpec, arrangement: TokenLayout) -> ModelSpec:
    """The model spec with the tokens and tiles of one image."""
    several = len(arrangement.crops) > 1
    return replace(
        spec,
        visual_tokens=arrangement.tokens,
        layout=replace(arrangement.layout, has_cls=False),
        crops=tuple(PatchGrid(crop.rows, crop.columns) for crop in arrangement.crops) if several else (),
        newlines=len(arrangement.newlines),
    )
