"""A LLaVA that remembers what its vision tower gave for an image, for many questions or many methods on one image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.model.llava_arch import EncodedImage, Llava, encoded_image_of
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder.clip_encoder import Encoded, encode
from llava.pipeline.accounting import Timer
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import TokenLayout

# Of remembered features; the images seen first are forgotten first.
CACHE_BYTES = 4 << 30  # in a sweep, which comes back to every image
RUN_BYTES = 512 << 20  # in a single run, whose questions about one image stand near each other


# At run time the class stands before the model's own class, whatever that is.
if TYPE_CHECKING:
    Base = Llava
else:
    Base = object


class CachingLlava(Base):
    """A LLaVA that keeps the tower's output for the images it has seen, in the memory of this process.

    CLS and every score asked for so far are kept for each image, so that methods share one pass of the tower; what a
    method is given, and the operations counted for it, are those of a run of its own.

    Attributes:
        remembers_features, takes_views: not for a model whose images do not go through a CLIP tower in the common way;
            then nothing is kept.
        cache_bytes: of features and scores to keep at most.
        ready_views: id of an image of the next batch -> the image and its views, where they were made ahead. The image
            is held because the id of one that is gone may be that of another one.
        remembered: images of the last batch that did not go through the tower.
    """

    cache_bytes = CACHE_BYTES
    remembered = 0

    def __new__(cls, model: Llava, cache_bytes: int = CACHE_BYTES) -> "CachingLlava":
        """Of the model's own family: what this class leaves alone is done as that family does it."""
        return object.__new__(type(f"{cls.__name__}{type(model).__name__}", (cls, type(model)), {}))

    def __init__(self, model: Llava, cache_bytes: int = CACHE_BYTES):
        self.__dict__.update(model.__dict__)
        self.cache_bytes = cache_bytes
        self.remembers_features = self.takes_views = can_remember(model)
        self.ready_views: dict[int, tuple[Any, tuple[Tensor, TokenLayout]]] = {}
        self._scores: dict[TowerScore, None] = {}
        self.tiled = isinstance(model, LlavaNext)
        self._seen: dict[object, tuple[Encoded, TokenLayout]] = {}
        self._bytes = 0

    def expect(self, reducers: Sequence[Reducer]) -> None:
        """Compute the scores of all these methods from the start; one more score means all images anew."""
        wanted = [
            score for reducer in reducers for score in reducer.tower_scores(self.tiled) if score not in self._scores
        ]
        if wanted:
            self._scores |= dict.fromkeys(wanted)
            self.forget()

    def remembers(self, key: object) -> bool:
        """Whether an image is remembered now; `key` is the hash of its content."""
        return key in self._seen

    def forget(self) -> None:
        """Give the memory back."""
        self._seen.clear()
        self._bytes = 0

    def views(self, image: Any) -> tuple[Tensor, TokenLayout]:
        ready = self.ready_views.get(id(image))
        return super().views(image) if ready is None else ready[1]

    def encode_images(
        self, images: Sequence[Any], keys: Sequence[object], reducer: Reducer, timer: Timer
    ) -> list[EncodedImage]:
        if not (self.remembers_features and reducer.acts_in.isdisjoint(("tower", "input_grid"))):
            self.remembered = 0
            return super().encode_images(images, keys, reducer, timer)
        self.expect([reducer])
        new = [i for i, name in enumerate(keys) if name not in self._seen]
        self.remembered = len(keys) - len(new)
        views = {i: self.views(images[i]) for i in new}
        timer.mark("preprocess")
        for temporal in {full.temporal for _, full in views.values()}:
            rows = [i for i in new if views[i][1].temporal == temporal]
            pixels = torch.cat([views[i][0] for i in rows]).to(self.device)
            tower, done = self.tower_of(temporal), 0
            fresh = encode(tower, pixels, self.select_layer, tuple(self._scores), keep_cls=True)
            for i in rows:
                crops, full = views[i]
                rows_of_image = with_own_memory(fresh.rows(slice(done, done + len(crops))))
                self._seen[keys[i]] = rows_of_image, full
                self._bytes += bytes_of(rows_of_image)
                done += len(crops)
        for_images: Any = self.tower
        depth = len(for_images.encoder.layers)
        found = []
        for name in keys:
            encoded, full = self._seen[name]
            wanted = reducer.tower_scores(full.tiles is not None)
            run = max([self.select_layer % (depth + 1), *(score.block % depth for score in wanted)])
            own = replace(
                encoded,
                features=encoded.features if reducer.keep_cls or full.temporal else encoded.features[:, 1:],
                scores={score: encoded.scores[score] for score in wanted},
                tokens=encoded.tokens[:run],
            )
            found.append(encoded_image_of(own, full, reducer.keep_cls))
        self._forget()
        return found

    def _forget(self) -> None:
        """Drop the images that were seen first until the rest fits."""
        while self._bytes > self.cache_bytes:
            encoded, _ = self._seen.pop(next(iter(self._seen)))
            self._bytes -= bytes_of(encoded)


def without_memory(model: Llava) -> Llava:
    """The model to time: every image goes through its tower."""
    if not getattr(model, "remembers_features", False):
        return model
    bare: Llava = object.__new__(type(model).__bases__[-1])  # the family's own class
    bare.__dict__.update(model.__dict__, remembers_features=False, takes_views=False)
    return bare


def can_remember(model: Llava) -> bool:
    """Whether the images of a model go through a CLIP tower in the common way; Qwen's have a tower of another kind."""
    return getattr(type(model), "encode_images", None) is Llava.encode_images


def with_own_memory(encoded: Encoded) -> Encoded:
    """A copy; a view of a batch keeps all of the batch alive."""
    scores = {score: values.clone() for score, values in encoded.scores.items()}
    return replace(encoded, features=encoded.features.clone(), scores=scores)


def bytes_of(encoded: Encoded) -> int:
    """Memory of the features and scores."""
    return sum(tensor.nbytes for tensor in (encoded.features, *encoded.scores.values()))
