"""ActivityNet-QA, in Video-LLaVA's layout (see eval/benchmarks/video/sets.py) or from lmms-eval's mirror.

The mirror's table is read from the hub or from DATA/hub/lmms-eval/ActivityNetQA; its videos must lie unpacked, in
all_test/ of that folder or at the official place. Beside the judged numbers stands ActivityNet-QA's own metric, exact
equality, which sentences as answers never reach.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset
from eval.benchmarks.hub import local_copy, open_table
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Id, TypedDict
from eval.benchmarks.video import activitynet_metric as activitynet
from eval.benchmarks.video.sets import MAX_NEW_TOKENS, Entry, Extra, Found, VideoSet, build, numbered, read_official
from eval.metrics import Score

SET = VideoSet("activitynet_qa", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test", count=8000, prefix="v_")
MIRROR = ("lmms-eval/ActivityNetQA", "lmms-lab/ActivityNetQA")
COLUMNS = ("video_name", "question", "answer", "type", "question_id")
# As lmms-eval generates on this set.
LMMS_NEW_TOKENS = 64


class MirrorRow(TypedDict):
    """A row of the mirror."""

    video_name: Id
    question: Filled
    answer: Filled
    type: Id
    question_id: Id


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The test split. lmms-eval's profile asks in a sentence and for a short answer."""
    lost = not is_file(SET.root(data) / "test_q.json")
    mirror = source == "mirror" or (source == "auto" and lost and local_copy(data, MIRROR) is not None)
    found = read_mirror(data, download=source == "mirror") if mirror else read_official(SET, data)
    return build(SET, found, profile, *ASKED[profile], own_metric)


def as_lmms_asks(question: str) -> str:
    """The instruction follows on the same line there, so it cannot be a suffix of its own."""
    return f"{question.capitalize()}? {SHORT}"


# Profile -> how a question is asked, and the longest answer.
ASKED: dict[str, tuple[Callable[[str], str], int]] = {
    "llava": (str, MAX_NEW_TOKENS),
    "lmms": (as_lmms_asks, LMMS_NEW_TOKENS),
}


def own_metric(entries: Sequence[Entry]) -> Extra | None:
    """ActivityNet-QA's metric over these entries; None if they have no types or others than it knows."""
    kinds = {str(number) for number in range(len(activitynet.TYPES))}
    types = {entry.id: int(entry.type) for entry in entries if entry.type in kinds}
    if len(types) < len(entries):
        return None
    answers = {entry.id: entry.answer for entry in entries}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        among = set(asked)
        counted = {name: answer for name, answer in answers.items() if name in among}
        return activitynet.score(counted, {name: types[name] for name in counted}, texts)

    return score


def read_mirror(data: Path, download: bool) -> Found:
    """The set from its table on the hub."""
    table = open_table(data, MIRROR, "Generation", "test", download)
    rows = table.records(MirrorRow)
    names = numbered(row["question_id"] for row in rows)
    entries = [
        Entry(
            name,
            str(row["question_id"]),
            str(row["video_name"]).removeprefix(SET.prefix),
            row["question"],
            row["answer"],
            str(row["type"]),
        )
        for name, row in zip(names, rows, strict=True)
    ]
    official = SET.root(data) / SET.videos
    places = [data / "hub" / owner / SET.videos for owner in MIRROR]
    videos = next((place for place in places if place.is_dir()), official)
    return Found(entries, videos, table.fingerprint(COLUMNS), table.where)


BENCHMARK = Benchmark(
    name="activitynet_qa",
    summary="Questions about long videos of activities; judged by GPT-3.5, and exact match.",
    splits=("test",),
    read=load,
    model="tinyllava_video",
    published="45.3 accuracy, 3.3 score",
    published_by=(
        "Video-LLaVA-7B's paper, judged by gpt-3.5-turbo; 43.1 in re-runs of papers on token reduction, whose"
        " judge was another version"
    ),
    needs=SET.needs,
    mirror=MIRROR,
    licence="annotations: Apache-2.0 by their LICENSE, MIT and non-commercial by their README",
)
