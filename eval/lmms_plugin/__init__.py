"""The methods in lmms-eval, as two of its models.

LMMS_EVAL_PLUGINS=eval.lmms_plugin python -m lmms_eval --model llava_reduced \\
    --model_args pretrained=liuhaotian/llava-v1.5-7b,method=consensusdrop,budget=64 --tasks gqa
LMMS_EVAL_PLUGINS=eval.lmms_plugin python -m lmms_eval --model reduced \\
    --model_args base=qwen2_5_vl,pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=divprune,budget=1/9 --tasks gqa

lmms-eval looks for `models` and `tasks` in the package that the variable names.

This module turns lmms-eval's --model_args into a run's configuration. It needs neither lmms-eval nor torch.
"""

from collections.abc import Mapping
from typing import Any

from eval.__main__ import configurations, parser
from eval.config import FULL, RunConfig
from llava.errors import UserError, unknown

# Model argument -> flag of `python -m eval`. "set.alpha=0.5" is an option of the method, "image.merge=spatial" a
# choice of reading images. lmms-eval hands its own --batch_size and --device over, too.
PLAIN = {"pretrained": "model", "batch_size": "batch-size", "text_tower": "text-tower"}
PLAIN |= {name: name for name in ("method", "budget", "dtype", "device", "seed", "quantization")}
GROUPS = {"set": "--set", "image": "--image-option"}


def configuration(arguments: Mapping[str, Any]) -> RunConfig:
    """The same configuration as of `python -m eval` with these arguments.

    Args:
        arguments: name -> value; lmms-eval has turned numbers and truth values into Python's.

    Raises:
        UserError: an unknown argument, a wrong value, or several methods or budgets.
    """
    given = {"method": FULL} | {name: written(value) for name, value in arguments.items()}
    given.pop("max_batch_size", None)  # lmms-eval's limit of the batch size "auto", which is refused
    words = []
    for key, value in given.items():
        group, _, name = key.partition(".")
        if group in GROUPS and name:
            words.append(f"{GROUPS[group]}={name}={value}")
        elif key in PLAIN:
            words.append(f"--{PLAIN[key]}={value}")
        else:
            raise unknown("model argument", key, (*PLAIN, *(f"{name}.KEY" for name in GROUPS)))
    config, *others = configurations(parser().parse_args(words))
    if others:
        raise UserError("llava_reduced runs one method at one budget; name one of each.")
    return config


def written(value: object) -> str:
    """A model argument as it was written, without the quotes that protect its commas from lmms-eval."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip("'\"")
