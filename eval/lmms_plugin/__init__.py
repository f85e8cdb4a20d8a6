"""This repository's methods as a model of lmms-eval, under the name `llava_reduced`.

LMMS_EVAL_PLUGINS=eval.lmms_plugin python -m lmms_eval --model llava_reduced \\
    --model_args pretrained=liuhaotian/llava-v1.5-7b,method=consensusdrop,budget=64 --tasks gqa

lmms-eval looks for `models` and `tasks` in the package that the variable names. An installed package can name
`manifest` as an entry point of the group "lmms_eval.models" instead.
"""

from typing import Any

NAME = "llava_reduced"
CLASS = f"{__name__}.models.{NAME}.LlavaReduced"


def manifest() -> Any:
    """What an entry point hands to lmms-eval (lmms_eval.models.registry_v2.ModelManifest)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=CLASS)
