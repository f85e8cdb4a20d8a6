"""The result of a run: what the score alone provides, what produced the answers, and the sentences that are printed."""

import dataclasses
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.reuse import joint, read_result
from eval.answers.source_hash import listed
from eval.benchmarks.base import Question
from eval.config import FULL, HALF
from eval.metrics import Score
from eval.results.statistics import LEVEL, interval, rounded, terms_of
from llava.budget import BLIND, RETENTION_RATIO, budget_text
from llava.errors import UserError

LOWER_IS_BETTER = {"distribution"}
# Libraries whose version can change an answer.
DECIDING = ("torch", "transformers", "tokenizers", "numpy", "pillow")
PARTIAL = re.compile(r"limit\d+")


def scored(score: Score, questions: Iterable[Question], labels: Mapping[str, str]) -> dict[str, Any]:
    """The score in JSON types, with 95 % confidence intervals of its main number and of those in `other_terms`.

    Args:
        labels: as eval.benchmarks.base.Dataset.labels returns them.
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
    """Name of a number -> its interval and the unit that was resampled; empty if the main number is missing."""
    if score.values.get(score.main) is None:
        return {}
    drawn = {name: terms_of(score, labels, name) for name in (score.main, *score.other_terms)}
    return {name: {**dataclasses.asdict(interval(terms)), "unit": terms.unit} for name, terms in drawn.items()}


def interval_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The interval of a result's main number, if it has one."""
    found: Mapping[str, Any] | None = record["confidence"].get(record["main"])
    return found


def main_score(result: Mapping[str, Any]) -> float | None:
    """The main number of a result; None if it is missing."""
    score: float | None = result["metrics"].get(result["main"])
    return score


def percent_of_full(result: Mapping[str, Any], output: Path) -> float | None:
    """The main score in percent of the score of `full`; None if either is missing or `full` scores 0.

    Args:
        output: the run's folder; the result of `full` is searched in the folders next to it.
    """
    score = main_score(result)
    full = full_score(result, output)
    return 100 * score / full if score is not None and full else None


def full_score(result: Mapping[str, Any], output: Path) -> float | None:
    """Main score of a run of `full` on the same questions and images under the same settings; None if there is none."""
    found = beside(result, output, FULL)
    return None if found is None else main_score(found)


def beside(result: Mapping[str, Any], output: Path, control: str) -> Mapping[str, Any] | None:
    """The result of `full` or `none` on the same questions and images under the same settings, next to a run.

    Args:
        output: the run's folder; the folders next to it are searched.
    """
    if result["method"] == control:
        return result
    folder = output.resolve()
    run = folder.parent if PARTIAL.fullmatch(folder.name) else folder  # results of the first questions are in limitN/
    # Folders of `full` usually have it in their name; they are tried first, as a sweep has hundreds of others. Those of
    # `none`, which few sweeps have, always do.
    names = "*" if control == FULL else f"{control}-*"
    found = [*run.parent.glob(f"{names}/result.json"), *run.parent.glob(f"{names}/limit*/result.json")]
    for path in sorted(found, key=lambda path: (not path.relative_to(run.parent).parts[0].startswith(control), path)):
        try:
            other = read_result(path.parent)
        except UserError:
            continue  # the run that a damaged file belongs to reports it
        if other.get("method") == control and joint(other) == joint(result):
            return other
    return None


def gain_beside(result: Mapping[str, Any], output: Path) -> float | None:
    """`gain_kept` of a run, from the results of `full` and `none` next to it; None without them."""
    blind = beside(result, output, BLIND)
    full = None if blind is None else beside(result, output, FULL)
    if blind is None or full is None:
        return None
    ends = [{"score": main_score(one), **(interval_of(one) or {"low": None, "high": None})} for one in (full, blind)]
    return gain_kept(main_score(result), *ends)


def gain_kept(score: float | None, full: Mapping[str, Any], blind: Mapping[str, Any]) -> float | None:
    """What of the visual gain a score keeps, in percent; None unless full is clearly above blind.

    Single answers are not looked at, so here the intervals of full and blind must lie apart; `vtr stats` tests the
    difference, and gives an interval.

    Args:
        full, blind: "score", and "low" and "high", the ends of its interval, which may be None.
    """
    low, high = full["low"], blind["high"]
    if score is None or low is None or high is None or low <= high:
        return None
    return 100 * (score - float(blind["score"])) / (float(full["score"]) - float(blind["score"]))


def operations_of(result: Mapping[str, Any]) -> float | None:
    """Operations per question, for comparison between runs; None unless they were counted for every question.

    Questions differ in length, so a mean over only some of them is not comparable.
    """
    whole = (result.get("timing") or {}).get("questions", result["asked"]) == result["asked"]
    found: float | None = (result.get("flops") or {}).get("per_question")
    return found if whole else None


# -- what made the answers ------------------------------------------------------------------------------------------


