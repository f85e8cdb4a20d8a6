"""LLaVA-Bench-in-the-Wild."""

from eval.benchmarks.llava_bench.data import BENCHMARK

BENCHMARKS = (BENCHMARK,)
