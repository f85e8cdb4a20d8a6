"""The --judge flag: which LLM judge scores the answers of a run, and the notes on it in the result."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Dataset
from eval.judging import Judging, Verdict
from eval.judging.ask import Judge, Line, Store, ask, is_ours, read_verdicts, verdict_file, verdict_files
from eval.judging.judges import configured, endpoint
from eval.metrics import Score, first_names
from llava.errors import UserError

HELP = (
    "for benchmarks that a language model judges: auto, none, match (word match, no published metric), endpoint "
    "(JUDGE_MODEL, JUDGE_URL and JUDGE_KEY in the environment), local:MODEL, or a file or folder with verdicts"
)
NAMED = ("auto", "none", "match", "endpoint")
LOCAL = "local:"

Scored = tuple[Score, dict[str, Any]]


def check_judge(data: Dataset, judge: str) -> None:
    """Raise before a run what would stop its scoring."""
    if data.judging is None:
        if judge != "auto":
            raise UserError(f"{data.title} is scored without a judge; leave --judge {judge} out.")
    elif judge == "endpoint":
        endpoint()
    elif judge not in NAMED and not judge.removeprefix(LOCAL):
        raise UserError(f"--judge {judge} names no model; write {LOCAL}FOLDER or the id of a model on the hub.")
    elif judge not in NAMED and not judge.startswith(LOCAL) and not Path(judge).exists():
        raise UserError(
            f"--judge should be {', '.join(NAMED)}, {LOCAL}MODEL, or a file or folder with verdicts; "
            f"there is no {judge!r}."
        )


def score_answers(
    data: Dataset, judge: str, asked: Sequence[str], texts: Mapping[str, str], answers: Path
) -> tuple[Score, dict[str, Any]]:
    """The score, and facts about the judge for the result.

    Args:
        answers: the answer file; verdicts are kept beside it.
    """
    judging: Judging | None = data.judging
    if judging is None:
        return data.score(asked, texts), {}
    score, facts = _score(judging, judge, asked, texts, answers)
    return with_extra(judging, score, asked, texts), {"judge": facts}


def unjudged(judging: Judging) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """`Dataset.score` of a judged benchmark: what can be said about answers without any judge."""
    return lambda asked, texts: with_extra(judging, judging.match(asked, texts), asked, texts)


def with_extra(judging: Judging, score: Score, asked: Sequence[str], texts: Mapping[str, str]) -> Score:
    """The numbers that need no judge beside the judged ones."""
    if judging.extra is None:
        return score
    more = judging.extra(asked, texts)
    return dataclasses.replace(
        score,
        values=score.values | more.values,
        groups=score.groups | more.groups,
        notes=(*score.notes, *more.notes),
        points=score.points | more.points,
    )


def _score(judging: Judging, judge: str, asked: Sequence[str], texts: Mapping[str, str], answers: Path) -> Scored:
    if judge == "none":
        missing = f"{judging.main} was not measured: {_advice(judging, answers)}"
        return Score({judging.main: None}, {}, {}, (missing,), judging.main), {"name": "none"}
    if judge == "match":
        return judging.match(asked, texts), {"name": "match"}
    if judge == "endpoint" or (judge == "auto" and configured()):
        return _ask(judging, endpoint(), asked, texts, answers.parent)
    if judge.startswith(LOCAL):
        from eval.judging.judges import LocalModel

        return _ask(judging, LocalModel(judge.removeprefix(LOCAL)), asked, texts, answers.parent)
    if judge == "auto":
        return _kept(judging, asked, texts, answers)
    return _from_disk(judging, Path(judge), asked, texts)


def _advice(judging: Judging, answers: Path) -> str:
    return (
        f"the published numbers are verdicts of {judging.official}; set JUDGE_MODEL, JUDGE_URL and JUDGE_KEY in the "
        f"environment and run `python -m eval.score {judging.benchmark} --answers {answers} --judge endpoint` with "
        "this run's --data, --split and --profile"
    )


def _ask(judging: Judging, judge: Judge, asked: Sequence[str], texts: Mapping[str, str], folder: Path) -> Scored:
    """Verdicts of a model, those in the folder and new ones."""
    requests = judging.requests(asked, texts)
    path = verdict_file(folder, judge.name)
    with Store(path) as store:
        ask(judge, judging, requests, store)
        lines = store.of(requests)
    return _of_lines(judging, asked, lines, path)


def _kept(judging: Judging, asked: Sequence[str], texts: Mapping[str, str], answers: Path) -> Scored:
    """Verdicts beside the answers, the official judge's if there are several; without any, the word match."""
    requests = judging.requests(asked, texts)
    stored = {path: read_verdicts(path).of(requests) for path in verdict_files(answers.parent)}
    whole = [path for path, lines in stored.items() if len(lines) == len(asked)]
    notes = [
        f"{path.name} holds verdicts about {len(lines):,} of these {len(asked):,} answers and was not used"
        for path, lines in stored.items()
        if 0 < len(lines) < len(asked)
    ]
    if whole:
        path = min(whole, key=lambda path: (path != verdict_file(path.parent, judging.official), path))
        notes += [f"{other.name} holds other verdicts about these answers" for other in whole if other != path]
        score, facts = _of_lines(judging, asked, stored[path], path)
    else:
        score, facts = judging.match(asked, texts), {"name": "match"}
        notes.append(f"no judge was found: {_advice(judging, answers)}")
    return dataclasses.replace(score, notes=(*score.notes, *notes)), facts


