"""MME: two yes-or-no questions about each image, in 14 tasks. Read from DATA/MME.

    llava_mme.jsonl                             LLaVA's question file: question_id, image, text with suffix
    MME_Benchmark_release_version/TASK/         images with a text file each, which holds questions and answers
    MME_Benchmark_release_version/TASK/images/  and questions_answers_YN/ beside it, in five of the tasks

Answers may also be a folder of result files, one per task, as MME's eval_tool reads them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.answers.jsonl import Row, is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import local_copy, open_table
from eval.benchmarks.llava_files import Prompt, read_prompts
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.mme import metric as mme
from eval.benchmarks.mme.files import (
    PLEASE,
    Result,
    answer_folder,
    official_question,
    read_results,
    read_truth,
    score_folder,
    stem,
    write_results,
)
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Id, TypedDict
from eval.metrics import Score
from eval.metrics.accuracy import check_coverage
from llava.errors import UserError, unknown

MIRROR = ("lmms-lab-encoder/MME", "lmms-lab/MME")
MIRROR_COLUMNS = ("question_id", "question", "answer", "category")
# LLaVA's loader leaves the length at 128, lmms-eval's task says 16.
LONGEST = {"llava": 128, "lmms": 16}


class MirrorRow(TypedDict):
    """A row of the mirror."""

    question_id: Id
    question: Filled
    answer: Filled
    category: Filled


@dataclass(frozen=True)
class Entry:
    """A question with what result files say of it; the result's text is empty."""

    question: Question
    result: Result


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the only split; everything that can be wrong with its files is said here, images excepted."""
    prompts = data / "MME" / "llava_mme.jsonl"
    if source == "official" or (source == "auto" and is_file(prompts)):
        return from_official(data / "MME", prompts, profile)
    if source == "auto" and local_copy(data, MIRROR) is None:
        raise UserError(
            f"No MME questions at {prompts}, and no copy of {MIRROR[0]} below {data / 'hub'}; "
            "--data should be the folder that holds MME/, with LLaVA's eval.zip unpacked in it."
        )
    return from_mirror(data, split, profile, download=source == "mirror")


def from_official(folder: Path, prompts: Path, profile: str) -> Dataset:
    """LLaVA's questions with the answers of MME's release."""
    if not is_file(prompts):
        raise UserError(f"No MME questions at {prompts}; unpack LLaVA's eval.zip into the folder given by --data.")
    release = folder / "MME_Benchmark_release_version"
    if not release.is_dir():
        raise UserError(f"No MME release at {release}; get it as {SOURCE} says.")
    entries, truths = [], Truths(release)
    seen: Counter[str] = Counter()
    for prompt in read_prompts(prompts):
        entries.append(read_entry(prompt, truths, seen, profile))
    return assemble(profile, entries, Folder(release), fingerprint([prompts, *sorted(truths.files)]), "official")


class Truths:
    """The text files of the release, each read once."""

    def __init__(self, release: Path):
        self.release = release
        self.files: dict[Path, dict[str, str]] = {}
        self._folders: dict[str, Path] = {}

    def of(self, task: str, file: str) -> dict[str, str]:
        """Question -> answer."""
        if task not in self._folders:
            self._folders[task] = answer_folder(self.release, task)
        path = self._folders[task] / file
        if path not in self.files:
            self.files[path] = read_truth(path)
        return self.files[path]


def read_entry(prompt: Prompt, truths: Truths, seen: Counter[str], profile: str) -> Entry:
    """One line of LLaVA's file. Its ids are images: the k-th question about one is called ID#k."""
    where, text = prompt.where, prompt.question.strip()
    official = image_name(str(prompt.id), where)
    task, file = official.split("/")[0], f"{stem(official)}.txt"
    if task not in mme.TASKS:
        raise unknown(f"MME task in {where}", task, mme.TASKS)
    answers = truths.of(task, file)
    asked = official_question(text, answers)
    if asked is None:
        raise UserError(f"{where} asks {text!r}, which {file} below {truths.release / task} does not.")
    seen[official] += 1
    name = f"{official}#{seen[official]}"
    # lmms-eval takes the instruction away and leaves a second space where there is one.
    shown = lmms_text(asked) if profile == "lmms" else text
    question = Question(name, shown, prompt.suffix, (prompt.image,), answers[asked].lower(), official)
    return Entry(question, Result(where, task, file, asked, answers[asked], ""))


def lmms_text(question: str) -> str:
    """An official question as lmms-eval shows it."""
    return question.strip().replace(PLEASE, "")


