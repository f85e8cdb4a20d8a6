"""What the caption benchmarks share: the prompt, the score and the COCO results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import Row, read_json
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import Pictures
from eval.benchmarks.records import Id, TypedDict, check_all
from eval.metrics import Score, captions, coco_captions
from llava.errors import UserError

# As lmms-eval asks; its output is limited to 64 tokens.
PROMPT = "Provide a one-sentence caption for the provided image."
TOKENS = 64
NO_REFERENCES = "the references of this split are not public: upload {file} to {server}"


def dataset(
    title: str,
    images: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    pictures: Pictures,
    fingerprint: str,
    source: str,
    domains: Mapping[str, str] | None = None,
    server: str = "",
    file: str = "captions.json",
) -> Dataset:
    """A caption data set.

    Args:
        images: image id -> name in `pictures`, in the order they are asked in.
        references: image id -> captions; empty for a split that a server scores.
        domains: image id -> part of the set.
        server: what scores a split without references.
        file: name of the COCO results file.
    """
    if references and (lost := [name for name in images if not references.get(name)]):
        raise UserError(f"{title}: {len(lost):,} images have no caption, the first is {lost[0]}.")
    first = {name: texts[0] for name, texts in references.items()}
    questions = tuple(Question(name, PROMPT, "", (image,), first.get(name, "")) for name, image in images.items())

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        if not references:
            return Score({"cider": None}, {}, {}, (NO_REFERENCES.format(file=file, server=server),), "cider")
        return captions.score(references, {name: texts[name] for name in asked}, domains)

    def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
        """The COCO results format. Ids are numbers there, as in the annotation files."""
        return {file: [{"image_id": number(name), "caption": text} for name, text in texts.items()]}

    facts = {
        "source": source,
        "images": len(questions),
        "references": sum(map(len, references.values())),
        "caption scorer": coco_captions.described(),
    }
    # One caption has no sample score in [0, 1]: CIDEr goes to 10 and depends on the other images.
    return Dataset(title, questions, pictures, fingerprint, score, None, submission, TOKENS, facts, read_results)


class Result(TypedDict):
    """An entry of a COCO results file."""

    image_id: Id
    caption: str


def number(name: str) -> int | str:
    """An image id as COCO files have it."""
    return int(name) if name.isdecimal() else name


def read_results(path: Path) -> list[Row] | None:
    """A COCO results file; None if `path` is none."""
    if path.suffix != ".json":
        return None
    try:
        rows = read_json(path)
    except UserError:
        return None  # JSON lines under that name are for the general reader
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "caption" in r for r in rows):
        return None
    places = [(f"{path} entry {number}", row) for number, row in enumerate(rows, start=1)]
    checked = zip(places, check_all(Result, places), strict=True)
    return [Row(where, str(row["image_id"]), row["caption"]) for (where, _), row in checked]


def add(images: dict[str, str], name: str, image: str, where: str) -> None:
    """One more image; an id that comes twice is an error, as results files could not tell the two apart."""
    if name in images:
        raise UserError(f"{where} has the image id {name} twice.")
    images[name] = image
