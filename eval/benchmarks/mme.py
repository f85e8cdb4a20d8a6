"""MME: two yes-or-no questions about each image, in 14 tasks. Read from DATA/MME.

    llava_mme.jsonl                             LLaVA's question file: question_id, image, text with suffix
    MME_Benchmark_release_version/TASK/         images with a text file each: two lines, question TAB answer
    MME_Benchmark_release_version/TASK/images/  and questions_answers_YN/ beside it, in five of the tasks

Answers may also be a folder of result files, one per task, as MME's eval_tool reads them:

    eval_tool/answers/MODEL/existence.txt       file TAB question TAB answer TAB prediction

The score is in points: per task 100 x accuracy + 100 x accuracy+, summed over perception and over cognition. Accuracy+
is the share of images whose two questions are both answered right. Papers print perception, of at most 2,000, or its
sum with cognition, of at most 2,800. `official_score` is MME's eval_tool/calculation.py, which takes every two lines
for an image; `lmms_score` is lmms-eval @ 75571cf, which pairs by the question's id and reads some texts differently.
Where those stop, at a task that is missing or an image with one answer, these go on and say so.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from eval.answers.jsonl import Row, is_file, read_bytes
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import Table, official_file, open_table, picture_names
from eval.benchmarks.llava_files import EVAL_ZIP, SHORT, Asked, read_prompts
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled
from eval.metrics import Array, Score, SufficientStatistics, divide, first_names
from eval.metrics.accuracy import check_coverage
from llava.errors import UserError, unknown

MIRROR = ("lmms-lab-encoder/MME", "lmms-lab/MME")
MIRROR_COLUMNS = ("question_id", "question", "answer", "category")
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
# LLaVA's loader leaves the length at 128, lmms-eval's task says 16.
LONGEST = {"llava": 128, "lmms": 16}

# Questions of each task in the release.
PERCEPTION = {
    **dict.fromkeys(("existence", "count", "position", "color"), 60),
    "posters": 294,
    "celebrity": 340,
    **dict.fromkeys(("scene", "landmark", "artwork"), 400),
    "OCR": 40,
}
COGNITION = {
    "commonsense_reasoning": 140,
    **dict.fromkeys(("numerical_calculation", "text_translation", "code_reasoning"), 40),
}
TASKS = PERCEPTION | COGNITION

# What ends the official questions, where LLaVA has its own instruction.
PLEASE = " Please answer yes or no."
SPACES = str.maketrans("\t\n\r", "   ")


class MirrorRow(Asked):
    """A row of the mirror."""

    answer: Filled
    category: Filled


@dataclass(frozen=True)
class Result:
    """One line of a result file.

    Attributes:
        where: file and line, for errors.
        file: name of the image or of its text file, which differ in their suffix only.
    """

    where: str
    task: str
    file: str
    question: str
    truth: str
    text: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, image and question, the same for every spelling in use."""
        return self.task, stem(self.file), plain(self.question)


@dataclass(frozen=True)
class Line:
    """One question with its answer.

    Attributes:
        id: unique over all tasks.
        image: name of the image, unique over all tasks.
        truth: "yes" or "no" in any case.
        text: the model's raw text.
    """

    id: str
    image: str
    truth: str
    text: str


