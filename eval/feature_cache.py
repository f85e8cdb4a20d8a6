"""A LLaVA that keeps its vision tower's output for an image, to reuse it for other questions or other methods."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava.model.llava_arch import EncodedImage, Llava, encoded_image_of
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder.clip_encoder import Encoded, encode
from llava.pipeline.accounting import Timer
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import TokenLayout

# Limits of the features kept; images seen first are dropped first.
CACHE_BYTES = 4 << 30  # in a sweep, which returns to every image with each method
RUN_BYTES = 512 << 20  # in a single run, where questions about one image follow each other closely


class CachingLlava(Llava):
    """A LLaVA that keeps the tower's output for the images it has seen, in the memory of this process.

    It keeps the class token and every score asked for so far of each image, so that methods share one pass of the
    tower. A method still receives exactly what a run of its own would give it, and the same operations are counted.

    Attributes:
        remembers_features, takes_views: False for a model whose images do not go through a CLIP tower as in LLaVA; then
            nothing is kept.
        cache_bytes: the most bytes of features and scores to keep.
        ready_views: id of an image of the next batch -> the image and its views, if they were made ahead. The image is
            held so that no other object can get its id.
        remembered: number of images of the last batch that did not go through the tower.
    """

    cache_bytes = CACHE_BYTES
    remembered = 0

    def __new__(cls, model: Llava, cache_bytes: int = CACHE_BYTES) -> "CachingLlava":
        """Make a subclass of the model's own family, so that all other methods stay those of the family."""
        own = cls if type(model) is Llava else type(f"{cls.__name__}{type(model).__name__}", (cls, type(model)), {})
        return object.__new__(own)

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
        """Compute the scores of all these methods for every image from now on.

        If one of them is new, everything kept so far is forgotten. So name all methods before the first image.
        """
        wanted = [
            score for reducer in reducers for score in reducer.tower_scores(self.tiled) if score not in self._scores
        ]
        if wanted:
            self._scores |= dict.fromkeys(wanted)
            self.forget()

    def remembers(self, key: object) -> bool:
        """Whether the output for an image is kept now; `key` is the hash of its content."""
        return key in self._seen

    def forget(self) -> None:
        """Free what is kept."""
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
                own = fresh.rows(slice(done, done + len(crops)))
                # Copies, because a view would keep the memory of the whole batch.
                scores = {score: values.clone() for score, values in own.scores.items()}
                own = replace(own, features=own.features.clone(), scores=scores)
                self._seen[keys[i]] = own, full
                self._bytes += bytes_of(own)
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
        while self._bytes > self.cache_bytes:  # drop the images seen first
            encoded, _ = self._seen.pop(next(iter(self._seen)))
            self._bytes -= bytes_of(encoded)
        return found


def without_memory(model: Llava) -> Llava:
    """The model without kept features, for timing: every image goes through its tower."""
    if not getattr(model, "remembers_features", False):
        return model
    bare: Llava = object.__new__(type(model).__bases__[-1])  # the family's own class
    bare.__dict__.update(model.__dict__, remembers_features=False, takes_views=False)
    return bare


def can_remember(model: Llava) -> bool:
    """Whether a model encodes images as LLaVA does, through a CLIP tower. Qwen's models do not."""
    return type(model).encode_images is Llava.encode_images


def bytes_of(encoded: Encoded) -> int:
    """Bytes of the features and scores."""
    return sum(tensor.nbytes for tensor in (encoded.features, *encoded.scores.values()))
