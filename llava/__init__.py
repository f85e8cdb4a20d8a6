"""Visual token reduction: `reduce` for a model object of transformers, `load` for a checkpoint.

Both are imported when they are first asked for, so that `import llava` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.hf.reduce import reduce
    from llava.model.builder import load
    from llava.model.official_names import LlavaLlamaForCausalLM

# The version of the whole distribution; pyproject.toml reads it here.
__version__ = "1.0.0"
__all__ = ["LlavaLlamaForCausalLM", "load", "reduce"]

HOMES = {
    "load": "llava.model.builder",
    "reduce": "llava.hf.reduce",
    "LlavaLlamaForCausalLM": "llava.model.official_names",  # scripts written for LLaVA's own package import it
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
