"""The option `--compile`: vision tower, prefill and decoding of a model as compiled graphs of fixed shapes.

Sums are taken in another order than in the plain way, so the last bits of scores and logits differ.
"""

import logging
from dataclasses import dataclass
from typing import Any, Protocol

from llava.errors import UserError
from llava.pipeline.faster.compiled_layers import CompiledLayers
from llava.pipeline.faster.compiled_step import CompiledStep
from llava.pipeline.faster.compiled_tower import CompiledTower
from llava.pipeline.faster.graphs import Backend

log = logging.getLogger(__name__)


class Model(Protocol):
    """What of a Llava is compiled, or decides whether it can be."""

    name: str
    llm: Any
    tower: Any
    shares_prefix: bool


@dataclass(frozen=True)
class Compiled:
    """The compiled parts of a model.

    Attributes:
        tower: in place of `clip_encoder.run_blocks`; None for a tower of another kind.
        layers: in place of `decoder.run_segment`.
        step: in place of `decoder.step`.
    """

    tower: CompiledTower | None
    layers: CompiledLayers
    step: CompiledStep

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds of `Timing` that compiling has taken so far, by the wall clock."""
        tower = 0.0 if self.tower is None else self.tower.graphs.seconds
        return {"vision": tower, "prefill": self.layers.graphs.seconds, "decode": self.step.graphs.seconds}

    @property
    def seconds(self) -> float:
        """The same of all stages together."""
        return sum(self.by_stage.values())


def compile_model(model: Model, backend: Backend = "inductor") -> Compiled:
    """What goes to `model.compiled`; each graph is compiled when its shape first comes.

    Args:
        backend: of torch.compile.

    Raises:
        UserError: the decoder's attention is eager, or its weights are spread over ranks.
    """
    llm = model.llm
    if llm.config._attn_implementation == "eager":
        raise UserError("--compile needs attention by the kernel (sdpa), but this model is set to eager.")
    if getattr(llm, "ranks", 1) > 1 or any(hasattr(weight, "ds_id") for weight in llm.parameters()):
        raise UserError("--compile needs the decoder whole on one device; leave --tensor-parallel and --zero out.")
    common = hasattr(model.tower, "encoder")  # Qwen's has blocks of its own kind
    if not common:
        log.warning("--compile: the vision tower of %s is not compiled; prefill and decoding are.", model.name)
    if model.shares_prefix:
        log.warning("--compile: with --share-prefix the prefill is not compiled; tower and decoding are.")
    tower = CompiledTower(model.tower, backend) if common else None
    return Compiled(tower, CompiledLayers(llm, backend), CompiledStep(llm, backend))
