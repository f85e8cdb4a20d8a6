"""Files of MME: the questions with answers of its release, and the result files that its eval_tool reads.

MME_Benchmark_release_version/existence/0001.txt                          two lines, question TAB answer
MME_Benchmark_release_version/artwork/questions_answers_YN/0001.txt       the same where the images are in images/
eval_tool/answers/MODEL/existence.txt                                     file TAB question TAB answer TAB prediction
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.answers.jsonl import is_file, read_bytes
from eval.benchmarks.mme import metric as mme
from eval.metrics import Score, first_names
from llava.errors import UserError

# What ends the official questions, where LLaVA has its own instruction.
PLEASE = " Please answer yes or no."
# Questions of each task in the release.
SIZES = {
    **dict.fromkeys(("existence", "count", "position", "color"), 60),
    "posters": 294,
    "celebrity": 340,
    **dict.fromkeys(("scene", "landmark", "artwork"), 400),
    "OCR": 40,
    "commonsense_reasoning": 140,
    **dict.fromkeys(("numerical_calculation", "text_translation", "code_reasoning"), 40),
}
SPACES = str.maketrans("\t\n\r", "   ")


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
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, image and question, the same for every spelling in use."""
        return self.task, stem(self.file), plain(self.question)


def stem(file: str) -> str:
    """ "images/0001.v2.jpg" -> "0001": the official conversion cuts at the first full stop."""
    return file.split("/")[-1].split(".")[0]


def plain(question: str) -> str:
    """A question without its instruction and its spaces' number, which some files have doubled."""
    return " ".join(question.replace(PLEASE.strip(), "").split())


def answer_folder(release: Path, task: str) -> Path:
    """Where the text files of a task are."""
    folder = release / task
    nested = folder / "questions_answers_YN"
    found = nested if nested.is_dir() else folder
    if not found.is_dir():
        raise UserError(f"No MME task folder at {folder}; it should hold text files of questions and answers.")
    return found


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
    found = {task: folder / f"{task}.txt" for task in mme.TASKS if is_file(folder / f"{task}.txt")}
    if not found:
        raise UserError(f"{folder} has no MME result files; expected {mme.TASKS[0]}.txt and so on, one per task.")
    return {task: read_result_file(task, file) for task, file in found.items()}


def read_result_file(task: str, file: Path) -> list[Result]:
    """The lines of one task."""
    results = []
    for number, line in enumerate(text_lines(file), start=1):
        where = f"{file} line {number}"
        fields = line.split("\t", 3)
        if len(fields) != 4:
            raise UserError(f"{where} should have file, question, answer and prediction with tabs between them.")
        results.append(Result(where, task, *fields))
    return results


def score_folder(folder: Path, partial: bool = False) -> Score:
    """The official score of result files, which hold all it takes: no questions or images are needed.

    As in the official script every two lines are one image, whatever the file names.

    Args:
        partial: go on without tasks and images that MME's release has.
    """
    found = read_results(folder)
    lines = {
        task: [
            mme.Line(f"{task}/{result.file}#{number}", f"{task}/{stem(result.file)}", result.truth, result.text)
            for number, result in enumerate(results, start=1)
        ]
        for task, results in found.items()
    }
    if not any(lines.values()):
        raise UserError(f"{folder} holds no answers: every result file is empty.")
    problems = folder_problems(lines)
    if problems and not partial:
        raise UserError(
            f"{folder} does not hold whole results of MME: {'; '.join(problems)}; score what is there with --partial, "
            "or name the data of other questions with --data."
        )
    score = mme.score(lines)
    return replace(score, notes=(*score.notes, *problems))


def folder_problems(lines: Mapping[str, Sequence[mme.Line]]) -> list[str]:
    """What a whole folder of results does not have."""
    problems = []
    if lost := [task for task in mme.TASKS if not lines.get(task)]:
        problems.append(f"no answers to {', '.join(lost)}")
    if odd := [f"{task} ({len(there)})" for task, there in lines.items() if len(there) % 2]:
        problems.append(f"an odd number of lines, two belong to each image, in {', '.join(odd)}")
    counts = {task: len(lines.get(task, ())) for task in SIZES}
    other = [f"{task} {counts[task]:,} of {size:,}" for task, size in SIZES.items() if counts[task] != size]
    total = sum(map(len, lines.values()))
    if other:
        problems.append(
            f"the files hold {total:,} answers, MME's release asks {sum(SIZES.values()):,} questions "
            f"({first_names(other)})"
        )
    return problems


def write_results(results: Iterable[Result]) -> str:
    """A result file. Tabs and line breaks inside a prediction, at which the official script stops, become spaces."""
    rows = ([r.file, r.question, r.truth, r.text.translate(SPACES)] for r in results)
    return "".join("\t".join(row) + "\n" for row in rows)


def text_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}).") from error
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
