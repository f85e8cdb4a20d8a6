"""Flickr30k captions, asked as lmms-eval asks.

Official layout, read from DATA/flickr30k:

    dataset_flickr30k.json    Karpathy's split; its 1,000 test images are what papers report
    flickr30k-images/

Mirror: flickr30k, split test: caption (list), img_id, image. lmms-eval's numbers are over all images of that table,
which are many more than Karpathy's test images: the two are not comparable, the number of images is in every result.
"""

from pathlib import Path

from eval import captioning
from eval.dataset import Benchmark, Dataset, Need, fingerprint
from eval.hub import local_copy, open_table
from eval.jsonl import read_json
from eval.pictures import Folder, image_name
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/flickr30k", "lmms-lab/flickr30k")
SPLIT_FILE = "flickr30k/dataset_flickr30k.json"
IMAGES = "flickr30k/flickr30k-images"


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """The test images with their five captions each."""
    official = (data / SPLIT_FILE).is_file()
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
    for row, record in enumerate(table.records(("img_id", "caption"))):
        name = str(record["img_id"])
        captioning.add(images, name, f"{row}/image", table.where)
        references[name] = captioning.texts_of(record["caption"], f"{table.where} row {row}")
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
    if not path.is_file():
        raise UserError(f"No Flickr30k at {path}; it is in Karpathy's caption_datasets.zip.")
    content = read_json(path)
    records = content.get("images") if isinstance(content, dict) else None
    images: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for number, record in enumerate(records or (), start=1):
        where = f"{path} image {number}"
        if not isinstance(record, dict) or any(key not in record for key in ("imgid", "filename", "sentences")):
            raise UserError(f"{where} should have imgid, filename and sentences.")
        if record.get("split") != split:
            continue
        name = str(record["imgid"])
        captioning.add(images, name, image_name(str(record["filename"]), where), str(path))
        references[name] = captioning.texts_of([sentence.get("raw") for sentence in record["sentences"]], where)
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
    load=load,
    profiles=("lmms",),
    needs=(
        Need(SPLIT_FILE, "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"),
        Need(IMAGES, "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)", count=31783),
    ),
    mirror=MIRROR,
    licence="images: Flickr terms of use, research only",
)
