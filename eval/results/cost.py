"""What answers cost: visual tokens and bytes per sample, time per batch, floating point operations per question."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.pipeline.accounting import TokenAccounting
    from llava.pipeline.answer import Batch

STAGES = ("preprocess", "vision", "selection", "prefill", "decode")
PARTS = ("tower", "projector", "selection", "prefill")


def audit_record(audit: "TokenAccounting") -> dict[str, Any]:
    """One sample's audit as it stands in the answer file."""
    return {
        "entering": list(audit.tokens_per_layer),
        "mean": audit.mean,
        "planned": audit.planned,
        "visual_tokens": audit.visual_tokens,
        "merged": audit.merged,
        "kv_bytes": audit.kv_bytes,
    }


def timing_record(batch: "Batch", conditions: Mapping[str, Any]) -> dict[str, Any]:
    """One batch's line in timing.jsonl: seconds for the batch as a whole, and what they were measured under."""
    return {
        "questions": len(batch.answers),
        "images": batch.images,
        **{name: getattr(batch.timing, name) for name in STAGES},
        "decode_steps": batch.decode_steps,
        "kv_bytes": batch.kv_bytes,
        "kv_bytes_with_room": batch.kv_bytes_with_room,
        "flops": batch.flops,
        "flops_alone": dict(batch.flops_alone),
        "notes": list(batch.notes),
        **conditions,
    }


def summarise_audit(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what was really computed, over the samples that have an image: the others have no visual tokens."""
    total, records = len(records), [record for record in records if record["visual_tokens"]] or records
    depth = min(len(record["entering"]) for record in records)
    return {
        "samples": total,
        "without_picture": total - len(records),
        "visual_tokens_before": fmean(record["visual_tokens"] for record in records),
        "entering_per_layer": [fmean(record["entering"][layer] for record in records) for layer in range(depth)],
        "mean_tokens_per_layer": fmean(record["mean"] for record in records),
        "merged_tokens": fmean(record["merged"] for record in records),
        "kv_bytes_per_sample": fmean(record["kv_bytes"] for record in records),
    }


def off_budget(records: Sequence[Mapping[str, Any]], rounding: float) -> dict[str, Any] | None:
    """An audited mean that is not the planned one: both means and a remark; None where they agree.

    Args:
        records: audits; samples whose images decide how many tokens stay have no plan and are left out.
        rounding: how far the method may be off by its own documentation.
    """
    # Questions without an image have nothing to keep: they would only water a deviation down.
    bound = [record for record in records if record["planned"] is not None and record["visual_tokens"]]
    if not bound:
        return None
    counted, planned = (fmean(record[name] for record in bound) for name in ("mean", "planned"))
    if abs(counted - planned) <= rounding:
        return None
    differing = sum(abs(record["mean"] - record["planned"]) > rounding for record in bound)
    remark = (
        f"The audit counts {counted:.2f} visual tokens per layer on average where {planned:.2f} are planned "
        f"(tolerance {rounding:g}), because of {differing:,} of {len(bound):,} samples; a score is one at "
        f"{counted:.2f} tokens."
    )
    return {"planned": planned, "counted": counted, "remark": remark}


def summarise_timing(lines: Sequence[Mapping[str, Any]], this_run: str) -> dict[str, Any]:
    """Time over every timed batch, and apart from it over the batches of this run.

    Args:
        this_run: the `run` of the lines that belong to this process.
    """
    return {
        **times(lines),
        "this_run": times([line for line in lines if line.get("run") == this_run]),
        "runs": len({line.get("run") for line in lines}),
        "conditions": [dict(pairs) for pairs in sorted({conditions(line) for line in lines}, key=str)],
    }


def times(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a batch, and milliseconds, key/value bytes and decode steps per question; None without lines.

    `ms_per_question` is a batch's time divided by its questions: a cost, not a latency.
    """
    count = sum(line["questions"] for line in lines)
    spent = {stage: total(lines, stage) for stage in STAGES}
    return {
        "questions": count,
        "batches": len(lines),
        "batch": batch_latency(lines),
        "ms_per_question": {stage: None if value is None else 1000 * value / count for stage, value in spent.items()},
        "kv_bytes_padded": total(lines, "kv_bytes") / count if count else None,
        "kv_bytes_with_room": room / count if (room := total(lines, "kv_bytes_with_room")) and count else None,
        "decode_steps_per_batch": fmean(line["decode_steps"] for line in lines) if lines else None,
    }


def total(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Sum over the batches; None without any, and where a batch of an earlier version was not asked for this."""
    return sum(line[key] for line in lines) if lines and all(key in line for line in lines) else None


def batch_latency(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Median milliseconds over the batches of one size, the most frequent one and the larger of equals.

    The median, because the first batch pays for warm-up. These are times of the run: the tower does not see an image
    again that it has seen, so they hold no time to first token (eval.asking.first_token_times).
    """
    if not lines:
        return None
    sizes = Counter(line["questions"] for line in lines)
    size = max(sizes, key=lambda questions: (sizes[questions], questions))
    same = [line for line in lines if line["questions"] == size]
    known = {name: [line[name] for line in same if name in line] for name in STAGES}
    return {
        "questions": size,
        "batches": len(same),
        "median_ms": {name: 1000 * median(values) if values else None for name, values in known.items()},
    }


def summarise_flops(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Floating point operations up to the first token, the vision tower apart.

    Questions of a batch share the tower's pass over their image, so what a batch really computes depends on its size.
    All numbers but the last are of questions asked alone and do not, apart from padding where a method scores questions
    of different lengths together.

    Returns:
        tower_per_image, language_model_per_question (projector, selection and prefill), by_part (per question),
        per_question (everything) and as_batched_per_question; None where batches were counted by an earlier version.
    """
    count = sum(line["questions"] for line in lines)
    alone = [line["flops_alone"] for line in lines if line.get("flops_alone")]
    found: dict[str, Any] = dict.fromkeys(("tower_per_image", "language_model_per_question", "by_part", "per_question"))
    if lines and len(alone) == len(lines):
        parts = {part: sum(batch.get(part, 0) for batch in alone) for part in PARTS}
        images = total(lines, "images")
        found = {
            "tower_per_image": parts["tower"] / images if images else None,
            "language_model_per_question": sum(parts[part] for part in PARTS if part != "tower") / count,
            "by_part": {part: amount / count for part, amount in parts.items()},
            "per_question": sum(parts.values()) / count,
        }
    return found | {"as_batched_per_question": total(lines, "flops") / count if count else None}


def flops_as_batched(result: Mapping[str, Any]) -> float:
    """Operations per question of a finished run as its batches computed them, from result files of any version."""
    return result["flops"]["as_batched_per_question"] if "flops" in result else result["flops_per_question"]


def conditions(line: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a timing was measured under."""
    return tuple((key, line.get(key)) for key in ("device", "hardware", "threads", "batch_size", "dtype"))


def notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every distinct remark of the model, in order of first appearance, and what to know about the times of the run."""
    found = list(dict.fromkeys(note for line in lines for note in line.get("notes", ())))
    if old := sum("preprocess" not in line for line in lines):
        found.append(f"Vision of {old:,} of {len(lines):,} batches include preprocessing (earlier version).")
    if shared := sum(bool(line.get("shared_prefix")) for line in lines):
        found.append(
            f"Vision and prefill of {shared:,} of {len(lines):,} batches are of prompts whose common beginning "
            "ran once (--share-prefix): no times of the method."
        )
    return found
