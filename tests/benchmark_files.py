"""Small files of benchmarks: documents, images, data sets as they lie on the hub, and scores of judged answers."""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from eval import benchmarks
from eval.judging.choice import score_answers


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edit_line(path: Path, number: int, **changes: Any) -> None:
    """Change fields of one line (counted from 1); None removes a field."""
    lines = path.read_text().splitlines()
    row = {**json.loads(lines[number - 1]), **changes}
    lines[number - 1] = json.dumps({key: value for key, value in row.items() if value is not None})
    path.write_text("\n".join(lines) + "\n")


def write_json(path: Path, content: Any) -> Path:
    """A JSON document, or JSON lines where the name says so."""
    if path.suffix == ".jsonl":
        return write_lines(path, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def png(colour: str | tuple[int, int, int] = "red", size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def cell(colour: str | tuple[int, int, int] = "red") -> dict[str, Any]:
    """An image as the tables of the hub hold it."""
    return {"bytes": png(colour), "path": None}


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
    return path


def write_hub(data: Path, name: str, split: str, rows: Sequence[Mapping[str, Any]], config: str = "") -> Path:
    """A data set below DATA/hub; the columns image, image_1, ... hold cells with images, or lists of them.

    Returns:
        DATA.
    """
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    for column in table.column_names:
        if re.fullmatch(r"image(_\d)?", column):
            listed = isinstance(rows[0][column], list)
            table = table.cast_column(column, datasets.List(datasets.Image()) if listed else datasets.Image())
    folder = data / "hub" / name
    (folder / (config or "data")).mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / (config or "data") / f"{split}-00000-of-00001.parquet")
    if config:
        page = folder / "README.md"
        known = page.read_text().removeprefix("---\nconfigs:\n").removesuffix("---\n") if page.exists() else ""
        files = f"[{{split: {split}, path: {config}/{split}-*}}]"
        page.write_text(f"---\nconfigs:\n{known}- config_name: {config}\n  data_files: {files}\n---\n")
    return data


def load(name: str, data: Path, profile: str | None = None, split: str | None = None, source: str = "auto") -> Any:
    benchmark = benchmarks.get(name)
    return benchmark.load(data, benchmarks.check_split(benchmark, split), profile, source)


def right_answers(data: Any, *wrong: str) -> dict[str, str]:
    """Right answers to yes-or-no questions, but for the ids in `wrong`."""
    turned = {"yes": "No", "no": "Yes"}
    return {q.id: turned[q.answer] if q.id in wrong else q.answer.capitalize() for q in data.questions}


def scored(data: Any, texts: Mapping[str, str]) -> Any:
    """The score of answers to all questions."""
    return data.score([question.id for question in data.questions], texts)


def judged(data: Any, verdicts: Path, texts: Mapping[str, str]) -> Any:
    """The score of judged answers with verdicts from disk."""
    return score_answers(data, str(verdicts), list(texts), texts, verdicts.parent / "answers.jsonl")[0]
