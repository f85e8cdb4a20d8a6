"""Greedy choices: loops that take one token after the other.

Each file holds one choice in two forms. The loop in torch is the reference; it never waits for the device, and where
the cosines of all pairs would need too much memory it makes a few rows of them at a time. On a CPU the same choice is
made on numpy arrays that share the tensors' memory, where a step costs a tenth, and from no more cosines than are
needed (cosines.py). Both choose the same tokens, and of equal ones that with the lower index.
"""

from llava.reduction.greedy.coverage import cover_greedily
from llava.reduction.greedy.determinant import largest_determinant
from llava.reduction.greedy.duplicates import distinct
from llava.reduction.greedy.farthest import farthest_apart, farthest_from

__all__ = ["cover_greedily", "distinct", "farthest_apart", "farthest_from", "largest_determinant"]
