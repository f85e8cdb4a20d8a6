"""Look at the prompts between the stages of a prefill."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from llava.pipeline import generate as module
from llava.pipeline.sequence import ImageKey, PromptBatch
from llava.pipeline.stages import BatchImage, Stages


@dataclass
class Watched:
    """The images and prompts of the last prefill.

    Attributes:
        images: by sample and number, after the encoder stage.
        sequences: by stage, "embedded", "prompt" and "layer N", as each stage returned them.
    """

    images: dict[ImageKey, BatchImage] = field(default_factory=dict)
    sequences: dict[str, PromptBatch] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Watched]:
    found = Watched()
    embed, reduce_prompt, between_layers = module.embed, Stages.reduce_prompt, Stages.reduce_between_layers

    def at_embed(model, reducer, prompts, images):
        found.images = images
        found.sequences["embedded"] = embed(model, reducer, prompts, images)
        return found.sequences["embedded"]

    def at_prompt(self, sequence):
        found.sequences["prompt"] = reduce_prompt(self, sequence)
        return found.sequences["prompt"]

    def at_layer(self, sequence, layer, *arguments):
        found.sequences[f"layer {layer}"] = between_layers(self, sequence, layer, *arguments)
        return found.sequences[f"layer {layer}"]

    with (
        patch.object(module, "embed", at_embed),
        patch.object(Stages, "reduce_prompt", at_prompt),
        patch.object(Stages, "reduce_between_layers", at_layer),
    ):
        yield found
