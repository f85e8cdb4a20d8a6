"""Flickr30k and NoCaps as tables of the hub: one picture a row, with captions as people might write them."""

from collections.abc import Iterator
from pathlib import Path

from toy.benchmarks.files import IMAGE, INTEGER, STRING, STRINGS, fresh, write_table
from toy.benchmarks.pictures import Picture, copied
from toy.benchmarks.tables import OWNER
from toy.data.formats import caption_references
from toy.data.questions import Retry

PICTURES = 20


def write(root: Path) -> None:
    """Both sets below ROOT/hub."""
    hub = root / "hub" / OWNER
    write_flickr(fresh(hub / "flickr30k"))
    write_nocaps(fresh(hub / "NoCaps"))


def captioned(pictures: list[Picture]) -> Iterator[tuple[Picture, tuple[str, ...]]]:
    """The first pictures whose big shapes have a clear order, each with five captions."""
    made = 0
    for picture in pictures:
        try:
            references = caption_references(picture.things)
        except Retry:
            continue
        made += 1
        if made <= PICTURES:
            yield picture, references


def write_flickr(folder: Path) -> None:
    """Five captions a picture."""
    columns = {"image": IMAGE, "caption": STRINGS, "sentids": STRINGS, "split": STRING, "img_id": STRING}
    rows = [
        {"image": picture.cell, "caption": list(captions), "sentids": [str(5 * row + place) for place in range(5)]}
        | {"split": "test", "img_id": str(row), "filename": picture.file}
        for row, (picture, captions) in enumerate(captioned(copied(48)))
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", {**columns, "filename": STRING}, rows)


def write_nocaps(folder: Path) -> None:
    """Ten captions a picture: the five, and the five in other words."""
    columns = {"image": IMAGE, "image_id": INTEGER, "image_file_name": STRING, "annotations_captions": STRINGS}
    rows = [
        {"image": picture.cell, "image_id": row, "image_file_name": picture.file}
        | {
            "annotations_captions": [
                *captions,
                *(f"a drawing of {captions[place]}" for place in (0, 3)),
                *others(captions),
            ]
        }
        for row, (picture, captions) in enumerate(captioned(copied(48, 60)))
    ]
    write_table(folder / "data" / "validation-00000-of-00001.parquet", columns, rows)
    # The captions of the test split are not public.
    hidden = [
        {"image": picture.cell, "image_id": 1000 + row, "image_file_name": picture.file}
        for row, picture in enumerate(copied(6, 48))
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, hidden)


def others(captions: tuple[str, ...]) -> tuple[str, str, str]:
    """Three more captions."""
    plain = captions[0].replace("big ", "")
    return plain, f"a picture with {plain}", f"{captions[0]} on a plain background"