def from_mirror(data: Path, split: str, profile: str, download: bool) -> Dataset:
    """The hub's table."""
    table = open_table(data, MIRROR, None, split, download)
    entries: list[Entry] = []
    first: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for row, record in enumerate(table.records(MirrorRow)):
        where = f"{table.where} row {row}"
        official, task = str(record["question_id"]), record["category"]
        asked, truth = record["question"], record["answer"]
        if task not in mme.TASKS:
            raise unknown(f"MME task in {where}", task, mme.TASKS)
        if truth.lower() not in ("yes", "no"):
            raise UserError(f"{where} should have the answer Yes or No, got {truth!r}.")
        seen[official] += 1
        # The image stands in the table once for each question about it.
        image = f"{first.setdefault(official, row)}/image"
        text = lmms_text(asked) if profile == "lmms" else lmms_text(asked).strip()
        question = Question(f"{official}#{seen[official]}", text, SHORT, (image,), truth.lower(), official)
        entries.append(Entry(question, Result(where, task, f"{stem(official)}.txt", asked, truth, "")))
    return assemble(profile, entries, table.pictures(), table.fingerprint(MIRROR_COLUMNS), table.id)


def assemble(profile: str, entries: Sequence[Entry], pictures: Pictures, version: str, source: str) -> Dataset:
    """The data set in one of the profiles."""
    known = {entry.question.id: entry for entry in entries}
    parse = mme.parse_lmms if profile == "lmms" else mme.parse

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        check_coverage(asked, texts, set(known))
        lines: dict[str, list[mme.Line]] = defaultdict(list)
        for name, text in texts.items():
            entry = known[name]
            official = entry.question.official
            lines[entry.result.task].append(mme.Line(name, official, entry.result.truth, text))
        return mme.score_lmms(lines) if profile == "lmms" else mme.score(lines)

    def sample_score(question: Question, text: str) -> float:
        return float(parse(text) == question.answer)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        return result_files(texts, known)

    def read(path: Path) -> list[Row] | None:
        return read_folder(path, entries) if path.is_dir() else None

    images = {entry.question.official for entry in entries}
    facts = {"source": source, "profile": profile, "questions": len(entries), "images": len(images)}
    return Dataset(
        "MME",
        tuple(entry.question for entry in entries),
        pictures,
        version,
        score,
        sample_score,
        submission,
        max_new_tokens=LONGEST[profile],
        facts=facts,
        read=read,
    )


def result_files(texts: Mapping[str, str], known: Mapping[str, Entry]) -> dict[str, str]:
    """The folder that MME's calculation.py --results_dir reads, as LLaVA's convert_answer_to_mme.py writes it."""
    tasks: dict[str, list[Result]] = defaultdict(list)
    for name, text in texts.items():
        result = known[name].result
        tasks[result.task].append(replace(result, text=text))
    return {f"mme_results/{task}.txt": write_results(results) for task, results in tasks.items()}


def read_folder(folder: Path, entries: Iterable[Entry]) -> list[Row]:
    """Answers from result files; a line belongs to the question with its task, its image and its words."""
    known = {entry.result.key: entry for entry in entries}
    rows = []
    for results in read_results(folder).values():
        for result in results:
            entry = known.get(result.key)
            if entry is not None and entry.result.truth.lower() != result.truth.lower():
                raise UserError(
                    f"{result.where} gives the right answer as {result.truth!r}, the benchmark's files as "
                    f"{entry.result.truth!r}; these are not results of the same data."
                )
            name = entry.question.id if entry is not None else f"{result.task}/{result.file} {result.question}"
            rows.append(Row(result.where, name, result.text))
    return rows


SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"

BENCHMARK = Benchmark(
    name="mme",
    summary="Two yes-or-no questions per image in 14 tasks; points for accuracy and for both being right.",
    splits=("test",),
    read=load,
    score_alone=lambda path, partial: score_folder(path, partial) if path.is_dir() else None,
    published="1510.7 perception",
    published_by=(
        "LLaVA-1.5-7B, LLaVA's model zoo; 1506.47 in a re-run of the released weights with LLaVA's scripts in"
        " FasterVLM's EVAL.md; papers on token reduction quote 1862, the sum of perception and cognition"
    ),
    needs=(
        Need("MME/llava_mme.jsonl", "eval.zip of LLaVA's docs/Evaluation.md"),
        Need("MME/MME_Benchmark_release_version", SOURCE),
    ),
    mirror=MIRROR,
    licence="no licence file; for academic research, images under the terms of their sources",
)
