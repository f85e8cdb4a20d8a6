"""MME."""

from eval.benchmarks.mme.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
