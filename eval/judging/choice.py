"""The --judge flag: which LLM judge scores the answers of a run, how it is asked, and what the result says about it.

A judge is asked about every answer that has no verdict yet. Verdicts are stored as replies come in, one line per judged
answer, in judgements-<judge>.jsonl next to the answers.
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

# For an upper estimate in English: a token is four characters on average, and the role of a message costs a few tokens.
BYTES_PER_TOKEN = 3
TOKENS_PER_MESSAGE = 8

# Tokens of a reply if the request sets no limit; such verdicts are one line.
USUAL_REPLY = 64

# A verdict as it is stored.
Line = dict[str, Any]

# (question id, hash of what was asked) -> line.
Found = dict[tuple[str, str], Line]

FIELDS = ("question_id", "asked", "verdict", "judge")


# -- the flag --------------------------------------------------------------------------------------------------------


def check_judge(data: Dataset, judge: str) -> None:
    """Raise UserError before a run if --judge could not score its answers."""
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
    """Score answers, with a judge if the benchmark needs one.

    Args:
        judge: a word of NAMED, or a file or folder with verdicts.
        asked: ids of the questions that were asked.
        texts: question id -> answer.
        answers: the answer file; verdicts are stored next to it.

    Returns:
        The score, and facts about the judge for the result.
    """
    judging: Judging | None = data.judging
    if judging is None:
        return data.score(asked, texts), {}
    facts: dict[str, Any] = {"name": judge}
    if judge == "none":
        missing = f"{judging.main} was not measured: {_advice(judging, answers)}"
        score = Score({judging.main: None}, {}, {}, (missing,), judging.main)
    elif judge == "match":
        score = judging.match(asked, texts)
    elif judge == "endpoint" or (judge == "auto" and configured()):
        model, requests = endpoint(), judging.requests(asked, texts)
        path = verdict_file(answers.parent, model.name)
        with contextlib.closing(Store(path)) as store:
            ask(model, judging, requests, store)
        score, facts = _of_lines(judging, asked, lines_of(store.found, requests), path)
    elif judge == "auto":
        score, facts = _kept(judging, asked, texts, answers)
    else:
        score, facts = _from_disk(judging, Path(judge), asked, texts)
    return score, {"judge": facts}


def _advice(judging: Judging, answers: Path) -> str:
    return (
        f"the published numbers are verdicts of {judging.official}; set JUDGE_MODEL, JUDGE_URL and JUDGE_KEY in the "
        f"environment and run `python -m eval.score {judging.benchmark} --answers {answers} --judge endpoint` with "
        "this run's --data, --split and --profile"
    )


def _kept(judging: Judging, asked: Sequence[str], texts: Mapping[str, str], answers: Path) -> Scored:
    """The score of verdicts stored next to the answers, the official judge's first; without any, the word match."""
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
    """The score of verdicts in our format, with notes on how they differ from the published ones."""
    verdicts = {name: line["verdict"] for name, line in lines.items() if line["verdict"] is not None}
    score, facts = _judged(judging, asked, verdicts, (line["judge"] for line in lines.values()), path)
    if failed := [name for name in asked if lines[name].get("failed")]:
        fate = "left out" if judging.failed is None else "scored as the official script does after its last try"
        note = f"no readable verdict for {len(failed):,} answers ({first_names(failed)}): {fate}"
        score = dataclasses.replace(score, notes=(*score.notes, note))
    return score, facts


def _about(judging: Judging, models: Sequence[str]) -> str:
    """A note on whether verdicts of these models are comparable with published numbers."""
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
    """The score of verdicts, with facts about the models that gave them and a note on comparability."""
    names = sorted(set(map(str, models)))
    score = judging.score(asked, verdicts)
    facts = {"name": ", ".join(names) or "unknown", "official": judging.official, "verdicts": str(path)}
    return dataclasses.replace(score, notes=(*score.notes, _about(judging, names))), facts


def _from_disk(judging: Judging, path: Path, asked: Sequence[str], texts: Mapping[str, str]) -> Scored:
    """The score of verdicts in a file or folder, in our format or the official script's."""
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
    """The "model" of an official verdict, which may be absent, one name, or one name per run, as a list."""
    if models is None:
        return []
    return models if isinstance(models, list) else [models]


