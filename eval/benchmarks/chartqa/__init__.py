"""ChartQA."""

from eval.benchmarks.chartqa.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
