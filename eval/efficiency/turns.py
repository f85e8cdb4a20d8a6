"""Several questions about one image: choose tokens for each of them, or once for the first.

    vtr bench turns --method attnmix,divprune --budget 64 --limit 1000

Each method answers the questions about an image, in file order, in three ways, one question at a time:

    each    tokens are chosen again for every question, as `vtr eval` does
    first   the tokens chosen for the first question stay, and only the text of a later one runs
    turns   the same, but earlier questions and answers stay in the context

Only the later questions are scored, because the first one is the same in all three. docs/evaluation.md defines the
columns. Images with one question, and questions with no image or several, are left out.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from eval.benchmarks.base import Dataset, Question
from eval.command import add_json_flag, exit_on_user_error, make_parser, open_dataset, print_record, value
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, TOY_BANNER, count, is_toy
from eval.efficiency.measure import Measurements
from eval.efficiency.oracle import chosen_options, reducers_of
from eval.feature_cache import RUN_BYTES, CachingLlava
from eval.results.statistics import Comparison, Interval, accuracy_terms, compare, interval, p_text, rounded
from eval.tables import difference_text, markdown, score_text
from llava.errors import UserError
from llava.model.builder import DTYPES, load
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer
from llava.pipeline.generate import generate
from llava.pipeline.turns import Turn, answer_turns
from llava.processing.prompt import Sample
from llava.reduction.reducer import Reducer

EACH, FIRST, TURNS = MODES = ("each", "first", "turns")
HEAD = (
    "method",
    "tokens chosen",
    "accuracy",
    "less each",
    "p",
    "answers changed, %",
    "kept overlap, %",
    "GFLOP, first question",
    "GFLOP, later question",
    "cache MB",
)


def remaining(answer: Answer) -> set[int]:
    """The input tokens of the image at whose places tokens remain after all steps of a method."""
    places: list[int] = []
    for step in answer.trace:
        kept = step.reduction.kept[0].tolist()
        places = [places[place] for place in kept] if places else kept
    return set(places)


def images_of(data: Dataset, limit: int | None) -> list[list[Question]]:
    """The questions about each image with at least two, in file order; images are told apart by their content.

    Args:
        limit: the most questions. The image that would exceed it, and all after it, are left out.
    """
    labels, found = data.labels(), dict[str, list[Question]]()
    for question in data.questions:
        if len(question.images) == 1:
            found.setdefault(labels[question.images[0]], []).append(question)
    images, asked = [], 0
    for questions in (several for several in found.values() if len(several) > 1):
        asked += len(questions)
        if limit is not None and asked > limit:
            break
        images.append(questions)
    if not images:
        raise UserError(
            f"{data.title} has no image with several questions"
            + (f" among its first {limit}; ask for more with --limit." if found and limit else ".")
        )
    return images


def answer_image(model: Llava, reducer: Reducer, samples: Sequence[Sample], longest: int) -> dict[str, Any]:
    """The answers to all questions about one image in the three modes, and their costs, in JSON types.

    Returns:
        Mode -> for each question a `Turn`; "kept" -> for each question the tokens that `each` keeps.
    """
    turns, kept = list[Turn](), list[list[int]]()
    for sample in samples:
        batch = generate(model, [sample], reducer, longest)
        (answer,), alone = batch.answers, batch.operations.alone
        flops = sum(alone.values()) - alone.get("tower", 0)
        turns.append(Turn(sample.id, answer.text, answer.token_ids, flops, answer.accounting.kv_bytes))
        kept.append(sorted(remaining(answer) if answer.trace else range(answer.accounting.visual_tokens)))
    found = {EACH: turns}
    found |= {mode: answer_turns(model, samples, reducer, mode == TURNS, longest) for mode in (FIRST, TURNS)}
    return {mode: [asdict(turn) for turn in own] for mode, own in found.items()} | {"kept": kept}


def rows_of(
    name: str,
    reducer: Reducer,
    images: Sequence[Sequence[Question]],
    answered: Sequence[Mapping[str, Any]],
    data: Dataset,
) -> list[dict[str, Any]]:
    """The three rows of a method, in JSON types; None where `each` would be compared with itself."""
    judge = data.sample_score
    assert judge is not None  # checked before anything was asked
    later = {question.id: question for questions in images for question in questions[1:]}
    clusters = {question.id: questions[0].id for questions in images for question in questions}
    # Mode -> id of a later question -> its answer. Below, the tokens of every later question beside the first one's.
    texts = {mode: {one["id"]: one["text"] for image in answered for one in image[mode][1:]} for mode in MODES}
    terms = {
        mode: accuracy_terms({one: judge(later[one], text) for one, text in own.items()}, clusters)
        for mode, own in texts.items()
    }
    pairs = [(set(own), set(image["kept"][0])) for image in answered for own in image["kept"][1:]]
    overlap = sum(len(own & first) for own, first in pairs) / sum(len(own) for own, _ in pairs)
    rows = []
    for mode, own in texts.items():
        differs = mode != EACH
        rows.append(
            {
                "method": name,
                "reads_question": "question" in reducer.metadata.reads,
                "mode": mode,
                "accuracy": asdict(interval(terms[mode])),
                "difference": asdict(compare(terms[mode], terms[EACH])) if differs else None,
                "changed": fmean(own[one] != texts[EACH][one] for one in own) if differs else None,
                "overlap": overlap if differs else None,
                "first_flops": fmean(image[mode][0]["flops"] for image in answered),
                "later_flops": fmean(one["flops"] for image in answered for one in image[mode][1:]),
                "later_kv_bytes": fmean(one["kv_bytes"] for image in answered for one in image[mode][1:]),
            }
        )
    return rows


def lines(record: Mapping[str, Any]) -> list[str]:
    """The rows as a table and sentences."""
    table = []
    for row in record["rows"]:
        scored, difference = row["accuracy"], row["difference"]
        differs = ["", "", "", ""]
        if difference:
            differs = [difference_text(Comparison(**difference)), p_text(difference["p"])]
            differs += [rounded(100 * row[name]) for name in ("changed", "overlap")]
        flops = [rounded(row[name] / 1e9, 2) for name in ("first_flops", "later_flops")]
        kept = rounded(row["later_kv_bytes"] / 1e6, 2)
        table.append([row["method"], row["mode"], score_text(Interval(**scored)), *differs, *flops, kept])
    asked, images = record["questions"], record["images"]
    found = [TOY_BANNER, ""] if is_toy(record["model"]) else []
    found += [
        f"{record['title']}, {record['model']}, {record['budget']} visual tokens: {asked - images:,} later questions "
        f"about {images:,} images; the first question about each is not scored.",
        "",
        markdown(HEAD, table),
        "",
    ]
    reading = {row["method"]: row["reads_question"] for row in record["rows"]}
    for does, words in ((True, "reads"), (False, "does not read")):
        if names := [name for name, reads in reading.items() if reads is does]:
            found.append(f"Selection {words} the question: {', '.join(names)}.")
    notes = {(row["method"], row["mode"]): (row["difference"] or {}).get("note") for row in record["rows"]}
    found += [f"no interval, {method} {mode} less each: {note[5:]}" for (method, mode), note in notes.items() if note]
    return found


def run(args: Any) -> dict[str, Any]:
    """Ask all methods about all images; returns what is printed and written."""
    data = open_dataset(args.benchmark, str(args.data), args.split, None, "auto")
    if data.sample_score is None:
        raise UserError(f"{data.title} has no score for a single answer, so later questions cannot be scored alone.")
    images = images_of(data, args.limit)
    data.check_images(question for questions in images for question in questions)
    model = load(args.model, args.dtype, args.device)
    names = args.method.split(",")
    reducers = reducers_of(names, args.budget, chosen_options(args.set, names), model)
    stored = Measurements(
        args.measurements,
        {
            "model": model.name,
            "weights": model.fingerprint,
            "title": data.title,
            "questions": data.questions_digest,
            "budget": args.budget,
            "options": sorted(args.set),
            "dtype": args.dtype,
        },
    )
    model, rows = CachingLlava(model, RUN_BYTES), []
    model.expect(list(reducers.values()))
    total = sum(map(len, images)) * len(reducers)
    with tqdm(total=total, unit="question", disable=None) as bar:
        for number, questions in enumerate(images):
            samples: list[Sample] = []
            for name, reducer in reducers.items():
                if (number, name, 1) not in stored.rows:
                    samples = samples or [data.sample(question) for question in questions]
                    stored.add(number, name, 1, answer_image(model, reducer, samples, data.max_new_tokens))
                bar.update(len(questions))
    for name, reducer in reducers.items():
        rows += rows_of(name, reducer, images, [stored.rows[n, name, 1] for n in range(len(images))], data)
    return {
        "title": data.title,
        "model": model.name,
        "budget": args.budget,
        "images": len(images),
        "questions": sum(map(len, images)),
        "rows": rows,
    }


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.turns", __doc__)
    add = parser.add_argument
    add("--method", required=True, help="a name, several separated by commas, or all")
    add("--budget", type=value(count), required=True, help="visual tokens to keep per image")
    add("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help="option of one method, or of each")
    add(
        "--benchmark",
        default="gqa",
        help="gqa, vqav2, seed, pope, mme, or another",
    )
    add("--split", help="split of the benchmark; by default the first that is there")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder that holds the benchmarks")
    add("--limit", type=value(count, minimum=2), help="so many questions at most, and all about each image")
    add("--model", default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    add("--device", default="auto", help="torch device")
    add(
        "--measurements",
        type=Path,
        metavar="FILE",
        help="write every answer here and continue from what is there",
    )
    add_json_flag(parser, "title, model, budget, images, questions, rows")
    args = parser.parse_args(arguments)
    record = run(args)
    print_record(record, lines(record), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
