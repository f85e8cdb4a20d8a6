"""Bytes and seconds in words."""

from collections.abc import Mapping

GIB = 2**30


def size_text(size: float) -> str:
    """Bytes in words: "13.1 GiB", "14.5 MiB"."""
    name, unit = ("GiB", GIB) if size >= 0.1 * GIB else ("MiB", GIB / 1024)
    return f"{figures(size / unit)} {name}"


def listed(parts: Mapping[str, int], total: int | None = None) -> str:
    """The sum (or `total`) and its parts in one unit: "13.1 GiB (vision tower 0.57, decoder 12.3)"."""
    total = sum(parts.values()) if total is None else total
    unit = GIB if total >= 0.1 * GIB else GIB / 1024
    inside = ", ".join(f"{name} {figures(size / unit)}" for name, size in parts.items() if size)
    return f"{size_text(total)} ({inside})"


def figures(value: float) -> str:
    """Three figures, or two of a small number."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds in words: "3.1 ms", "12 s", "5.0 min", "2.1 h"."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"
