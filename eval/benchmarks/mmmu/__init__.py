"""MMMU."""

from eval.benchmarks.mmmu.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
