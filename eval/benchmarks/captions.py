"""Captions of images, asked as lmms-eval asks: NoCaps, and Flickr30k.

NoCaps, objects that COCO captions do not name, is read from DATA/nocaps, in COCO format:

    nocaps_val_4500_captions.json    4,500 images with ten captions each and their domain
    nocaps_test_image_info.json      10,600 images without captions
    validation/, test/               the images

Mirror: NoCaps, splits validation and test: image, image_id, annotations_captions. It has no domains; where a table has
a column "domain", CIDEr is broken down by it as for the official file.

Flickr30k is read from DATA/flickr30k:

    dataset_flickr30k.json    Karpathy's split; its 1,000 test images are what papers report
    flickr30k-images/

Mirror: flickr30k, split test: caption (list), img_id, image. lmms-eval's numbers are over all images of that table,
which are many more than Karpathy's test images: the two are not comparable, the number of images is in every result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eval.answers.jsonl import read_json
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import official_file, open_table, ungraded
from eval.benchmarks.llava_files import as_number, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, check, check_list
from eval.metrics import Score, captions
from llava.errors import UserError

# As lmms-eval asks; its output is limited to 64 tokens.
PROMPT = "Provide a one-sentence caption for the provided image."
TOKENS = 64

NOCAPS_MIRROR = ("lmms-lab-encoder/NoCaps", "lmms-lab/NoCaps")
NOCAPS_FILES = {"validation": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
NOCAPS_SOURCE = "https://nocaps.org/download"

FLICKR_MIRROR = ("lmms-lab-encoder/flickr30k", "lmms-lab/flickr30k")
FLICKR_FILE, FLICKR_IMAGES = "flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"
FLICKR_SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


class CocoImage(TypedDict):
    """An image of NoCaps' official file."""

    id: Id
    file_name: Filled
    domain: NotRequired[str | None]


class Annotation(TypedDict):
    """A caption of NoCaps' official file."""

    image_id: Id
    caption: Filled


class Coco(TypedDict):
    """NoCaps' official file; the one of split test has no captions."""

    images: Annotated[list[CocoImage], Field(min_length=1)]
    annotations: NotRequired[list[Annotation]]


class NoCapsRow(TypedDict):
    """A row of NoCaps' mirror, split test."""

    image_id: Id
    domain: NotRequired[str | None]


class CaptionedRow(NoCapsRow):
    """A row of its split validation."""

    annotations_captions: Texts


class Sentence(TypedDict):
    """A caption of Karpathy's file."""

    raw: Filled


class KarpathyImage(TypedDict):
    """An image of Karpathy's file."""

    imgid: Id
    filename: Filled
    split: str
    sentences: Annotated[list[Sentence], Field(min_length=1)]


class FlickrRow(TypedDict):
    """A row of Flickr30k's mirror."""

    img_id: Id
    caption: Texts


@dataclass(frozen=True)
class Image:
    """An image: id, name in the data set's images, captions (none where only a server has them), part of the set."""

    id: str
    name: str
    captions: Sequence[str] = ()
    domain: str | None = None


