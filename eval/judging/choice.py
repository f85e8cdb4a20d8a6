"""The --judge flag: which LLM judge scores the answers of a run, how it is asked, and the notes on it in the result.

A judge is asked about every answer that has no verdict yet. Verdicts are kept in judgements-<judge>.jsonl beside the
answers, one line per judged answer, written as replies come in.
"""

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.answers.jsonl import DurableLines, read_appended
from eval.benchmarks.base import Dataset
from eval.judging import Judging, Request, Verdict
from eval.judging.judges import Endpoint, configured, endpoint
from eval.metrics import Score, first_names
from llava.errors import UserError

HELP = (
    "for benchmarks that a language model judges: auto, none, match (word match, no published metric), endpoint "
    "(JUDGE_MODEL, JUDGE_URL and JUDGE_KEY in the environment), or a file or folder with verdicts"
)
NAMED = ("auto", "none", "match", "endpoint")

Scored = tuple[Score, dict[str, Any]]

# An upper estimate for English: tokens are four characters on average, and roles cost a few tokens each.
BYTES_PER_TOKEN = 3
TOKENS_PER_MESSAGE = 8

# For judges without a limit on the reply; a verdict of these is one line.
USUAL_REPLY = 64

# A verdict as it is stored.
Line = dict[str, Any]

# By question id and by the hash of what was asked.
Found = dict[tuple[str, str], Line]

FIELDS = ("question_id", "asked", "verdict", "judge")


# -- the flag --------------------------------------------------------------------------------------------------------


