"""Prefill: from prompts and images to the decoder's state after the last prompt token.

stage 0  tower    merge inside blocks of the vision tower (llava/model/multimodal_encoder/clip_encoder.py)
stage 1  encoder  reduce features before the projector    (encoder_stage.py)
stage 2  prompt   reduce before decoder layer 0           (prompt_stage.py)
stage 3  decoder  reduce between two decoder layers       (decoder_stage.py)
"""

from collections.abc import Sequence as Samples
from typing import TYPE_CHECKING

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pipeline import decoder
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.decoder_stage import DecoderStage
from llava.pipeline.encoder_stage import encode_images
from llava.pipeline.faster import shared_prefix
from llava.pipeline.image_batch import ImageBatch
from llava.pipeline.prompt_stage import reduce_prompt
from llava.pipeline.sequence import Sequence, assemble
from llava.processing.prompt import Prompt
from llava.processing.sample import Sample
from llava.reduction.flops import prefill_flops
from llava.reduction.reducer import Reducer

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava


@torch.inference_mode()
def prefill(
    model: "Llava", samples: Samples[Sample], reducer: Reducer, timer: Timer | None = None
) -> tuple[decoder.Prefilled, Record]:
    """Run a batch up to the hidden state that predicts the first token.

    Args:
        timer: marked after "preprocess" (tokenizing prompts, resizing images on the CPU), "vision" (tower and
            projector), "selection" (the method's own functions, and applying what they return) and "prefill"
            (embedding and assembling prompts, running the decoder).
    """
    timer = timer or Timer(model.device)
    record = Record.of(len(samples), len(model.llm.layers))
    prompts = [model.prompt(sample) for sample in samples]
    timer.mark("preprocess")
    images = encode_images(model, reducer, samples, record, timer)
    sequence = embed(model, reducer, prompts, images)
    timer.mark("prefill")
    if images is not None and "prompt" in reducer.acts_in:
        sequence = reduce_prompt(model, reducer, samples, sequence, images, record)
        timer.mark("selection")
    layers = reducer.decoder_layers(len(model.llm.layers)) if images is not None else ()
    if model.shares_prefix and len(samples) > 1 and not layers:
        prefilled = shared_prefix.prefill(model.llm, sequence, shared_prefix.beginnings(prompts, images, sequence))
    else:
        stage = DecoderStage(model, reducer, samples, sequence, images, record, timer) if layers else None
        run = model.compiled.layers if model.compiled else decoder.run_segment
        prefilled = decoder.prefill(model.llm, sequence, layers, stage, run)
    timer.mark("prefill")
    for lengths in zip(*prefilled.lengths, strict=True):
        record.operations.add("prefill", prefill_flops, model.llm.layers, lengths, model.head)
    return prefilled, record


def embed(model: "Llava", reducer: Reducer, prompts: list[Prompt], images: ImageBatch | None) -> Sequence:
    """Embed the text of every prompt and put visual tokens where "<image>" stands."""
    slots, tokens, kept, inputs, groups = [], [], [], [], []
    ids = [[token for token in prompt.ids if token != IMAGE_TOKEN_INDEX] for prompt in prompts]
    # All texts at once: one copy to the device and one lookup.
    line = torch.tensor([token for own in ids for token in own]).to(model.device, non_blocking=True)
    texts = model.llm.embed_tokens(line).split([len(own) for own in ids])
    # Numbered anew, text and visual tokens follow one another without gaps.
    gaps = model.axes or reducer.positions == "original"
    for sample, prompt in enumerate(prompts):
        found = [place for place, token in enumerate(prompt.ids) if token == IMAGE_TOKEN_INDEX]
        rows = [(sample, number) for number in range(len(found))] if images else []
        slots.append([place - earlier for earlier, place in enumerate(found)])
        tokens.append([images.tokens[row] for row in rows] if images else [])
        kept.append([images.kept[row] if gaps else None for row in rows] if images else [])
        # Text after an image keeps the position ids it would have with every visual token present.
        inputs.append([images.inputs[row] if gaps else len(images.tokens[row]) for row in rows] if images else [])
        groups.append([model.groups(images.of(row)) for row in rows] if model.axes and images else [])
    questions, instructions = [prompt.question for prompt in prompts], [prompt.instruction for prompt in prompts]
    sequence = assemble(texts, slots, tokens, kept, inputs, questions, instructions, groups if model.axes else None)
    reduced = images is not None and any(indices is not None for indices in images.kept.values())
    return sequence.renumbered() if gaps and reduced and reducer.positions == "renumber" else sequence