Lines = Mapping[str, Sequence[Line]]
Pairs = Mapping[str, Sequence[Sequence[Line]]]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the only split; everything that can be wrong with its files is said here, images excepted."""
    prompts = official_file(data, source, "MME", [data / "MME" / "llava_mme.jsonl"], MIRROR, EVAL_ZIP)
    if prompts is None:
        contents = read_mirror(open_table(data, MIRROR, None, split, source), profile)
    else:
        contents = read_official(prompts, profile)
    known, image_of = contents.references, {question.id: question.official for question in contents.questions}
    read_text = parse_lmms if profile == "lmms" else parse_official

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        check_coverage(asked, texts, set(known))
        lines: dict[str, list[Line]] = defaultdict(list)
        for name, text in texts.items():
            lines[known[name].task].append(Line(name, image_of[name], known[name].truth, text))
        return lmms_score(lines) if profile == "lmms" else official_score(lines)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        """The folder that MME's calculation.py --results_dir reads, as LLaVA's convert_answer_to_mme.py writes it."""
        tasks: dict[str, list[Result]] = defaultdict(list)
        for name, text in texts.items():
            tasks[known[name].task].append(replace(known[name], text=text))
        # Tabs and line breaks inside a prediction, at which the official script stops, become spaces.
        return {
            f"mme_results/{task}.txt": "".join(
                f"{one.file}\t{one.question}\t{one.truth}\t{one.text.translate(SPACES)}\n" for one in results
            )
            for task, results in tasks.items()
        }

    return contents.dataset(
        "MME",
        profile,
        score,
        lambda question, text: float(read_text(text) == question.answer),
        submission,
        {"questions": len(known), "images": len(set(image_of.values()))},
        max_new_tokens=LONGEST[profile],
        read=lambda path: read_folder(path, known) if path.is_dir() else None,
    )


def read_official(prompts: Path, profile: str) -> Contents[Result]:
    """LLaVA's questions with the answers of MME's release.

    Ids of LLaVA's file are images: the k-th question about one is called ID#k.
    """
    release = prompts.with_name("MME_Benchmark_release_version")
    if not release.is_dir():
        raise UserError(f"No MME release at {release}; get it as {SOURCE} says.")
    folder_of = cache(lambda task: answer_folder(release, task))
    files: dict[Path, dict[str, str]] = {}
    questions: list[Question] = []
    results: dict[str, Result] = {}
    seen: Counter[str] = Counter()
    for prompt in read_prompts(prompts):
        where, text = prompt.where, prompt.question.strip()
        official = image_name(str(prompt.id), where)
        task, file = official.split("/")[0], f"{stem(official)}.txt"
        if task not in TASKS:
            raise unknown(f"MME task in {where}", task, list(TASKS))
        path = folder_of(task) / file
        if path not in files:
            files[path] = read_truth(path)
        answers = files[path]
        asked = official_question(text, answers)
        if asked is None:
            raise UserError(f"{where} asks {text!r}, which {file} below {release / task} does not.")
        seen[official] += 1
        shown = lmms_text(asked) if profile == "lmms" else text
        name = f"{official}#{seen[official]}"
        questions.append(Question(name, shown, prompt.suffix, (prompt.image,), answers[asked].lower(), official))
        results[name] = Result(where, task, file, asked, answers[asked])
    mark = fingerprint([prompts, *sorted(files)])
    return Contents("official", tuple(questions), results, Folder(release), mark)


def lmms_text(question: str) -> str:
    """An official question as lmms-eval shows it: it takes the instruction away and leaves a second space there."""
    return question.strip().replace(PLEASE, "")


def read_mirror(table: Table, profile: str) -> Contents[Result]:
    """The rows of the hub's table, in which an image stands once for each question about it."""
    questions: list[Question] = []
    results: dict[str, Result] = {}
    seen: Counter[str] = Counter()
    rows = table.records(MirrorRow)
    images = picture_names(table, (str(record["question_id"]) for record in rows))
    for row, (record, image) in enumerate(zip(rows, images, strict=True)):
        where = f"{table.where} row {row}"
        official, task = str(record["question_id"]), record["category"]
        asked, truth = record["question"], record["answer"]
        if task not in TASKS:
            raise unknown(f"MME task in {where}", task, list(TASKS))
        if truth.lower() not in ("yes", "no"):
            raise UserError(f"{where} should have the answer Yes or No, got {truth!r}.")
        seen[official] += 1
        name = f"{official}#{seen[official]}"
        text = lmms_text(asked) if profile == "lmms" else lmms_text(asked).strip()
        questions.append(Question(name, text, SHORT, (image,), truth.lower(), official))
        results[name] = Result(where, task, f"{stem(official)}.txt", asked, truth)
    return table.contents(questions, results, MIRROR_COLUMNS)


# -- files of questions and results ----------------------------------------------------------------------------------


def stem(file: str) -> str:
    """ "images/0001.v2.jpg" -> "0001": the official conversion cuts at the first full stop."""
    return file.split("/")[-1].split(".")[0]


def plain(question: str) -> str:
    """A question without its instruction and its spaces' number, which some files have doubled."""
    return " ".join(question.replace(PLEASE.strip(), "").split())


def answer_folder(release: Path, task: str) -> Path:
    """Where the text files of a task are."""
    for folder in (release / task / "questions_answers_YN", release / task):
        if folder.is_dir():
            return folder
    raise UserError(f"No MME task folder at {release / task}; it should hold text files of questions and answers.")


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


