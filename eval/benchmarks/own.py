"""Questions of the user's own: a JSON-lines file beside its pictures, named in place of a benchmark.

    vtr recommend questions.jsonl --model liuhaotian/llava-v1.5-7b
    vtr eval --benchmark questions.jsonl --method fastv --budget 64 --model liuhaotian/llava-v1.5-7b

Each line is a question:

    {"image": "a.jpg", "question": "What colour is the car?", "answer": "red"}
    {"image": "b.jpg", "question": "How many cups are there?", "answer": ["2", "two"], "id": "cups"}
    {"image": "b.jpg", "question": "What is it for?", "options": ["tea", "soup"], "answer": "A"}

`image` is a path from the folder of the file. `answer` is the right text, a list of accepted texts, or with `options`
the letter of the right one. A question without `id` has the number of its line. Texts are asked with LLaVA's
instruction for short answers and are right if they equal an accepted answer but for case and punctuation; options are
asked with its instruction for letters, and the letter is read as lmms-eval reads it.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eval.answers.jsonl import read_jsonl
from eval.benchmarks.base import Benchmark, Contents, Dataset, Question, fingerprint, no_submission, scored_by
from eval.benchmarks.hub import letters, option_lines
from eval.benchmarks.llava_files import LETTER, SHORT, each_once
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, check, columns_of
from eval.metrics.short_answers import METRICS
from llava.errors import UserError, unknown

MOST_OPTIONS = 10  # letters that the metric reads


class Line(TypedDict):
    """A line of the file."""

    image: Filled
    question: Filled
    answer: Filled | Texts
    options: NotRequired[Texts]
    id: NotRequired[Id]


def load(path: Path, data: Path, split: str, profile: str, source: str) -> Dataset:
    """Read the file; everything that can be wrong with it is said here, with the line.

    Args:
        data, split, profile, source: unused; all there is stands beside the file.
    """
    known = [key for keys in columns_of(Line) for key in keys]
    images, answers = Folder(path.parent), dict[str, tuple[bool, Sequence[str]]]()
    questions, places = list[Question](), list[tuple[str, str]]()
    for number, record in read_jsonl(path):
        where = f"{path} line {number}"
        for key in record:
            if key not in known:
                raise UserError(f"{where}: {unknown('key', key, known)}")
        row = check(Line, record, where)
        image = image_name(row["image"], where)
        if images.missing([image]):
            raise UserError(f"{where} names the image {image}, which is not in {images.where}.")
        accepted = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        options = letters(row.get("options", ()))
        if len(options) > MOST_OPTIONS:
            raise UserError(f"{where} has {len(options)} options, expected at most {MOST_OPTIONS}.")
        if lost := [answer for answer in accepted if options and answer not in options]:
            raise UserError(f"{where} has answer {lost[0]!r}, expected a letter of its options: {', '.join(options)}.")
        if not all(answer.strip() for answer in accepted):
            raise UserError(f"{where} has an empty answer.")
        name, text = str(row.get("id", number)), row["question"]
        text = f"{text}\n{option_lines(options)}" if options else text
        questions.append(Question(name, text, LETTER if options else SHORT, (image,), accepted[0]))
        answers[name] = bool(options), accepted
        places.append((where, name))
    if not questions:
        raise UserError(f"{path} holds no questions.")
    each_once(places)
    contents = Contents("own", tuple(questions), answers, images, fingerprint([path]))
    return contents.dataset(path.stem, "llava", *scored_by(answers, sample_score), no_submission, {})


def sample_score(text: str, reference: tuple[bool, Sequence[str]]) -> float:
    """1 if the text is right; the reference says whether it is a letter, and what is accepted."""
    is_letter, accepted = reference
    return METRICS["letter" if is_letter else "loose_match"](text, accepted)


def benchmark(name: str) -> Benchmark:
    """The file as a benchmark of one split."""
    return Benchmark(name, "questions of your own", ("all",), partial(load, Path(name)), ("llava",))
