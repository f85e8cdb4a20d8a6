"""Which code and which libraries run here, for results and `vtr --version`. Imports neither torch nor transformers."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eval.answers.source_hash import FOLLOWED
from llava import __version__
from llava.places import PACKAGES

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "wandb")


def summary() -> str:
    """The line of `vtr --version`: versions of the project, Python, torch and transformers, and the commit."""
    here = {"torch": "not installed", "transformers": "not installed"} | versions()
    of_commit = "" if (at := commit()) == "unknown" else f", commit {at}"
    libraries = ", ".join(f"{name} {here[name]}" for name in ("torch", "transformers"))
    return f"visual-token-reduction {__version__}{of_commit}, Python {here['python']}, {libraries}"


def commit(root: Path = PACKAGES) -> str:
    """The repository's commit, with "+changes" if the code is not its code; "unknown" outside git.

    Code has changed if a tracked file differs, or if a package has a file that is not tracked, as that of a new method.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "HEAD")
    # A copy without .git inside somebody else's repository must not report that one's commit.
    if not top or not head or Path(top).resolve() != root.resolve():
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", *FOLLOWED, "eval", "lab")
    return head + ("+changes" if changed or new else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]  # a kill would leave the lock of the index
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
