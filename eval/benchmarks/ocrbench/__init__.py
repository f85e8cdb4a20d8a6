"""OCRBench."""

from eval.benchmarks.ocrbench.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
