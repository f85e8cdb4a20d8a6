"""TGIF-QA in Video-LLaVA's layout; see eval/benchmarks/video/sets.py. Answers are judged, see eval/judging/."""

from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset
from eval.benchmarks.video.sets import VideoSet, load_official

SET = VideoSet("tgif_qa", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4", count=25751)


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The test split from its official files; no mirror is known."""
    return load_official(SET, data, source)


BENCHMARK = Benchmark(
    name="tgif_qa",
    summary="Questions about animated GIFs: actions, counts, frames, transitions; judged by GPT-3.5.",
    splits=("test",),
    read=load,
    profiles=("llava",),
    model="tinyllava_video",
    published="70.0 accuracy, 4.0 score",
    published_by=(
        "Video-LLaVA-7B's paper, judged by gpt-3.5-turbo; 47.1 in re-runs of papers on token reduction; 19.8 "
        "on the first 1,000 questions, which are all about actions"
    ),
    needs=SET.needs,
    licence="the GIFs belong to their owners on Tumblr; TGIF-QA's annotations name none",
)
