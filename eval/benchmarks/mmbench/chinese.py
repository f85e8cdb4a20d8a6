"""MMBench in Chinese, read from DATA/mmbench or DATA/mmbench_cn, or from a copy of lmms-eval's data set.

    mmbench_dev_cn_20231003.tsv    the columns of the English file

LLaVA's documentation puts the file under mmbench/, its script reads mmbench_cn/: both are looked at. For everything
else see eval/benchmarks/mmbench/english.py.
"""

from functools import partial

from eval.benchmarks.base import Benchmark, Need
from eval.benchmarks.mmbench.data import MIRROR, Edition, load
from eval.benchmarks.prompts import LETTER_CN

EDITION = Edition(
    title="MMBench-CN",
    config="cn",
    files={
        split: tuple(
            f"{folder}/{name}.tsv"
            for name in (f"mmbench_{split}_cn_20231003", f"MMBench_{split.upper()}_CN")
            for folder in ("mmbench", "mmbench_cn")
        )
        for split in ("dev", "test")
    },
    suffix=LETTER_CN,
    suffix_lmms="请直接使用所提供的选项字母作为答案回答。",
    max_new_tokens_lmms=256,
    nan_is_hint=True,
)

BENCHMARK = Benchmark(
    name="mmbench_cn",
    summary="MMBench in Chinese; right only if it is for every rotation of the options.",
    splits=("dev", "test"),
    read=partial(load, EDITION),
    published="58.3 accuracy",
    published_by=(
        "LLaVA-1.5-7B, LLaVA's model zoo, on dev; 58.08 in a re-run of the released weights with LLaVA's "
        "scripts in FasterVLM's EVAL.md"
    ),
    needs=(
        Need(
            "mmbench/mmbench_dev_cn_20231003.tsv",
            "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_cn_20231003.tsv",
            others=(
                "mmbench_cn/mmbench_dev_cn_20231003.tsv",
                "mmbench/MMBench_DEV_CN.tsv",
                "mmbench_cn/MMBench_DEV_CN.tsv",
            ),
        ),
    ),
    mirror=MIRROR,
    licence="Apache-2.0 (MMBench repository)",
)
