"""MME: two yes-or-no questions about each image, in 14 tasks. Read from DATA/MME.

    llava_mme.jsonl                             LLaVA's question file: question_id, image, text with suffix
    MME_Benchmark_release_version/TASK/         images with a text file each: two lines, question TAB answer
    MME_Benchmark_release_version/TASK/images/  and questions_answers_YN/ beside it, in five of the tasks

Answers may also be a folder of result files, one per task, as MME's eval_tool reads them:

    eval_tool/answers/MODEL/existence.txt       file TAB question TAB answer TAB prediction

The score is in points: per task 100 x accuracy + 100 x accuracy+, summed over perception and over cognition. Accuracy+
is the share of images whose two questions are both answered right. Papers print perception, of at most 2,000, or its
sum with cognition, of at most 2,800. `parse_official` reads a text as MME's eval_tool/calculation.py does, `parse_lmms`
as lmms-eval @ 75571cf; the rest is the same. calculation.py takes every two lines for an image, here an image's answers
belong together wherever they stand. Where both stop, at a task that is missing or an image with one answer, this goes
on and says so.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.answers.jsonl import AnswerRow, is_file, read_bytes
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import HubTable, image_names, official_file, open_table
from eval.benchmarks.llava_files import EVAL_ZIP, SHORT, QuestionRecord, read_prompts
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import check_coverage
from llava.errors import UserError, unknown

MIRROR = ("lmms-lab-encoder/MME", "lmms-lab/MME")
MIRROR_COLUMNS = ("question_id", "question", "answer", "category")
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
# LLaVA's loader leaves the length at 128, lmms-eval's task says 16.
LONGEST = {"llava": 128, "lmms": 16}

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)

# What ends the official questions, where LLaVA has its own instruction.
PLEASE = " Please answer yes or no."
SPACES = str.maketrans("\t\n\r", "   ")


class MirrorRow(QuestionRecord):
    """A row of the mirror."""

    answer: Filled
    category: Filled


@dataclass(frozen=True)
class MmeReference:
    """One question.

    Attributes:
        image: its name, unique over all tasks.
        file: name of the image's text file within the task.
        question: in the official words.
        truth: "yes" or "no" in any case.
    """

    task: str
    image: str
    file: str
    question: str
    truth: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the only split; everything that can be wrong with its files is said here, images excepted."""
    prompts = official_file(data, source, "MME", [data / "MME" / "llava_mme.jsonl"], MIRROR, EVAL_ZIP)
    if prompts is None:
        contents = read_mirror(open_table(data, MIRROR, None, split, source), profile)
    else:
        contents = read_official(prompts, profile)
    items = contents.references
    read = parse_lmms if profile == "lmms" else parse_official

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return evaluate({name: items[name] for name in asked}, texts, read)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        """The folder that MME's calculation.py --results_dir reads, as LLaVA's convert_answer_to_mme.py writes it."""
        files: dict[str, str] = defaultdict(str)
        for name, text in texts.items():
            one = items[name]
            # Tabs and line breaks inside a prediction, at which the official script stops, become spaces.
            line = f"{one.file}\t{one.question}\t{one.truth}\t{text.translate(SPACES)}\n"
            files[f"mme_results/{one.task}.txt"] += line
        return files

    return contents.dataset(
        "MME",
        profile,
        score,
        lambda question, text: float(read(text) == question.answer),
        submission,
        {"questions": len(items), "images": len({item.image for item in items.values()})},
        max_new_tokens=LONGEST[profile],
        read=lambda path: read_folder(path, items) if path.is_dir() else None,
    )


def read_official(prompts: Path, profile: str) -> Contents[MmeReference]:
    """LLaVA's questions with the answers of MME's release.

    Ids of LLaVA's file are images: the k-th question about one is called ID#k.
    """
    release = prompts.with_name("MME_Benchmark_release_version")
    if not release.is_dir():
        raise UserError(f"No MME release at {release}; get it as {SOURCE} says.")
    files: dict[Path, dict[str, str]] = {}
    questions: list[Question] = []
    items: dict[str, MmeReference] = {}
    seen: Counter[str] = Counter()
    for prompt in read_prompts(prompts):
        where, text = prompt.where, prompt.question.strip()
        official = image_name(str(prompt.id), where)
        task, file = official.split("/")[0], f"{stem(official)}.txt"
        if task not in TASKS:
            raise unknown(f"MME task in {where}", task, TASKS)
        places = (release / task / "questions_answers_YN", release / task)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise UserError(
                f"No MME task folder at {release / task}; it should hold text files of questions and answers."
            )
        path = folder / file
        if path not in files:
            files[path] = read_truth(path)
        answers = files[path]
        # A prompt without the instruction asks the official question that has it after one or two spaces.
        spellings = [text] if PLEASE.strip() in text else [text + PLEASE, f"{text} {PLEASE}"]
        asked = next((spelling for spelling in spellings if spelling in answers), None)
        if asked is None:
            raise UserError(f"{where} asks {text!r}, which {file} below {release / task} does not.")
        seen[official] += 1
        shown = lmms_text(asked) if profile == "lmms" else text
        name = f"{official}#{seen[official]}"
        questions.append(Question(name, shown, prompt.suffix, (prompt.image,), answers[asked].lower(), official))
        items[name] = MmeReference(task, official, file, asked, answers[asked])
    mark = fingerprint([prompts, *sorted(files)])
    return Contents("official", tuple(questions), items, Folder(release), mark)


