"""The image part of SEED-Bench (SEED-IMG, types 1 to 9); the files are those of eval/benchmarks/seed/whole.py.

The frames of videos are not needed. An answer file over all of SEED-Bench is accepted, its other answers are ignored.
"""

from functools import partial

from eval.benchmarks.base import Benchmark
from eval.benchmarks.seed.data import LICENCE, MIRROR, NEEDS, load

BENCHMARK = Benchmark(
    name="seed_img",
    summary="The questions of SEED-Bench about images (SEED-IMG); share of right letters.",
    splits=("test",),
    read=partial(load, "image_accuracy"),
    published="70.2 accuracy (1.6-7B)",
    published_by="LLaVA-1.6-7B, LLaVA's model zoo; the zoo's number of LLaVA-1.5-7B is over videos too",
    needs=NEEDS,
    mirror=MIRROR,
    licence=LICENCE,
)
