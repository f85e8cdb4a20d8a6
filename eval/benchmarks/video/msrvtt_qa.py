"""MSRVTT-QA in Video-LLaVA's layout; see eval/benchmarks/video/sets.py. Answers are judged, see eval/judging/."""

from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset
from eval.benchmarks.video.sets import VideoSet, load_official

SET = VideoSet("msrvtt_qa", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", "videos/all", count=72821)


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The test split from its official files; no mirror is known."""
    return load_official(SET, data, source)


BENCHMARK = Benchmark(
    name="msrvtt_qa",
    summary="Questions about web videos of twenty categories; judged by GPT-3.5.",
    splits=("test",),
    read=load,
    profiles=("llava",),
    model="tinyllava_video",
    published="59.2 accuracy, 3.5 score",
    published_by=(
        "Video-LLaVA-7B's paper, judged by gpt-3.5-turbo; 56.7 in re-runs of papers on token reduction, whose"
        " judge was another version"
    ),
    needs=SET.needs,
    licence="the authors of MSR-VTT name none for the videos",
)
