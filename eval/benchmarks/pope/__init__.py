"""POPE."""

from eval.benchmarks.pope.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
