"""The blocks of the vision tower as one compiled graph: a part of the option `--compile`.

Shapes are fixed by the size of the images and their number. Scores of the tower are computed from the inputs of their
blocks, which the graph gives beside its output.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from llava.model.multimodal_encoder import clip_encoder
from llava.pipeline.faster.graphs import Backend, Graphs, compiled_once

NUMBERS = 16  # of images in a batch that get a graph; each has its own


@compiled_once
def block_on_images(block: nn.Module, hidden: Tensor) -> Tensor:
    """One block, [B, n, D] -> [B, n, D]."""
    return block(hidden, None)


class CompiledTower:
    """Takes the place of `clip_encoder.run_blocks`, with torch.compile.

    Args:
        tower: tells the device; another tower on it may be run too.
        backend: of torch.compile.
    """

    def __init__(self, tower: nn.Module, backend: Backend = "inductor"):
        self.graphs = Graphs("vision tower", blocks_on_images, tower, backend, NUMBERS)

    def __call__(self, tower: nn.Module, hidden: Tensor, places: Sequence[int]) -> list[Tensor]:
        """`clip_encoder.run_blocks`: hidden states [B, n, D] behind the first k blocks, for each k in `places`."""
        if not self.graphs.take((id(tower), tuple(hidden.shape), tuple(places))):
            return clip_encoder.run_blocks(tower, hidden, places)
        blocks = [tower.encoder.layers[index] for index in range(places[-1])]
        inside = [place for place in places if place > 0]
        found = self.graphs(blocks, hidden, inside) if inside else []
        return [hidden] * (len(places) - len(inside)) + found


def blocks_on_images(blocks: list[nn.Module], hidden: Tensor, places: list[int]) -> list[Tensor]:
    """Hidden states behind the first k blocks, for each k in `places`."""
    found = []
    for done, block in enumerate(blocks, 1):
        hidden = block_on_images(block, hidden)
        if done in places:
            found.append(hidden)
    return found
