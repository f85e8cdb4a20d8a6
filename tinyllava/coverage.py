"""Which thing a patch shows, from which thing a pixel shows."""

import numpy as np

from tinyllava.scenes import PATCH


def patch_owners(planes: np.ndarray) -> np.ndarray:
    """[n, S, S] integers, the thing of every pixel or -1 -> [n, P] int8: the thing that covers an eighth of a patch.

    The most covering one where there are several, the lower number of equals, -1 where there is none.
    """
    planes, grid = np.asarray(planes, np.int64) + 1, planes.shape[-1] // PATCH
    patches = planes.reshape(-1, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, PATCH * PATCH)
    counts = np.zeros((len(patches), max(2, int(planes.max()) + 1)), np.int64)
    np.add.at(counts, (np.repeat(np.arange(len(patches)), PATCH * PATCH), patches.ravel()), 1)
    covered = counts[:, 1:]
    best = np.where(covered.max(1) >= PATCH * PATCH // 8, covered.argmax(1), -1)
    return best.astype(np.int8).reshape(len(planes), grid * grid)
