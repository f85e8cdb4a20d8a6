"""Flickr30k captions, asked as lmms-eval asks.

Official layout, read from DATA/flickr30k:

    dataset_flickr30k.json    Karpathy's split; its 1,000 test images are what papers report
    flickr30k-images/

Mirror: flickr30k, split test: caption (list), img_id, image. lmms-eval's numbers are over all images of that table,
which are many more than Karpathy's test images: the two are not comparable, the number of images is in every result.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, fingerprint
from eval.benchmarks.captions import data as captioning
from eval.benchmarks.hub import local_copy, open_table
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, Texts, TypedDict, check_list
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/flickr30k", "lmms-lab/flickr30k")
SPLIT_FILE = "flickr30k/dataset_flickr30k.json"
IMAGES = "flickr30k/flickr30k-images"


class Sentence(TypedDict):
    """A caption of Karpathy's file."""

    raw: Filled


class Image(TypedDict):
    """An image of Karpathy's file."""

    imgid: Id
    filename: Filled
    split: str
    sentences: Annotated[list[Sentence], Field(min_length=1)]


class MirrorRow(TypedDict):
    """A row of the mirror."""

    img_id: Id
    caption: Texts


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """The test images with their five captions each."""
    official = is_file(data / SPLIT_FILE)
    if source == "official" or (source == "auto" and official):
        return from_karpathy(data, split)
    if source == "auto" and local_copy(data, MIRROR) is None:
        raise UserError(
            f"No Flickr30k at {data / SPLIT_FILE} nor a copy of {MIRROR[0]} below {data / 'hub'}; "
            "get one of them, or let --source mirror read the hub."
        )
    table = open_table(data, MIRROR, None, split, download=source == "mirror")
    images: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for row, record in enumerate(table.records(MirrorRow)):
        name = str(record["img_id"])
        captioning.add(images, name, f"{row}/image", table.where)
        references[name] = record["caption"]
    return captioning.dataset(
        f"Flickr30k {split}",
        images,
        references,
        table.pictures(),
        table.fingerprint(("img_id", "caption")),
        f"mirror {table.id}",
        file=f"flickr30k_{split}_results.json",
    )


def from_karpathy(data: Path, split: str) -> Dataset:
    """The images that Karpathy's file puts into `split`."""
    path = data / SPLIT_FILE
    if not is_file(path):
        raise UserError(f"No Flickr30k at {path}; it is in Karpathy's caption_datasets.zip.")
    images: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for number, record in enumerate(check_list(path, Image, "images"), start=1):
        if record["split"] != split:
            continue
        name = str(record["imgid"])
        captioning.add(images, name, image_name(record["filename"], f"{path} entry {number}"), str(path))
        references[name] = [sentence["raw"] for sentence in record["sentences"]]
    if not images:
        raise UserError(f"{path} should list images with the split {split!r}, and has none.")
    return captioning.dataset(
        f"Flickr30k {split}",
        images,
        references,
        Folder(data / IMAGES),
        fingerprint([path]),
        "official: Karpathy's split",
        file=f"flickr30k_{split}_results.json",
    )


BENCHMARK = Benchmark(
    name="flickr30k",
    summary="One-sentence captions of everyday photographs; CIDEr against five references.",
    splits=("test",),
    read=load,
    profiles=("lmms",),
    needs=(
        Need(SPLIT_FILE, "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"),
        Need(IMAGES, "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)", count=31783),
    ),
    mirror=MIRROR,
    licence="images: Flickr terms of use, research only",
)
