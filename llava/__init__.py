"""Visual token reduction: `reduce` for a model object of transformers, `load` for a checkpoint.

Both are imported when they are first asked for, so that `import llava` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.hf.reduce import reduce
    from llava.model.builder import load

__all__ = ["load", "reduce"]


def __getattr__(name: str) -> Any:
    if name == "reduce":
        from llava.hf.reduce import reduce

        return reduce
    if name == "load":
        from llava.model.builder import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
