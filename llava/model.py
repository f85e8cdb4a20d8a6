"""A loaded LLaVA: the modules the staged forward runs over, and the two calls a user needs, `load` and `answer`."""

import hashlib
import json
from collections.abc import Sequence as Samples
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from llava import conversation
from llava.errors import UserError
from llava.flops import linear_flops
from llava.generate import generate
from llava.layout import Layout
from llava.prompt import Prompt, build_prompt
from llava.reducer import ModelFacts, Reducer
from llava.reduction import Reduction
from llava.sample import Batch, Sample
from llava.states import BlockState
from llava.vision import Encoded, encode, patch_grid

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tinyllava"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Llava:
    """Modules and preprocessing of one checkpoint.

    Args:
        checkpoint: what `llava.checkpoint.load_checkpoint` returned.
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
        self.tower: nn.Module = container.model.vision_tower
        self.projector: nn.Module = container.model.multi_modal_projector
        self.llm: nn.Module = container.model.language_model
        self.head: nn.Linear = container.lm_head
        self.select_layer: int = container.config.vision_feature_layer
        self.layout = Layout(*patch_grid(self.tower))

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
        depth = len(self.tower.encoder.layers)
        return ModelFacts(
            self.visual_tokens, len(self.llm.layers), self.layout, depth, has_text_tower=self.text_tower is not None
        )

    @cached_property
    def clip(self):
        """The CLIP text tower (llava.clip_text.ClipText), read from its files when a method first asks for it."""
        from llava.clip_text import load_clip_text

        return load_clip_text(self.text_tower, self.tower, self.tokenizer, self.device)

    def prompt(self, sample: Sample) -> Prompt:
        return build_prompt(sample, self.tokenizer, self.conversation)

    def encode_images(
        self, pictures: Samples, keys: Samples, reducer: Reducer, grid: tuple[int, int] | None
    ) -> Encoded:
        """Preprocess pictures and run the tower on them.

        Args:
            pictures: PIL images.
            keys: one hashable name per picture; here unused, a sweep over methods remembers pictures by them.
            grid: patch grid to shrink to, or None.
        """
        pixels = torch.stack([self.image_processor(picture) for picture in pictures]).to(self.device)
        names, facts = tuple(map(str, range(len(pictures)))), self.facts()
        spent = 0

        def merge_at(hidden: Tensor, keys: Tensor, sizes: Tensor, block: int) -> Reduction | None:
            nonlocal spent
            state = BlockState(ids=names, facts=facts, tokens=hidden, keys=keys, sizes=sizes, block=block)
            reduction = reducer.tower(state)
            projection = self.tower.encoder.layers[block].self_attn.k_proj
            spent += state.flops // len(pictures) + linear_flops(projection, hidden.shape[1])
            return reduction

        selected = self.select_layer % (len(self.tower.encoder.layers) + 1)
        merging = reducer.merging_blocks(selected)
        encoded = encode(
            self.tower, pixels, self.select_layer, reducer.signals(), grid, reducer.keep_cls, merging, merge_at
        )
        return replace(encoded, spent=spent)

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
        reducer.check(self.facts())
        stop = conversation.stop_string(self.conversation)
        # A stop string that is the end token needs no search in the decoded text.
        searched = () if stop is None or stop == self.tokenizer.eos_token else (stop,)
        return generate(self, samples, reducer, max_new_tokens, searched)


def sampled(tensor: Tensor) -> bytes:
    """Up to about 4,096 evenly spaced values: enough to tell checkpoints apart, cheap at 13 billion weights."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous().numpy().tobytes()


def load(
    source: str | Path | None = None,
    dtype: str = "float32",
    device: str = "auto",
    text_tower: str | Path | None = None,
) -> Llava:
    """Load a checkpoint.

    Args:
        source: directory or hub id, transformers or original layout; None for the embedded model.
        dtype: float32, bfloat16 or float16.
        device: "cpu", "cuda", "cuda:1", or "auto".
        text_tower: folder or hub id of the CLIP that the vision tower comes from, where the checkpoint names none.
    """
    from llava.checkpoint import load_checkpoint

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"Device {device!r} was asked for, but this machine has no CUDA device; use --device cpu.")
    place = torch.device(device)
    return Llava(load_checkpoint(source or EMBEDDED, DTYPES[dtype], place, text_tower), place)
