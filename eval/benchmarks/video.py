"""Questions about videos: Video-LLaVA's zero-shot sets, judged by a language model, and a set of short answers.

MSVD-QA, MSRVTT-QA, TGIF-QA and ActivityNet-QA are read from DATA/GPT_Zero_Shot_QA or DATA/eval/GPT_Zero_Shot_QA:

    <Set>_Zero_Shot_QA/test_q.json   [{"video_name", "question", "question_id"}, ...], asked in this order
    <Set>_Zero_Shot_QA/test_a.json   [{"answer", "type", "question_id"}, ...]; "type" is optional
    <Set>_Zero_Shot_QA/<videos>/     VIDEO_NAME.mp4, .avi, .mov or .mkv (.webm and .gif are read too)

Questions and answers are joined by id. Video-LLaVA's script takes answers by position and, when it runs on several
GPUs, gives every part of the questions the answers of the first one; judged on such files, its numbers are wrong.
ActivityNet-QA is read from lmms-eval's mirror too: its table from the hub or from DATA/hub/lmms-eval/ActivityNetQA, its
videos must lie unpacked, in all_test/ of that folder or at the official place.

video_qa is a set in the same layout, in DATA/video_qa (test_q.json, test_a.json, videos/; `val` has the same names with
`val` for `test`), whose short answers are compared word for word. The papers' numbers on the real sets are judged by
GPT-3.5 instead and cannot be compared with these.

The judge follows the Video-ChatGPT protocol as Video-LLaVA's eval_video_qa.py (984e65b) runs it: yes or no, and 0 to 5
points. Differs from it: accuracy is in percent, and items are joined by question id.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.answers.jsonl import is_file, read_json
from eval.benchmarks.base import Benchmark, Contents, Dataset, Need, Question, fingerprint, listed, scored_by
from eval.benchmarks.hub import by_unique_id, local_copy, open_table
from eval.benchmarks.llava_files import SHORT, QuestionRecord, json_lines
from eval.benchmarks.media import Videos, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_list
from eval.judging import Judging, Request, Verdict, prompts
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import contains, exact_match, grouped, words
from llava.errors import UserError

FORMATS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
LAYOUT = "GPT_Zero_Shot_QA"
SOURCE = "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md (videos and annotations)"
# As Video-LLaVA's scripts generate; answers end long before. And as lmms-eval generates on ActivityNet-QA.
MAX_NEW_TOKENS, LMMS_NEW_TOKENS = 1024, 64
# ActivityNet-QA on the hub.
MIRROR = ("lmms-eval/ActivityNetQA", "lmms-lab/ActivityNetQA")
COLUMNS = ("video_name", "question", "answer", "type", "question_id")


class Official(QuestionRecord):
    """An entry of test_q.json."""

    video_name: Id


class Answered(TypedDict):
    """An entry of test_a.json."""

    question_id: Id
    answer: Filled
    type: NotRequired[Id | None]


class MirrorRow(Official):
    """A row of the mirror."""

    answer: Filled
    type: Id


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


@dataclass(frozen=True)
class Entry:
    """One question with its answer, as a source has it; `official` is the set's own id, which may come again."""

    official: str
    video: str
    question: str
    answer: str
    type: str | None


# By question id.
Entries = Mapping[str, Entry]


