"""The benchmarks. A new one is one file in this folder that defines BENCHMARK; nothing else changes."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from eval.dataset import Benchmark
from llava.errors import unknown


def names() -> list[str]:
    """Every benchmark there is, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> Benchmark:
    """The benchmark called `name`."""
    if name not in names():
        raise unknown("benchmark", name, names())
    return import_module(f"{__name__}.{name}").BENCHMARK


def check_split(benchmark: Benchmark, split: str | None, data: Path | None = None) -> str:
    """`split`, or for None the first one whose question file is in the data folder."""
    if split is None:
        there = (s for s, file in benchmark.split_files.items() if data is not None and (data / file).is_file())
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
    """Name, summary and splits of each, for --list."""
    return [
        {"name": b.name, "summary": b.summary, "splits": list(b.splits), "profiles": list(b.profiles)}
        for b in map(get, names())
    ]
