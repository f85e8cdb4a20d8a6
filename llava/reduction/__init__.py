"""What a method imports: the base class, the states it is given, reductions, scores and the registry."""

from llava.reduction.reducer import Reducer, option
from llava.reduction.reduction import Reduction, Step, Trace, gather_tokens, keep_top

__all__ = ["Reducer", "Reduction", "Step", "Trace", "gather_tokens", "keep_top", "option"]
