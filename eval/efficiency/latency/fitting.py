"""Whether a batch fits into the memory that is free, before it is tried."""

from eval.efficiency import memory
from eval.efficiency.memory import QuestionShape, layout_of
from llava.model.checkpoint.limits import free_memory
from llava.model.llava_arch import Llava
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction.reducer import Reducer

ROOM = 0.9  # of the free memory may be used


def fits(model: Llava, reducer: Reducer, samples: list[Sample], length: int) -> bool:
    """Whether activations and cache of a batch with answers of `length` tokens are expected to fit.

    A CPU has no error for memory that is used up: the machine ends the process. On a GPU the batch is tried.
    """
    if model.device.type != "cpu":
        return True
    itemsize = next(model.llm.parameters()).element_size()
    shapes = [shape_of(model, sample) for sample in samples]
    found = memory.activations(model, reducer, shapes, itemsize)
    prompts = [memory.lengths(model, reducer, shape) for shape in shapes]
    answers = memory.kv_bytes(model, prompts, itemsize, length) + found.decode
    return max(found.vision, found.prefill_with_cache, answers) < ROOM * free_memory(model.device)


def shape_of(model: Llava, sample: Sample) -> QuestionShape:
    """What memory depends on in a question."""
    text = sum(token >= 0 for token in model.prompt(sample).ids)
    images = tuple(
        layout_of(model, image.frames[0].size if isinstance(image, Video) else image.size, isinstance(image, Video))
        for image in sample.images
    )
    return QuestionShape(text, images, sample.id)
