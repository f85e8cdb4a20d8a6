"""What a method returned, checked before it is used: a wrong one ends in one sentence that names the method.

Types, shapes and dtypes are known on the host and always checked. Values are read where they lie on the host. On an
accelerator reading them would stall it at every stage, so there they are read once for each method, options, budget and
stage, which is on the first batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava.errors import MethodError
from llava.reduction.reduction import Reduction

if TYPE_CHECKING:
    from llava.reduction.reducer import Reducer

SHOWN = 12  # indices of a sentence
_read: set[tuple["Reducer", str]] = set()  # those whose values were read from an accelerator


def by_images(
    method: "Reducer", stage: str, returned: Any, ids: Sequence[str], tokens: int
) -> list[tuple[Reduction, range]]:
    """Each reduction and the images that it is of: all of them share one, or have one each; [] for None.

    Args:
        returned: by the method's function `stage`.
        ids: one name per image.
        tokens: of each image.

    Raises:
        MethodError: it is no reduction of these images and tokens.
    """
    if returned is None:
        return []
    if not isinstance(returned, list):
        check(method, stage, returned, ids, tokens)
        return [(returned, range(len(ids)))]
    if len(returned) != len(ids):
        raise mistake(method, stage, f"must return one reduction for each of {len(ids)} images, got {len(returned)}")
    for name, reduction in zip(ids, returned, strict=True):
        check(method, stage, reduction, (name,), tokens)
    return [(reduction, range(row, row + 1)) for row, reduction in enumerate(returned)]


def check(method: "Reducer", stage: str, returned: Any, ids: Sequence[str], tokens: int) -> None:
    """Raise MethodError unless `returned` is one reduction of all these images."""
    count = len(ids)
    if not isinstance(returned, Reduction):
        raise mistake(method, stage, f"must return a Reduction, a list of them or None, got {_kind(returned)}")
    if returned.inputs != tokens:
        raise mistake(method, stage, f"returned a reduction of {returned.inputs} tokens, but each image has {tokens}")
    outputs = returned.kept.shape[-1] if isinstance(returned.kept, Tensor) and returned.kept.dim() else 0
    merged = (returned.assignment is None, returned.merge_weight is None)
    if merged[0] != merged[1] or (returned.merge_matrix is not None and not merged[0]):
        raise mistake(method, stage, "merges by assignment and merge_weight together, or by merge_matrix alone")
    wanted = {
        "kept": (torch.int64, (count, outputs)),
        "assignment": (torch.int64, (count, tokens)),
        "merge_weight": (torch.float32, (count, tokens)),
        "merge_matrix": (torch.float32, (count, outputs, tokens)),
    }
    for name, (dtype, shape) in wanted.items():
        value = getattr(returned, name)
        if value is None and name != "kept":
            continue
        if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
            kind = f"{name} must be {str(dtype).removeprefix('torch.')} of shape {list(shape)}"
            raise mistake(method, stage, f"{kind} for {count} images of {tokens} tokens, got {_kind(value)}")
    if returned.kept.is_meta or (not _on_host(returned.kept) and (method, stage) in _read):
        return
    _read.add((method, stage))
    for name, kept in zip(ids, returned.kept.numpy(force=True), strict=True):
        if problem := _wrong_order(method, kept, tokens, returned.appended):
            raise mistake(method, stage, f"{problem}, got {_indices(kept)} for {name}")
    if returned.assignment is not None:
        target = returned.assignment.numpy(force=True)
        if target.min(initial=0) < -(returned.drops) or target.max(initial=-1) >= outputs:
            least = "-1 (dropped)" if returned.drops else "0 (drops=False)"
            found = f"{target.min()} to {target.max()}"
            raise mistake(method, stage, f"assignment must be {least} to {outputs - 1} (output tokens), got {found}")


def mistake(method: "Reducer", stage: str, problem: str) -> MethodError:
    """The error for what `stage` of a method did wrong."""
    return MethodError(f"{method.name}.{stage}: {problem}.")


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _wrong_order(method: "Reducer", kept: np.ndarray, tokens: int, appended: int) -> str:
    """What is wrong with the indices [K] of one image; "" for nothing."""
    raster = kept[: len(kept) - appended]
    if not len(kept) or kept.min() < 0 or kept.max() >= tokens:
        return f"kept must hold indices of the {tokens} tokens, 0 to {tokens - 1}"
    if not method.deviates("duplicates") and len(np.unique(kept)) < len(kept):
        return "kept must not hold a token twice"
    if not method.deviates("unsorted") and (raster[1:] < raster[:-1]).any():
        return "kept must ascend (kept.sort(dim=1).values), but for tokens that `appended` counts at the end"
    return ""


def _kind(value: Any) -> str:
    """A tensor's type and shape, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    return f"{value!r}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _indices(kept: np.ndarray) -> str:
    return f"[{', '.join(map(str, kept[:SHOWN]))}{', ...' if len(kept) > SHOWN else ''}]"
