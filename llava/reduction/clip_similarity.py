"""Similarity of patches to the question in CLIP's space, for methods with `needs_text_tower`."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llava.reduction.states import EncoderState

# Sign of the similarity of a text to the patches that show it: negative in a CLIP that was trained on its CLS token
# alone (CDPruner issue 14, TRIM issue 3), positive in one whose config.json has `"patch_similarity": "plain"`.
NEGATED, PLAIN = "negated", "plain"
RELEVANCE = ("tower", NEGATED, PLAIN)


def text_similarity(state: EncoderState, texts: Sequence[str], cosine: bool, long: str = "frame") -> Tensor:
    """Return the similarity of each patch to its image's text, averaged over the chunks of the text.

    Args:
        state: tower features and CLIP; its `flops` are increased.
        cosine: cosine similarity; otherwise dot products.
        long: see `ClipText.chunks`.

    Returns:
        [B, N] float32.
    """
    text, mask, text_flops = state.clip.text(texts, long)
    image, image_flops = state.clip.image(state.features)
    state.flops += text_flops + image_flops
    if cosine:
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    similarity = state.matmul(image, text.transpose(1, 2))  # [B, N, C]
    if text.shape[1] == 1:  # one chunk of every text, which is its own mean
        return similarity.squeeze(2)
    return (similarity * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)


def signed(similarity: Tensor, choice: str, clip: Any) -> Tensor:
    """Return relevance from similarity, higher is more relevant.

    Args:
        choice: one of RELEVANCE; "tower" takes the sign from the text tower's config.json.
    """
    return -similarity if (clip.relevance if choice == "tower" else choice) == NEGATED else similarity
