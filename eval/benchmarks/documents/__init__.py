"""DocVQA and InfographicVQA."""

from eval.benchmarks.documents import docvqa, infovqa

BENCHMARKS = (
    docvqa.BENCHMARK,
    infovqa.BENCHMARK,
)
