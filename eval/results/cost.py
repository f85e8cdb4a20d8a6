"""What answers cost: visual tokens and bytes per sample, time per batch, floating point operations per question."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from eval.benchmarks.records import NotRequired, Number, TypedDict, check
from eval.config import HALF
from llava.errors import UserError
from llava.pipeline.accounting import Batch, TokenAccounting
from llava.reduction.reducer import Reducer

STAGES = ("preprocess", "vision", "selection", "prefill", "decode")
PARTS = ("tower", "projector", "selection", "prefill")


class TimingLine(TypedDict):
    """A line of timing.jsonl, as far as numbers are made of it."""

    questions: int
    images: int
    preprocess: Number
    vision: Number
    selection: Number
    prefill: Number
    decode: Number
    decode_steps: Number
    kv_bytes: Number
    kv_bytes_allocated: Number
    flops: Number
    flops_alone: dict[str, Number]
    notes: list[str]
    device: NotRequired[str]
    hardware: NotRequired[str]
    threads: NotRequired[int]
    batch_size: NotRequired[int]
    dtype: NotRequired[str]


def accounting_record(accounting: TokenAccounting) -> dict[str, Any]:
    """One sample's accounting as it stands in the answer file."""
    return {
        "entering": list(accounting.tokens_per_layer),
        "mean": accounting.mean,
        "planned": accounting.planned,
        "asked": accounting.asked,
        "visual_tokens": accounting.visual_tokens,
        "merged": accounting.merged,
        "kv_bytes": accounting.kv_bytes,
        "on_padding": accounting.on_padding,
    }