def _of_lines(judging: Judging, asked: Sequence[str], lines: Mapping[str, Line], path: Path) -> Scored:
    """The score of stored verdicts, with what sets them apart from the published ones."""
    verdicts = {name: line["verdict"] for name, line in lines.items() if line["verdict"] is not None}
    models = sorted({str(line["judge"]) for line in lines.values()})
    failed = [name for name in asked if lines[name].get("failed")]
    notes = [_about(judging, models)]
    if failed:
        fate = "left out" if judging.failed is None else "scored as the official script does after its last try"
        notes.append(f"no readable verdict for {len(failed):,} answers ({first_names(failed)}): {fate}")
    score = judging.score(asked, verdicts)
    return dataclasses.replace(score, notes=(*score.notes, *notes)), _facts(judging, models, path)


def _about(judging: Judging, models: Sequence[str]) -> str:
    if list(models) == [judging.official]:
        return f"judged by {judging.official}, as the published numbers"
    if not models:
        return (
            f"the file does not name its judge; published numbers are of {judging.official}, compare with them only if "
            "these verdicts are of the same model"
        )
    if len(models) == 1 and judging.official.startswith(f"{models[0]}-"):
        return (
            f"judged by {models[0]}, a name without a version; published numbers are of {judging.official}, compare "
            "with them only if it was that version"
        )
    return (
        f"judged by {', '.join(models)}; published numbers are of {judging.official} and cannot be compared with "
        "these, the judge's version alone moves results by points"
    )


def _facts(judging: Judging, models: Sequence[str], path: Path) -> dict[str, Any]:
    return {"name": ", ".join(models) or "unknown", "official": judging.official, "verdicts": str(path)}


def _from_disk(judging: Judging, path: Path, asked: Sequence[str], texts: Mapping[str, str]) -> Scored:
    """Verdicts in our format or in that of the official script."""
    if is_ours(path):
        lines = read_verdicts(path).of(judging.requests(asked, texts))
        _check_cover(path, asked, lines, "about these answers")
        return _of_lines(judging, asked, lines, path)
    verdicts = judging.read(path)
    _check_cover(path, asked, verdicts)
    about = {name: judging.text(verdicts[name]) for name in asked}
    other = [name for name in asked if (text := about[name]) is not None and text.strip() != texts[name].strip()]
    if other:
        raise UserError(
            f"{path} judges other answers to {len(other):,} of {len(asked):,} questions ({first_names(other)}); "
            "it belongs to another answer file."
        )
    models = sorted({str(model) for name in asked for model in as_list(verdicts[name].get("model"))})
    notes = [_about(judging, models)]
    if any(text is None for text in about.values()):
        notes.append(f"{path} does not hold the judged answers: that it belongs to this answer file is not checked")
    score = judging.score(asked, {name: verdicts[name] for name in asked})
    return dataclasses.replace(score, notes=(*score.notes, *notes)), _facts(judging, models, path)


def as_list(models: Any) -> list[Any]:
    """The "model" of an official verdict: absent, one name, or one for each run."""
    return models if isinstance(models, list) else [] if models is None else [models]


def _check_cover(path: Path, asked: Sequence[str], verdicts: Mapping[str, Verdict], what: str = "") -> None:
    if missing := [name for name in asked if name not in verdicts]:
        raise UserError(
            f"{path} holds no verdict{f' {what}' if what else ''} for {len(missing):,} of {len(asked):,} questions "
            f"({first_names(missing)})."
        )
