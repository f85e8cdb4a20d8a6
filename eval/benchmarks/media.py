"""Where a benchmark's images and videos come from: a folder, bytes inside a table, a data set of the hub."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from llava.errors import UserError
from llava.file_state import FileState, file_state

if TYPE_CHECKING:
    from PIL import Image

    from llava.processing.video import Video


# Longer names of files do not exist on the usual file systems.
LONGEST_NAME = 255
# Of a hash: among a million images two share one with a probability of 1 in 37 million.
DIGITS = 16


class Images(Protocol):
    """Images by name.

    Attributes:
        noun: what they are, for sentences.
        where: the folder or table, for sentences.
    """

    @property
    def noun(self) -> str: ...

    @property
    def where(self) -> str: ...

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not there, found without decoding anything."""
        ...

    def open(self, name: str) -> "Image.Image | Video":
        """One image as RGB, or the frames of a video."""
        ...

    def digest(self, name: str) -> str:
        """Hash of the encoded file: other content, other hash."""
        ...

    def read(self, name: str) -> "tuple[Image.Image | Video, str]":
        """What `open` gives, and the hash of the very content that it was made of."""
        ...


@dataclass(frozen=True)
class Files(ABC):
    """Files below one folder."""

    root: Path

    @property
    def where(self) -> str:
        return str(self.root)

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not (self.root / name).is_file()]

    def digest(self, name: str) -> str:
        path = self.root / name
        try:
            return file_digest(file_state(path))
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}.") from error

    @abstractmethod
    def open(self, name: str) -> "Image.Image | Video":
        """The content of a file, read anew."""

    def read(self, name: str) -> "tuple[Image.Image | Video, str]":
        digest, content = self.digest(name), self.open(name)
        if self.digest(name) != digest:  # not hashed again unless its state is another one
            raise UserError(f"{self.root / name} changed while it was read; ask its questions again.")
        return content, digest


class Folder(Files):
    """Image files below one folder."""

    noun = "images"

    def open(self, name: str) -> "Image.Image":
        # torch comes with this: a benchmark can be scored without it.
        from llava.processing.image import open_image

        return open_image(self.root / name)


class Videos(Files):
    """Video files below one folder."""

    noun = "videos"

    def open(self, name: str) -> "Video":
        from llava.processing.video import read_video

        return read_video(self.root / name)


@dataclass(frozen=True)
class Inline:
    """Encoded images that stand in a table.

    Attributes:
        names: those there are.
        fetch: name -> the bytes of an image file.
    """

    where: str
    names: frozenset[str]
    fetch: Callable[[str], bytes]
    noun = "images"

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.names]

    def open(self, name: str) -> "Image.Image":
        from llava.processing.image import open_image

        return open_image(io.BytesIO(self.fetch(name)), f"{name} in {self.where}")

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.fetch(name)).hexdigest()[:DIGITS]

    def read(self, name: str) -> "tuple[Image.Image, str]":
        return self.open(name), self.digest(name)  # nothing changes a table that is open


@lru_cache(maxsize=200_000)
def file_digest(state: FileState) -> str:
    """Hash of a file's content, remembered for as long as its state is this one."""
    with state.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def digest_of(images: Images, names: Iterable[str]) -> str:
    """Hashes of the images of one question, in its order; "" for a question without images.

    The store keeps it with every answer and compares it before the answer is used again. Hashing a file takes a few
    hundredths of the time that decoding it takes.
    """
    return " ".join(images.digest(name) for name in names)


def first_of_content(images: Images, names: Iterable[str]) -> dict[str, str]:
    """Name of an image -> the first of `names` that has the same content; its own name if it is not there.

    Equal content has equal size, so only files of which several have the same size are read. Videos are not read at
    all: their files have one name each, and are large.
    """
    names = list(dict.fromkeys(names))
    absent = set(images.missing(names))
    there = [name for name in names if name not in absent]
    if isinstance(images, Files):
        sizes = {name: (images.root / name).stat().st_size for name in there}
        count = Counter(sizes.values())
        there = [name for name in there if count[sizes[name]] > 1]
    first: dict[str, str] = {}
    known = there if images.noun == "images" else ()
    same = {name: first.setdefault(images.digest(name), name) for name in known}
    return {name: same.get(name, name) for name in names}


def image_name(name: str, where: str) -> str:
    """A file name from a question file, refused if it points out of the image folder.

    Links inside the folder are followed: their owner put them there, the question file's author did not.
    """
    path = PurePosixPath(name)
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise UserError(f"{where} names an image with more than {LONGEST_NAME} characters: {name[:40]!r}...")
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where} names the image {name!r}, which is not inside the image folder.")
    return name
