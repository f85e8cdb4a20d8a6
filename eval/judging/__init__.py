"""Benchmarks whose answers an LLM judge grades.

A benchmark defines a `Judging`: what the judge is asked, how its reply is read, and the score of its verdicts.
eval/judging/choice.py picks the judge that --judge names: an endpoint, stored verdicts or a word match.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from eval.answers.jsonl import read_json
from eval.metrics import Score

# What a judge said about one answer, in JSON types. Its fields are the benchmark's own.
Verdict = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    Attributes:
        id: of the benchmark's question.
        messages: role and content, as chat models take them.
        temperature: None leaves it to the judge, as the official script does.
        max_tokens: longest reply; None as above.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    temperature: float | None = None
    max_tokens: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of what is asked: a verdict counts for exactly the answer it was given about."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Judging:
    """How a judge is used on one benchmark.

    Attributes:
        benchmark: its name on the command line.
        official: the judge of the published numbers.
        main: name of the number it gives.
        requests: (ids that were asked, raw text by id) -> one request for each.
        parse: (id, reply) -> verdict; None if the reply cannot be read.
        read: verdicts of the official script on disk, by question id.
        score: (ids, verdict by id) -> the official metric; ids without a verdict had no readable reply.
        match: (ids, raw text by id) -> a word match with the reference answers, no published metric.
        tries: replies that are asked for until one can be read.
        again: (first request, unreadable replies so far) -> the next request; by default the same.
        failed: verdict after the last try; None leaves the question out of the score.
        text: the answer that a verdict on disk is about, if it says so.
    """

    benchmark: str
    official: str
    main: str
    requests: Callable[[Sequence[str], Mapping[str, str]], list[Request]]
    parse: Callable[[str, str], Verdict | None]
    read: Callable[[Path], dict[str, Verdict]]
    score: Callable[[Sequence[str], Mapping[str, Verdict]], Score]
    match: Callable[[Sequence[str], Mapping[str, str]], Score]
    tries: int = 1
    again: Callable[[Request, int], Request] = field(default=lambda request, failures: request)
    failed: Verdict | None = None
    text: Callable[[Verdict], str | None] = field(default=lambda verdict: None)


@cache
def prompts() -> Any:
    """The official judge prompts; README.md says where they are from."""
    return read_json(Path(__file__).parent / "prompts.json")


def judged_facts(judging: Judging, questions: int, published: int) -> dict[str, Any]:
    """The `facts` of a data set that a judge scores; another number of questions than the published one is said."""
    facts: dict[str, Any] = {"questions": questions, "official judge": judging.official}
    if questions != published:
        facts["size"] = f"{questions:,} questions, the published set has {published}"
    return facts
