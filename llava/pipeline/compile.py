"""The option `--compile`: blocks of the vision tower and layers of the decoder, compiled by torch.compile.

Sums are taken in another order than in the plain way, so the last bits of scores and logits differ. A block or layer is
compiled when it first runs, once more when sizes change, and then for all sizes: equal layers share what was compiled,
so it takes about as long for 32 layers as for one. What a method does between layers is its own code, and so is merging
inside the tower.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from llava.errors import UserError
from llava.pipeline.decoder import Prefilled, causal_mask, rotary_angles
from llava.pipeline.sequence import Sequence
from llava.transformers_names import CACHE, kernel_of

Backend = str | Callable[..., Any]  # of torch.compile
LIMIT = 64  # what is compiled of one part: with padding or without, for one sample or several, for new sizes

log = logging.getLogger(__name__)


class Part:
    """torch.compile of one function.

    Args:
        name: for messages, "decoding".
        function: modules, tensors and whole numbers -> a tensor.
        backend: of torch.compile.

    Attributes:
        seconds: wall clock of the calls that compiled.
    """

    def __init__(self, name: str, function: Callable[..., Tensor], backend: Backend):
        self.name, self.seconds = name, 0.0
        compile_: Any = torch.compile  # its newest options have no types yet
        limits = {"recompile_limit": LIMIT, "isolate_recompiles": True}
        known = signature(compile_).parameters
        limits = {name: value for name, value in limits.items() if name in known}
        if "isolate_recompiles" not in known:  # before torch 2.13 parts that compile one function share its limit
            torch._dynamo.config.recompile_limit = LIMIT
        self._compiled = compile_(function, backend=backend, **limits)

    def __call__(self, *arguments: Any) -> Tensor:
        """The function's output.

        Raises:
            UserError: it could not be compiled.
        """
        graphs = torch._dynamo.utils.counters["stats"]  # of this process
        before, began = graphs["unique_graphs"], time.monotonic()
        try:
            output: Tensor = self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise UserError(
                f"torch.compile could not compile the {self.name} ({reason}); see that there is a C++ compiler, or "
                "leave --compile out."
            ) from error
        if graphs["unique_graphs"] > before:
            self.seconds += time.monotonic() - began
        return output


class Columns:
    """The cache that a layer sees while it is traced: keys and values [B, Hkv, C, d], of which `past` are there."""

    def __init__(self, keys: Tensor, values: Tensor, past: int):
        self.keys, self.values, self.past = keys, values, past

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, Hkv, new, d] behind the others; returns all."""
        end = self.past + key_states.shape[2]
        self.keys[:, :, self.past : end] = key_states
        self.values[:, :, self.past : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]


def block_on_images(block: nn.Module, hidden: Tensor) -> Tensor:
    """One block of the tower, [B, n, D] -> [B, n, D]."""
    after: Tensor = block(hidden, None)
    return after


def layer_on_tokens(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    past: int,
) -> Tensor:
    """One decoder layer, [B, n, D] -> [B, n, D]; the n keys and values are written behind the `past` ones."""
    cache = Columns(keys, values, past)
    after: Tensor = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
    return after


class Compiled:
    """The compiled parts of a model.

    Attributes:
        tower: in place of `clip_encoder.run_blocks`; None for a tower of another kind.
    """

    def __init__(self, model: Any, backend: Backend):
        self._block = Part("vision tower", block_on_images, backend)
        self._prefill = Part("prefill", layer_on_tokens, backend)
        self._decode = Part("decoding", layer_on_tokens, backend)
        self.tower = self._tower if hasattr(model.tower, "encoder") else None  # Qwen's has blocks of its own kind
        if self.tower is None:
            log.warning("--compile: the vision tower of %s is not compiled; prefill and decoding are.", model.name)

    def _tower(self, tower: Any, hidden: Tensor, places: Listed[int]) -> list[Tensor]:
        """`clip_encoder.run_blocks`: hidden states [B, n, D] behind the first k blocks, for each k in `places`."""
        states, done = [], 0
        for place in places:
            for block in tower.encoder.layers[done:place]:
                hidden = self._block(block, hidden)
            states.append(hidden)
            done = place
        return states

    def layers(
        self, llm: Any, sequence: Sequence, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache
    ) -> tuple[Tensor, Tensor]:
        """`decoder.run_segment`: hidden states [B, L, D] behind the last of some layers, and as they entered it."""
        hidden = entered = sequence.hidden
        batch, length, _ = hidden.shape
        rotary = rotary[0].contiguous(), rotary[1].contiguous()  # a reduced prompt has a part of those of the whole one
        mask = causal_mask(sequence.valid(), length, hidden.dtype, "sdpa") if sequence.padded else None
        for index in layers:
            entered, layer = hidden, llm.layers[index]
            sizes = batch, llm.config.num_key_value_heads, length, layer.self_attn.head_dim
            keys, values = hidden.new_empty(sizes), hidden.new_empty(sizes)
            hidden = self._prefill(layer, entered, mask, rotary, keys, values, 0)
            cache.update(keys, values, index)
        return hidden, entered

    def step(self, llm: Any, state: Prefilled, token: Tensor) -> Tensor:
        """`decoder.step`: one embedded token per sample, [B, 1, D] -> [B, 1, D] before the final norm."""
        hidden, held = token, list[Any](state.cache.layers)
        for segment in state.segments:
            rotary, mask = rotary_angles(llm, token, segment.next_position), None
            if segment.valid is not None:
                segment.valid = F.pad(segment.valid, (0, 1), value=True)
                mask = segment.valid[:, None, None, :]
            for index in segment.layers:
                # The column of the token is written once more, inside.
                keys, values = state.cache.update(held[index].keys[:, :, :1], held[index].values[:, :, :1], index)
                hidden = self._decode(llm.layers[index], hidden, mask, rotary, keys, values, keys.shape[2] - 1)
            segment.next_position = segment.next_position + 1
        return hidden

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds of `Timing` that compiling has taken so far, by the wall clock."""
        return {"vision": self._block.seconds, "prefill": self._prefill.seconds, "decode": self._decode.seconds}

    @property
    def seconds(self) -> float:
        """The same of all stages together."""
        return sum(self.by_stage.values())


def compile_model(model: Any, backend: Backend = "inductor") -> Compiled:
    """What goes to `model.compiled`; each part is compiled when it first runs.

    Args:
        model: a Llava.
        backend: of torch.compile.

    Raises:
        UserError: the model runs its own forward, its decoder's attention is eager, or the weights are on several
            ranks.
    """
    llm = model.llm
    if model.answers is not None:
        raise UserError(f"--compile compiles LLaVA's stages, and {model.name} runs its own forward; leave it out.")
    if kernel_of(llm.config) == "eager":
        raise UserError("--compile needs attention by the kernel (sdpa), but this model is set to eager.")
    if getattr(llm, "ranks", 1) > 1 or any(hasattr(weight, "ds_id") for weight in llm.parameters()):
        raise UserError("--compile needs the decoder whole on one device; leave --tensor-parallel and --zero out.")
    return Compiled(model, backend)
