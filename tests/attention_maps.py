"""Transformers' own attention maps of every decoder layer, for tests that compare rows with them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from llava.model.llava_arch import Llava

Maps = dict[int, Tensor]  # layer -> [B, H, L, L] as last computed, padding included


@contextmanager
def eager_maps(model: Llava) -> Iterator[Maps]:
    """Run the decoder with eager attention and note the weights of each layer's prefill."""
    maps: Maps = {}

    def note(layer: int):
        def hook(module, args, outputs):
            if outputs[1].shape[2] > 1:
                maps[layer] = outputs[1]

        return hook

    before = model.llm.config._attn_implementation
    model.llm.config._attn_implementation = "eager"
    hooks = [layer.self_attn.register_forward_hook(note(i)) for i, layer in enumerate(model.llm.layers)]
    try:
        yield maps
    finally:
        model.llm.config._attn_implementation = before
        for hook in hooks:
            hook.remove()


def real(maps: Maps, layer: int, sample: int, length: int) -> Tensor:
    """[H, length, length], one sample's map without its padding, which is on the left."""
    return maps[layer][sample, :, -length:, -length:]
