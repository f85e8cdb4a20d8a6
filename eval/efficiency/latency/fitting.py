"""Whether a batch fits into the memory that is free, before it is tried."""

import torch

from eval.efficiency import memory
from eval.efficiency.memory import QuestionShape, layout_of
from eval.efficiency.quantities import size_text
from llava.errors import UserError
from llava.model.checkpoint.limits import free_memory
from llava.model.llava_arch import Llava
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction.reducer import Reducer

ROOM = 0.9  # of the free memory may be used


def room(model: Llava) -> float | None:
    """Bytes that a batch may take; None on a GPU, where it is tried.

    A CPU has no error for memory that is used up: the machine ends the process.
    """
    return ROOM * free_memory(model.device) if model.device.type == "cpu" else None


def needed(model: Llava, reducer: Reducer, samples: list[Sample], length: int) -> int:
    """Expected bytes of activations and cache of a batch with answers of `length` tokens."""
    itemsize = next(model.llm.parameters()).element_size()
    shapes = [shape_of(model, sample) for sample in samples]
    found = memory.activations(model, reducer, shapes, itemsize)
    prompts = [memory.lengths(model, reducer, shape) for shape in shapes]
    answers = memory.kv_bytes(model, prompts, itemsize, length) + found.decode
    return max(found.vision, found.prefill_with_cache, answers)


def refuse_large_weights(model: Llava, itemsize: int, device: torch.device) -> None:
    """Raise UserError where random weights would not fit into the free memory of a CPU.

    Args:
        model: on the meta device, with the layers that will have weights of their own.
        itemsize: bytes of a weight.
    """
    if device.type != "cpu":
        return
    # Layers that share weights are one parameter.
    need, free = sum(weight.numel() for weight in model.hf_model.parameters()) * itemsize, free_memory(device)
    if need >= ROOM * free:
        raise UserError(
            f"The weights of {model.name} need {size_text(need)}, and {size_text(free)} are free; give fewer layers "
            "their own weights with --distinct 1, or take --dtype bfloat16."
        )


def shape_of(model: Llava, sample: Sample) -> QuestionShape:
    """What memory depends on in a question."""
    text = sum(token >= 0 for token in model.prompt(sample).ids)
    images = tuple(
        layout_of(model, image.frames[0].size if isinstance(image, Video) else image.size, isinstance(image, Video))
        for image in sample.images
    )
    return QuestionShape(text, images, sample.id)
