"""GQA."""

from eval.benchmarks.gqa.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