def made_by(origins: Sequence[tuple[Mapping[str, Any] | None, int]]) -> dict[str, Any]:
    """Commit and library versions of the answers, with a note if they are not the same for all answers.

    Args:
        origins: as AnswerStore.origins returns them.
    """
    total = sum(number for _, number in origins)
    notes = []
    if unknown := sum(number for run, number in origins if run is None):
        notes.append(f"the commit of {unknown:,} of {total:,} answers is unknown: the end of runs.jsonl was lost")
    commits, libraries = Counter[str](), Counter[str]()
    for run, number in origins:
        commits["unknown" if run is None else run["commit"]] += number
        if run is not None:
            versions = ", ".join(f"{library} {release}" for library, release in sorted(run["versions"].items()))
            libraries[versions] += number
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
    """Sentences about differences between runs that are not settings but can change an answer.

    These are library versions, hardware and, in half precision, the batch size. Runs that are off their budget are
    named too.

    Args:
        results: a name of the run for the reader -> content of result.json.
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
    """The name of the chip behind a torch device; timings mean nothing without it."""
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
    """A record of `scored` as lines of text; numbers have two decimals, as official scripts print them."""
    points, main = set(record["points"]), record["main"]
    lines = []
    for name, value in record["metrics"].items():
        text = "not measured"
        if value is not None:
            better = " (lower is better)" if name in LOWER_IS_BETTER else ""
            text = f"{value:.2f}{'' if name in points else ' %'}{better}"
        lines.append(f"{name:14s} {text}")
    if (found := interval_of(record)) is not None:
        lines.append(f"{main}, 95 % CI by {found.get('unit', 'image')}: {ends(found, 2)}")
    for name, table in ((name, table) for name, table in record["groups"].items() if table):
        mark = "" if name in points else " %"
        lines.append(f"{main} / {name}" if main == "accuracy" else name)
        lines += [f"  {group:12s} {e['percent']:.2f}{mark} (n = {e['questions']:,})" for group, e in table.items()]
    return lines + [f"note: {note}" for note in record["notes"]]


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines about a run's tokens, bytes, times, questions per second (also by rank, if several) and FLOPs."""
    accounting, timing, flops = result["accounting"], result["timing"], result["flops"]
    layers = ", ".join(number(tokens) for tokens in accounting["entering_per_layer"])
    held, room = short(accounting["kv_bytes_per_sample"] / 1e6, 100), timing["kv_bytes_allocated"]
    with_room = f", {short(room / 1e6, 100)} MB held while answering (padding, room for new tokens)" if room else ""
    timed = "" if timing["questions"] == result["asked"] else of_some(timing["questions"], result["asked"])
    # None if unknown; absent from results of earlier versions.
    empty = "" if (padding := accounting.get("mean_tokens_on_padding")) is None else f"{padding:.1f} on padding, "
    mean = tokens_text(accounting) + ";" if accounting.get("adaptive") else f"mean {tokens_text(accounting)},"
    lines = [
        f"visual tokens entering each layer: {layers} ({mean} "
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
    """The number of questions that an accounting's means cover, if some questions have no image; otherwise ""."""
    total = accounting["samples"]
    return of_some(total - accounting["without_image"], total, " with an image") if accounting["without_image"] else ""


def of_some(some: int, total: int, which: str = "") -> str:
    return f", over the {some:,} of {total:,} questions{which}"


def failed_lines(result: Mapping[str, Any], shown: int = 5) -> list[str]:
    """Lines about the questions without an answer: the reasons of the first ones, and what to do."""
    failed = result.get("failed", ())
    if not failed:
        return []
    lines = [f"failed: question {line['question_id']}: {line['reason']}" for line in failed[:shown]]
    more = f" ({len(failed) - shown:,} more are in failures.jsonl)" if len(failed) > shown else ""
    return [*lines, f"{len(failed):,} questions have no answer{more}; --retry-failed asks them again."]


def time_lines(timing: Mapping[str, Any]) -> list[str]:
    """Lines with median milliseconds per batch and per question, and the conditions of the measurement."""
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
    """The result in one sentence: method and budget, score with its interval, number of questions, and cost."""
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
    tokens = f"{tokens_text(accounting)} tokens per layer{off_text(result)}"
    if accounting.get("adaptive"):
        tokens = f"tokens per layer: {tokens_text(accounting)}"
    return (
        f"{result['method']} at {budget_text(result['budget'], ratio)} of {total} visual tokens: {score} "
        f"on {asked} {result['title']} questions{failed}; {tokens}"
        f"{share_with_image(accounting)}, KV {short(accounting['kv_bytes_per_sample'] / 1e6, 100)} MB, TTFT {wait}{by}."
    )


def tokens_text(accounting: Mapping[str, Any]) -> str:
    """The mean number of tokens per layer; "mean 61.3 of 64 asked, 40 to 96" where the image decides the number.

    The ends are the means over layers of the images with the fewest and with the most tokens.

    Args:
        accounting: of result.json; results of earlier versions do not say whether the image decides.
    """
    mean = f"{accounting['mean_tokens_per_layer']:.1f}"
    if not accounting.get("adaptive"):
        return mean
    ends = (number(accounting[f"{end}_tokens_per_layer"]) for end in ("least", "most"))
    return f"mean {mean} of {number(accounting['asked_tokens_per_layer'])} asked, {' to '.join(ends)}"


def off_text(result: Mapping[str, Any]) -> str:
    """The part of the sentence about a mean that misses the budget; "" if it does not."""
    accounting = result["accounting"]
    if off := result["off_budget"]:
        over = f"{off['questions']:,} question{'' if off['questions'] == 1 else 's'}"
        return f" where {off['asked']:.1f} were asked for (mean over {over})"
    asked = accounting["asked_tokens_per_layer"]
    if (reason := result["counts_otherwise"]) and f"{asked:.1f}" != f"{accounting['mean_tokens_per_layer']:.1f}":
        return f" where {asked:.1f} were asked for ({reason})"
    return ""


def ends(found: Mapping[str, Any], digits: int) -> str:
    """The two ends of an interval, or the reason why there is none."""
    if found["low"] is None:
        return str(found["method"])
    return f"{rounded(found['low'], digits)} to {rounded(found['high'], digits)}"


def number(value: float) -> str:
    """64.0 -> "64", 64.25 -> "64.2"."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def short(value: float, whole_from: float) -> str:
    """A number with no decimals from `whole_from` on, with one below, and with two digits below 0.1."""
    if value >= whole_from:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
