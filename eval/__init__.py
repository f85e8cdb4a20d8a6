"""Benchmarks, official metrics, the resumable answer store and the run that joins them."""

import sys
from importlib.util import find_spec
from pathlib import Path


def refuse_other_llava() -> None:
    """End with a sentence if `llava` is not the package beside this one: LLaVA's own code installs that name, too."""
    spec, ours = find_spec("llava"), Path(__file__).resolve().parent.parent / "llava"
    places = list(spec.submodule_search_locations or ()) if spec else []
    if places and ours not in (Path(place).resolve() for place in places):
        sys.exit(
            f"Another package called llava, in {places[0]}, hides the one of this repository; uninstall it "
            "(pip uninstall llava), or use an environment of its own: scripts/*.sh make one."
        )


refuse_other_llava()

# As early as can be, and after it is known whose llava this is.
from eval.answers.source_hash import record_imports  # noqa: E402

record_imports()
