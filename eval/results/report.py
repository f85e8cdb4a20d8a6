"""The result of a run: the part that scoring alone can fill, what made it, and the sentences that are printed of it."""

import dataclasses
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.reuse import joint, read_result
from eval.answers.source_hash import listed
from eval.benchmarks.base import Question
from eval.config import FULL, HALF
from eval.metrics import Score
from eval.results.statistics import LEVEL, interval, rounded, terms_of
from llava.budget import RETENTION_RATIO, budget_text
from llava.errors import UserError

LOWER_IS_BETTER = {"distribution"}
# Those of them that can change an answer.
DECIDING = ("torch", "transformers", "tokenizers", "numpy", "pillow")
PARTIAL = re.compile(r"limit\d+")


def scored(score: Score, questions: Iterable[Question], labels: Mapping[str, str]) -> dict[str, Any]:
    """The score in JSON types, with the 95 % confidence intervals of its main number and of `other_terms`.

    Args:
        labels: of eval.benchmarks.base.Dataset.labels.
    """
    return {
        "questions": len(score.correct) or len(list(questions)),
        "main": score.main,
        "metrics": score.values,
        "points": sorted(score.points),
        "confidence": {"level": LEVEL, **confidence(score, labels)},
        "groups": {
            name: {group: {"percent": share, "questions": count} for group, (share, count) in table.items()}
            for name, table in score.groups.items()
        },
        "notes": list(score.notes),
    }


def confidence(score: Score, labels: Mapping[str, str]) -> dict[str, Any]:
    """Intervals by number, and the unit that was resampled; nothing where there is no number."""
    if score.values.get(score.main) is None:
        return {}
    drawn = {name: terms_of(score, labels, name) for name in (score.main, *score.other_terms)}
    return {name: {**dataclasses.asdict(interval(terms)), "unit": terms.unit} for name, terms in drawn.items()}