def load(one: VideoSet, data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The test split of one of the sets; lmms-eval asks for a short answer."""
    activitynet = one.benchmark == "activitynet_qa"
    if source == "mirror" and not activitynet:
        raise UserError(f"{one.title} has no mirror on the hub; leave --source out.")
    lost = not is_file(one.root(data) / "test_q.json")
    if source == "mirror" or (activitynet and source == "auto" and lost and local_copy(data, MIRROR) is not None):
        entries, videos, mark, where = read_mirror(one, data, source)
    else:
        entries, videos, mark, where = read_official(one, data)
    lmms = profile == "lmms"
    find = cache(lambda name: find_video(videos, f"{one.prefix}{name}", Path(one.title)))
    questions = []
    for name, entry in entries.items():
        # The instruction follows on the same line there, so it cannot be a suffix of its own.
        text = f"{entry.question.capitalize()}? {SHORT}" if lmms else entry.question
        questions.append(Question(name, text, "", (find(entry.video),), entry.answer, entry.official))
    judging = judge_with(one, entries, {question.id: question.image for question in questions})

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        """The lines that the official judging script reads."""
        rows = []
        for name, text in texts.items():
            row = {"id": entries[name].official, "question": entries[name].question}
            rows.append(row | {"answer": entries[name].answer, "pred": text.strip()})
        return {"merge.jsonl": json_lines(rows)}

    facts = {"questions of the whole set": one.count, "official judge": judging.official}
    more = {"max_new_tokens": LMMS_NEW_TOKENS if lmms else MAX_NEW_TOKENS, "judging": judging}
    return Contents(where, tuple(questions), entries, Videos(videos), mark).dataset(
        f"{one.title} test", profile, judging.match, None, submission, facts, **more
    )


def read_official(one: VideoSet, data: Path) -> tuple[Entries, Path, str, str]:
    """Entries, the folder of the videos, hash and name of both official files."""
    root = one.root(data)
    asked, answered = root / "test_q.json", root / "test_a.json"
    if not is_file(asked):
        raise UserError(
            f"No {one.title} questions at {asked}; --data should be the folder that holds {LAYOUT}/ "
            f"(or eval/{LAYOUT}/), see {SOURCE}."
        )
    return joined(asked, answered), root / one.videos, fingerprint([asked, answered]), "official"


def joined(asked: Path, answered: Path) -> dict[str, Entry]:
    """Questions and answers of two files by question id. If an id repeats, its k-th question has its k-th answer."""
    rows, answers = by_unique_id(check_list(asked, Official)), by_unique_id(check_list(answered, Answered))
    entries = {}
    for name, row in rows.items():
        if name not in answers:
            raise UserError(f"{asked} asks question {name}, which has no answer in {answered}.")
        kind = answers[name].get("type")
        official, video = str(row["question_id"]), str(row["video_name"])
        entries[name] = Entry(
            official, video, row["question"], answers[name]["answer"], None if kind is None else str(kind)
        )
    return entries


def read_mirror(one: VideoSet, data: Path, source: str) -> tuple[Entries, Path, str, str]:
    """Entries, the folder of the videos, hash and name of ActivityNet-QA's table on the hub."""
    table = open_table(data, MIRROR, "Generation", "test", source)
    entries = {}
    for name, row in by_unique_id(table.records(MirrorRow)).items():
        official, video = str(row["question_id"]), str(row["video_name"]).removeprefix(one.prefix)
        entries[name] = Entry(official, video, row["question"], row["answer"], str(row["type"]))
    places = [data / "hub" / owner / one.videos for owner in MIRROR]
    videos = next((place for place in places if place.is_dir()), one.root(data) / one.videos)
    return entries, videos, table.fingerprint(COLUMNS), table.where


def find_video(videos: Path, stem: str, path: Path) -> str:
    """File name of a video, by the first format there is; .mp4 where there is none, for the check that names it."""
    name = image_name(f"{stem}{FORMATS[0]}", str(path))
    files = (f"{stem}{suffix}" for suffix in FORMATS if (videos / f"{stem}{suffix}").is_file())
    return next(files, name)


# -- the judge -------------------------------------------------------------------------------------------------------

BEST = 5
OFFICIAL = "gpt-3.5-turbo"
# The official script asks again for ever; a judge that does not keep to the format would never come to an end.
TRIES = 5


def judge_with(one: VideoSet, entries: Entries, videos: Mapping[str, str]) -> Judging:
    """The judging of a video set.

    Args:
        entries: with the questions as the data set words them, which is what the judge sees.
        videos: question id -> the video's file.
    """
    system, user = prompts()["video_qa_gpt_judge"]["messages"]
    types = {name: entry.type for name, entry in entries.items() if entry.type is not None}
    notes: tuple[str, ...] = ()
    if len(entries) != one.count:
        notes = (f"the question file holds {len(entries):,} questions, the published set {one.count:,}",)

    def request(name: str, text: str) -> Request:
        """The official script leaves temperature and length to the service."""
        # The template's slots are filled in order. What is filled in is not searched for slots again.
        parts, rest = [], user["content"]
        for slot, value in (
            ("{question}", entries[name].question),
            ("{answer}", entries[name].answer),
            ("{pred}", text),
        ):
            before, _, rest = rest.partition(slot)
            parts += [before, value]
        return Request(name, (system, {"role": "user", "content": "".join([*parts, rest])}))

    def score(asked: Sequence[str], verdicts: Mapping[str, Verdict]) -> Score:
        judged = {name: verdicts[name]["judgement"] for name in asked if name in verdicts}
        return judged_score(judged, types, videos, notes=notes)

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        judged = {name: word_match(texts[name], entries[name].answer) for name in asked}
        note = (
            "accuracy_match and score_match (5 or 0) say whether a text holds the answer's words: no published metric"
        )
        return judged_score(judged, types, videos, ("accuracy_match", "score_match"), (note, *notes))

    def parse(name: str, reply: str) -> Verdict | None:
        return None if (judgement := parse_literal(reply)) is None else {"judgement": judgement}

    # Where an id comes again, a verdict is of the first of its questions.
    ids = {entry.official: name for name, entry in reversed(list(entries.items()))}
    return Judging(
        benchmark=one.benchmark,
        official=OFFICIAL,
        main="accuracy",
        requests=lambda asked, texts: [request(name, texts[name]) for name in asked],
        parse=parse,
        read=lambda path: read_verdicts(path, ids),
        score=score,
        match=match,
        tries=TRIES,
        text=lambda verdict: verdict.get("text"),
    )


def read_verdicts(path: Path, ids: Mapping[str, str]) -> dict[str, Verdict]:
    """Official verdicts: a folder with one ID.json per question, or the file they were merged into.

    Args:
        ids: the set's own question id -> ours.
    """
    files = {file.stem: file for file in sorted(path.glob("*.json"))}
    entries = {name: read_json(file) for name, file in files.items()} if path.is_dir() else read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"{path} should hold verdicts: a folder with one JSON file per question, or one that maps ids to them."
        )
    verdicts: dict[str, Verdict] = {}
    for name, entry in entries.items():
        # [judgement, {"q", "a", "pred"}] of the official script.
        if not isinstance(entry, list) or not entry:
            raise UserError(f"{path} entry {name} should be a list of a judgement and what was judged.")
        text = entry[1].get("pred") if len(entry) > 1 and isinstance(entry[1], dict) else None
        verdicts[ids.get(name, name)] = {"judgement": entry[0]} | ({"text": text} if isinstance(text, str) else {})
    return verdicts


