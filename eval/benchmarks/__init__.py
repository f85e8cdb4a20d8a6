"""The benchmarks.

A new one is a file of sets/ if it is plain, else a module here that defines BENCHMARK or BENCHMARKS. Nothing else
changes.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, catalogue
from llava.errors import UserError, unknown

OWN = ".jsonl"  # ends the name of a file with questions of the user's own
SETS = Path(__file__).parent / "sets"  # a file of plain.py for each of its benchmarks


def entries_of(module: str) -> tuple[Benchmark, ...]:
    """The benchmarks that a module of this folder defines. Modules that define none are what the others share."""
    found = import_module(f"{__name__}.{module}")
    return getattr(found, "BENCHMARKS", (found.BENCHMARK,) if hasattr(found, "BENCHMARK") else ())


@cache
def registry() -> dict[str, Benchmark]:
    """Every benchmark by name, sorted; this imports all modules."""
    entries = [benchmark for entry in iter_modules(__path__) for benchmark in entries_of(entry.name)]
    found: dict[str, Benchmark] = {}
    for benchmark in sorted(entries, key=lambda benchmark: benchmark.name):
        if benchmark.name in found:
            raise UserError(f"Two benchmarks are called {benchmark.name}; rename one of their files.")
        found[benchmark.name] = benchmark
    return found


def names() -> list[str]:
    """Every benchmark there is, sorted."""
    return list(registry())


def get(name: str) -> Benchmark:
    """The benchmark called `name`, or the questions in the file of the user's own that it names (own.py).

    Only its own module is imported: the one in catalogue.yaml, or one of its name.

    Raises:
        UserError: there is none, or a file of SETS has the name of another benchmark.
    """
    if name.endswith(OWN):
        own: Benchmark = import_module(f"{__name__}.own").benchmark(name)
        return own
    module = catalogue().get(name, {}).get("module", name)
    if module in (entry.name for entry in iter_modules(__path__)) and not (SETS / f"{name}.yaml").exists():
        for benchmark in entries_of(module):
            if benchmark.name == name:
                return benchmark
    if name not in registry():
        raise unknown("benchmark", name, names())
    return registry()[name]


def check_name(name: str) -> None:
    """Raise UserError for an unknown name. Names in catalogue.yaml are known without an import."""
    if name not in catalogue():
        get(name)


def check_split(benchmark: Benchmark, split: str | None, data: Path | None = None) -> str:
    """`split`, or for None the first one whose question file is in the data folder."""
    if split is None:
        there = (s for s, file in benchmark.split_files.items() if data is not None and is_file(data / file))
        return next(there, benchmark.splits[0])
    if split not in benchmark.splits:
        raise unknown(f"split of {benchmark.name}", split, benchmark.splits)
    return split


def check_profile(benchmark: Benchmark, profile: str | None) -> str:
    """`profile`, or the default for None."""
    if profile is None:
        return benchmark.profiles[0]
    if profile not in benchmark.profiles:
        raise unknown(f"profile of {benchmark.name}", profile, benchmark.profiles)
    return profile


def describe() -> list[dict[str, object]]:
    """Name, summary and splits of each, for `vtr show`."""
    return [
        {"name": b.name, "summary": b.summary, "splits": list(b.splits), "profiles": list(b.profiles)}
        for b in map(get, names())
    ]
