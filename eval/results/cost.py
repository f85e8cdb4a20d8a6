"""What answers cost: the audit of tokens and bytes per sample, and the time and FLOPs per batch."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from llava.errors import UserError

if TYPE_CHECKING:
    from llava.pipeline.accounting import Audit
    from llava.pipeline.answer import Batch

PHASES = ("vision", "selection", "prefill", "ttft", "decode")


def audit_record(audit: "Audit") -> dict[str, Any]:
    """One sample's audit as it stands in the answer file."""
    return {
        "entering": list(audit.entering),
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
        **{phase: getattr(batch.timing, phase) for phase in PHASES},
        "decode_steps": batch.decode_steps,
        "kv_bytes": batch.kv_bytes,
        "flops": batch.flops,
        "notes": list(batch.notes),
        **conditions,
    }


def summarise_audit(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what was really computed, over the samples that have a picture: the others have no visual tokens."""
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


def check_budget_kept(records: Sequence[Mapping[str, Any]], rounding: float) -> None:
    """An audited mean that is not the planned one is an error, not a footnote.

    Args:
        records: audits; samples whose pictures decide how many tokens stay have no plan and are left out.
        rounding: how far the method may be off by its own documentation.
    """
    # Questions without a picture have nothing to keep: they would only water a deviation down.
    bound = [record for record in records if record["planned"] is not None and record["visual_tokens"]]
    if not bound:
        return
    kept = fmean(record["mean"] for record in bound)
    expected = fmean(record["planned"] for record in bound)
    if abs(kept - expected) > rounding:
        raise UserError(
            f"The audit counts {kept:.2f} visual tokens per layer on average where the budget is {expected:.2f} "
            f"(tolerance {rounding:g}); the answers are kept but this is no result at that budget."
        )


def summarise_timing(lines: Sequence[Mapping[str, Any]], this_run: str) -> dict[str, Any]:
    """Cost per question over every timed batch, and apart from it over the batches of this run.

    A batch's seconds are divided by its questions, so these are costs and not latencies unless the batch size is 1.

    Args:
        this_run: the `run` of the lines that belong to this process.
    """
    return {
        **per_question(lines),
        "this_run": per_question([line for line in lines if line.get("run") == this_run]),
        "runs": len({line.get("run") for line in lines}),
        "conditions": [dict(pairs) for pairs in sorted({conditions(line) for line in lines}, key=str)],
    }


def per_question(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds, FLOPs, key/value bytes with padding and decode steps per question; numbers None without lines."""
    count = sum(line["questions"] for line in lines)

    def mean(key: str) -> float | None:
        return sum(line[key] for line in lines) / count if count else None

    def milliseconds(key: str) -> float | None:
        seconds = mean(key)
        return None if seconds is None else 1000 * seconds

    return {
        "questions": count,
        "mean_ms": {phase: milliseconds(phase) for phase in PHASES},
        # The first batch pays for warm-up: the median over batches does not.
        "median_ms": {
            phase: 1000 * median(line[phase] / line["questions"] for line in lines) if lines else None
            for phase in PHASES
        },
        "flops": mean("flops"),
        "kv_bytes_padded": mean("kv_bytes"),
        "batches": len(lines),
        "decode_steps_per_batch": fmean(line["decode_steps"] for line in lines) if lines else None,
    }


def conditions(line: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a timing was measured under."""
    return tuple((key, line.get(key)) for key in ("device", "hardware", "threads", "batch_size", "dtype"))


def notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every distinct remark of the model, in order of first appearance."""
    return list(dict.fromkeys(note for line in lines for note in line.get("notes", ())))
