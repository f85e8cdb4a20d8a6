"""SEED-Bench, and its image part alone."""

from eval.benchmarks.seed import image_part, whole

BENCHMARKS = (
    whole.BENCHMARK,
    image_part.BENCHMARK,
)
