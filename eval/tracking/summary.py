"""The numbers and settings of a W&B run, each under a flat name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.answers import HASHED, flatten
from eval.answers.source_hash import combined
from eval.results import report

HEADLINE = ("score", "percent_of_full", "metric", "questions", "tokens_per_layer", "kv_bytes_per_question")


def flat(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of an evaluation on one level, the method's budget and options among them.

    Hashes of many files become one. An option that has the name of another setting becomes "option.NAME", unless it has
    the same value.
    """
    hashed = {key: combined(settings[key]) for key in HASHED if isinstance(settings.get(key), dict)}
    found = flatten({key: value for key, value in settings.items() if key != "config"} | hashed) | more
    for name, value in flatten(settings["config"]).items():
        found[name if found.get(name, value) == value else f"option.{name}"] = value
    return found


def headline(result: Mapping[str, Any], output: Path) -> tuple[Any, ...]:
    """The numbers that every benchmark has, in the order of HEADLINE; None where there is none."""
    return (
        result["metrics"].get(result["main"]),
        report.percent_of_full(result, output),
        result["main"],
        result["asked"],
        result["audit"]["mean_tokens_per_layer"],
        result["audit"]["kv_bytes_per_sample"],
    )


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the result by a flat name."""
    tree = {key: result[key] for key in ("metrics", "confidence", "audit", "timing", "flops")}
    numbers = {
        name.replace(".", "/"): value
        for name, value in flatten(tree).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    throughput = result.get("throughput") or {}
    for name in ("questions_per_second", "start_seconds"):
        if throughput.get(name) is not None:
            numbers[f"throughput/{name}"] = throughput[name]
    for part in throughput.get("ranks", ()):
        numbers[f"throughput/rank {part['rank']}/questions_per_second"] = part["questions_per_second"]
    numbers["failed"] = len(result.get("failed", ()))
    for layer, tokens in enumerate(result["audit"]["entering_per_layer"]):
        numbers[f"audit/entering/layer {layer}"] = tokens
    return numbers
