"""Which code and which libraries made the answers of a result."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config import ROOT

if TYPE_CHECKING:
    from eval.parallel.ranks import Rank

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "wandb")


def commit(root: Path = ROOT) -> str:
    """The repository's commit, with "+changes" if tracked files differ from it; "unknown" outside git."""
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "HEAD")
    # A copy without .git inside somebody else's repository must not report that one's commit.
    if not top or not head or Path(top).resolve() != root.resolve():
        return "unknown"
    return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def versions() -> dict[str, str]:
    """Python and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def made_by(origins: Sequence[tuple[Mapping[str, Any] | None, int]]) -> dict[str, Any]:
    """Commit and library versions of the answers, and notes where not all of them have the same.

    Args:
        origins: see AnswerStore.origins.
    """
    total = sum(number for _, number in origins)
    notes = []
    if unknown := sum(number for run, number in origins if run is None):
        notes.append(f"the commit of {unknown:,} of {total:,} answers is unknown: the end of runs.jsonl was lost")
    commits: dict[str, int] = {}
    libraries: dict[str, int] = {}
    for run, number in origins:
        name = "unknown" if run is None else run["commit"]
        commits[name] = commits.get(name, 0) + number
        if run is not None:
            words = ", ".join(f"{library} {release}" for library, release in sorted(run["versions"].items()))
            libraries[words] = libraries.get(words, 0) + number
    for what, found in (("commits", commits), ("library versions", libraries)):
        if len(found) > 1:
            parts = "; ".join(f"{name}: {number:,} answers" for name, number in found.items())
            notes.append(f"the answers were made with different {what} ({parts})")
    runs = [run for run, _ in origins if run is not None]
    return {
        "commit": " and ".join(commits) if commits else "unknown",
        "versions": dict(runs[-1]["versions"]) if runs else {},
        "notes": notes,
    }


def command_began(rank: "Rank") -> float:
    """When the user's command started, in seconds since 1970: this process, or the one that started the ranks."""
    if rank.control is not None:
        return rank.get("command began")
    import psutil

    return psutil.Process().create_time()


def hardware(device: str) -> str:
    """The name of the chip of a torch device; timings mean nothing without it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
