"""Versions of Python and of libraries that the project was tried with: the one place where they stand.

`scripts/dev/versions.sh`, `scripts/serve_setup.sh` and the note below read them; pyproject.toml, the README,
docs/cluster.md and docs/models/serving.md say the same, see tests/test_versions.py. This module imports nothing that
has to be installed.
"""

import re
import warnings

# The lowest and the highest minor version.
TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.14"),
    "transformers": ("5.19", "5.24"),
    "vllm": ("0.26", "0.32"),
}


def note_untested(package: str, version: str) -> None:
    """Warn where the installed version of a package is none of those tested; it is used all the same."""
    lowest, highest = TESTED[package]
    if not minor(lowest) <= minor(version) <= minor(highest):
        warnings.warn(
            f"{package} {lowest} to {highest} were tested, {version} is installed; should a call fail or a result look "
            f"wrong, {advice(package)}.",
            stacklevel=2,
        )


def advice(package: str) -> str:
    """How to get a tested version, to follow "; " in a sentence."""
    return f"install a version that was tested (pip install '{package}~={TESTED[package][1]}.0')"


def minor(version: str) -> tuple[int, ...]:
    """What versions are compared by, (5, 24) of "5.24.0" and (6, 0) of "6.0rc1"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
