"""This repository's methods as a model of lmms-eval, under the name `llava_reduced`.

LMMS_EVAL_PLUGINS=eval.lmms_plugin python -m lmms_eval --model llava_reduced \\
    --model_args pretrained=liuhaotian/llava-v1.5-7b,method=consensusdrop,budget=64 --tasks gqa

lmms-eval looks for `models` and `tasks` in the package that the variable names. An installed package can name
`manifest` as an entry point of the group "lmms_eval.models" instead.

This module turns lmms-eval's --model_args into a run's configuration. It needs neither lmms-eval nor torch.
"""

from collections.abc import Mapping
from typing import Any

from eval.config import DEFAULT_MODEL, RunConfig, budget_of, whole_number
from llava.budget import RETENTION_RATIO, count_or_ratio
from llava.errors import UserError, unknown

NAME = "llava_reduced"
CLASS = f"{__name__}.models.{NAME}.LlavaReduced"
# Those of lmms-eval's own flags (--batch_size, --max_batch_size, --device) are handed over with --model_args.
PLAIN = (
    "pretrained",
    "method",
    "budget",
    "batch_size",
    "max_batch_size",
    "dtype",
    "device",
    "seed",
    "quantization",
    "text_tower",
)
# "set.alpha=0.5" is an option of the method, "picture.merge=spatial" a choice of reading images.
GROUPS = ("set", "picture")
DTYPES = ("float32", "bfloat16", "float16")


def configuration(arguments: Mapping[str, Any]) -> RunConfig:
    """The same configuration as of `python -m eval` with these arguments.

    Args:
        arguments: name -> value; lmms-eval has turned numbers and truth values into Python's.
    """
    plain: dict[str, str] = {}
    grouped: dict[str, dict[str, str]] = {name: {} for name in GROUPS}
    for key, value in arguments.items():
        group, dot, name = key.partition(".")
        if dot and group in GROUPS and name:
            grouped[group][name] = text(value)
        elif key in PLAIN:
            plain[key] = text(value)
        else:
            raise unknown("model argument", key, (*PLAIN, *(f"{name}.KEY" for name in GROUPS)))
    options = grouped["set"]
    try:
        budget, chosen = budget_of(count_or_ratio(plain["budget"]) if "budget" in plain else None)
    except ValueError as error:
        raise UserError(f"budget {error}.") from None
    if chosen and RETENTION_RATIO in options:
        raise UserError(f"A budget of {plain['budget']} and set.{RETENTION_RATIO} are both given; leave one out.")
    dtype = plain.get("dtype", "float32")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return RunConfig(
        method=plain.get("method", "full"),
        budget=budget,
        model=plain.get("pretrained", DEFAULT_MODEL),
        options=options | chosen,
        picture=grouped["picture"],
        quantization=plain.get("quantization"),
        text_tower=plain.get("text_tower"),
        dtype=dtype,
        device=plain.get("device", "auto"),
        batch_size=batch_size(plain),
        seed=whole_number("seed", plain.get("seed", "0"), minimum=0, maximum=2**32 - 1),
    )


def text(value: Any) -> str:
    """A value as the command line of `python -m eval` has it; quotes protect commas from lmms-eval and are dropped."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip("'\"")


def batch_size(plain: Mapping[str, str]) -> int:
    """Questions answered at once."""
    if plain.get("batch_size", "").startswith("auto"):
        raise UserError("batch_size should be a number: llava_reduced does not search for the largest batch.")
    size = plain.get("batch_size", "1")
    return min(whole_number("batch_size", size), whole_number("max_batch_size", plain.get("max_batch_size", size)))


def manifest() -> Any:
    """What an entry point hands to lmms-eval (lmms_eval.models.registry_v2.ModelManifest)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=CLASS)
