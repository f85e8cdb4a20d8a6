"""template_name finds planted answers."""

import torch

from baselines.template_name import RECEIVED, TemplateName
from llava.reduction import EncoderState, PatchGrid


def kept(attention: torch.Tensor, **options: float) -> list[list[int]]:
    """Token numbers that are kept of images of 4 x 4 patches."""
    state = EncoderState(
        ids=tuple(map(str, range(len(attention)))),
        features=torch.randn(*attention.shape, 8),
        scores={RECEIVED: attention},
        layout=PatchGrid(4, 4),
    )
    return TemplateName(budget=3, **options).encoder(state).kept.tolist()


def test_planted_tokens_are_kept():
    """Plants the highest attention at three tokens of each image."""
    attention, planted = torch.rand(2, 16), torch.tensor([[1, 7, 12], [0, 3, 15]])
    assert kept(attention.scatter(1, planted, 9.0)) == planted.tolist()


def test_of_equal_attention_the_middle_is_kept():
    assert kept(torch.ones(1, 16), middle=0.5) == [[5, 6, 9]]
