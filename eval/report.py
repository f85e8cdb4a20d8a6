"""Results in words and in a few lines, and the part of a result file that scoring alone can fill."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from eval.dataset import Question
from eval.metrics import Score
from eval.statistics import bootstrap

# Not a share of questions, so no percent sign.
PLAIN = {"distribution"}
LOWER_IS_BETTER = {"distribution"}


def scored(score: Score, questions: Iterable[Question], seed: int = 0) -> dict[str, Any]:
    """The score in JSON types, with 95 % intervals of the accuracy by question and by image."""
    images = {question.id: question.image for question in questions}
    credits = [100 * credit for credit in score.correct.values()]
    by_image = bootstrap(credits, [images[name] for name in score.correct], seed=seed)
    return {
        "questions": len(credits),
        "metrics": score.values,
        "confidence": {
            "level": 0.95,
            "accuracy": dataclasses.asdict(bootstrap(credits, seed=seed)),
            "accuracy_by_image": dataclasses.asdict(by_image),
        },
        "groups": {
            name: {group: {"percent": share, "questions": count} for group, (share, count) in table.items()}
            for name, table in score.groups.items()
        },
        "notes": list(score.notes),
    }


def score_lines(record: Mapping[str, Any]) -> list[str]:
    """A `scored` record as the lines a person reads, numbers with the official two decimals."""
    lines = [f"{name:14s} {metric_text(name, value)}" for name, value in record["metrics"].items()]
    for label, key in (("95 % CI by question", "accuracy"), ("95 % CI by image", "accuracy_by_image")):
        interval = record["confidence"][key]
        lines.append(f"accuracy, {label}: {interval['low']:.2f} to {interval['high']:.2f}")
    for name, table in record["groups"].items():
        lines.append(f"accuracy / {name}")
        lines += [f"  {group:12s} {e['percent']:.2f} % ({e['questions']:,} questions)" for group, e in table.items()]
    return lines + [f"note: {note}" for note in record["notes"]]


def metric_text(name: str, value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" + ("" if name in PLAIN else " %") + (" (lower is better)" if name in LOWER_IS_BETTER else "")


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """Tokens, bytes, time and FLOPs of a run."""
    audit, timing = result["audit"], result["timing"]
    layers = ", ".join(number(tokens) for tokens in audit["entering_per_layer"])
    lines = [
        f"visual tokens entering each layer: {layers} (mean {audit['mean_tokens_per_layer']:.1f}, "
        f"{audit['merged_tokens']:.1f} of them merged, {number(audit['visual_tokens_before'])} before reduction)",
        f"key/value cache: {short(audit['kv_bytes_per_sample'] / 1e6, 100)} MB per question",
    ]
    if timing["questions"]:
        spent = ", ".join(f"{phase} {value:.1f}" for phase, value in timing["mean_ms"].items())
        lines.append(f"ms per question: {spent}; {timing['flops'] / 1e9:.2f} GFLOP")
        lines.append(
            f"timed: {timing['questions']:,} questions in {timing['runs']} {'run' if timing['runs'] == 1 else 'runs'}, "
            f"{timing['this_run']['questions']:,} of them in this one"
        )
        for entry in timing["conditions"]:
            lines.append("measured with " + ", ".join(f"{key} {value}" for key, value in entry.items()))
    return lines


def sentence(result: Mapping[str, Any]) -> str:
    """The result in words: what, how good, how sure, on how much, at which cost."""
    audit, timing, interval = result["audit"], result["timing"], result["confidence"]["accuracy"]
    asked = f"{result['asked']:,}"
    if result["partial"]:
        asked = f"the first {asked} of {result['available']:,}"
    ttft = timing["mean_ms"]["ttft"]
    wait = "n/a" if ttft is None else f"{short(ttft, 10)} ms"
    return (
        f"{result['method']} at {result['budget']} of {result['visual_tokens']} visual tokens: "
        f"{result['metrics']['accuracy']:.1f} % accuracy (95 % CI {interval['low']:.1f} to {interval['high']:.1f}) "
        f"on {asked} {result['title']} questions; {audit['mean_tokens_per_layer']:.1f} tokens per layer, "
        f"KV {short(audit['kv_bytes_per_sample'] / 1e6, 100)} MB, TTFT {wait} per question."
    )


def number(value: float) -> str:
    """64.0 -> "64", 64.25 -> "64.2"."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def short(value: float, whole_from: float) -> str:
    """No decimals from `whole_from` on, one below, and two digits for what would print as 0.0."""
    if value >= whole_from:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
