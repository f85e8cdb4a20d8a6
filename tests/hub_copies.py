"""Tiny data sets as they lie on the hub, for tests of the benchmarks that read them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def picture(shade: int) -> dict[str, Any]:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def write(data: Path, name: str, split: str, rows: Sequence[Mapping[str, Any]], config: str = "") -> None:
    """A data set as it lies on the hub; columns with "image" in their name hold pictures."""
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    for column in table.column_names:
        if column.startswith("image") and column != "image_url":
            table = table.cast_column(column, datasets.Image())
    folder = data / "hub" / name / (config or "data")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    if config:
        paths = f"data_files: [{{split: {split}, path: {config}/{split}-*}}]"
        (data / "hub" / name / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  {paths}\n---\n")
