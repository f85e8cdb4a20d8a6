"""Benchmarks whose answers an LLM judge grades.

A benchmark defines a `Judging`: what the judge is asked, how its reply is read, and how verdicts become a score.
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

# What a judge said about one answer, in JSON types. Each benchmark has its own fields.
Verdict = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    Attributes:
        id: id of the benchmark's question.
        messages: role and content of each message, as chat models take them.
        temperature: None leaves it to the judge, if the official script does so.
        max_tokens: longest reply; None as for `temperature`.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    temperature: float | None = None
    max_tokens: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the messages, because a verdict is valid only for the answer that it judged."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Judging:
    """How a judge is used on one benchmark.

    Attributes:
        benchmark: name of the benchmark on the command line.
        official: the judge behind the published numbers.
        main: name of the number that the verdicts give.
        requests: (ids that were asked, raw text by id) -> one request for each id.
        parse: (id, reply) -> verdict; None if the reply cannot be read.
        read: path -> verdicts that the official script wrote, by question id.
        score: (ids, verdict by id) -> the official metric; ids without a verdict had no readable reply.
        match: (ids, raw text by id) -> a word match with the reference answers, which is not a published metric.
        tries: how often a judge is asked until its reply can be read.
        again: (first request, number of unreadable replies) -> the next request; by default the same one.
        failed: verdict after the last try; None leaves the question out of the score.
        text: verdict on disk -> the answer that it judged; None if it does not say.
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
    """The official judge prompts; README.md names their sources."""
    return read_json(Path(__file__).parent / "prompts.json")


def judged_facts(judging: Judging, questions: int, published: int) -> dict[str, Any]:
    """The `facts` of a judged data set, with a remark if its size differs from the published set's."""
    facts: dict[str, Any] = {"questions": questions, "official judge": judging.official}
    if questions != published:
        facts["size"] = f"{questions:,} questions, the published set has {published}"
    return facts
