"""Inputs and results of official selection functions that were run on random numbers, in tests/data/vectors/.

One NAME.npz for each method holds the arrays and, as `about`, a JSON text: repository@commit, function and licence of
the code that was run, how the numbers were made, and the cases with the expected indices. No code is taken from there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "vectors"


def vectors(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is known about the recording, with its "cases", and its arrays; floating point numbers as float64."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "about"}
        about = json.loads(str(file["about"]))
    return about, {key: one.double() if one.is_floating_point() else one for key, one in arrays.items()}
