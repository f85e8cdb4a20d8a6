"""One question about no, one or several images."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from llava.processing.video import Video


@dataclass(frozen=True)
class Sample:
    """One question about no, one or several images.

    Attributes:
        id: stable name of the question; seeds the methods that draw random numbers.
        question: the question alone, the text whose tokens query-aware methods look at.
        suffix: answer-format instruction, appended on a new line (GQA's asks for a single word or phrase).
        image: RGB image, a video (llava.processing.video.Video), a tuple of them, or None for a text-only prompt.
            The budget holds for each.
        image_ids: one per image, a hash of its content: images with the same id share one pass of the vision tower.
            () for images that share it with none.
        history: earlier turns about the same images as (user message, answer).
    """

    id: str
    question: str
    suffix: str = ""
    image: "Image.Image | Video | tuple[Image.Image | Video, ...] | None" = None
    image_ids: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()

    @cached_property
    def images(self) -> "tuple[Image.Image | Video, ...]":
        """All images, in the order in which they stand before the question."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @cached_property
    def message(self) -> str:
        """The user turn as the benchmark scripts write it."""
        return f"{self.question}\n{self.suffix}" if self.suffix else self.question
