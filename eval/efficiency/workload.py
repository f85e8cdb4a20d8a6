"""The questions of a run as memory and time see them: lengths of prompts, layouts of images, lengths of answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eval.batches import asking_order
from eval.benchmarks.base import Dataset, Question
from eval.efficiency.memory import FLOAT32, QuestionShape, layout_of
from eval.efficiency.tower_passes import image_bytes, keys, remembers, tower_passes
from eval.feature_cache import RUN_BYTES
from eval.outcomes import chunks
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction.reducer import Reducer

SAMPLED = 64  # questions whose prompts and images are read


@dataclass(frozen=True)
class Workload:
    """The questions of a run, by a sample of them.

    Attributes:
        shapes: sampled questions.
        steps: decoding steps of a batch after the first token, if answers are as long as the references; 0 where there
            are no references.
        questions: all questions of the run.
        passes: images that the vision tower sees in the whole run (eval/efficiency/tower_passes.py).
        images: distinct images of the run whose tower output is remembered; 0 where none is.
        image_bytes: of the remembered output of one image, on average.
    """

    shapes: tuple[QuestionShape, ...]
    steps: float
    questions: int
    passes: int
    images: int = 0
    image_bytes: float = 0.0


def workload(
    model: Llava,
    data: Dataset,
    planned: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    reducer: Reducer,
    itemsize: int = FLOAT32,
    replicas: int = 1,
) -> Workload:
    """Prompts and images of evenly spaced questions, the length of their reference answers, and passes of the tower.

    Args:
        model: on the meta device.
        itemsize: bytes of a feature of the tower.
        replicas: that share the questions and remember images each for itself.
    """
    if not planned:
        raise UserError(f"{data.title} has no question to estimate; raise --limit.")
    stride = max(1, len(planned) // SAMPLED)
    chosen = planned[::stride][:SAMPLED]
    shapes = tuple(shape_of(model, data, question) for question in chosen)
    answers = [len(model.tokenizer(q.answer, add_special_tokens=False).input_ids) for q in chosen if q.answer]
    groups = [answers[i : i + batch_size] for i in range(0, len(answers), batch_size)]
    steps = sum(min(max(group), max_new_tokens - 1) for group in groups) / len(groups) if groups else 0.0
    kept = remembers(model, reducer)
    images = [image for shape in shapes for image in shape.images] if kept else []
    each = sum(image_bytes(model, reducer, image, itemsize) for image in images) / max(1, len(images))
    batches = list(chunks(asking_order(planned, planned, model, bool(reducer.acts_in)), batch_size))
    passes = tower_passes(batches, each, RUN_BYTES if kept else 0, replicas)
    return Workload(shapes, steps, len(planned), passes, len(keys(planned)) if kept else 0, each)


def shape_of(model: Llava, data: Dataset, question: Question) -> QuestionShape:
    """What memory and time depend on in a question. An image is opened only where its size matters."""
    video = data.pictures.noun == "videos"
    blank = Image.new("RGB", (1, 1))
    stand_in = Video((blank,)) if video else blank
    prompt = model.prompt(
        Sample(question.id, question.question, question.suffix, tuple(stand_in for _ in question.images) or None)
    )
    by_size = not video and (hasattr(model, "anyres") or model.axes)
    sizes = [_size(data, name) if by_size else None for name in question.images]
    images = tuple(layout_of(model, size, video) for size in sizes)
    return QuestionShape(sum(token >= 0 for token in prompt.ids), images, " ".join(question.images))


def _size(data: Dataset, name: str) -> tuple[int, int] | None:
    """(width, height) of an image; None, which stands for the largest, where it cannot be read here."""
    try:
        opened: Any = data.pictures.open(name)
    except (UserError, OSError):
        return None
    return opened.size
