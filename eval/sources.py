"""Which files a benchmark is read from: the official ones, or the copy that lmms-eval reads."""

from collections.abc import Sequence
from pathlib import Path

from eval.hub import local_copy
from llava.errors import UserError


def official_file(data: Path, source: str, title: str, files: Sequence[Path], mirror: Sequence[str]) -> Path | None:
    """The question file to read; None for the mirror.

    Args:
        source: one of eval.dataset.SOURCES.
        title: of the questions, for the error: "ScienceQA test".
        files: names the official file goes by, the usual one first.
        mirror: repositories on the hub, the newest id first.
    """
    if source == "mirror":
        return None
    found = next((file for file in files if file.is_file()), None)
    if found is not None:
        return found
    if source == "auto" and local_copy(data, mirror) is not None:
        return None
    folder = files[0].relative_to(data).parts[0]
    raise UserError(
        f"No {title} questions at {' or '.join(map(str, files))}"
        + (f" and no copy of {' or '.join(mirror)} below {data / 'hub'}" if source == "auto" else "")
        + f"; --data should be the folder that holds {folder}/"
        + ("." if source == "official" else ", or read them from the hub with --source mirror.")
    )
