"""Ask an LLM judge about every answer that has no verdict yet, and keep its verdicts.

They are kept in judgements-<judge>.jsonl, one line per judged answer, written as replies come in.
"""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from eval.answers.jsonl import DurableLines, read_jsonl
from eval.judging import Judging, Request, Verdict
from llava.errors import UserError

# An upper estimate for English: tokens are four characters on average, and roles cost a few tokens each.
BYTES_PER_TOKEN = 3


TOKENS_PER_MESSAGE = 8


# For judges without a limit on the reply; a verdict of these is one line.
USUAL_REPLY = 64

# A verdict as it is stored.
Line = dict[str, Any]

FIELDS = ("question_id", "asked", "verdict", "judge")


class Judge(Protocol):
    """A chat model that judges answers."""

    @property
    def name(self) -> str:
        """Of the model, as written to results."""
        ...

    @property
    def workers(self) -> int:
        """Requests in flight at once."""
        ...

    def reply(self, request: Request) -> tuple[str, str]:
        """The reply's text and the model that the judge says it is."""
        ...

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Price of so many tokens; None if nobody said it, or there is none."""
        ...


def verdict_file(folder: Path, judge: str) -> Path:
    """Where the verdicts of a judge are kept."""
    return folder / f"judgements-{re.sub(r'[^A-Za-z0-9_.-]+', '-', judge).strip('-.') or 'judge'}.jsonl"


def verdict_files(folder: Path) -> list[Path]:
    """All there are in a folder, sorted."""
    return sorted(folder.glob("judgements-*.jsonl"))


def is_ours(path: Path) -> bool:
    """Whether a file is one of these rather than in a benchmark's official format."""
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    first = next((row for _, row in read_jsonl(path)), {})
    return all(name in first for name in FIELDS)


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


class Verdicts:
    """Verdicts by question and by what was asked, so that several answer files can share a folder."""

    def __init__(self, lines: Iterable[Line]):
        self._found: dict[tuple[str, str], Line] = {}
        for entry in lines:
            self.add(entry)

    def add(self, entry: Line) -> None:
        self._found[str(entry["question_id"]), str(entry["asked"])] = entry

    def find(self, request: Request) -> Line | None:
        """The line about exactly this request."""
        return self._found.get((request.id, request.fingerprint))

    def of(self, requests: Iterable[Request]) -> dict[str, Line]:
        """Lines by question id, of those requests that have one."""
        return {request.id: entry for request in requests if (entry := self.find(request)) is not None}


def read_verdicts(path: Path) -> Verdicts:
    """Verdicts of a file that nobody is writing to."""
    return Verdicts(_checked(path, (row for _, row in read_jsonl(path))))


def _checked(path: Path, rows: Iterable[Line]) -> list[Line]:
    rows = list(rows)
    for row in rows:
        if lost := [name for name in FIELDS if name not in row]:
            raise UserError(f"{path} should hold verdicts; a line has no {', '.join(lost)}.")
    return rows


class Store(Verdicts):
    """A file of verdicts that grows; every line that was added survives a crash."""

    def __init__(self, path: Path):
        self.path = path
        self._lines = DurableLines(path)
        try:
            super().__init__(_checked(path, self._lines.rows))
        except BaseException:
            self.close()
            raise

    def append(self, entry: Line) -> None:
        """Write one verdict and return when it is on the disk."""
        self._lines.append([entry])
        self.add(entry)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def ask(judge: Judge, judging: Judging, requests: Sequence[Request], store: Store) -> None:
    """Ask about all requests without a stored verdict, and store each verdict as it arrives.

    Prints an estimate before the first request, because requests cost money.
    """
    pending = [request for request in requests if store.find(request) is None]
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


def judge_one(judge: Judge, judging: Judging, request: Request) -> Line:
    """One verdict, asked for until it can be read or the official number of tries is used up."""
    reply, model = "", judge.name
    for failures in range(judging.tries):
        reply, model = judge.reply(judging.again(request, failures) if failures else request)
        verdict = judging.parse(request.id, reply)
        if verdict is not None:
            return line(request, verdict, reply, model, failures + 1, failed=False)
    return line(request, judging.failed, reply, model, judging.tries, failed=True)


def estimate(judge: Judge, judging: Judging, requests: Sequence[Request]) -> str:
    """How much is about to be asked."""
    tokens_in = sum(count_tokens(request) for request in requests)
    tokens_out = sum(request.max_tokens or USUAL_REPLY for request in requests)
    price = judge.cost(tokens_in, tokens_out)
    again = f"; an unreadable reply is asked for up to {judging.tries} times" if judging.tries > 1 else ""
    return (
        f"Judge {judge.name}: {len(requests):,} requests, at most about {tokens_in:,} tokens in and {tokens_out:,} out"
        f"{'' if price is None else f', a cost of {price:.2f}'}{again}."
    )


def count_tokens(request: Request) -> int:
    """Upper estimate of a request's length, without the judge's tokenizer."""
    return sum(
        math.ceil(len(message["content"].encode()) / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE
        for message in request.messages
    )
