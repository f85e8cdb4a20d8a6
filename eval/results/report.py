"""Results in words and in a few lines, and the part of a result file that scoring alone can fill."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from eval.benchmarks.base import Question
from eval.metrics import Score
from eval.results.statistics import LEVEL, interval, terms_of

LOWER_IS_BETTER = {"distribution"}


def scored(score: Score, questions: Iterable[Question]) -> dict[str, Any]:
    """The score in JSON types, with the 95 % confidence intervals of its main number and of `other_terms`."""
    return {
        "questions": len(score.correct) or len(list(questions)),
        "main": score.main,
        "metrics": score.values,
        "points": sorted(score.points),
        "confidence": {"level": LEVEL, **confidence(score, questions)},
        "groups": {
            name: {group: {"percent": share, "questions": count} for group, (share, count) in table.items()}
            for name, table in score.groups.items()
        },
        "notes": list(score.notes),
    }


def confidence(score: Score, questions: Iterable[Question]) -> dict[str, Any]:
    """Intervals by number, and the unit that was resampled; nothing where there is no number."""
    if score.values.get(score.main) is None:
        return {}
    main = terms_of(score, {question.id: question.image for question in questions})
    return {
        name: {**dataclasses.asdict(interval(terms)), "unit": terms.unit}
        for name, terms in {score.main: main, **score.other_terms}.items()
    }


def interval_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The interval in a result; older results hold one by question and one by image, which is the one to print."""
    main, known = record["main"], record["confidence"]
    return known.get(f"{main}_by_image") or known.get(main)


def score_lines(record: Mapping[str, Any]) -> list[str]:
    """A `scored` record as the lines a person reads, numbers with the official two decimals."""
    points, main = set(record["points"]), record["main"]
    lines = [f"{name:14s} {metric_text(name, value, points)}" for name, value in record["metrics"].items()]
    if (found := interval_of(record)) is not None:
        lines.append(f"{main}, 95 % CI by {found.get('unit', 'image')}: {ends(found, 2)}")
    for name, table in ((name, table) for name, table in record["groups"].items() if table):
        mark = "" if name in points else " %"
        lines.append(f"{main} / {name}" if main == "accuracy" else name)
        lines += [f"  {group:12s} {e['percent']:.2f}{mark} (n = {e['questions']:,})" for group, e in table.items()]
    return lines + [f"note: {note}" for note in record["notes"]]


def metric_text(name: str, value: float | None, points: Collection[str] = ()) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" + ("" if name in points else " %") + (" (lower is better)" if name in LOWER_IS_BETTER else "")


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """Tokens, bytes, time and FLOPs of a run."""
    audit, timing = result["audit"], result["timing"]
    layers = ", ".join(number(tokens) for tokens in audit["entering_per_layer"])
    held, room = short(audit["kv_bytes_per_sample"] / 1e6, 100), timing["kv_bytes_with_room"]
    with_room = f", {short(room / 1e6, 100)} MB held while answering (padding, room for new tokens)" if room else ""
    lines = [
        f"visual tokens entering each layer: {layers} (mean {audit['mean_tokens_per_layer']:.1f}, "
        f"{audit['merged_tokens']:.1f} of them merged, {number(audit['visual_tokens_before'])} before reduction)",
        f"key/value cache: {held} MB per question{with_room}",
    ]
    lines += time_lines(timing) + throughput_lines(result.get("throughput")) + flops_lines(result["flops"])
    return lines


def throughput_lines(throughput: Mapping[str, Any] | None) -> list[str]:
    """Questions per second of this run, and of each rank where there were several."""
    if not throughput or not throughput["questions"]:
        return []
    rate, ranks = throughput["questions_per_second"], throughput["ranks"]
    line = f"asked {throughput['questions']:,} questions in {throughput['seconds']:.1f} s, {rate:.1f} per second"
    if len(ranks) > 1:
        parts = [f"rank {part['rank']} {part['questions_per_second']:.1f}" for part in ranks]
        line += f" ({', '.join(parts)})"
    return [line]