def parse_literal(reply: str) -> Any:
    """The Python literal that a reply is; None if it is none. What it means is only looked at when scores are added."""
    try:
        literal = ast.literal_eval(reply.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    # Everything JSON can hold is kept, as officially; sets, bytes and the like are asked for again.
    return literal if isinstance(literal, dict | list | str | int | float) else None


def points_and_verdict(judgement: Any) -> tuple[int, bool | None]:
    """Points, and yes or no, of one judgement; None where it says neither.

    Officially points are cut to whole numbers, and a string of a fraction ("4.8") is an error that costs an item its
    points and its verdict, though it still counts in the average. "yes" is looked for before "no".
    """
    try:
        points = int(judgement["score"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return 0, None
    said = judgement.get("pred") if isinstance(judgement, dict) else None
    if not isinstance(said, str):
        return points, None
    return points, True if "yes" in said.lower() else False if "no" in said.lower() else None


def accuracy(sums: Array) -> Array:
    """[..., (yes, yes or no)] -> percent."""
    return 100 * divide(sums[..., 0], sums[..., 1])


def judged_score(
    judgements: Mapping[str, Any],
    types: Mapping[str, str],
    videos: Mapping[str, str],
    names: tuple[str, str] = ("accuracy", "score"),
    notes: tuple[str, ...] = (),
) -> Score:
    """Accuracy in percent and mean points.

    Args:
        judgements: question id -> what the judge said, as read from its reply; {} counts as malformed.
        types: question id -> its group in the breakdown, where there are any.
        videos: question id -> its video; questions about one are drawn together in intervals.
        names: of accuracy and points.
    """
    read = {name: points_and_verdict(judgement) for name, judgement in judgements.items()}
    verdicts = {name: verdict for name, (_, verdict) in read.items()}
    rows = np.array([(said is True, said is not None) for said in verdicts.values()], np.float64).reshape(-1, 2)
    neither = int((rows[:, 1] == 0).sum())
    if neither:
        notes = (*notes, f"{neither:,} verdicts say neither yes nor no: they count in {names[1]}, not in {names[0]}")
    values: dict[str, float | None] = {
        names[0]: float(accuracy(rows.sum(0))) if rows[:, 1].any() else None,
        names[1]: sum(points for points, _ in read.values()) / len(read) if read else None,
    }
    clusters = tuple(videos[name] for name in read)
    terms = SufficientStatistics("video", tuple(read), clusters, rows, accuracy, proportion=True)
    decided = {name: float(said) for name, said in verdicts.items() if said is not None}
    groups = {"type": grouped(decided, types)} if types else {}
    correct = {name: float(said is True) for name, said in verdicts.items()}
    return Score(values, groups, correct, notes, names[0], frozenset({names[1]}), terms)


def word_match(text: str, answer: str) -> dict[str, Any]:
    """A judgement by words alone: yes if the text is the answer, or holds its words one after the other."""
    same = exact_match(text, answer) or contains(words(text), words(answer))
    return {"pred": "yes", "score": BEST} if same else {"pred": "no", "score": 0}


# -- video_qa --------------------------------------------------------------------------------------------------------


def load_short(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split of video_qa; everything that can be wrong with its files is said here, the videos excepted."""
    folder = data / "video_qa"
    asked, answered = folder / f"{split}_q.json", folder / f"{split}_a.json"
    if not is_file(asked):
        raise UserError(f"No video questions at {asked}; --data should be the folder that holds video_qa/.")
    entries = joined(asked, answered)
    questions = []
    for name, entry in entries.items():
        video = find_video(folder / "videos", entry.video, asked)
        questions.append(Question(name, entry.question, "", (video,), entry.answer))
    answers = {name: entry.answer for name, entry in entries.items()}
    types = {name: entry.type for name, entry in entries.items() if entry.type is not None}
    score, sample_score = scored_by(answers, exact_match, {"type": types})
    return Dataset(
        f"video QA {split}",
        tuple(questions),
        Videos(folder / "videos"),
        fingerprint([asked, answered]),
        score,
        sample_score,
        # With the field names of Video-LLaVA's answer files.
        lambda texts: {"predictions.json": [{"id": name, "pred": text.strip()} for name, text in texts.items()]},
    )


# -- the benchmarks --------------------------------------------------------------------------------------------------


def zero_shot(one: VideoSet, **more: Any) -> Benchmark:
    """The entry of one of Video-LLaVA's sets."""
    files = ("test_q.json", "test_a.json", one.videos)
    needs = tuple(Need(f"{LAYOUT}/{one.folder}/{file}", SOURCE) for file in files)
    fields = {"model": "tinyllava_video", "profiles": ("llava",), "needs": needs} | more
    return listed(one.benchmark, partial(load, one), ("test",), **fields)


ACTIVITYNET = VideoSet("activitynet_qa", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test", 8000, prefix="v_")
BENCHMARKS = (
    listed("video_qa", load_short, ("test", "val"), model="tinyllava_video"),
    zero_shot(VideoSet("msvd_qa", "MSVD-QA", "MSVD_Zero_Shot_QA", "videos", 13157)),
    zero_shot(VideoSet("msrvtt_qa", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", "videos/all", 72821)),
    zero_shot(VideoSet("tgif_qa", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4", 25751)),
    zero_shot(ACTIVITYNET, profiles=("llava", "lmms"), mirror=MIRROR),
)
