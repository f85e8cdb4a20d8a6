"""SEED-Bench, images and videos together, and its image part alone, read from DATA/seed_bench.

    SEED-Bench.json            official questions with answers
    llava-seed-bench.jsonl     LLaVA's question file: question_id, image, text with suffix
    SEED-Bench-image/          official images
    SEED-Bench-video-image/    the middle frame of each video: TYPE_ID.png

Without LLaVA's file the same wording is made from SEED-Bench.json. The image part (SEED-IMG, types 1 to 9), which most
papers on token reduction print, is the benchmark seed_img: it does without the frames of videos; an answer file over
all of SEED-Bench is accepted, its other answers are ignored.

Scored as LLaVA's scripts/convert_seed_for_submission.py (commit c121f04) does it, and as lmms-eval does.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eval.answers.jsonl import is_file
from eval.benchmarks.base import PARTS, Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import HubTable, by_unique_id, letters, official_file, open_table, option_lines
from eval.benchmarks.llava_files import LETTER, QuestionRecord, all_asked, json_lines, read_prompts
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Id, NotRequired, check_list
from eval.metrics import Score
from eval.metrics.accuracy import grouped, percent
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/SEED-Bench", "lmms-lab/SEED-Bench")


# Some choices are numbers.
Choice = str | int | float


COLUMNS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type")


class SeedRecord(QuestionRecord):
    """A question of SEED-Bench.json or a row of the mirror."""

    choice_a: Choice
    choice_b: Choice
    choice_c: Choice
    choice_d: Choice
    answer: Literal["A", "B", "C", "D"]
    data_type: Literal["image", "video"]
    data_id: NotRequired[Id | None]
    question_type_id: NotRequired[int | None]


TYPES: dict[int, str] = PARTS["seed"]


@dataclass(frozen=True)
class SeedReference:
    """What scoring needs of a question.

    Attributes:
        official: the benchmark's own id, which a few questions share.
        answer: the right letter.
        kind: "image" or "video".
        type: key of TYPES; None where the data does not say.
    """

    official: str
    answer: str
    kind: str
    type: int | None = None


Rule = Callable[[str, str], float]


def load(main: str, data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the benchmark; everything that can be wrong with its files is said here, images excepted.

    Args:
        main: "accuracy" for all questions, "image_accuracy" for those about images alone.
    """
    lmms, images_only = profile == "lmms", main == "image_accuracy"
    official = official_file(data, source, "SEED-Bench", [data / "seed_bench" / "SEED-Bench.json"], MIRROR)
    if official is None:
        contents = read_mirror(open_table(data, MIRROR, None, split, source), lmms)
    else:
        contents = read_official(official)
    items = contents.references
    questions = tuple(q for q in contents.questions if not images_only or items[q.id].kind == "image")
    rule: Rule = first_character if lmms else exact

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return evaluate({name: items[name] for name in asked}, texts, rule, main)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        """The leaderboard's file as LLaVA's conversion writes it, or lmms-eval's, which has the first characters."""
        if lmms:
            rows = [{"question_id": items[n].official, "prediction": t.strip()[:1]} for n, t in texts.items()]
            return {"seed_submission.json": rows}
        seen = last_by_official(items, texts)
        rows = [{"question_id": items[name].official, "prediction": seen[name]} for name in items if name in seen]
        return {"seed_upload.jsonl": json_lines(rows)}

    kinds = Counter(item.kind for item in items.values())
    shown = "all frames of the data set" if lmms and official is None else "the middle frame"
    counts = {f"{kind} questions": kinds[kind] for kind in ("image", "video")}
    return replace(contents, questions=questions).dataset(
        "SEED-Bench image part" if images_only else "SEED-Bench",
        profile,
        score,
        lambda question, text: rule(text, question.answer),
        submission,
        {"questions": len(questions), **counts, "videos": shown},
        # lmms-eval's task names no length; its LLaVA then generates up to 1,024 tokens.
        max_new_tokens=1024 if lmms else 128,
        # An answer file over all questions holds the answers to those about images.
        accepts=frozenset(items.keys() - {question.id for question in questions}),
    )


def read_official(path: Path) -> Contents[SeedReference]:
    """SEED-Bench.json, in the order and words of LLaVA's question file if that is there."""
    records, prompts = by_unique_id(check_list(path, SeedRecord, "questions")), path.with_name("llava-seed-bench.jsonl")
    if is_file(prompts):
        questions, files = from_prompts(prompts, records, path), [prompts, path]
    else:
        questions, files = [], [path]
        for name, record in records.items():
            where, kind = f"Question {name} in {path}", record["data_type"]
            needed = "data_id" if kind == "image" else "question_type_id"
            if record.get(needed) is None:
                raise UserError(f"{where} has no {needed}, which names its {kind}.")
            image = f"SEED-Bench-video-image/{record.get('question_type_id')}_{record['question_id']}.png"
            if kind == "image":
                image = f"SEED-Bench-image/{record.get('data_id')}"
            questions.append(ask(name, record, [image_name(image, where)]))
    return Contents("official files", tuple(questions), read_items(records), Folder(path.parent), fingerprint(files))


