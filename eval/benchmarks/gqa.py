"""GQA in the official layout, read from DATA/gqa.

    llava_gqa_testdev_balanced.jsonl        LLaVA's question file: question_id, image, text with suffix, category
    data/testdev_balanced_questions.json    official questions with answers
    data/images/                            official images
    data/testdev_choices.json               optional, for validity and plausibility
    data/testdev_all_questions.json         optional, for consistency

The split `val` has the same names with `val` for `testdev`. Without LLaVA's file the questions are asked in the order
of the official one, with LLaVA's suffix. The mirror has two tables for a split, one of questions and one of images.

The metric is written from a description of the GQA evaluation script (SITE/evaluate.html) and equal to it on the
vectors in tests/data/gqa. Differs from it: files that the test-dev release lacks (choices, all questions) are optional,
and predictions must match the questions exactly, so that a forgotten or repeated answer is an error, no silent 0.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, scored_by
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import SHORT, prompts_by_id, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, TypedDict, check_map
from eval.metrics import Score
from eval.metrics.accuracy import bare, check_coverage, grouped, loose_match, normalise, percent
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
SITE = "https://cs.stanford.edu/people/dorarad/gqa"


class Types(TypedDict):
    """What kind of question it is."""

    structural: str
    semantic: str
    detailed: str


class Step(TypedDict):
    """An operation of the program that answers the question."""

    operation: str
    argument: str


# "global" is a keyword of Python and cannot stand in a class.
Groups = TypedDict("Groups", {"global": str | None})


class Official(TypedDict):
    """A question of the official file."""

    question: Filled
    answer: str
    imageId: Id
    isBalanced: bool
    types: Types
    semantic: list[Step]
    groups: Groups
    entailed: list[str]


class Entailed(TypedDict):
    """What is looked at of a question in the file with all questions."""

    answer: str
    isBalanced: bool


class Choices(TypedDict):
    """The answers that make sense for a question, and those that are likely in the world."""

    valid: list[str]
    plausible: list[str]


class MirrorQuestion(TypedDict):
    """A row of the mirror's table of questions."""

    id: Id
    question: Filled
    answer: Filled
    imageId: Id


class MirrorImage(TypedDict):
    """What is read of a row of the mirror's table of images."""

    id: Id