def lmms_text(question: str) -> str:
    """An official question as lmms-eval shows it: it takes the instruction away and leaves a second space there."""
    return question.strip().replace(PLEASE, "")


def read_mirror(table: HubTable, profile: str) -> Contents[MmeReference]:
    """The rows of the hub's table, in which an image stands once for each question about it."""
    questions: list[Question] = []
    items: dict[str, MmeReference] = {}
    seen: Counter[str] = Counter()
    rows = table.records(MirrorRow)
    images = image_names(table, (str(record["question_id"]) for record in rows))
    for row, (record, image) in enumerate(zip(rows, images, strict=True)):
        where = f"{table.where} row {row}"
        official, task = str(record["question_id"]), record["category"]
        asked, truth = record["question"], record["answer"]
        if task not in TASKS:
            raise unknown(f"MME task in {where}", task, TASKS)
        if truth.lower() not in ("yes", "no"):
            raise UserError(f"{where} should have the answer Yes or No, got {truth!r}.")
        seen[official] += 1
        name = f"{official}#{seen[official]}"
        text = lmms_text(asked) if profile == "lmms" else lmms_text(asked).strip()
        questions.append(Question(name, text, SHORT, (image,), truth.lower(), official))
        items[name] = MmeReference(task, official, f"{stem(official)}.txt", asked, truth)
    return table.contents(questions, items, MIRROR_COLUMNS)


# -- files of questions and results ----------------------------------------------------------------------------------


def stem(file: str) -> str:
    """ "images/0001.v2.jpg" -> "0001": the official conversion cuts at the first full stop."""
    return file.split("/")[-1].split(".")[0]


def plain(question: str) -> str:
    """A question without its instruction and with single spaces, which some files have doubled."""
    return " ".join(question.replace(PLEASE.strip(), "").split())


def read_truth(file: Path) -> dict[str, str]:
    """Question -> answer of one image's text file; {} if there is none."""
    if not is_file(file):
        return {}
    answers = {}
    for number, line in enumerate(text_lines(file), start=1):
        question, *rest = line.strip().split("\t")
        if len(rest) != 1 or rest[0].lower() not in ("yes", "no"):
            raise UserError(f"{file} line {number} should be a question, a tab and Yes or No, got {line.strip()!r}.")
        answers[question] = rest[0]
    return answers


def read_folder(folder: Path, items: Mapping[str, MmeReference]) -> list[AnswerRow]:
    """Answers from result files; a line belongs to the question with its task, its image and its words."""
    name_of = {(item.task, stem(item.file), plain(item.question)): name for name, item in items.items()}
    files = {task: folder / f"{task}.txt" for task in TASKS if is_file(folder / f"{task}.txt")}
    if not files:
        raise UserError(f"{folder} has no MME result files; expected existence.txt and so on, one per task.")
    rows = []
    for task, file in files.items():
        for number, line in enumerate(text_lines(file), start=1):
            where, fields = f"{file} line {number}", line.split("\t", 3)
            if len(fields) != 4:
                raise UserError(f"{where} should have file, question, answer and prediction with tabs between them.")
            image, question, truth, text = fields
            name = name_of.get((task, stem(image), plain(question)))
            if name is not None and items[name].truth.lower() != truth.lower():
                raise UserError(
                    f"{where} gives the right answer as {truth!r}, the benchmark's files as {items[name].truth!r}; "
                    "these are not results of the same data."
                )
            rows.append(AnswerRow(where, name or f"{task}/{image} {question}", text))
    return rows


def text_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}).") from error
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


# -- the metric ------------------------------------------------------------------------------------------------------

# The answer is looked for in this many first characters.
PREFIX = 4


