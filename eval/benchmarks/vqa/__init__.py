"""Short answers against those of ten people: VQAv2, TextVQA, VizWiz."""

from eval.benchmarks.vqa import textvqa, vizwiz, vqav2

BENCHMARKS = (
    vqav2.BENCHMARK,
    textvqa.BENCHMARK,
    vizwiz.BENCHMARK,
)