# (ids that were asked, texts) -> the metric.
Rule = Callable[[Sequence[str], Mapping[str, str]], Score]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    file = data / "gqa" / "data" / f"{split}_balanced_questions.json"
    official = official_file(data, source, f"GQA {split}", [file], MIRROR)
    if official is None:
        contents, accepts, score = read_mirror(data, split, source), frozenset[str](), None
    else:
        contents, accepts, score = read_official(official, split)
    lmms = profile == "lmms"
    answers = {question.id: question.answer for question in contents.questions}
    # lmms-eval ignores case and punctuation. The mirror has no types and programs: what needs them is not measured.
    rule: Callable[[str, str], float] = loose_match if lmms else lambda text, answer: normalise(text) == answer
    plain_score, sample_score = scored_by(answers, rule)

    def score_asked(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return plain_score(asked, {name: text for name, text in texts.items() if name not in accepts})

    return contents.dataset(
        f"GQA {split}",
        profile,
        score_asked if lmms or score is None else score,
        sample_score,
        submission,
        {},
        max_new_tokens=16 if lmms else 128,
        accepts=accepts,
        normalise=bare if lmms else normalise,
    )


def read_official(official: Path, split: str) -> tuple[Contents[Official], frozenset[str], Rule]:
    """The official questions, in LLaVA's order if its file is there, the ids of the unbalanced ones, and the metric."""
    folder = official.parent
    prompts = folder.parent / f"llava_gqa_{split}_balanced.jsonl"
    records, images, files = check_map(official, Official), folder / "images", [official]
    questions = []
    if is_file(prompts):
        files.insert(0, prompts)
        balanced = [name for name, record in records.items() if record["isBalanced"]]
        for name, prompt in prompts_by_id(prompts, official, records, balanced):
            answer, kind = records[name]["answer"], records[name]["types"]["detailed"]
            questions.append(Question(name, prompt.question, prompt.suffix, (prompt.image,), answer, kind=kind))
    else:
        for name, record in records.items():
            # GQA ships .jpg; a lossless set may use .png.
            image, lossless = image_name(f"{record['imageId']}.jpg", str(official)), f"{record['imageId']}.png"
            if not (images / image).exists() and (images / lossless).exists():
                image = lossless
            kind = record["types"]["detailed"]
            questions.append(Question(name, record["question"], SHORT, (image,), record["answer"], kind=kind))
    choices_file, all_file = folder / f"{split}_choices.json", folder / f"{split}_all_questions.json"
    choices = check_map(choices_file, Choices) if is_file(choices_file) else None
    everything = check_map(all_file, Entailed) if is_file(all_file) else None

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        predictions = {name: normalise(text) for name, text in texts.items()}
        return evaluate({name: records[name] for name in asked}, predictions, choices, everything)

    unbalanced = {name for name, record in {**(everything or {}), **records}.items() if not record["isBalanced"]}
    contents = Contents("official", tuple(questions), records, Folder(images), fingerprint(files))
    return contents, frozenset(unbalanced), score


def read_mirror(data: Path, split: str, source: str) -> Contents[Any]:
    """The two tables of the hub.

    One has question, answer and imageId of each question, the other id and encoded bytes of each image.
    """
    table = open_table(data, MIRROR, f"{split}_balanced_instructions", split, source)
    shown = open_table(data, MIRROR, f"{split}_balanced_images", split, source)
    row_of = {str(record["id"]): row for row, record in enumerate(shown.records(MirrorImage))}
    questions = []
    for record in table.records(MirrorQuestion):
        name, image = str(record["id"]), str(record["imageId"])
        if image not in row_of:
            raise UserError(f"Question {name} in {table.where} is about image {image}, which has no row.")
        questions.append(Question(name, record["question"], SHORT, (f"{row_of[image]}/image",), record["answer"]))
    columns = list(MirrorQuestion.__annotations__)
    return table.contents(unique(questions, table.where), {}, columns, shown.images())


def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """The official script's input, its testdev_balanced_predictions.json."""
    rows = [{"questionId": name, "prediction": normalise(text)} for name, text in texts.items()]
    return {"predictions.json": rows}


# An official question, of which the metric looks at `Official`'s fields.
Record = Mapping[str, Any]

# Operations that name or check an object rather than reason a further step; matched inside "operation: argument".
NOT_A_STEP = ("exist", "query: name", "choose name")


def evaluate(
    questions: Mapping[str, Record],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    all_questions: Mapping[str, Record] | None = None,
) -> Score:
    """The official numbers over the balanced questions.

    Args:
        questions: id -> official question record; only those with `isBalanced` are counted.
        predictions: id -> normalised prediction; one for every balanced question.
        choices: id -> {"valid": [...], "plausible": [...]}. Without it both are None, as nothing can be looked up.
        all_questions: also the unbalanced ones, which balanced questions entail. Without it, or without predictions
            for them, consistency is None.
    """
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    check_coverage(balanced, predictions, {*questions, *(all_questions or ())})
    correct = {name: float(predictions[name] == question["answer"]) for name, question in balanced.items()}
    is_open = {name: question["types"]["structural"] == "query" for name, question in balanced.items()}
    notes = []

    def among(kind: str) -> float | None:
        """Percent of the predictions that are one of their question's "valid" or "plausible" answers."""
        if choices is None:
            return None
        if lost := [name for name in balanced if name not in choices]:
            raise UserError(f"The choices file has no entry for question {lost[0]}.")
        # "What do these have in common" is answered by an attribute's name, whatever the choices list.
        common = {name: "Common" in question["types"]["detailed"] for name, question in balanced.items()}
        named = ("color", "material", "shape")
        return percent(float(predictions[n] in (named if common[n] else choices[n][kind])) for n in balanced)

    if choices is None:
        notes.append("no choices file: validity and plausibility are not measured")
    consistency, reason = score_consistency(balanced, predictions, correct, all_questions)
    if reason:
        notes.append(reason)

    values = {
        "accuracy": percent(correct.values()),
        "binary": percent(correct[name] for name in balanced if not is_open[name]),
        "open": percent(correct[name] for name in balanced if is_open[name]),
        "consistency": consistency,
        "validity": among("valid"),
        "plausibility": among("plausible"),
        "distribution": distribution(balanced, predictions),
    }
    kinds: dict[str, dict[str, Any]] = {
        "structural type": {name: question["types"]["structural"] for name, question in balanced.items()},
        "semantic type": {name: question["types"]["semantic"] for name, question in balanced.items()},
        "steps number": {name: count_steps(question) for name, question in balanced.items()},
        "words number": {name: len(question["question"].split()) for name, question in balanced.items()},
    }
    groups = {title: grouped(correct, kind) for title, kind in kinds.items()}
    # About a hundred, which the official script does not print.
    kinds["detailed type"] = {name: question["types"]["detailed"] for name, question in balanced.items()}
    return Score(values, groups, correct, tuple(notes), points=frozenset({"distribution"}), kinds=kinds)


def count_steps(question: Record) -> int:
    """Reasoning steps of the question's program."""
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in step for word in NOT_A_STEP) for step in steps)


def distribution(questions: Mapping[str, Record], predictions: Mapping[str, str]) -> float:
    """Chi-square between the counts of answers and of predictions within each question group.

    It is the mean over the groups, weighted by their sizes and divided by 100.
    """
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    observed: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            expected[group][question["answer"]] += 1
            observed[group][predictions[name]] += 1
    weighted = sum(
        counts.total() * sum((observed[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in expected.items()
    )
    total = sum(counts.total() for counts in expected.values())
    return weighted / total / 100 if total else 0.0


def score_consistency(
    balanced: Mapping[str, Record],
    predictions: Mapping[str, str],
    correct: Mapping[str, float],
    all_questions: Mapping[str, Record] | None,
) -> tuple[float | None, str | None]:
    """How many of the questions that a right answer entails are right too, in percent; None with the reason why not."""
    if all_questions is None:
        return None, "no file with all questions: consistency is not measured"
    per_question = []
    for name, question in balanced.items():
        entailed = [other for other in question["entailed"] if other != name]
        if not correct[name] or not entailed:
            continue
        if lost := [other for other in entailed if other not in predictions or other not in all_questions]:
            return None, f"consistency is not measured: no prediction for entailed questions such as {lost[0]}"
        hits = [predictions[other] == all_questions[other]["answer"] for other in entailed]
        per_question.append(sum(hits) / len(hits))
    return percent(per_question), None


BENCHMARK = listed("gqa", load, ("testdev", "val"), model="tinyllava", mirror=MIRROR)
