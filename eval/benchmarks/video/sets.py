"""The zero-shot video sets in Video-LLaVA's layout, read from DATA/GPT_Zero_Shot_QA or DATA/eval/GPT_Zero_Shot_QA.

    <Set>_Zero_Shot_QA/test_q.json   [{"video_name", "question", "question_id"}, ...], asked in this order
    <Set>_Zero_Shot_QA/test_a.json   [{"answer", "type", "question_id"}, ...]; "type" is optional
    <Set>_Zero_Shot_QA/<videos>/     VIDEO_NAME.mp4, .avi, .mov or .mkv (.webm and .gif are read too)

Questions and answers are joined by id. Video-LLaVA's script takes answers by position and, when it runs on several
GPUs, gives every part of the questions the answers of the first one; judged on such files, its numbers are wrong.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Dataset, Need, Question, fingerprint
from eval.benchmarks.media import Videos
from eval.benchmarks.records import check_list
from eval.benchmarks.video.video_qa import Answered, Asked, find_video
from eval.judging.choice import unjudged
from eval.judging.video import video_judging
from eval.metrics import Score
from llava.errors import UserError

# As Video-LLaVA's scripts generate. Answers end long before.
MAX_NEW_TOKENS = 1024
LAYOUT = "GPT_Zero_Shot_QA"
SOURCE = "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md (videos and annotations)"

# The action questions come first in TGIF-QA's file.
TGIF_ACTIONS = 2274

Extra = Callable[[Sequence[str], Mapping[str, str]], Score]


@dataclass(frozen=True)
class VideoSet:
    """One of the sets.

    Attributes:
        benchmark: its name here.
        title: for sentences.
        folder: below GPT_Zero_Shot_QA.
        videos: below `folder`.
        count: questions of the whole set.
        prefix: of video files, before the name in the question file.
    """

    benchmark: str
    title: str
    folder: str
    videos: str
    count: int
    prefix: str = ""

    def root(self, data: Path) -> Path:
        """Where the set lies; the first place there could be, if it lies nowhere."""
        places = [data / LAYOUT / self.folder, data / "eval" / LAYOUT / self.folder]
        return next((place for place in places if is_file(place / "test_q.json")), places[0])

    @property
    def needs(self) -> tuple[Need, ...]:
        """The official files."""
        names = ("test_q.json", "test_a.json", self.videos)
        return tuple(Need(f"{LAYOUT}/{self.folder}/{name}", SOURCE) for name in names)


@dataclass(frozen=True)
class Entry:
    """One question with its answer, as a source has it."""

    id: str
    official: str
    video: str
    question: str
    answer: str
    type: str | None


@dataclass(frozen=True)
class Found:
    """What a source holds: entries, the folder of their videos, a hash, and its name for the result."""

    entries: Sequence[Entry]
    videos: Path
    hashed: str
    source: str = "official"


def load_official(video_set: VideoSet, data: Path, source: str) -> Dataset:
    """A set that has no mirror, as Video-LLaVA asks it."""
    if source == "mirror":
        raise UserError(f"{video_set.title} has no mirror on the hub; leave --source out.")
    return build(video_set, read_official(video_set, data))


def read_official(video_set: VideoSet, data: Path) -> Found:
    """Both official files, joined by question id; a repeated id's k-th question has its k-th answer."""
    root = video_set.root(data)
    asked, answered = root / "test_q.json", root / "test_a.json"
    if not is_file(asked):
        raise UserError(
            f"No {video_set.title} questions at {asked}; --data should be the folder that holds {LAYOUT}/ "
            f"(or eval/{LAYOUT}/), see {SOURCE}."
        )
    rows, answers = check_list(asked, Asked), check_list(answered, Answered)
    by_id = dict(zip(numbered(row["question_id"] for row in answers), answers, strict=True))
    entries = []
    for name, row in zip(numbered(row["question_id"] for row in rows), rows, strict=True):
        if name not in by_id:
            raise UserError(f"{asked} asks question {name}, which has no answer in {answered}.")
        answer, kind = by_id[name]["answer"], by_id[name].get("type")
        official, video = str(row["question_id"]), str(row["video_name"])
        entries.append(Entry(name, official, video, row["question"], answer, None if kind is None else str(kind)))
    return Found(entries, root / video_set.videos, fingerprint([asked, answered]))


def numbered(ids: Iterable[Any]) -> list[str]:
    """Ids as text; those that come again get their number, counted from 2."""
    seen: Counter[str] = Counter()
    names = []
    for name in map(str, ids):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def build(
    video_set: VideoSet,
    found: Found,
    profile: str = "llava",
    ask: Callable[[str], str] = str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    extra: Callable[[Sequence[Entry]], Extra | None] = lambda entries: None,
) -> Dataset:
    """The data set of what a source holds.

    Args:
        ask: the data set's question -> what the model is asked.
        extra: entries -> numbers that need no judge.
    """
    entries, videos = found.entries, found.videos
    find = cache(lambda name: find_video(videos, f"{video_set.prefix}{name}", Path(video_set.title)))
    questions = {
        entry.id: Question(entry.id, ask(entry.question), "", (find(entry.video),), entry.answer, entry.official)
        for entry in entries
    }
    raw = {entry.id: entry.question for entry in entries}
    types = {entry.id: entry.type for entry in entries if entry.type is not None}
    judging = video_judging(
        video_set.benchmark,
        questions,
        raw,
        types,
        lambda asked: subset_notes(video_set, asked, list(questions), types),
        extra(entries),
    )
    facts = {
        "source": found.source,
        "profile": profile,
        "answers": "joined with questions by question_id",
        "questions of the whole set": video_set.count,
        "official judge": judging.official,
    }
    return Dataset(
        f"{video_set.title} test",
        tuple(questions.values()),
        Videos(videos),
        found.hashed,
        unjudged(judging),
        None,
        lambda texts: {"merge.jsonl": merged(questions, raw, texts)},
        max_new_tokens,
        facts,
        judging=judging,
    )


def merged(questions: Mapping[str, Question], raw: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """The lines that the official judging script reads."""
    return "".join(
        json.dumps(
            {
                "id": questions[name].official,
                "question": raw[name],
                "answer": questions[name].answer,
                "pred": text.strip(),
            }
        )
        + "\n"
        for name, text in texts.items()
    )


def subset_notes(
    video_set: VideoSet, asked: Sequence[str], order: Sequence[str], types: Mapping[str, str]
) -> tuple[str, ...]:
    """What parts of a set, and sets of another size, are not comparable with."""
    notes = []
    if len(order) != video_set.count:
        notes.append(f"the question file holds {len(order):,} questions, the published set {video_set.count:,}")
    if len(asked) == len(order):
        return tuple(notes)
    kinds = {types[name] for name in asked if name in types}
    every = set(types.values())
    first = list(asked) == list(order[: len(asked)])
    if len(kinds) == 1 < len(every):
        kind = kinds.pop()
        notes.append(f"all of these questions are of type {kind}, one of {len(every)}: not comparable with the whole")
    elif video_set.benchmark == "tgif_qa" and first and not kinds and len(asked) <= TGIF_ACTIONS:
        notes.append(
            "the first questions of TGIF-QA are all about actions, the hardest of its four types: not comparable with "
            "the whole set (Video-LLaVA-7B has 19.8 on the first 1,000 and 47 on all)"
        )
    return tuple(notes)
