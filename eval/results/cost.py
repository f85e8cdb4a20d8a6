"""What answers cost: visual tokens and bytes per sample, time per batch, floating-point operations per question."""

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
CONDITIONS = ("device", "hardware", "threads", "batch_size", "dtype")  # of a timing


class TimingLine(TypedDict):
    """The keys of a line of timing.jsonl from which numbers are computed."""

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
    """One sample's accounting as the answer file records it."""
    return {
        "entering": list(accounting.tokens_per_layer),
        "mean": accounting.mean,
        "paid": accounting.paid,
        "planned": accounting.planned,
        "asked": accounting.asked,
        "visual_tokens": accounting.visual_tokens,
        "merged": accounting.merged,
        "kv_bytes": accounting.kv_bytes,
        "on_padding": accounting.on_padding,
    }


def timing_record(batch: Batch, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """One batch's line of timing.jsonl: seconds of the whole batch, and the conditions of the measurement."""
    return {
        "questions": len(batch.answers),
        "images": batch.images,
        **{name: getattr(batch.timing, name) for name in STAGES},
        "decode_steps": batch.decode_steps,
        "kv_bytes": batch.kv_bytes,
        "kv_bytes_allocated": batch.kv_bytes_allocated,
        "flops": batch.operations.total,
        "flops_alone": batch.operations.alone,
        "notes": [],  # remarks about a lack of memory
        **conditions,
    }


def checked(lines: Sequence[Mapping[str, Any]], path: Path) -> Sequence[Mapping[str, Any]]:
    """Return lines of `path` unchanged; UserError if one of them lacks what `timing_record` writes."""
    for line in lines:
        try:
            check(TimingLine, line, f"The line of question {line['question_ids'][0]} in {path}")
        except UserError as error:
            raise UserError(f"{error} Delete the line, without which the answers count as before.") from error
    return lines


def summarise_accounting(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what was computed, over the samples with an image; over all samples if none has one.

    `adaptive` says whether an image decided how many tokens are kept, so that means differ from image to image.
    `mean_tokens_on_padding` is None if a sample does not record it, as answers of earlier versions do not.
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
        "least_tokens_per_layer": min(record["mean"] for record in records),
        "most_tokens_per_layer": max(record["mean"] for record in records),
        "adaptive": any(record["planned"] is None for record in records),
        "merged_tokens": fmean(record["merged"] for record in records),
        "mean_tokens_on_padding": fmean(padding) if len(padding) == len(records) else None,
        "kv_bytes_per_sample": fmean(record["kv_bytes"] for record in records),
    }


def off_budget(
    records: Sequence[Mapping[str, Any]], reducer: Reducer, planned_only: bool = False
) -> dict[str, Any] | None:
    """Describe how the mean number of visual tokens over all questions misses the budget; None if it does not.

    Deviations up to the method's `rounding` are accepted. If an image has fewer tokens than the budget, its budget is
    all of them. A method that adapts to the image may keep more of one image and less of another, as long as the mean
    is the budget.

    Args:
        records: one per question, see `accounting_record`.
        reducer: the method. If it declares that it counts otherwise (known_deviations, "uncounted"), the mean is
            compared with its plan in place of the budget.
        planned_only: leave out images for which the method has no plan, because the mean of a few says nothing.

    Returns:
        asked, counted, questions, and a remark in words.
    """
    # Questions without an image keep nothing and would only hide a deviation.
    bound = [record for record in records if record["visual_tokens"]]
    bound = [record for record in bound if not planned_only or record["planned"] is not None]
    if not bound:
        return None
    targets = [record["asked"] for record in bound]
    if reducer.deviates("uncounted"):
        targets = [record["asked"] if record["planned"] is None else record["planned"] for record in bound]
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
    """Times over all timed batches, and over those of this run alone.

    Args:
        this_run: the `run` in the lines of this process.
    """
    conditions = {tuple((key, line.get(key)) for key in CONDITIONS) for line in lines}
    return {
        **times(lines),
        "this_run": times([line for line in lines if line.get("run") == this_run]),
        "runs": len({line.get("run") for line in lines}),
        "conditions": [dict(pairs) for pairs in sorted(conditions, key=str)],
    }


def times(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds per batch and per question, key/value bytes per question and decode steps; None without lines.

    `batch` has the median milliseconds over the batches of the most frequent size, the larger one if two are equally
    frequent; the median, because the first batch includes warm-up. These times give no time to first token, because the
    run does not encode an image a second time; eval.ask.first_token_times measures it. `ms_per_question` is the median
    time of `batch` divided by its number of questions. It is a cost, not a latency.
    """
    count, batch = sum(line["questions"] for line in lines), dict[str, Any]()
    if lines:
        sizes = Counter(line["questions"] for line in lines)
        size = max(sizes, key=lambda questions: (sizes[questions], questions))
        same = [line for line in lines if line["questions"] == size]
        medians = {name: 1000 * median(line[name] for line in same) for name in STAGES}
        batch = {"questions": size, "batches": len(same), "median_ms": medians}

    def per_question(key: str) -> float | None:
        return sum(line[key] for line in lines) / count if lines else None

    return {
        "questions": count,
        "batches": len(lines),
        "batch": batch or None,
        "ms_per_question": {name: batch["median_ms"][name] / batch["questions"] if batch else None for name in STAGES},
        "kv_bytes_padded": per_question("kv_bytes"),
        "kv_bytes_allocated": per_question("kv_bytes_allocated"),
        "decode_steps_per_batch": fmean(line["decode_steps"] for line in lines) if lines else None,
    }


def summarise_flops(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Floating-point operations up to the first token, with the vision tower separate.

    Questions about one image share the tower's pass in a batch, so the operations of a batch depend on its size. All
    numbers except the last are for questions asked alone, and depend on the batch only by padding, if a method scores
    questions of different lengths together.

    Returns:
        questions (in these lines), tower_per_image, language_model_per_question (projector, selection and prefill),
        by_part (per question), per_question (everything) and as_batched_per_question. A number is None without lines,
        or if it needs a part that is not counted for this model.
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


def mixed_batches(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark if answers in half precision were computed with several batch sizes; otherwise an empty list.

    The batch size changes the order of sums, and in half precision their rounding changes one answer in some hundred.
    The requested size counts, because the last batch of every run is smaller.

    Args:
        lines: of timing.jsonl.
    """
    sizes = Counter[str]()
    for line in lines:
        if line.get("dtype") in HALF:
            at_most = " at most, for lack of memory" if line["notes"] else ""
            sizes[f"{line['batch_size']}{at_most}"] += line["questions"]
    if len(sizes) < 2:
        return []
    parts = "; ".join(f"{size}: {count:,} answers" for size, count in sizes.items())
    return [
        f"answers in half precision depend on the batch size, and these were asked with several ({parts}); --restart "
        "asks all of them with one"
    ]


def notes(lines: Sequence[Mapping[str, Any]], asked: int) -> list[str]:
    """All distinct remarks in order of first appearance, and one if questions are missing from the means.

    Args:
        asked: number of questions with an answer. Their lines can be missing if the disk failed or a batch was torn.
    """
    found = list(dict.fromkeys(note for line in lines for note in line["notes"]))
    if (timed := sum(line["questions"] for line in lines)) < asked:
        found.append(
            f"operations, times and the cache held while answering are means over {timed:,} of {asked:,} questions: "
            "timing.jsonl has lost the batches of the others, whose answers are kept and count"
        )
    return found
