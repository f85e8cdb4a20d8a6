"""The images of a batch after the vision tower, and the visual tokens of each so far."""

from dataclasses import dataclass, field

from torch import Tensor

from llava.model.encoded_image import EncodedImage
from llava.pipeline.sequence import Row


@dataclass
class ImageBatch:
    """Images of a batch; the key of an image is (sample, number of the image in its prompt).

    Attributes:
        pictures: distinct encoded images; questions about the same image share one.
        owner: image -> index in `pictures`.
        tokens: image -> [N, H] projected visual tokens.
        kept: image -> [N] indices of its tokens among the unreduced ones; None if it is not reduced.
        inputs: image -> visual tokens before any reduction.
    """

    pictures: list[EncodedImage]
    owner: dict[Row, int]
    tokens: dict[Row, Tensor] = field(default_factory=dict)
    kept: dict[Row, Tensor | None] = field(default_factory=dict)
    inputs: dict[Row, int] = field(default_factory=dict)

    def of(self, image: Row) -> EncodedImage:
        return self.pictures[self.owner[image]]
