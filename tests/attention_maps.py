"""Eager attention of tower and decoder, and transformers' own maps of every decoder layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from llava.model.llava_arch import Llava

Maps = dict[int, Tensor]  # layer -> [B, H, L, L] as last computed, padding included


@contextmanager
def eager_attention(model: Llava) -> Iterator[None]:
    """Tower and decoder run eager attention, whose weights and products can be seen, in place of the fused kernel."""
    with pytest.MonkeyPatch.context() as patch:
        for config in (model.hf_model.config, model.llm.config, model.tower.config):
            patch.setattr(config, "_attn_implementation", "eager")
        yield


@contextmanager
def eager_maps(model: Llava) -> Iterator[Maps]:
    """Run the decoder with eager attention and note the weights of each layer's prefill."""
    maps: Maps = {}

    def note(layer: int):
        def hook(module, args, outputs):
            if outputs[1].shape[2] > 1:
                maps[layer] = outputs[1]

        return hook

    hooks = [layer.self_attn.register_forward_hook(note(i)) for i, layer in enumerate(model.llm.layers)]
    try:
        with eager_attention(model):
            yield maps
    finally:
        for hook in hooks:
            hook.remove()


def real(maps: Maps, layer: int, sample: int, length: int) -> Tensor:
    """[H, length, length], one sample's map without its padding, which is on the left."""
    return maps[layer][sample, :, -length:, -length:]


@contextmanager
def noted_logits(model: Llava) -> Iterator[list[Tensor]]:
    """The logits [B, vocabulary] from which the pipeline has chosen each token, in order."""
    seen: list[Tensor] = []
    plain = type(model).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "logits", lambda hidden: seen.append(plain(model, hidden)) or seen[-1], raising=False)
        yield seen
