"""InfographicVQA, questions about infographics, as lmms-eval 0.7.3 asks and scores them; see data.py."""

from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset
from eval.benchmarks.documents.data import IDS, SPLITS, Documents
from eval.benchmarks.documents.data import load as load_documents

DOCUMENTS = Documents(
    title="InfographicVQA",
    config="InfographicVQA",
    kinds=("answer_type", "answer type"),
    picture=("image_url",),
    submission="infovqa_test_for_submission.json",
    expected={"val": 2801, "test": 3288},
)


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read a split."""
    return load_documents(DOCUMENTS, data, split, profile, source)


BENCHMARK = Benchmark(
    name="infovqa",
    summary="Questions about infographics; ANLS.",
    splits=tuple(SPLITS),
    read=load,
    profiles=("lmms",),
    mirror=IDS,
    licence="see https://www.docvqa.org and the data card",
)