def failed_lines(result: Mapping[str, Any], shown: int = 5) -> list[str]:
    """The questions without an answer, with the reason of the first ones, and what to do."""
    failed = result.get("failed", ())
    if not failed:
        return []
    lines = [f"failed: question {line['question_id']}: {line['reason']}" for line in failed[:shown]]
    more = f" ({len(failed) - shown:,} more are in failures.jsonl)" if len(failed) > shown else ""
    return [*lines, f"{len(failed):,} questions have no answer{more}; --retry-failed asks them again."]


def time_lines(timing: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a batch and per question, and what they were measured under."""
    if not timing["questions"]:
        return []
    batch = timing["batch"]
    lines = [
        f"ms of {batch_text(batch['questions'])}, median of {batch['batches']:,}: {milliseconds(batch['median_ms'])}",
        f"ms per question, the batch's time divided by its questions: {milliseconds(timing['ms_per_question'])}",
        f"timed: {timing['questions']:,} questions in {timing['runs']} {'run' if timing['runs'] == 1 else 'runs'}, "
        f"{timing['this_run']['questions']:,} of them in this one",
    ]
    for entry in timing["conditions"]:
        lines.append("measured with " + ", ".join(f"{key} {value}" for key, value in entry.items()))
    return lines


def flops_lines(flops: Mapping[str, Any]) -> list[str]:
    """Operations of the tower per image, and of the language model per question."""
    if flops["language_model_per_question"] is None:
        return []
    model = f"{flops['language_model_per_question'] / 1e9:.2f} GFLOP per question after the tower"
    if flops["tower_per_image"] is None:
        return [model]
    return [f"vision tower: {flops['tower_per_image'] / 1e9:.2f} GFLOP per image; {model}"]


def milliseconds(values: Mapping[str, float | None]) -> str:
    """ "vision 12.0, prefill 30.1"; what was not measured is left out."""
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items() if value is not None)


def batch_text(questions: int) -> str:
    return "one question" if questions == 1 else f"a batch of {questions}"


def sentence(result: Mapping[str, Any]) -> str:
    """The result in words: what, how good, how sure, on how much, at which cost."""
    audit, timing = result["audit"], result["timing"]
    asked = f"{result['asked']:,}"
    if result["partial"]:
        asked = f"the first {asked} of {result['available']:,}"
    wait, first = "n/a", timing["ttft"]
    if first is not None:
        batches = f"median of {first['batches']} batches"
        wait = f"{short(first['median_ms'], 10)} ms for {batch_text(first['questions'])} ({batches})"
    failed = f" ({len(result['failed']):,} more failed)" if result.get("failed") else ""
    off = f" where {result['off_budget']['planned']:.1f} are planned" if result.get("off_budget") else ""
    return (
        f"{result['method']} at {result['budget']} of {result['visual_tokens']} visual tokens: "
        f"{headline(result)} "
        f"on {asked} {result['title']} questions{failed}; {audit['mean_tokens_per_layer']:.1f} tokens per layer{off}, "
        f"KV {short(audit['kv_bytes_per_sample'] / 1e6, 100)} MB, TTFT {wait}."
    )


def headline(result: Mapping[str, Any]) -> str:
    """The main number with its interval, or that there is none yet."""
    main = result["main"]
    value, found = result["metrics"].get(main), interval_of(result)
    if value is None:
        return "answers written, no score"
    sure = f" (95 % CI {ends(found, 1)})" if found else ""
    return f"{value:.1f}{'' if main in result['points'] else ' %'} {main.replace('_', ' ')}{sure}"


def ends(found: Mapping[str, Any], digits: int) -> str:
    """An interval's two ends, or why there is none."""
    if found["low"] is None:
        return str(found["method"])
    return f"{found['low']:.{digits}f} to {found['high']:.{digits}f}"


def number(value: float) -> str:
    """64.0 -> "64", 64.25 -> "64.2"."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def short(value: float, whole_from: float) -> str:
    """No decimals from `whole_from` on, one below, and two digits for what would print as 0.0."""
    if value >= whole_from:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
