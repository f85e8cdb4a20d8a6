"""Small files of judged benchmarks, and their scores with verdicts from disk."""

import json
from pathlib import Path

from eval import benchmarks
from eval.judging.choice import score_answers


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def load(name: str, data: Path, **options):
    return benchmarks.get(name).load(data, "test", **options)


def judged(data, verdicts: Path, texts):
    return score_answers(data, str(verdicts), list(texts), texts, verdicts.parent / "answers.jsonl")[0]
