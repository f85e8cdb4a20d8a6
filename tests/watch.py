"""Look at the prompts between the stages of a prefill."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from llava.pipeline import prefill as module
from llava.pipeline.decoder_stage import DecoderStage
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.sequence import Sequence


@dataclass
class Watched:
    """The images and prompts of the last prefill.

    Attributes:
        images: after the encoder stage.
        sequences: by stage, "embedded", "prompt" and "layer N", as each stage returned them.
    """

    images: ImageBatch | None = None
    sequences: dict[str, Sequence] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Watched]:
    found = Watched()
    embed, reduce_prompt, decoder = module.embed, module.reduce_prompt, DecoderStage.__call__

    def at_embed(model, reducer, prompts, images):
        found.images = images
        found.sequences["embedded"] = embed(model, reducer, prompts, images)
        return found.sequences["embedded"]

    def at_prompt(*arguments):
        found.sequences["prompt"] = reduce_prompt(*arguments)
        return found.sequences["prompt"]

    def at_layer(self, sequence, layer, *arguments):
        found.sequences[f"layer {layer}"] = decoder(self, sequence, layer, *arguments)
        return found.sequences[f"layer {layer}"]

    with (
        patch.object(module, "embed", at_embed),
        patch.object(module, "reduce_prompt", at_prompt),
        patch.object(DecoderStage, "__call__", at_layer),
    ):
        yield found
