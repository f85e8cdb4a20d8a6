"""The projector: features of the vision tower -> visual tokens of the decoder.

LLaVA, LLaVA-NeXT and Video-LLaVA have a two-layer MLP, the `multi_modal_projector` of their HF model. Qwen-VL has a
merger, which makes one visual token of every 2 x 2 patches.
"""

from torch import Tensor, nn

from llava.model.multimodal_encoder.qwen_encoder import project


class Merger(nn.Module):
    """Qwen's projector: [1, n, 4 D] features of merge groups -> [1, n, H] visual tokens."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.merger = visual.merger
        # Not a submodule: the blocks of the tower are no part of the projector.
        object.__setattr__(self, "visual", visual)

    def forward(self, features: Tensor) -> Tensor:
        return project(self.visual, features)


def projector_of(model: nn.Module) -> nn.Module:
    """The projector of a HF model.

    Args:
        model: the inner model of a LLaVA or Qwen-VL, with its towers.
    """
    return Merger(model.visual) if hasattr(model, "visual") else model.multi_modal_projector
