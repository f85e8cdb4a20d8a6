"""Bytes of the weights that a real rank of two holds, for tests/test_estimate.py."""

from pathlib import Path

from torch import nn

from eval.efficiency.estimate import Spread
from llava.model import parallel
from llava.model.builder import load
from tests.tiny_checkpoints import make_tiny_llava, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_transformers,
    save_qwen_transformers,
)

SPREADS = {
    "tensor parallel": Spread(tensor_parallel=2),
    "zero on the device": Spread(zero="none", zero_ranks=2),
    "zero in memory": Spread(zero="cpu", zero_ranks=2),
}


def save(folder: Path) -> None:
    """One checkpoint per family that can be split. Qwen has biases in its decoder."""
    save_transformers_layout(folder / "llava", make_tiny_llava(intermediate_size=128))
    save_next_transformers(folder / "next", make_tiny_next("mistral", num_key_value_heads=2))
    save_qwen_transformers(folder / "qwen", make_tiny_qwen())


def session(folder: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(family, spread) -> bytes of this rank: whole weights and parts on the device, and partitions of ZeRO."""
    found = {}
    for family in ("llava", "next", "qwen"):
        for name, spread in SPREADS.items():
            model = load(folder / family, device="cpu", tensor_parallel=spread.tensor_parallel, zero=spread.zero)
            found[family, name] = counted(model.hf_model)
    assert parallel.group_size() == 2
    return found


def counted(model: nn.Module) -> dict[str, int]:
    """Bytes that are held whole or cut, and bytes of partitions."""
    held = sum(weight.nbytes for weight in model.parameters())
    parts = sum(weight.ds_tensor.nbytes for weight in model.parameters() if hasattr(weight, "ds_tensor"))
    return {"held": held, "partitions": parts}