def _check_cover(path: Path, asked: Sequence[str], verdicts: Mapping[str, Verdict], what: str = "") -> None:
    if missing := [name for name in asked if name not in verdicts]:
        raise UserError(
            f"{path} holds no verdict{f' {what}' if what else ''} for {len(missing):,} of {len(asked):,} questions "
            f"({first_names(missing)})."
        )


# -- verdicts on disk ------------------------------------------------------------------------------------------------


def verdict_file(folder: Path, judge: str) -> Path:
    """The file in which the verdicts of a judge are stored."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", judge).strip("-.") or "judge"
    return folder / f"judgements-{name}.jsonl"


def line(request: Request, verdict: Verdict | None, reply: str, judge: str, tries: int, failed: bool) -> Line:
    """A verdict as a line of the file."""
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
    """The key of a verdict: question and hash of what was asked, so that several answer files can share a folder."""
    return request.id, request.fingerprint


def by_request(path: Path, rows: Iterable[Line]) -> Found:
    """The lines of a file by key; of several lines with the same key the last one counts."""
    found = {}
    for row in rows:
        if lost := [name for name in FIELDS if name not in row]:
            raise UserError(f"{path} should hold verdicts; a line has no {', '.join(lost)}.")
        found[str(row["question_id"]), str(row["asked"])] = row
    return found


def read_verdicts(path: Path) -> Found:
    """The verdicts of a file that nobody has open; an incomplete last line is skipped."""
    return by_request(path, (row for _, _, row in read_appended(path) if row))


def lines_of(found: Found, requests: Iterable[Request]) -> dict[str, Line]:
    """Question id -> line, for the requests that have one."""
    return {request.id: found[key] for request in requests if (key := key_of(request)) in found}


class Store:
    """A growing file of verdicts; a line survives a crash once `append` has returned.

    Attributes:
        found: the lines by key, see `key_of`.
    """

    def __init__(self, path: Path):
        self._lines = DurableLines(path)
        try:
            self.found = by_request(path, self._lines.rows)
        except BaseException:
            self.close()
            raise

    def append(self, entry: Line) -> None:
        """Write one verdict to the disk."""
        self._lines.append([entry])
        self.found[entry["question_id"], entry["asked"]] = entry

    def close(self) -> None:
        self._lines.close()


# -- asking ----------------------------------------------------------------------------------------------------------


def ask(judge: Endpoint, judging: Judging, requests: Sequence[Request], store: Store) -> None:
    """Send all requests that have no stored verdict, and store each verdict as it arrives.

    Because requests cost money, an estimate of their number and size is printed first.
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
            # Requests in flight have been paid for, so their verdicts are stored too.
            keep([future for future in running if future.exception() is None], store, bar)
            raise


def keep(done: Iterable[Future[Line]], store: Store, bar: "tqdm[Any]") -> None:
    """Store the verdicts of finished requests, then raise the first error among them."""
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
    """Ask for one verdict until it can be read or the official number of tries is used up."""
    reply, model = "", judge.name
    for failures in range(judging.tries):
        reply, model = judge.reply(judging.again(request, failures) if failures else request)
        verdict = judging.parse(request.id, reply)
        if verdict is not None:
            return line(request, verdict, reply, model, failures + 1, failed=False)
    return line(request, judging.failed, reply, model, judging.tries, failed=True)


def estimate(judge: Endpoint, judging: Judging, requests: Sequence[Request]) -> str:
    """A sentence on how much is about to be asked: number of requests, and at most how many tokens."""
    lengths = [len(message["content"].encode()) for request in requests for message in request.messages]
    tokens_in = sum(math.ceil(length / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for length in lengths)
    tokens_out = sum(request.max_tokens or USUAL_REPLY for request in requests)
    again = f"; an unreadable reply is asked for up to {judging.tries} times" if judging.tries > 1 else ""
    return (
        f"Judge {judge.name}: {len(requests):,} requests, at most about {tokens_in:,} tokens in and {tokens_out:,} out"
        f"{again}."
    )
