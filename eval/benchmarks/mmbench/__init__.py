"""MMBench in English and in Chinese."""

from eval.benchmarks.mmbench import chinese, english

BENCHMARKS = (
    english.BENCHMARK,
    chinese.BENCHMARK,
)
