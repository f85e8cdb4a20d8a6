"""MMBench in English, read from DATA/mmbench or from a copy of lmms-eval's data set.

    mmbench_dev_20230712.tsv    index, question, hint, A to D, answer, category, l2-category, image (base64), ...

Every question stands there two to four times with its options rotated; it counts as answered if all of them are
(metric.py). The newer files mmbench_dev_en_20231003.tsv and MMBench_DEV_EN.tsv are read too: they have 1,164 groups
instead of 1,176, and the number of groups stands in the result. The split `test` has no public answers.
"""

from functools import partial

from eval.benchmarks.base import Benchmark, Need
from eval.benchmarks.mmbench.data import MIRROR, Edition, load
from eval.benchmarks.prompts import LETTER

EDITION = Edition(
    title="MMBench",
    config="en",
    files={
        split: (
            f"mmbench/mmbench_{split}_20230712.tsv",
            f"mmbench/mmbench_{split}_en_20231003.tsv",
            f"mmbench/MMBench_{split.upper()}_EN.tsv",
        )
        for split in ("dev", "test")
    },
    suffix=LETTER,
    suffix_lmms=LETTER,
    max_new_tokens_lmms=1024,
    nan_is_hint=False,
    groups=1176,
)

BENCHMARK = Benchmark(
    name="mmbench",
    summary="Multiple choice over twenty abilities; right only if it is for every rotation of the options.",
    splits=("dev", "test"),
    read=partial(load, EDITION),
    published="64.3 accuracy",
    published_by=(
        "LLaVA-1.5-7B, LLaVA's model zoo, on dev with 1,176 groups; 64.69 in a re-run of the released weights"
        " with LLaVA's scripts in FasterVLM's EVAL.md"
    ),
    needs=(
        Need(
            "mmbench/mmbench_dev_20230712.tsv",
            "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv (4,377 rows)",
            others=("mmbench/mmbench_dev_en_20231003.tsv", "mmbench/MMBench_DEV_EN.tsv"),
        ),
    ),
    mirror=MIRROR,
    licence="Apache-2.0 (MMBench repository)",
)