def timing_record(batch: Batch, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """One batch's line in timing.jsonl: seconds for the batch as a whole, and what they were measured under."""
    return {
        "questions": len(batch.answers),
        "images": batch.images,
        **{name: getattr(batch.timing, name) for name in STAGES},
        "decode_steps": batch.decode_steps,
        "kv_bytes": batch.kv_bytes,
        "kv_bytes_allocated": batch.kv_bytes_allocated,
        "flops": batch.operations.total,
        "flops_alone": batch.operations.alone,
        "notes": [],  # what a limit of memory remarks
        **conditions,
    }


def checked(lines: Sequence[Mapping[str, Any]], path: Path) -> Sequence[Mapping[str, Any]]:
    """The same lines of `path`; UserError if one of them holds something else than `timing_record` writes."""
    for line in lines:
        try:
            check(TimingLine, line, f"The line of question {line['question_ids'][0]} in {path}")
        except UserError as error:
            raise UserError(f"{error} Delete the line, without which the answers count as before.") from error
    return lines


def summarise_accounting(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what was really computed, over the samples that have an image: the others have no visual tokens.

    Tokens on padding are None if they are not known of one of them, as of answers of earlier versions.
    """
    total, records = len(records), [record for record in records if record["visual_tokens"]] or records
    depth = min(len(record["entering"]) for record in records)
    padding = [tokens for record in records if (tokens := record.get("on_padding")) is not None]
    return {
        "samples": total,
        "without_image": total - len(records),
        "visual_tokens_before": fmean(record["visual_tokens"] for record in records),
        "entering_per_layer": [fmean(record["entering"][layer] for record in records) for layer in range(depth)],
        "mean_tokens_per_layer": fmean(record["mean"] for record in records),
        "asked_tokens_per_layer": fmean(record["asked"] for record in records),
        "merged_tokens": fmean(record["merged"] for record in records),
        "mean_tokens_on_padding": fmean(padding) if len(padding) == len(records) else None,
        "kv_bytes_per_sample": fmean(record["kv_bytes"] for record in records),
    }


def off_budget(
    records: Sequence[Mapping[str, Any]], reducer: Reducer, planned_only: bool = False
) -> dict[str, Any] | None:
    """A mean over questions that is not the budget that was asked for; None where they agree.

    The two agree within the method's `rounding`. The budget of an image with fewer tokens is all of these. A method
    that adapts to the image may keep more of one and less of another, as long as the mean is the budget.

    Args:
        records: accounts.
        reducer: the method. Where it says that it counts otherwise (known_deviations, "uncounted"), its plan is what
            was asked for.
        planned_only: leave out images of which the method has no plan: the mean of a few says nothing.

    Returns:
        asked, counted, questions, and the remark that says so.
    """
    # Questions without an image have nothing to keep: they would only water a deviation down.
    bound = [record for record in records if record["visual_tokens"]]
    bound = [record for record in bound if not planned_only or record["planned"] is not None]
    if not bound:
        return None
    otherwise = bool(reducer.deviates("uncounted"))
    targets = [record["planned" if otherwise and record["planned"] is not None else "asked"] for record in bound]
    counted, asked = fmean(record["mean"] for record in bound), fmean(targets)
    if abs(counted - asked) <= reducer.rounding:
        return None
    differing = sum(
        abs(record["mean"] - target) > reducer.rounding for record, target in zip(bound, targets, strict=True)
    )
    remark = (
        f"{counted:.2f} visual tokens entered a decoder layer on average over {len(bound):,} "
        f"question{'' if len(bound) == 1 else 's'}, where the budget asks for {asked:.2f} (tolerance "
        f"{reducer.rounding:g}); {differing:,} of them differ. The score is one at {counted:.2f} tokens."
    )
    return {"asked": asked, "counted": counted, "questions": len(bound), "remark": remark}


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

    `ms_per_question` is the median time of `batch` divided by its questions: a cost, not a latency.
    """
    count, batch = sum(line["questions"] for line in lines), batch_latency(lines)

    def per_question(key: str) -> float | None:
        return sum(line[key] for line in lines) / count if lines else None

    return {
        "questions": count,
        "batches": len(lines),
        "batch": batch,
        "ms_per_question": {name: batch["median_ms"][name] / batch["questions"] if batch else None for name in STAGES},
        "kv_bytes_padded": per_question("kv_bytes"),
        "kv_bytes_allocated": per_question("kv_bytes_allocated"),
        "decode_steps_per_batch": fmean(line["decode_steps"] for line in lines) if lines else None,
    }


def batch_latency(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Median milliseconds over the batches of one size, the most frequent one and the larger of equals.

    The median, because the first batch pays for warm-up. These are times of the run: the tower does not see an image
    again that it has seen, so they hold no time to first token (eval.ask.first_token_times).
    """
    if not lines:
        return None
    sizes = Counter(line["questions"] for line in lines)
    size = max(sizes, key=lambda questions: (sizes[questions], questions))
    same = [line for line in lines if line["questions"] == size]
    medians = {name: 1000 * median(line[name] for line in same) for name in STAGES}
    return {"questions": size, "batches": len(same), "median_ms": medians}


def summarise_flops(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Floating point operations up to the first token, the vision tower apart.

    Questions of a batch share the tower's pass over their image, so what a batch really computes depends on its size.
    All numbers but the last are of questions asked alone and do not, apart from padding where a method scores questions
    of different lengths together.

    Returns:
        questions (that these lines are about), tower_per_image, language_model_per_question (projector, selection and
        prefill), by_part (per question), per_question (everything) and as_batched_per_question; None without lines, and
        for sums of which a part is not counted in this model.
    """
    count, images = (sum(line[key] for line in lines) for key in ("questions", "images"))
    parts = {part: sum(line["flops_alone"].get(part, 0) for line in lines) for part in PARTS}
    whole, counted = sum(parts.values()), {part for line in lines for part in line["flops_alone"]}
    decoder, tower = "prefill" in counted, "tower" in counted or not images
    return {
        "questions": count,
        "tower_per_image": parts["tower"] / images if images and tower else None,
        "language_model_per_question": (whole - parts["tower"]) / count if decoder else None,
        "by_part": {part: amount / count for part, amount in parts.items()} if lines else None,
        "per_question": whole / count if decoder and tower else None,
        "as_batched_per_question": sum(line["flops"] for line in lines) / count if decoder and tower else None,
    }


def conditions(line: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a timing was measured under."""
    return tuple((key, line.get(key)) for key in ("device", "hardware", "threads", "batch_size", "dtype"))


def mixed_batches(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark about answers in half precision that were asked in batches of several sizes; nothing for others.

    Sums are taken in another order in a larger batch, and in half precision their rounding decides one answer of some
    hundred. The last batch of a run is smaller in every run, so the size that was asked for counts.

    Args:
        lines: of timing.jsonl.
    """
    sizes = Counter[str]()
    for line in lines:
        if line.get("dtype") in HALF:
            sizes[f"{line['batch_size']}{' at most, for lack of memory' * bool(line['notes'])}"] += line["questions"]
    if len(sizes) < 2:
        return []
    parts = "; ".join(f"{size}: {count:,} answers" for size, count in sizes.items())
    return [
        f"answers in half precision depend on the batch size, and these were asked with several ({parts}); --restart "
        "asks all of them with one"
    ]


def notes(lines: Sequence[Mapping[str, Any]], asked: int) -> list[str]:
    """Every distinct remark, in order of first appearance, and whether questions are missing from the means.

    Args:
        asked: questions with an answer. Lines of some are missing where a disk has failed, or a batch was torn.
    """
    found = list(dict.fromkeys(note for line in lines for note in line["notes"]))
    if (timed := sum(line["questions"] for line in lines)) < asked:
        found.append(
            f"operations, times and the cache held while answering are means over {timed:,} of {asked:,} questions: "
            "timing.jsonl has lost the batches of the others, whose answers are kept and count"
        )
    return found
