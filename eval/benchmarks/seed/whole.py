"""SEED-Bench, images and videos together, read from DATA/seed_bench.

    SEED-Bench.json            official questions with answers
    llava-seed-bench.jsonl     LLaVA's question file: question_id, image, text with suffix
    SEED-Bench-image/          official images
    SEED-Bench-video-image/    the middle frame of each video: TYPE_ID.png

Without LLaVA's file the same wording is made from SEED-Bench.json. The image part alone, which most papers on token
reduction print, is the benchmark seed_img.
"""

from functools import partial

from eval.benchmarks.base import Benchmark
from eval.benchmarks.seed.data import LICENCE, MIRROR, NEED_FRAMES, NEEDS, load

BENCHMARK = Benchmark(
    name="seed",
    summary="Multiple choice over twelve kinds of questions about images and videos; share of right letters.",
    splits=("test",),
    read=partial(load, "accuracy"),
    published="58.6 accuracy",
    published_by="LLaVA-1.5-7B, LLaVA's model zoo, over images and videos",
    needs=(*NEEDS, NEED_FRAMES),
    mirror=MIRROR,
    licence=LICENCE,
)
