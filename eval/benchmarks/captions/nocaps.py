"""NoCaps: captions of objects that COCO captions do not name, asked as lmms-eval asks.

Official layout, read from DATA/nocaps, in COCO format:

    nocaps_val_4500_captions.json    4,500 images with ten captions each and their domain
    nocaps_test_image_info.json      10,600 images without captions
    validation/, test/               the images

Mirror: NoCaps, splits validation and test: image, image_id, annotations_captions. It has no domains; where a table has
a column "domain", CIDEr is broken down by it as for the official file.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eval.answers.jsonl import is_file, read_json
from eval.benchmarks.base import Benchmark, Dataset, Need, fingerprint
from eval.benchmarks.captions import data as captioning
from eval.benchmarks.hub import local_copy, open_table
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, check
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/NoCaps", "lmms-lab/NoCaps")
FILES = {"validation": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
SOURCE = "https://nocaps.org/download"
SERVER = "the NoCaps challenge of EvalAI"


class Image(TypedDict):
    """An image of the official file."""

    id: Id
    file_name: Filled
    domain: NotRequired[str | None]


class Annotation(TypedDict):
    """A caption of the official file."""

    image_id: Id
    caption: Filled


class Coco(TypedDict):
    """The official file; the one of split test has no captions."""

    images: Annotated[list[Image], Field(min_length=1)]
    annotations: NotRequired[list[Annotation]]


class TestRow(TypedDict):
    """A row of the mirror's split test."""

    image_id: Id
    domain: NotRequired[str | None]


class ValidationRow(TestRow):
    """A row of the mirror's split validation."""

    annotations_captions: Texts


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """One split; `test` has no references and gives a results file only."""
    path = data / "nocaps" / FILES[split]
    if source == "official" or (source == "auto" and is_file(path)):
        return from_coco(path, split)
    if source == "auto" and local_copy(data, MIRROR) is None:
        raise UserError(
            f"No NoCaps at {path} nor a copy of {MIRROR[0]} below {data / 'hub'}; "
            f"get one of them ({SOURCE}), or let --source mirror read the hub."
        )
    return from_mirror(data, split, source)


def from_mirror(data: Path, split: str, source: str) -> Dataset:
    """The data set of the hub."""
    table = open_table(data, MIRROR, None, split, download=source == "mirror")
    scored = split != "test"
    columns = ("image_id", "annotations_captions") if scored else ("image_id",)
    images: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    domains: dict[str, str] = {}
    records: Sequence[TestRow]
    if scored:
        captioned = table.records(ValidationRow)
        references = {str(record["image_id"]): record["annotations_captions"] for record in captioned}
        records = captioned
    else:
        records = table.records(TestRow)
    for row, record in enumerate(records):
        name = str(record["image_id"])
        captioning.add(images, name, f"{row}/image", table.where)
        if domain := record.get("domain"):
            domains[name] = domain
    return finish(
        split, images, references, domains, table.pictures(), table.fingerprint(columns), f"mirror {table.id}"
    )


def from_coco(path: Path, split: str) -> Dataset:
    """The official file."""
    if not is_file(path):
        raise UserError(f"No NoCaps {split} images at {path}; get the file from {SOURCE}.")
    content = check(Coco, read_json(path), str(path))
    images: dict[str, str] = {}
    domains: dict[str, str] = {}
    for number, record in enumerate(content["images"], start=1):
        where = f"{path} image {number}"
        name = str(record["id"])
        captioning.add(images, name, image_name(record["file_name"], where), str(path))
        if domain := record.get("domain"):
            domains[name] = domain
    references: dict[str, list[str]] = defaultdict(list)
    for number, annotation in enumerate(content.get("annotations", ()) if split != "test" else (), start=1):
        if str(annotation["image_id"]) not in images:
            raise UserError(
                f"{path} annotation {number} is about image {annotation['image_id']}, which is not in the file."
            )
        references[str(annotation["image_id"])].append(annotation["caption"])
    if split != "test" and not references:
        raise UserError(f"{path} has no annotations; the split {split} needs the file with captions from {SOURCE}.")
    return finish(
        split, images, references, domains, Folder(path.parent / split), fingerprint([path]), "official COCO file"
    )


def finish(
    split: str,
    images: dict[str, str],
    references: dict[str, list[str]],
    domains: dict[str, str],
    pictures: Any,
    seal: str,
    source: str,
) -> Dataset:
    """A breakdown by domain needs a domain for every image."""
    return captioning.dataset(
        f"NoCaps {split}",
        images,
        references,
        pictures,
        seal,
        source,
        domains if len(domains) == len(images) else None,
        SERVER,
        f"nocaps_{split}_results.json",
    )


BENCHMARK = Benchmark(
    name="nocaps",
    summary="One-sentence captions of novel objects; CIDEr against ten references.",
    splits=("validation", "test"),
    read=load,
    profiles=("lmms",),
    needs=(
        Need(f"nocaps/{FILES['validation']}", SOURCE),
        Need("nocaps/validation", f"{SOURCE} (images of Open Images)", count=4500),
    ),
    mirror=MIRROR,
    licence="annotations and images CC BY 2.0",
)
