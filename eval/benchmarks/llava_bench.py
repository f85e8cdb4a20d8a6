"""LLaVA-Bench-in-the-Wild, read from DATA/llava-bench-in-the-wild or from lmms-eval's mirror.

    questions.jsonl       question_id, image, text, category (conv, detail, complex)
    context.jsonl         image, caption: what the judge knows of the image
    answers_gpt4.jsonl    question_id, text: the reference answers
    images/

Answers are judged, see eval/judging/: an LLM scores GPT-4's answer and the model's from 1 to 10; reported is their
ratio. Source of the definitions: LLaVA's eval_gpt_review_bench.py (how a review is read) and summarize_gpt_review.py,
both at c121f04. Differs from them: reviews are joined with questions by id instead of by position.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, no_submission
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import each_once, need_file
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Number, Texts, TypedDict, check_lines
from eval.judging import Judging, Request, Verdict, judged_facts, prompts
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import words
from llava.errors import UserError

FOLDER = "llava-bench-in-the-wild"
MIRROR = ("lmms-lab-encoder/llava-bench-in-the-wild", "lmms-lab/llava-bench-in-the-wild")
COLUMNS = ("question", "caption", "gpt_answer", "category")
COUNT = 60
SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
Kind = Literal["complex", "conv", "detail"]


class BenchLine(TypedDict):
    """A line of questions.jsonl."""

    question_id: Id
    image: Filled
    text: Filled
    category: Kind


class Context(TypedDict):
    """A line of context.jsonl."""

    image: Filled
    caption: Filled | Texts


class Reference(TypedDict):
    """A line of answers_gpt4.jsonl."""

    question_id: Id
    text: Filled


class MirrorRow(TypedDict):
    """A row of the mirror."""

    question: Filled
    caption: Filled | Texts
    gpt_answer: Filled
    category: Kind
    question_id: NotRequired[Id]


class Review(TypedDict):
    """A line of the official script's review file."""

    question_id: Id
    tuple: Annotated[list[Number], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Entry:
    """One question with what the judge is told."""

    image: str
    question: str
    category: str
    caption: str
    reference: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """The 60 questions; both profiles ask them as they are."""
    title = "LLaVA-Bench-in-the-Wild"
    official = official_file(data, source, title, [data / FOLDER / "questions.jsonl"], MIRROR)
    contents = read_mirror(data, source) if official is None else read_official(official, title)
    judging = judge_with(contents.references)
    facts = judged_facts(judging, len(contents.questions), COUNT)
    # model_vqa.py's generate call. lmms-eval allows 32,768, which no answer comes near to.
    more = {"max_new_tokens": 1024, "judging": judging}
    # The official script reads answers.jsonl as it is.
    return contents.dataset(title, profile, judging.match, None, no_submission, facts, **more)


def read_official(asked: Path, title: str) -> Contents[Entry]:
    """Entries in file order."""
    context, answers = asked.with_name("context.jsonl"), asked.with_name("answers_gpt4.jsonl")
    for path in (asked, context, answers):
        need_file(path, title, SOURCE)
    captions = {row["image"]: caption_text(row["caption"]) for _, row in check_lines(context, Context)}
    references = {str(row["question_id"]): row["text"] for _, row in check_lines(answers, Reference)}
    lines = check_lines(asked, BenchLine)
    each_once((where, str(row["question_id"])) for where, row in lines)
    entries: dict[str, Entry] = {}
    for where, row in lines:
        name, image = str(row["question_id"]), image_name(row["image"], where)
        if image not in captions:
            raise UserError(f"{context} has no caption for {image}, which question {name} is about.")
        if name not in references:
            raise UserError(f"{answers} has no answer to question {name}.")
        entries[name] = Entry(image, row["text"], row["category"], captions[image], references[name])
    mark = fingerprint([asked, context, answers])
    return Contents("official", ask(entries), entries, Folder(asked.parent / "images"), mark)


def caption_text(caption: str | Sequence[str]) -> str:
    """Captions of one image, a line each."""
    return caption if isinstance(caption, str) else "\n".join(caption)


def ask(entries: Mapping[str, Entry]) -> tuple[Question, ...]:
    return tuple(Question(name, one.question, "", (one.image,), one.reference) for name, one in entries.items())


def read_mirror(data: Path, source: str) -> Contents[Entry]:
    """The hub's table, whose rows are numbered where it has no ids."""
    table = open_table(data, MIRROR, None, "train", source)
    rows = table.records(MirrorRow)
    names = [str(row.get("question_id", number)) for number, row in enumerate(rows)]
    each_once((f"{table.where} row {number}", name) for number, name in enumerate(names))
    entries = {}
    for name, image, row in zip(names, table.row_images(), rows, strict=True):
        caption = caption_text(row["caption"])
        entries[name] = Entry(image, row["question"], row["category"], caption, row["gpt_answer"])
    return table.contents(ask(entries), entries, COLUMNS)


# -- the judge -------------------------------------------------------------------------------------------------------


def judge_with(entries: Mapping[str, Entry]) -> Judging:
    """How LLaVA's script uses its judge: one try, and what cannot be read stays in the mean."""
    official = prompts()["llava_bench"]
    images = {name: entry.image for name, entry in entries.items()}

    def request(name: str, text: str) -> Request:
        system = {"role": "system", "content": official["system"]}
        user = {"role": "user", "content": message(entries[name], text)}
        return Request(name, (system, user), official["temperature"], official["max_tokens"])

    def kinds(asked: Sequence[str]) -> dict[str, str]:
        return {name: entries[name].category for name in asked}

    def score(asked: Sequence[str], verdicts: Mapping[str, Verdict]) -> Score:
        return evaluate(kinds(asked), {name: tuple(verdicts[name]["tuple"]) for name in asked}, images)

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        """Ten points for the reference, and for the model ten times the F1 of its words with the reference's."""
        shared = {name: unigram_f1(texts[name], entries[name].reference) for name in asked}
        pairs = {name: (FULL_MARKS, FULL_MARKS * value) for name, value in shared.items()}
        note = "relative_score_match is the F1 of an answer's words with the reference's: no published metric"
        return evaluate(kinds(asked), pairs, images, "_match", note)

    return Judging(
        benchmark="llava_bench",
        official=official["judge_model"],
        main="relative_score",
        requests=lambda asked, texts: [request(name, texts[name]) for name in asked],
        parse=lambda name, reply: {"tuple": list(parse_review(reply))},
        read=read_reviews,
        score=score,
        match=match,
    )


def message(entry: Entry, text: str) -> str:
    """What the judge reads: captions, question, both answers and the rule of the question's category."""
    rule = prompts()["llava_bench"]["rules"][f"llava_bench_{entry.category}"]
    parts = [f"[Context]\n{entry.caption}\n\n[Question]\n{entry.question}\n\n"]
    for number, answer in enumerate((entry.reference, text), start=1):
        who = f"{rule['role']} {number}"
        parts.append(f"[{who}]\n{answer}\n\n[End of {who}]\n\n")
    return f"{''.join(parts)}[System]\n{rule['prompt']}\n\n"


def read_reviews(path: Path) -> dict[str, Verdict]:
    """The review file of the official script: question_id, content and the pair read from it."""
    verdicts: dict[str, Verdict] = {}
    for where, row in check_lines(path, Review):
        name = str(row["question_id"])
        if name in verdicts:
            raise UserError(f"{where} reviews question {name} a second time.")
        verdicts[name] = {"tuple": row["tuple"]}
    return verdicts


# -- the metric ------------------------------------------------------------------------------------------------------

Pair = tuple[float, float]

UNREADABLE: Pair = (-1.0, -1.0)
FULL_MARKS = 10.0
KINDS = ("complex", "conv", "detail")


def parse_review(review: str) -> Pair:
    """The two scores in a review's first line: GPT-4's answer, then the model's.

    Commas are spaces and single spaces separate, so "8,9" can be read and "8, 9" cannot. What cannot be read is
    (-1, -1) and stays in the means.
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return UNREADABLE
    return first, second


def ratio(sums: Array) -> Array:
    """[..., (reference's scores, model's scores, reviews)] -> percent, not rounded: intervals need its slopes."""
    # Guarded: unreadable reviews can cancel out to 0 for the reference, where the official script would stop.
    return divide(sums[..., 1], sums[..., 0]) * 100


def official_ratio(sums: Array) -> float:
    """The same for [3] as it is reported: both means are rounded to three digits first, the percent to one."""
    reference, model = (round(float(mean), 3) for mean in divide(sums[:2], sums[2:]))
    return round(model / reference * 100, 1) if reference else 0.0


def evaluate(
    categories: Mapping[str, str], pairs: Mapping[str, Pair], images: Mapping[str, str], tail: str = "", note: str = ""
) -> Score:
    """The model's share of GPT-4's score in percent, over all questions and per category.

    Args:
        categories: question id -> conv, detail or complex, of every question that was asked.
        pairs: question id -> scores of the reference and of the model.
        images: question id -> its image; questions about one are drawn together in intervals.
        tail: of the numbers' names, for pairs that no judge gave.
    """
    rows = np.array([(*pairs[name], 1.0) for name in categories]).reshape(-1, 3)
    table = {}
    for kind in KINDS:
        members = [category == kind for category in categories.values()]
        if any(members):
            table[kind] = official_ratio(rows[members].sum(0)), sum(members)
    clusters = tuple(images[name] for name in categories)
    total = rows.sum(0)
    main, *names = (f"{name}{tail}" for name in ("relative_score", "reference_points", "model_points"))
    values: dict[str, float | None] = {main: official_ratio(total)}
    for name, mean in zip(names, total[:2] / len(rows), strict=True):
        values[name] = round(round(float(mean), 3) * 10, 1)
    lost = sum(tuple(pairs[name]) == UNREADABLE for name in categories)
    notes = [note] if note else []
    if lost:
        notes.append(f"{lost:,} reviews could not be read; officially they count as -1 points for both answers")
    # No question has a sample score of its own: a ratio of means is no mean of ratios.
    terms = SufficientStatistics("image", tuple(categories), clusters, rows, ratio)
    return Score(values, {"category": table}, {}, tuple(notes), main, frozenset(names), terms)


def unigram_f1(text: str, answer: str) -> float:
    """Harmonic mean of the shares of words that text and answer have in common, repeated words counted."""
    said, expected = Counter(words(text)), Counter(words(answer))
    shared = (said & expected).total()
    return 2 * shared / (said.total() + expected.total()) if shared else 0.0


BENCHMARK = listed("llava_bench", load, ("test",), mirror=MIRROR)