def interval_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The interval of the main number of a result, if it has one."""
    found: Mapping[str, Any] | None = record["confidence"].get(record["main"])
    return found


def main_score(result: Mapping[str, Any]) -> float | None:
    """The main number of a result; None where it is missing."""
    score: float | None = result["metrics"].get(result["main"])
    return score


def percent_of_full(result: Mapping[str, Any], output: Path) -> float | None:
    """Main score in percent of that of `full`; None where either is missing or `full` scores 0.

    Args:
        output: the run's folder; the result of `full` is looked for in the folders beside it.
    """
    score = main_score(result)
    full = full_score(result, output)
    return 100 * score / full if score is not None and full else None


def full_score(result: Mapping[str, Any], output: Path) -> float | None:
    """Main score of a run of `full` that asked the same questions, about the same images, under the same settings."""
    if result["method"] == FULL:
        return main_score(result)
    folder = output.resolve()
    run = folder.parent if PARTIAL.fullmatch(folder.name) else folder  # results of the first questions are in limitN/
    found = [*run.parent.glob("*/result.json"), *run.parent.glob("*/limit*/result.json")]
    # Folders of `full` usually say so; a sweep has hundreds of others.
    for path in sorted(found, key=lambda path: (not path.relative_to(run.parent).parts[0].startswith(FULL), path)):
        try:
            other = read_result(path.parent)
        except UserError:
            continue  # a damaged file is an error of the run that it belongs to
        if other.get("method") == FULL and joint(other) == joint(result):
            return main_score(other)
    return None


def operations_of(result: Mapping[str, Any]) -> float | None:
    """Operations per question, to be shown beside those of other runs; None where they are not of every question.

    Questions differ in length, so a mean over fewer of them is another number.
    """
    whole = (result.get("timing") or {}).get("questions", result["asked"]) == result["asked"]
    found: float | None = (result.get("flops") or {}).get("per_question")
    return found if whole else None


# -- what made the answers ------------------------------------------------------------------------------------------


def made_by(origins: Sequence[tuple[Mapping[str, Any] | None, int]]) -> dict[str, Any]:
    """Commit and library versions of the answers, and notes where not all of them have the same.

    Args:
        origins: see AnswerStore.origins.
    """
    total = sum(number for _, number in origins)
    notes = []
    if unknown := sum(number for run, number in origins if run is None):
        notes.append(f"the commit of {unknown:,} of {total:,} answers is unknown: the end of runs.jsonl was lost")
    commits, libraries = Counter[str](), Counter[str]()
    for run, number in origins:
        commits["unknown" if run is None else run["commit"]] += number
        if run is not None:
            libraries[", ".join(f"{library} {release}" for library, release in sorted(run["versions"].items()))] += (
                number
            )
    for what, found in (("commits", commits), ("library versions", libraries)):
        if len(found) > 1:
            parts = "; ".join(f"{name}: {number:,} answers" for name, number in found.items())
            notes.append(f"the answers were made with different {what} ({parts})")
    runs = [run for run, _ in origins if run is not None]
    return {
        "commit": " and ".join(commits) if commits else "unknown",
        "versions": dict(runs[-1]["versions"]) if runs else {},
        "notes": notes,
    }


def circumstances(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences about what is no setting of an answer but can move one, where it differs between runs.

    These are versions of libraries and hardware and, in half precision, the number of questions asked at once. A run
    whose mean of visual tokens is not its budget is named, too.

    Args:
        results: what a reader knows the run by -> content of result.json.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, result in results.items():
        for library in DECIDING if result.get("versions") else ():
            found[f"with different versions of {library}"][result["versions"].get(library, "none")].append(name)
        conditions = (result.get("timing") or {}).get("conditions") or ()
        if chips := {str(one["hardware"]) for one in conditions}:
            found["on different hardware"][" and ".join(sorted(chips))].append(name)
        if sizes := {one["batch_size"] for one in conditions if one["dtype"] in HALF}:
            size = " and ".join(map(str, sorted(sizes)))
            found["with different batch sizes, on which answers in half precision depend"][size].append(name)
    sentences = []
    for what, names in found.items():
        if len(names) > 1:
            parts = (f"{value} ({listed(own)})" for value, own in names.items())
            sentences.append(f"the runs were made {what}: {'; '.join(parts)}")
    off = ((name, result.get("off_budget")) for name, result in results.items())
    return sentences + [f"{name} is off its budget: {one['remark']}" for name, one in off if one]


def hardware(device: str) -> str:
    """The name of the chip of a torch device; timings mean nothing without it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# -- in words -------------------------------------------------------------------------------------------------------


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
        return "not measured"
    return f"{value:.2f}" + ("" if name in points else " %") + (" (lower is better)" if name in LOWER_IS_BETTER else "")


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """Tokens, bytes, times, questions per second (and of each rank where there were several) and FLOPs of a run."""
    accounting, timing, flops = result["accounting"], result["timing"], result["flops"]
    layers = ", ".join(number(tokens) for tokens in accounting["entering_per_layer"])
    held, room = short(accounting["kv_bytes_per_sample"] / 1e6, 100), timing["kv_bytes_allocated"]
    with_room = f", {short(room / 1e6, 100)} MB held while answering (padding, room for new tokens)" if room else ""
    timed = "" if timing["questions"] == result["asked"] else of_some(timing["questions"], result["asked"])
    # None where it is not known, absent from results of earlier versions.
    empty = "" if (padding := accounting.get("mean_tokens_on_padding")) is None else f"{padding:.1f} on padding, "
    lines = [
        f"visual tokens entering each layer: {layers} (mean {accounting['mean_tokens_per_layer']:.1f}, "
        f"{accounting['merged_tokens']:.1f} of them merged, {empty}"
        f"{number(accounting['visual_tokens_before'])} before reduction)"
        f"{share_with_image(accounting)}",
        f"key/value cache: {held} MB per question{share_with_image(accounting)}{with_room}",
        *time_lines(timing),
    ]
    asked = result["throughput"]
    if asked["questions"]:
        parts = [f"rank {part['rank']} {part['questions_per_second']:.1f}" for part in asked["ranks"]]
        by_rank = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        rate = f"{asked['questions_per_second']:.1f} per second{by_rank}"
        lines.append(f"asked {asked['questions']:,} questions in {asked['seconds']:.1f} s, {rate}")
    if flops["language_model_per_question"] is not None:
        tower = flops["tower_per_image"]
        vision = "" if tower is None else f"vision tower: {tower / 1e9:.2f} GFLOP per image; "
        decoder = f"{flops['language_model_per_question'] / 1e9:.2f} GFLOP per question after the tower"
        lines.append(f"{vision}{decoder}{timed}")
    return lines


def share_with_image(accounting: Mapping[str, Any]) -> str:
    """Of how many questions the means of an accounting are, where some have no image."""
    total = accounting["samples"]
    return of_some(total - accounting["without_image"], total, " with an image") if accounting["without_image"] else ""