def load_nocaps(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """One split; `test` has no references and gives a results file only."""
    title, server = f"NoCaps {split}", "the NoCaps challenge of EvalAI" if split == "test" else ""
    official = official_file(data, source, title, [data / "nocaps" / NOCAPS_FILES[split]], NOCAPS_MIRROR, NOCAPS_SOURCE)
    if official is not None:
        images, folder = from_coco(official, split), Folder(official.parent / split)
        contents = Contents("official", *ask(images, str(official)), folder, fingerprint([official]))
    else:
        table = open_table(data, NOCAPS_MIRROR, None, split, source)
        rows: Sequence[Mapping[str, Any]] = table.records(NoCapsRow if server else CaptionedRow)
        images = [
            Image(str(row["image_id"]), name, row.get("annotations_captions", ()), row.get("domain"))
            for name, row in zip(table.row_images(), rows, strict=True)
        ]
        columns = ("image_id",) if server else ("image_id", "annotations_captions")
        contents = table.contents(*ask(images, table.where), columns)
    return dataset(title, contents, profile, f"nocaps_{split}_results.json", server)


def from_coco(path: Path, split: str) -> list[Image]:
    """The images of NoCaps' official file."""
    content = check(Coco, read_json(path), str(path))
    references: dict[str, list[str]] = {str(record["id"]): [] for record in content["images"]}
    for number, annotation in enumerate(content.get("annotations", ()) if split != "test" else (), start=1):
        name = str(annotation["image_id"])
        if name not in references:
            raise UserError(f"{path} annotation {number} is about image {name}, which is not in the file.")
        references[name].append(annotation["caption"])
    if split != "test" and not any(references.values()):
        raise UserError(
            f"{path} has no annotations; the split {split} needs the file with captions from {NOCAPS_SOURCE}."
        )
    images = []
    for number, record in enumerate(content["images"], start=1):
        file = image_name(record["file_name"], f"{path} image {number}")
        images.append(Image(str(record["id"]), file, references[str(record["id"])], record.get("domain")))
    return images


def load_flickr30k(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """The images with their five captions each: those that Karpathy's file puts into the split, or the mirror's."""
    title = f"Flickr30k {split}"
    path = official_file(data, source, title, [data / FLICKR_FILE], FLICKR_MIRROR, FLICKR_SOURCE)
    if path is None:
        table = open_table(data, FLICKR_MIRROR, None, split, source)
        rows = zip(table.row_images(), table.records(FlickrRow), strict=True)
        images = [Image(str(row["img_id"]), name, row["caption"]) for name, row in rows]
        contents = table.contents(*ask(images, table.where), ("img_id", "caption"))
    else:
        images = []
        for number, record in enumerate(check_list(path, KarpathyImage, "images"), start=1):
            if record["split"] == split:
                name = image_name(record["filename"], f"{path} entry {number}")
                images.append(Image(str(record["imgid"]), name, [sentence["raw"] for sentence in record["sentences"]]))
        if not images:
            raise UserError(f"{path} should list images with the split {split!r}, and has none.")
        contents = Contents("official", *ask(images, str(path)), Folder(data / FLICKR_IMAGES), fingerprint([path]))
    return dataset(title, contents, profile, f"flickr30k_{split}_results.json")


def ask(images: Sequence[Image], where: str) -> tuple[tuple[Question, ...], dict[str, Image]]:
    """One question per image, and the images by id, which must be unique in a results file."""
    questions = (Question(one.id, PROMPT, "", (one.name,), next(iter(one.captions), "")) for one in images)
    return unique(questions, where), {one.id: one for one in images}


def dataset(title: str, contents: Contents[Image], profile: str, file: str, server: str = "") -> Dataset:
    """A caption data set.

    Args:
        contents: with images in the order they are asked in. A breakdown by domain needs a domain for every image.
        file: name of the COCO results file.
        server: what scores a split without references.
    """
    images = contents.references.values()
    if not server and (lost := [image.id for image in images if not image.captions]):
        raise UserError(f"{title}: {len(lost):,} images have no caption, the first is {lost[0]}.")
    references = {image.id: image.captions for image in images if image.captions}
    domains = {image.id: image.domain for image in images if image.domain}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        said = {name: texts[name] for name in asked}
        return captions.captions_score(references, said, domains if len(domains) == len(images) else None)

    def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
        """The COCO results format. Ids are numbers there, as in the annotation files."""
        return {file: [{"image_id": as_number(name), "caption": text} for name, text in texts.items()]}

    facts: dict[str, Any] = {"images": len(images), "references": sum(map(len, references.values()))}
    facts["caption scorer"] = captions.described()
    rule = ungraded("cider", file, server) if server else score
    # One caption has no sample score in [0, 1]: CIDEr goes to 10 and depends on the other images.
    return contents.dataset(title, profile, rule, None, submission, facts, max_new_tokens=TOKENS)


BENCHMARKS = (
    listed("nocaps", load_nocaps, tuple(NOCAPS_FILES), profiles=("lmms",), mirror=NOCAPS_MIRROR),
    listed("flickr30k", load_flickr30k, ("test",), profiles=("lmms",), mirror=FLICKR_MIRROR),
)
