"""DocVQA, questions about scanned pages, as lmms-eval 0.7.3 asks and scores them; see data.py."""

from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset
from eval.benchmarks.documents.data import IDS, SPLITS, Documents
from eval.benchmarks.documents.data import load as load_documents

DOCUMENTS = Documents(
    title="DocVQA",
    config="DocVQA",
    kinds=("question_types", "question type"),
    picture=("ucsf_document_id", "ucsf_document_page_no"),
    submission="docvqa_test_for_submission.json",
    expected={"val": 5349, "test": 5188},
)


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read a split."""
    return load_documents(DOCUMENTS, data, split, profile, source)


BENCHMARK = Benchmark(
    name="docvqa",
    summary="Questions about scanned pages of documents; ANLS.",
    splits=tuple(SPLITS),
    read=load,
    profiles=("lmms",),
    mirror=IDS,
    licence="see https://www.docvqa.org and the data card",
)