def check_judge(data: Dataset, judge: str) -> None:
    """Raise before a run what would stop its scoring."""
    if data.judging is None:
        if judge != "auto":
            raise UserError(f"{data.title} is scored without a judge; leave --judge {judge} out.")
    elif judge == "endpoint":
        endpoint()
    elif judge not in NAMED and not Path(judge).exists():
        raise UserError(
            f"--judge should be {', '.join(NAMED)}, or a file or folder with verdicts; there is no {judge!r}."
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
    return score, {"judge": facts}


def _score(judging: Judging, judge: str, asked: Sequence[str], texts: Mapping[str, str], answers: Path) -> Scored:
    """The score by what --judge names: verdicts of a model, those in the folder and new ones, or none."""
    if judge == "none":
        missing = f"{judging.main} was not measured: {_advice(judging, answers)}"
        return Score({judging.main: None}, {}, {}, (missing,), judging.main), {"name": "none"}
    if judge == "match":
        return judging.match(asked, texts), {"name": "match"}
    if judge == "endpoint" or (judge == "auto" and configured()):
        model, requests = endpoint(), judging.requests(asked, texts)
        path = verdict_file(answers.parent, model.name)
        with contextlib.closing(Store(path)) as store:
            ask(model, judging, requests, store)
        return _of_lines(judging, asked, lines_of(store.found, requests), path)
    if judge == "auto":
        return _kept(judging, asked, texts, answers)
    return _from_disk(judging, Path(judge), asked, texts)


def _advice(judging: Judging, answers: Path) -> str:
    return (
        f"the published numbers are verdicts of {judging.official}; set JUDGE_MODEL, JUDGE_URL and JUDGE_KEY in the "
        f"environment and run `python -m eval.score {judging.benchmark} --answers {answers} --judge endpoint` with "
        "this run's --data, --split and --profile"
    )


def _kept(judging: Judging, asked: Sequence[str], texts: Mapping[str, str], answers: Path) -> Scored:
    """Verdicts beside the answers, the official judge's if there are several; without any, the word match."""
    requests = judging.requests(asked, texts)
    files = sorted(answers.parent.glob("judgements-*.jsonl"))
    stored = {path: lines_of(read_verdicts(path), requests) for path in files}
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
    score, facts = _judged(judging, asked, verdicts, (line["judge"] for line in lines.values()), path)
    if failed := [name for name in asked if lines[name].get("failed")]:
        fate = "left out" if judging.failed is None else "scored as the official script does after its last try"
        note = f"no readable verdict for {len(failed):,} answers ({first_names(failed)}): {fate}"
        score = dataclasses.replace(score, notes=(*score.notes, note))
    return score, facts


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


def _judged(
    judging: Judging, asked: Sequence[str], verdicts: Mapping[str, Verdict], models: Iterable[Any], path: Path
) -> Scored:
    """The score of verdicts, which models gave them, and what sets them apart from the published ones."""
    names = sorted(set(map(str, models)))
    score = judging.score(asked, verdicts)
    facts = {"name": ", ".join(names) or "unknown", "official": judging.official, "verdicts": str(path)}
    return dataclasses.replace(score, notes=(*score.notes, _about(judging, names))), facts


def _from_disk(judging: Judging, path: Path, asked: Sequence[str], texts: Mapping[str, str]) -> Scored:
    """Verdicts in our format or in that of the official script."""
    is_lines = path.is_file() and path.suffix == ".jsonl"
    first = next((row for _, _, row in read_appended(path) if row), {}) if is_lines else {}
    if all(name in first for name in FIELDS):
        lines = lines_of(read_verdicts(path), judging.requests(asked, texts))
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
    models = (model for name in asked for model in as_list(verdicts[name].get("model")))
    score, facts = _judged(judging, asked, {name: verdicts[name] for name in asked}, models, path)
    if any(text is None for text in about.values()):
        note = f"{path} does not hold the judged answers: that it belongs to this answer file is not checked"
        score = dataclasses.replace(score, notes=(*score.notes, note))
    return score, facts


def as_list(models: Any) -> list[Any]:
    """The "model" of an official verdict: absent, one name, or one for each run."""
    return models if isinstance(models, list) else [] if models is None else [models]


def _check_cover(path: Path, asked: Sequence[str], verdicts: Mapping[str, Verdict], what: str = "") -> None:
    if missing := [name for name in asked if name not in verdicts]:
        raise UserError(
            f"{path} holds no verdict{f' {what}' if what else ''} for {len(missing):,} of {len(asked):,} questions "
            f"({first_names(missing)})."
        )


# -- verdicts on disk ------------------------------------------------------------------------------------------------


def verdict_file(folder: Path, judge: str) -> Path:
    """Where the verdicts of a judge are kept."""
    return folder / f"judgements-{re.sub(r'[^A-Za-z0-9_.-]+', '-', judge).strip('-.') or 'judge'}.jsonl"


def line(request: Request, verdict: Verdict | None, reply: str, judge: str, tries: int, failed: bool) -> Line:
    """A verdict as it is stored."""
    return {
        "question_id": request.id,
        "asked": request.fingerprint,
        "verdict": verdict,
        "failed": failed,
        "judge": judge,
        "tries": tries,
        "reply": reply,
    }


def key_of(request: Request) -> tuple[str, str]:
    """What a verdict is found by: the question and what was asked, so that several answer files can share a folder."""
    return request.id, request.fingerprint


def by_request(path: Path, rows: Iterable[Line]) -> Found:
    """The lines of a file by question and by what was asked; the last one counts."""
    found = {}
    for row in rows:
        if lost := [name for name in FIELDS if name not in row]:
            raise UserError(f"{path} should hold verdicts; a line has no {', '.join(lost)}.")
        found[str(row["question_id"]), str(row["asked"])] = row
    return found


def read_verdicts(path: Path) -> Found:
    """Verdicts of a file that nobody is writing to, without a last one that a killed process has left torn."""
    return by_request(path, (row for _, _, row in read_appended(path) if row))


def lines_of(found: Found, requests: Iterable[Request]) -> dict[str, Line]:
    """Lines by question id, of those requests that have one."""
    return {request.id: found[key] for request in requests if (key := key_of(request)) in found}


class Store:
    """A file of verdicts that grows; every line that was added survives a crash.

    Attributes:
        found: the lines there are, by question and by what was asked.
    """

    def __init__(self, path: Path):
        self._lines = DurableLines(path)
        try:
            self.found = by_request(path, self._lines.rows)
        except BaseException:
            self.close()
            raise

    def append(self, entry: Line) -> None:
        """Write one verdict and return when it is on the disk."""
        self._lines.append([entry])
        self.found[entry["question_id"], entry["asked"]] = entry

    def close(self) -> None:
        self._lines.close()


# -- asking ----------------------------------------------------------------------------------------------------------


def ask(judge: Endpoint, judging: Judging, requests: Sequence[Request], store: Store) -> None:
    """Ask about all requests without a stored verdict, and store each verdict as it arrives.

    Prints how much is asked before the first request, because requests cost money.
    """
    pending = [request for request in requests if key_of(request) not in store.found]
    if not pending:
        return
    print(estimate(judge, judging, pending), flush=True)
    pool = ThreadPoolExecutor(judge.workers)
    bar = tqdm(
        total=len(requests),
        initial=len(requests) - len(pending),
        desc=f"judge {judge.name}",
        unit="answer",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    running: set[Future[Line]] = set()
    with bar, pool:
        try:
            for request in pending:
                if len(running) == judge.workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    keep(done, store, bar)
                running.add(pool.submit(judge_one, judge, judging, request))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                keep(done, store, bar)
        except BaseException:
            # Requests in flight have been paid for.
            keep([future for future in running if future.exception() is None], store, bar)
            raise


def keep(done: Iterable[Future[Line]], store: Store, bar: "tqdm[Any]") -> None:
    """Store what was judged, then raise what went wrong."""
    failures = []
    for future in done:
        if (failure := future.exception()) is not None:
            failures.append(failure)
            continue
        store.append(future.result())
        bar.update()
    if failures:
        raise failures[0]


def judge_one(judge: Endpoint, judging: Judging, request: Request) -> Line:
    """One verdict, asked for until it can be read or the official number of tries is used up."""
    reply, model = "", judge.name
    for failures in range(judging.tries):
        reply, model = judge.reply(judging.again(request, failures) if failures else request)
        verdict = judging.parse(request.id, reply)
        if verdict is not None:
            return line(request, verdict, reply, model, failures + 1, failed=False)
    return line(request, judging.failed, reply, model, judging.tries, failed=True)


def estimate(judge: Endpoint, judging: Judging, requests: Sequence[Request]) -> str:
    """How much is about to be asked, by an upper estimate of lengths without the judge's tokenizer."""
    lengths = [len(message["content"].encode()) for request in requests for message in request.messages]
    tokens_in = sum(math.ceil(length / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for length in lengths)
    tokens_out = sum(request.max_tokens or USUAL_REPLY for request in requests)
    again = f"; an unreadable reply is asked for up to {judging.tries} times" if judging.tries > 1 else ""
    return (
        f"Judge {judge.name}: {len(requests):,} requests, at most about {tokens_in:,} tokens in and {tokens_out:,} out"
        f"{again}."
    )