def official_question(prompt: str, answers: dict[str, str]) -> str | None:
    """The question of `answers` that a prompt without its instruction asks: one or two spaces join the official one."""
    spellings = [prompt] if PLEASE.strip() in prompt else [prompt + PLEASE, f"{prompt} {PLEASE}"]
    return next((spelling for spelling in spellings if spelling in answers), None)


def read_results(folder: Path) -> dict[str, list[Result]]:
    """Task -> lines of its result file, for the tasks that have one."""
    files = {task: folder / f"{task}.txt" for task in TASKS if is_file(folder / f"{task}.txt")}
    if not files:
        raise UserError(f"{folder} has no MME result files; expected existence.txt and so on, one per task.")
    results: dict[str, list[Result]] = {task: [] for task in files}
    for task, file in files.items():
        for number, line in enumerate(text_lines(file), start=1):
            where = f"{file} line {number}"
            fields = line.split("\t", 3)
            if len(fields) != 4:
                raise UserError(f"{where} should have file, question, answer and prediction with tabs between them.")
            results[task].append(Result(where, task, *fields))
    return results


def read_folder(folder: Path, known: Mapping[str, Result]) -> list[Row]:
    """Answers from result files; a line belongs to the question with its task, its image and its words."""
    name_of = {result.key: name for name, result in known.items()}
    rows = []
    for result in chain.from_iterable(read_results(folder).values()):
        name = name_of.get(result.key)
        if name is not None and known[name].truth.lower() != result.truth.lower():
            raise UserError(
                f"{result.where} gives the right answer as {result.truth!r}, the benchmark's files as "
                f"{known[name].truth!r}; these are not results of the same data."
            )
        rows.append(Row(result.where, name or f"{result.task}/{result.file} {result.question}", result.text))
    return rows


def score_folder(folder: Path, partial: bool = False) -> Score:
    """The official score of result files, which hold all it takes: no questions or images are needed.

    As in the official script every two lines are one image, whatever the file names.

    Args:
        partial: go on without tasks and images that MME's release has.
    """
    lines = {
        task: [
            Line(f"{task}/{result.file}#{number}", f"{task}/{stem(result.file)}", result.truth, result.text)
            for number, result in enumerate(results, start=1)
        ]
        for task, results in read_results(folder).items()
    }
    if not any(lines.values()):
        raise UserError(f"{folder} holds no answers: every result file is empty.")
    problems = folder_problems(lines)
    if problems and not partial:
        raise UserError(
            f"{folder} does not hold whole results of MME: {'; '.join(problems)}; score what is there with --partial, "
            "or name the data of other questions with --data."
        )
    score = official_score(lines)
    return replace(score, notes=(*score.notes, *problems))


def folder_problems(lines: Mapping[str, Sequence[Line]]) -> list[str]:
    """What a whole folder of results does not have."""
    problems = []
    if lost := [task for task in TASKS if not lines.get(task)]:
        problems.append(f"no answers to {', '.join(lost)}")
    if odd := [f"{task} ({len(there)})" for task, there in lines.items() if len(there) % 2]:
        problems.append(f"an odd number of lines, two belong to each image, in {', '.join(odd)}")
    counts = {task: len(lines.get(task, ())) for task in TASKS}
    other = [f"{task} {counts[task]:,} of {size:,}" for task, size in TASKS.items() if counts[task] != size]
    total = sum(map(len, lines.values()))
    if other:
        problems.append(
            f"the files hold {total:,} answers, MME's release asks {sum(TASKS.values()):,} questions "
            f"({first_names(other)})"
        )
    return problems


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


def official_score(lines: Lines) -> Score:
    """The numbers of calculation.py.

    Args:
        lines: task -> its lines in file order. Two by two they are taken for the questions of one image; where they
            are not, the numbers with right pairs stand beside the official ones.
    """
    in_twos = {task: [there[i : i + 2] for i in range(0, len(there), 2)] for task, there in lines.items()}
    score = score_pairs(in_twos, parse_official)
    pairs = [pair for there in in_twos.values() for pair in there]
    mixed = sum(len({line.image for line in pair}) > 1 for pair in pairs)
    if not mixed:
        return score
    right = score_pairs({task: by_image(there) for task, there in lines.items()}, parse_official)
    by_name = {f"{name}_paired_by_image": value for name, value in right.values.items()}
    note = (
        f"the official script takes every two lines for one image, but {mixed:,} of its {len(pairs):,} pairs are of "
        "two images; the values ..._paired_by_image pair by image"
    )
    return replace(score, values=score.values | by_name, notes=(*score.notes, note), points=score.points | set(by_name))