# Columns of the counts: right answers, questions, images with both answers right, images.
COLUMNS = 4
POINTS = frozenset({"perception", "cognition", "total", "task score"})


def parse_official(text: str) -> str:
    """ "yes", "no" or "other" as calculation.py reads a text: by its first four characters in lower case.

    So "know" and "nope" are no, "eyes" is yes, "unknown" is other, and so is "yes" after two spaces.
    """
    start = text.lower()[:PREFIX]
    return next((word for word in ("yes", "no") if word in start), "other")


def parse_lmms(text: str) -> str:
    """The same in lmms-eval: spaces around the text and all full stops are removed first, "y" and "n" are known."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or parse_official(text)


def evaluate(
    items: Mapping[str, MmeReference], texts: Mapping[str, str], read: Callable[[str], str] = parse_official
) -> Score:
    """The points of perception, of cognition and of both, and each task's.

    Args:
        items: id -> question, of those that were asked.
        texts: id -> the model's text; one for every item.
        read: parse_official or parse_lmms.
    """
    check_coverage(items, texts, set(items))
    said = {name: read(texts[name]) for name in items}
    correct = {name: float(said[name] == item.truth.lower()) for name, item in items.items()}
    pairs: dict[str, dict[str, list[float]]] = {task: defaultdict(list) for task in TASKS}
    for name, item in items.items():
        pairs[item.task][item.image].append(correct[name])
    counts = {task: {image: count(pair) for image, pair in there.items()} for task, there in pairs.items() if there}
    sums = {task: np.array(list(there.values())).sum(0) for task, there in counts.items()}
    scores = {task: float(task_score(total)) for task, total in sums.items()}
    values: dict[str, float | None] = {}
    notes = []
    for name, wanted in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [scores[task] for task in wanted if task in scores]
        values[name] = sum(there) if there else None
        if lost := [task for task in wanted if task not in scores]:
            notes.append(f"{name} is without {', '.join(lost)}: nothing was asked there")
    known = [value for value in values.values() if value is not None]
    values["total"] = sum(known) if len(known) == len(values) else None
    groups: dict[str, dict[str, tuple[float, int]]] = {"task score": {}, "accuracy": {}, "accuracy+": {}}
    for task, (right, asked, both, images) in sums.items():
        groups["task score"][task] = scores[task], int(asked)
        groups["accuracy"][task] = float(100 * divide(right, asked)), int(asked)
        groups["accuracy+"][task] = float(100 * divide(both, images)), int(asked)
    if other := sum(word == "other" for word in said.values()):
        notes.append(f"{other:,} of {len(said):,} answers have no yes or no at their start and count as wrong")
    if lone := sum(len(pair) != 2 for there in pairs.values() for pair in there.values()):
        notes.append(f"{lone:,} images without exactly two answers are left out of accuracy+")
    terms = terms_of({task: counts[task] for task in PERCEPTION if task in counts})
    total = terms_of(counts) if values["total"] is not None else None
    others = {"total": total} if total else {}
    kinds = {"task": {name: item.task for name, item in items.items()}}
    return Score(values, groups, correct, tuple(notes), "perception", POINTS, terms, others, kinds)


def count(pair: Sequence[float]) -> list[float]:
    """One image's row of the counts. Answers that are no pair count in the accuracy alone."""
    right, whole = sum(pair), len(pair) == 2
    return [right, float(len(pair)), float(whole and right == 2), float(whole)]


def task_score(counts: Array) -> Array:
    """Points of counts [..., columns]."""
    return 100 * divide(counts[..., 0], counts[..., 1]) + 100 * divide(counts[..., 2], counts[..., 3])


def terms_of(counts: Mapping[str, Mapping[str, Sequence[float]]]) -> SufficientStatistics | None:
    """The points of some tasks as a function of counts per image pair, the tasks side by side; None without a task.

    Args:
        counts: task -> image -> its row of the counts.
    """
    from scipy.linalg import block_diag

    if not counts:
        return None
    names = [image for there in counts.values() for image in there]
    sums = block_diag(*(list(there.values()) for there in counts.values()))
    # By name, because the order of an answer file is not the same for every model.
    order = sorted(range(len(names)), key=names.__getitem__)
    ordered = tuple(names[row] for row in order)
    return SufficientStatistics("image pair", ordered, ordered, sums[order], points)


def points(sums: Array) -> Array:
    """[..., tasks x columns] -> points."""
    total: Array = task_score(sums.reshape(*sums.shape[:-1], -1, COLUMNS)).sum(-1)
    return total


BENCHMARK = listed("mme", load, ("test",), mirror=MIRROR)