def of_some(some: int, total: int, which: str = "") -> str:
    return f", over the {some:,} of {total:,} questions{which}"


def failed_lines(result: Mapping[str, Any], shown: int = 5) -> list[str]:
    """The questions without an answer, with the reason of the first ones, and what to do."""
    failed = result.get("failed", ())
    if not failed:
        return []
    lines = [f"failed: question {line['question_id']}: {line['reason']}" for line in failed[:shown]]
    more = f" ({len(failed) - shown:,} more are in failures.jsonl)" if len(failed) > shown else ""
    return [*lines, f"{len(failed):,} questions have no answer{more}; --retry-failed asks them again."]


def time_lines(timing: Mapping[str, Any]) -> list[str]:
    """Median milliseconds of a batch, the same per question, and what they were measured under."""
    if not timing["questions"]:
        return []
    batch, alone = timing["batch"], timing["ms_per_question"]
    stages = ", ".join(f"{name} {value:.1f} ({alone[name]:.1f})" for name, value in batch["median_ms"].items())
    lines = [
        f"ms of {batch_text(batch['questions'])}, median of {batch['batches']:,} (divided by its questions): {stages}",
        f"timed: {timing['questions']:,} questions in {timing['runs']} {'run' if timing['runs'] == 1 else 'runs'}, "
        f"{timing['this_run']['questions']:,} of them in this one",
    ]
    for entry in timing["conditions"]:
        lines.append("measured with " + ", ".join(f"{key} {value}" for key, value in entry.items()))
    return lines


def batch_text(questions: int) -> str:
    return "one question" if questions == 1 else f"a batch of {questions}"


def sentence(result: Mapping[str, Any]) -> str:
    """The result in words: what, how good, how sure, on how much, at which cost."""
    accounting, timing, main, ci = result["accounting"], result["timing"], result["main"], interval_of(result)
    score = "answers written, no score"
    if (value := result["metrics"].get(main)) is not None:
        sure = f" (95 % CI {ends(ci, 1)})" if ci else ""
        score = f"{rounded(value)}{'' if main in result['points'] else ' %'} {main.replace('_', ' ')}{sure}"
    asked = f"{result['asked']:,}"
    if result["partial"]:
        asked = f"the first {asked} of {result['available']:,}"
    wait, first = "n/a", timing["ttft"]
    if first is not None:
        batches = f"median of {first['batches']} batches"
        wait = f"{short(first['median_ms'], 10)} ms for {batch_text(first['questions'])} ({batches})"
    engine = result["settings"].get("engine")
    by = f", by {engine['name']} {engine['version']}" if engine else ""
    failed = f" ({len(result['failed']):,} more failed)" if result.get("failed") else ""
    ratio = result["settings"]["config"].get(RETENTION_RATIO)
    total = "each image's" if ratio else result["visual_tokens"]
    tokens = f"{accounting['mean_tokens_per_layer']:.1f} tokens per layer{off_text(result)}"
    return (
        f"{result['method']} at {budget_text(result['budget'], ratio)} of {total} visual tokens: {score} "
        f"on {asked} {result['title']} questions{failed}; {tokens}"
        f"{share_with_image(accounting)}, KV {short(accounting['kv_bytes_per_sample'] / 1e6, 100)} MB, TTFT {wait}{by}."
    )


def off_text(result: Mapping[str, Any]) -> str:
    """What the sentence says of a mean that is not the budget; "" where it is."""
    accounting = result["accounting"]
    if off := result["off_budget"]:
        over = f"{off['questions']:,} question{'' if off['questions'] == 1 else 's'}"
        return f" where {off['asked']:.1f} were asked for (mean over {over})"
    asked = accounting["asked_tokens_per_layer"]
    if (reason := result["counts_otherwise"]) and f"{asked:.1f}" != f"{accounting['mean_tokens_per_layer']:.1f}":
        return f" where {asked:.1f} were asked for ({reason})"
    return ""


def ends(found: Mapping[str, Any], digits: int) -> str:
    """An interval's two ends, or why there is none."""
    if found["low"] is None:
        return str(found["method"])
    return f"{rounded(found['low'], digits)} to {rounded(found['high'], digits)}"


def number(value: float) -> str:
    """64.0 -> "64", 64.25 -> "64.2"."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def short(value: float, whole_from: float) -> str:
    """No decimals from `whole_from` on, one below, and two digits for what would print as 0.0."""
    if value >= whole_from:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
