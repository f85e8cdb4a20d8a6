"""MM-Vet."""

from eval.benchmarks.mmvet.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