def read_items(records: Mapping[str, SeedRecord]) -> dict[str, SeedReference]:
    """What scoring needs of the records."""
    return {
        name: SeedReference(
            str(record["question_id"]), record["answer"], record["data_type"], record.get("question_type_id")
        )
        for name, record in records.items()
    }


def from_prompts(path: Path, records: Mapping[str, SeedRecord], official: Path) -> list[Question]:
    """Questions in the words and order of LLaVA's file; a prompt tells which of the questions with its id it asks."""
    waiting: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        waiting[str(record["question_id"])].append(name)
    questions = []
    for prompt in read_prompts(path):
        names = waiting[str(prompt.id)]
        if not names:
            raise UserError(f"{prompt.where} asks question {prompt.id} more often than {official} has it.")
        name = next((name for name in names if prompt.text.startswith(records[name]["question"])), names[0])
        names.remove(name)
        answer = records[name]["answer"]
        questions.append(Question(name, prompt.question, prompt.suffix, (prompt.image,), answer, str(prompt.id)))
    all_asked(path, {question.id for question in questions}, records, official)
    return questions


def read_mirror(table: HubTable, every_frame: bool) -> Contents[SeedReference]:
    """The hub's table, whose images are lists: one image, or frames of a video.

    Args:
        every_frame: show all frames of a video as lmms-eval does, not the middle one as LLaVA.
    """
    records = by_unique_id(table.records(SeedRecord))
    frames: dict[int, list[str]] = defaultdict(list)
    names = table.images().names
    for name in sorted(names, key=lambda name: [int(part) for part in name.split("/") if part.isdigit()]):
        frames[int(name.split("/")[0])].append(name)
    first: dict[Any, int] = {}
    questions = []
    for row, (name, record) in enumerate(records.items()):
        # Rows about one image share its name, as in the official files.
        about = record.get("data_id") if record["data_type"] == "image" else None
        shown = frames[first.setdefault(about, row) if about is not None else row]
        if not shown:
            raise UserError(f"Question {name} in {table.where} has no image; fetch the data set again.")
        questions.append(ask(name, record, shown if every_frame else shown[len(shown) // 2 :][:1]))
    return table.contents(questions, read_items(records), COLUMNS)


def ask(name: str, record: SeedRecord, images: Sequence[str]) -> Question:
    """Question and choices as in LLaVA's file; lmms-eval words them alike."""
    choices = letters([record["choice_a"], record["choice_b"], record["choice_c"], record["choice_d"]])
    text = f"{record['question']}\n{option_lines(choices)}"
    return Question(name, text, LETTER, tuple(images), record["answer"], str(record["question_id"]))


# -- the metric ------------------------------------------------------------------------------------------------------


def exact(text: str, answer: str) -> float:
    """LLaVA's rule: the text is the letter and nothing else, in the same case, without a full stop or space."""
    return float(text == answer)


def first_character(text: str, answer: str) -> float:
    """lmms-eval's rule: the first character, in either case."""
    return float(text.strip()[:1].lower() == answer.strip().lower())


def last_by_official(items: Mapping[str, SeedReference], texts: Mapping[str, str]) -> dict[str, str]:
    """Texts as the official script sees them: of questions that share an id, the last answer stands for all."""
    last = {items[name].official: text for name, text in texts.items() if name in items}
    return {name: last[item.official] for name, item in items.items() if item.official in last}


def evaluate(
    items: Mapping[str, SeedReference], texts: Mapping[str, str], rule: Rule = exact, main: str = "accuracy"
) -> Score:
    """Accuracy over all questions, over those about images and over those about videos.

    A question without a prediction is wrong, as officially.

    Args:
        items: the questions that count; texts of others are ignored.
        texts: question id -> the model's text, in the order of the answer file.
        main: "accuracy", or "image_accuracy" for SEED-Bench's image part.
    """
    if main == "image_accuracy":
        items = {name: item for name, item in items.items() if item.kind == "image"}
    own = {name: rule(texts[name], item.answer) if name in texts else 0.0 for name, item in items.items()}
    correct, notes = own, []
    values: dict[str, float | None] = {}
    if rule is exact and len({item.official for item in items.values()}) < len(items):
        seen = last_by_official(items, texts)
        correct = {name: rule(seen[name], item.answer) if name in seen else 0.0 for name, item in items.items()}
        notes.append(
            "questions that share an id are all scored with the last of their answers, as the official script does"
        )
    for kind in ("video", "image"):
        part = [correct[name] for name, item in items.items() if item.kind == kind]
        if part or main == f"{kind}_accuracy":
            values = {f"{kind}_accuracy": percent(part) if part else None, **values}
    if main == "accuracy":
        values = {"accuracy": percent(correct.values()), **values}
    types = {name: item.type for name, item in items.items() if item.type is not None}
    titles = {str(kind): TYPES.get(int(kind), f"type {kind}") for kind in types.values()}
    # In the order of their numbers.
    groups = {"type": {titles[kind]: found for kind, found in grouped(correct, types).items()}}
    kinds = {"type": {name: titles[str(kind)] for name, kind in types.items()}}
    return Score(values, groups, correct, tuple(notes), main=main, kinds=kinds)


BENCHMARKS = (
    listed("seed", partial(load, "accuracy"), ("test",), mirror=MIRROR),
    listed("seed_img", partial(load, "image_accuracy"), ("test",), mirror=MIRROR),
)
