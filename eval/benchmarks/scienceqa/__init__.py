"""ScienceQA."""

from eval.benchmarks.scienceqa.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