def lmms_score(lines: Lines) -> Score:
    """The numbers of lmms-eval: `lines` is task -> lines, those about an image together wherever they stand."""
    return score_pairs({task: by_image(there) for task, there in lines.items()}, parse_lmms)


def by_image(lines: Iterable[Line]) -> list[Sequence[Line]]:
    """Lines about the same image."""
    images: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        images[line.image].append(line)
    return list(images.values())


def score_pairs(pairs: Pairs, read: Callable[[str], str]) -> Score:
    """The numbers for lines that are in pairs already."""
    for task in pairs:
        if task not in TASKS:
            raise unknown("MME task", task, list(TASKS))
    tasks = [task for task in TASKS if pairs.get(task)]
    lines = [line for task in tasks for pair in pairs[task] for line in pair]
    if odd := next((line for line in lines if line.truth.lower() not in ("yes", "no")), None):
        raise UserError(f"The answer to {odd.id} should be yes or no, got {odd.truth!r}.")
    said = {line.id: read(line.text) for line in lines}
    correct = {line.id: float(said[line.id] == line.truth.lower()) for line in lines}
    counts = {task: np.array([count(pair, correct) for pair in pairs[task]]) for task in tasks}
    sums = {task: counts[task].sum(0) for task in tasks}
    scores = {task: float(task_score(sums[task])) for task in tasks}
    values: dict[str, float | None] = {}
    notes = []
    for name, wanted in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [scores[task] for task in wanted if task in scores]
        values[name] = sum(there) if there else None
        if lost := [task for task in wanted if task not in tasks]:
            notes.append(f"{name} is without {', '.join(lost)}: nothing was asked there")
    known = [value for value in values.values() if value is not None]
    values["total"] = sum(known) if len(known) == len(values) else None
    groups: dict[str, dict[str, tuple[float, int]]] = {"task score": {}, "accuracy": {}, "accuracy+": {}}
    for task in tasks:
        right, asked, both, images = sums[task]
        groups["task score"][task] = scores[task], int(asked)
        groups["accuracy"][task] = float(100 * divide(right, asked)), int(asked)
        groups["accuracy+"][task] = float(100 * divide(both, images)), int(asked)
    if other := sum(word == "other" for word in said.values()):
        notes.append(f"{other:,} of {len(said):,} answers have no yes or no at their start and count as wrong")
    if lone := sum(len(pair) != 2 for there in pairs.values() for pair in there):
        notes.append(f"{lone:,} images without exactly two answers are left out of accuracy+")
    terms = terms_of(pairs, counts, [task for task in PERCEPTION if task in tasks])
    total = terms_of(pairs, counts, tasks) if values["total"] is not None else None
    others = {"total": total} if total else {}
    return Score(values, groups, correct, tuple(notes), "perception", POINTS, terms, others)


def count(pair: Sequence[Line], correct: Mapping[str, float]) -> tuple[float, float, float, float]:
    """One row of the counts. Lines that are no pair count in the accuracy alone."""
    right = sum(correct[line.id] for line in pair)
    whole = len(pair) == 2
    return right, len(pair), float(whole and right == 2), float(whole)


def task_score(counts: Array) -> Array:
    """Points of counts [..., columns]."""
    return 100 * divide(counts[..., 0], counts[..., 1]) + 100 * divide(counts[..., 2], counts[..., 3])


def terms_of(pairs: Pairs, counts: Mapping[str, Array], tasks: Sequence[str]) -> SufficientStatistics | None:
    """The points of some tasks as a function of counts per image pair, the tasks side by side; None without a task."""
    from scipy.linalg import block_diag

    if not tasks:
        return None
    names = [" + ".join(dict.fromkeys(line.image for line in pair)) for task in tasks for pair in pairs[task]]
    sums = block_diag(*(counts[task] for task in tasks))
    # By name, because the order of an answer file is not the same for every model.
    order = sorted(range(len(names)), key=names.__getitem__)
    ordered = tuple(names[row] for row in order)
    return SufficientStatistics("image pair", ordered, ordered, sums[order], points)


def points(sums: Array) -> Array:
    """[..., tasks x columns] -> points."""
    total: Array = task_score(sums.reshape(*sums.shape[:-1], -1, COLUMNS)).sum(-1)
    return total


BENCHMARK = listed(
    "mme",
    load,
    ("test",),
    mirror=MIRROR,
    score_alone=lambda path, partial: score_folder(path, partial) if path.is_dir() else None,
)
