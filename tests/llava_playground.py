"""A small `playground/data/eval` as LLaVA's evaluation scripts expect it: the first questions of the toy benchmarks."""

import json
import shutil
from itertools import islice
from pathlib import Path

from eval.config import DEFAULT_DATA

MODEL = "liuhaotian/llava-v1.5-13b"  # what the scripts call it
EACH = 4  # questions of a benchmark


def write_playground(root: Path, model: Path) -> Path:
    """Below `root`, with a model under the name that the scripts give it; returns the data folder."""
    (root / MODEL).parent.mkdir(parents=True)
    (root / MODEL).symlink_to(model.absolute())
    data = root / "playground" / "data" / "eval"
    for name in ("gqa", "pope", "textvqa", "scienceqa", "mmbench"):
        shutil.copytree(DEFAULT_DATA / name, data / name, copy_function=link)
    shorten(data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")
    shorten(data / "mmbench" / "mmbench_dev_20230712.tsv", EACH + 1)
    asked = {json.loads(line)["question_id"] for line in shorten(data / "gqa" / "llava_gqa_testdev_balanced.jsonl")}
    keep(data / "gqa" / "data" / "testdev_balanced_questions.json", asked)
    rows = json.loads((data / "scienceqa" / "llava_test_CQM-A.json").read_text())[:EACH]
    rewrite(data / "scienceqa" / "llava_test_CQM-A.json", json.dumps(rows))
    rewrite(data / "scienceqa" / "pid_splits.json", json.dumps({"test": [row["id"] for row in rows]}))
    kept = []
    for labels in sorted((data / "pope" / "coco").iterdir()):
        first = {(row["image"], row["text"]) for row in map(json.loads, shorten(labels, 2))}
        for line in (data / "pope" / "llava_pope_test.jsonl").read_text().splitlines(keepends=True):
            row = json.loads(line)
            if row["category"] in labels.name and (row["image"], row["text"].split("\n")[0]) in first:
                kept.append(line)
    rewrite(data / "pope" / "llava_pope_test.jsonl", "".join(kept))
    return data


def link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def rewrite(path: Path, text: str) -> None:
    """In place of a link to the whole file."""
    path.unlink()
    path.write_text(text)


def shorten(path: Path, lines: int = EACH) -> list[str]:
    """Leave the first lines of a file, and return them."""
    with path.open() as file:
        first = list(islice(file, lines))
    rewrite(path, "".join(first))
    return first


def keep(path: Path, names: set[str]) -> None:
    """Leave these entries of a JSON object."""
    rewrite(path, json.dumps({name: entry for name, entry in json.loads(path.read_text()).items() if name in names}))
