"""A loaded LLaVA: the modules the staged forward runs over, and the two calls a user needs, `load` and `answer`."""

import hashlib
import json
from collections.abc import Sequence as Samples
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from llava import conversation
from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import Encoded, encode, patch_grid
from llava.pipeline.encoded_images import Picture, picture_of
from llava.pipeline.generate import generate
from llava.pipeline.positions import Groups
from llava.processing.prompt import Prompt, build_prompt
from llava.processing.sample import Batch, Sample
from llava.reduction.crop_budget import in_tower, require
from llava.reduction.flops import linear_flops, tower_flops
from llava.reduction.patch_grid import Layout
from llava.reduction.reducer import ModelFacts, Reducer
from llava.reduction.reduction import Reduction
from llava.reduction.scores import Signal, signal_flops
from llava.reduction.states import BlockState
from llava.reduction.token_layout import Arrangement, single


class Llava:
    """Modules and preprocessing of one checkpoint.

    Args:
        checkpoint: what `llava.model.checkpoint.load.load_checkpoint` returned.
        device: where the modules are.
    """

    def __init__(self, checkpoint, device: torch.device):
        container = checkpoint.model
        self.container = container
        self.device = device
        self.tokenizer = checkpoint.tokenizer
        self.image_processor = checkpoint.image_processor
        self.conversation = checkpoint.conversation
        self.name = checkpoint.name
        self.layout_name = checkpoint.layout
        self.notes = checkpoint.notes
        self.vocabulary = checkpoint.vocabulary
        self.text_tower = checkpoint.text_tower
        self.llm: nn.Module = container.model.language_model
        self.head: nn.Linear = container.lm_head
        self._read_tower()

    def _read_tower(self) -> None:
        """Find the vision tower and the projector in the container, and the patches of one crop."""
        inner = self.container.model
        self.tower: nn.Module = inner.image_tower if hasattr(inner, "image_tower") else inner.vision_tower
        self.projector: nn.Module = inner.multi_modal_projector
        self.select_layer: int = self.container.config.vision_feature_layer
        self.layout = Layout(*patch_grid(self.tower))

    # Positions have three axes: frame, row and column.
    axes: bool = False

    # The learned vector behind every row of stitched tiles; a picture of one crop has none.
    newline: Tensor | None = None

    @property
    def conventions(self) -> dict[str, Any]:
        """Choices of reading a picture that answers depend on; part of every result."""
        return {}

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image before any reduction."""
        return self.layout.tokens

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and the generation config's where there is one."""
        ids = {self.tokenizer.eos_token_id}
        configured = getattr(self.container.generation_config, "eos_token_id", None)
        ids |= set(configured) if isinstance(configured, list) else {configured}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights; two checkpoints that answer differently never share one."""
        digest = hashlib.blake2b(digest_size=12)
        digest.update(json.dumps(self.container.config.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.container.state_dict().items()):
            digest.update(name.encode() + sampled(tensor))
        return digest.hexdigest()

    @cached_property
    def text_tower_fingerprint(self) -> str:
        """The same for the CLIP text tower; part of a result only for the methods that read it."""
        digest = hashlib.blake2b(digest_size=12)
        digest.update(f"{self.clip.relevance} {self.clip.begin} {self.clip.end}".encode())
        for name, tensor in sorted(self.clip.state_dict().items()):
            digest.update(name.encode() + sampled(tensor))
        return digest.hexdigest()

    def facts(self) -> ModelFacts:
        return self._facts(len(self.tower.encoder.layers))

    def _facts(self, depth: int) -> ModelFacts:
        known = self.text_tower is not None
        return ModelFacts(self.layout.tokens, len(self.llm.layers), self.layout, depth, has_text_tower=known)

    def groups(self, picture: Picture) -> Groups | None:
        """Frames, rows and columns of a picture's tokens, where positions have these axes."""
        return None

    @cached_property
    def clip(self):
        """The CLIP text tower (llava.model.multimodal_encoder.clip_text_encoder.ClipText), read from its files when a
        method first asks for it."""
        from llava.model.multimodal_encoder.clip_text_encoder import load_clip_text

        return load_clip_text(self.text_tower, self.tower, self.tokenizer, self.device)

    def prompt(self, sample: Sample) -> Prompt:
        return build_prompt(sample, self.tokenizer, self.conversation)

    def views(self, picture) -> tuple[Tensor, Arrangement]:
        """What the tower sees of a picture: pixels [C, 3, S, S], and the run of tokens that its C crops become."""
        return self.image_processor(picture)[None], single(self.layout.rows, self.layout.columns)

    def encode_images(self, pictures: Samples, keys: Samples, reducer: Reducer) -> list[Picture]:
        """Preprocess pictures and run the tower on them, all crops at once.

        Args:
            pictures: PIL images.
            keys: one hashable name per picture; here unused, a sweep over methods remembers pictures by them.
        """
        seen = [self.views(picture) for picture in pictures]
        found: list[Picture] = [None] * len(seen)
        groups: dict[tuple[Reducer, bool, bool], list[int]] = {}
        for index, (_, full) in enumerate(seen):
            groups.setdefault((in_tower(reducer, full), full.temporal, full.tiles is not None), []).append(index)
        for (sized, temporal, tiled), rows in groups.items():
            grid = sized.input_grid(self.layout)
            pixels = torch.cat([seen[index][0] for index in rows]).to(self.device)
            encoded, done = self.encode_crops(pixels, sized, grid, temporal, tiled), 0
            for index in rows:
                crops, full = seen[index]
                found[index] = picture_of(encoded.rows(slice(done, done + len(crops))), full, reducer.keep_cls, grid)
                done += len(crops)
        return found

    def tower_of(self, temporal: bool) -> nn.Module:
        """The vision tower for pictures, or for the frames of videos."""
        return self.tower

    def encode_crops(
        self,
        pixels: Tensor,
        reducer: Reducer,
        grid: tuple[int, int] | None,
        temporal: bool = False,
        tiled: bool = False,
    ) -> Encoded:
        """Run a tower on [B, 3, S, S] pixels, with the method's signals and its merging inside.

        Args:
            temporal: the pixels are frames of videos, whose class tokens are visual tokens.
            tiled: the pictures have tiles.
        """
        tower, keep_cls = self.tower_of(temporal), reducer.keep_cls or temporal
        names, facts = tuple(map(str, range(len(pixels)))), self.facts()
        spent = 0

        def merge_at(hidden: Tensor, keys: Tensor, sizes: Tensor, block: int) -> Reduction | None:
            nonlocal spent
            state = BlockState(ids=names, facts=facts, tokens=hidden, keys=keys, sizes=sizes, block=block)
            reduction = reducer.tower(state)
            projection = tower.encoder.layers[block].self_attn.k_proj
            spent += state.flops // len(pixels) + linear_flops(projection, hidden.shape[1])
            return reduction

        merging = reducer.merging_blocks(self.select_layer % (len(tower.encoder.layers) + 1))
        encoded = encode(
            tower, pixels, self.select_layer, reducer.tower_signals(tiled), grid, keep_cls, merging, merge_at
        )
        return replace(encoded, spent=spent)

    def tower_flops(self, picture: Picture, signals: tuple[Signal, ...]) -> tuple[int, int]:
        """Operations of the tower on all crops of one picture, and of the signals and merging beside it."""
        encoded, tower = picture.encoded, self.tower_of(picture.full.temporal)
        blocks, patches = tower.encoder.layers, encoded.grid[0] * encoded.grid[1]
        beside = encoded.spent
        for signal in signals:
            beside += signal_flops(signal, blocks[signal.index(len(blocks))], patches)
        crops = len(encoded.features)
        return crops * tower_flops(tower, patches, encoded.tokens), crops * beside

    def next_token(self, hidden: Tensor) -> Tensor:
        """Greedy choice [B] from the last hidden state [B, 1, D]; ties go to the lower id."""
        return self.logits(hidden).argmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, 1, D] before the final norm -> [B, vocabulary] float32, without the padding rows of the head."""
        # The head gets a 3-D input: tensor-parallel heads index the last of three axes.
        return self.head(self.llm.norm(hidden))[:, -1, : self.vocabulary].float()

    def decode(self, ids: Samples[int], special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def answer(self, samples: Samples[Sample], reducer: Reducer, max_new_tokens: int = 128) -> Batch:
        """Answer a batch of questions under a method.

        Raises:
            UserError: the method cannot run on this model at its budget, or there is nothing to answer.
        """
        if not samples:
            raise UserError("There is no question in this batch.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        require(reducer, self.facts())
        stop = conversation.stop_string(self.conversation)
        # A stop string that is the end token needs no search in the decoded text.
        searched = () if stop is None or stop == self.tokenizer.eos_token else (stop,)
        return generate(self, samples, reducer, max_new_tokens, searched)


def sampled(tensor: Tensor) -> bytes:
    """Up to about 4,096 evenly spaced values: enough to tell checkpoints apart, cheap at 13 billion weights."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous().numpy().tobytes()
