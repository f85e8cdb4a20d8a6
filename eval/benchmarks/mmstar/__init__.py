"""MMStar."""

from eval.benchmarks.mmstar.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
