"""Where files are: the packages, the checkout that they are part of, and the bundled toy models and toy data.

Every command line imports this module, so it needs nothing but the standard library.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from llava.errors import UserError

PROJECT = "visual-token-reduction"
TOY_PACKAGE = "visual_token_reduction_toy"  # package of the wheel with toy models and toy data, laid out like assets/
# The folder that holds llava/, eval/ and the others: a checkout, or site-packages. It is read, never written to.
PACKAGES = Path(__file__).resolve().parents[1]


def checkout_of(folder: Path) -> Path | None:
    """The folder if its pyproject.toml says that it is a checkout of this project, else None."""
    file = folder / "pyproject.toml"
    named = file.is_file() and re.search(rf'^name = "{PROJECT}"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    return folder if named else None


# The checkout that these packages are part of; None if they were installed from a wheel.
CHECKOUT = checkout_of(PACKAGES)
# The folder below which results and documentation pages are written: the checkout, else the current directory.
WORK = CHECKOUT or Path()


def bundled() -> Path | None:
    """The folder of toy models and toy data: the checkout's assets/, else the installed toy wheel's folder, if any."""
    if CHECKOUT and (CHECKOUT / "assets").is_dir():
        return CHECKOUT / "assets"
    found = find_spec(TOY_PACKAGE)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


# Without toy models and data, the place where an installed toy wheel would be; `check_bundled` says that it is missing.
ASSETS = bundled() or PACKAGES / TOY_PACKAGE


def check_bundled(path: str | Path) -> None:
    """Refuse a path of a bundled model or data set that is not here; other paths are not checked.

    Raises:
        UserError: it is missing; the message says what to do.
    """
    path = Path(path)
    if path.is_relative_to(ASSETS) and not path.exists():
        what = "data" if path.relative_to(ASSETS).parts[0].startswith("eval") else "model"
        raise UserError(
            f"The toy {what} at {path} is missing: name your own by --model and --data, "
            "use a whole checkout of the repository, or install the toy wheel from one: pip install ./assets"
        )


def check_checkout(what: str) -> None:
    """Refuse a command that reads or writes files of a checkout if there is none.

    Args:
        what: the command, as the subject of the error's sentence.

    Raises:
        UserError: the packages were installed from a wheel.
    """
    if CHECKOUT is None:
        raise UserError(f"{what} needs a checkout: git clone {repository()}, then pip install -e . in it.")


def repository() -> str:
    """The repository's address in the metadata of the installation, or words for it if there is none."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        urls = metadata(PROJECT).get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    pairs = (url.partition(", ")[::2] for url in urls)
    return next((url for title, url in pairs if title.lower() in ("repository", "source")), "of the repository")
