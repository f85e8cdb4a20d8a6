"""Quantise the decoder to 8 or 4 bits while it is loaded, with bitsandbytes through transformers.

Towers, projector and head keep the requested dtype: methods rank tokens by what the tower computes, and the tower is a
thirtieth of the weights.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py (NF4 with double quantisation for 4 bits)
Differs from it: the projector is not quantised; the requested dtype is used to compute, not always float16.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from llava.errors import UserError, unknown

Quantization = Literal["8bit", "4bit"]
CHOICES: tuple[Quantization, ...] = ("8bit", "4bit")

# Modules of the HF model that are not quantised.
KEPT = (
    "model.vision_tower",
    "model.image_tower",
    "model.video_tower",
    "model.visual",
    "model.multi_modal_projector",
    "lm_head",
)


def check_quantization(choice: str | None) -> None:
    """Raise UserError for an unknown choice or a missing package, before anything is read."""
    if choice is None:
        return
    if choice not in CHOICES:
        raise unknown("quantization", choice, CHOICES)
    _require_bitsandbytes(f"quantization {choice!r}")


def quantised_loading(
    config: PretrainedConfig, choice: str | None, dtype: torch.dtype, directory: Path
) -> dict[str, Any]:
    """Return further arguments of from_pretrained; empty for a model that is not quantised.

    Args:
        config: of the HF model. If the files are quantised already, transformers reads from it how.
        choice: "8bit", "4bit" or None.
        dtype: in which a 4-bit layer computes.
        directory: of the checkpoint, for errors.
    """
    check_quantization(choice)
    method = stored_method(config)
    if method is not None:
        if choice is not None:
            raise UserError(f"{directory} is quantised already; load it without quantization {choice!r}.")
        # The library would ignore an unknown method and read the quantised weights as if they were plain.
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise UserError(f"{directory} is quantised with {method}, which is not supported; take it unquantised.")
        if method.startswith("bitsandbytes"):
            _require_bitsandbytes(f"{directory}, which is quantised with bitsandbytes,")
        return {"quantization_config": None}  # transformers uses that of config.json
    if choice is None:
        return {}
    if choice == "8bit":
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=list(KEPT),
        )
    return {"quantization_config": made}


def stored_method(config: PretrainedConfig) -> str | None:
    """Return transformers' name of the method with which the files are quantised; None if they are not."""
    parts = config, config.get_text_config(decoder=True)
    found = next((part.quantization_config for part in parts if getattr(part, "quantization_config", None)), None)
    if found is None:
        return None
    stored = found.to_dict() if hasattr(found, "to_dict") else found
    bits = next((bits for bits in CHOICES if stored.get(f"load_in_{bits}")), None)
    return f"bitsandbytes_{bits}" if bits else str(stored.get("quant_method", "an unnamed method"))


def _require_bitsandbytes(what: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes, which is not installed; pip install bitsandbytes.")
