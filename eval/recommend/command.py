"""Find the cheapest method and budget that loses at most a tolerated number of points on your own questions.

vtr recommend questions.jsonl --loss 2 --model liuhaotian/llava-v1.5-7b
vtr recommend gqa --loss 2 --limit 1000          # a benchmark, here with the toy model

eval/benchmarks/own.py describes the file. Answers go where `vtr eval` puts them, so a stopped command goes on where it
was, and answers that are there already are used.
"""

import argparse
import random
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval import tracking
from eval.__main__ import configuration, names, sizes
from eval.answers.jsonl import is_file, make_folder, read_json, write_file, write_json
from eval.answers.reuse import check_reuse
from eval.answers.store import AnswerStore, settings_hash
from eval.ask import Job, first_token_times, measured_under
from eval.benchmarks.base import Dataset, Question
from eval.command import Parser, add_data_flags, add_json_flag, exit_on_user_error, make_parser, print_record, value
from eval.config import FULL, build_reducer, changed_options, count, device_name, is_toy, options_by_method, path_name
from eval.config import TOY_BANNER as BANNER
from eval.feature_cache import CACHE_BYTES
from eval.metrics import Array
from eval.parallel.ranks import Rank
from eval.recommend.halving import LOOKS, Choice, Look, Planned, halve, plan
from eval.recommend.page import page, sentences
from eval.results.report import hardware
from eval.results.statistics import FEWEST_CLUSTERS, accuracy_terms, compare
from eval.run import answer_questions, load_model, prepare, process_of, read_questions, texts
from eval.sweep import UnansweredQuestions
from llava.budget import RETENTION_RATIO, budget_text
from llava.errors import UserError
from llava.pipeline.generate import generate

METHODS = ("consensusdrop", "visiondrop", "attnmix", "divprune")
BUDGETS = "1/9,2/9,1/3,1/2"
FIRST = 64  # questions from which is said what all of them can show
COUNTED = 16  # questions whose operations are counted for a configuration's cost
CONSTANTS = 20  # answers that are tried as the same answer to every question
COSTS = "costs.json"  # beside the runs: times that were measured, so that a command that goes on decides the same


def parser() -> Parser:
    p = make_parser("eval.recommend.command", __doc__)
    p.add_argument("questions", help="FILE.jsonl with questions, pictures and answers, or the name of a benchmark")
    p.add_argument("--loss", type=value(points), default=2.0, help="points that may be lost against full")
    p.add_argument("--confidence", type=value(confidence), default=0.95, help="with which no more than that is lost")
    p.add_argument("--method", type=names, help=f"methods by commas; default: {','.join(METHODS)}")
    p.add_argument(
        "--budget", type=value(sizes), default=BUDGETS, help="visual tokens per image, or ratios of each image's"
    )
    p.add_argument("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help="option of a method")
    add_data_flags(p)
    p.add_argument("--model", type=value(path_name), help="folder or hub name of a checkpoint; default: a toy model")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", default="auto", help="torch device")
    p.add_argument("--batch-size", type=value(count), default=8, help="questions answered at once")
    p.add_argument("--limit", type=value(count), help="about so many questions, of pictures drawn at random")
    p.add_argument("--seed", type=value(count, minimum=0, maximum=2**32 - 1), default=0, help="of the pictures' order")
    p.add_argument("--page", type=value(path_name), default="recommend.html", help="the report, one HTML file")
    add_json_flag(p, "chosen, configurations, looks, planned")
    p.set_defaults(output=None, engine="own", image_option=[], retry_failed=False)
    return p


def points(text: str) -> float:
    """A tolerated loss; ValueError for what is none."""
    return between(text, 0, 100, "a number of points above 0 and below 100, such as 2")


def confidence(text: str) -> float:
    """A confidence; ValueError for what is none."""
    return between(text, 0.5, 1, "a probability above 0.5 and below 1, such as 0.95")


def between(text: str, low: float, high: float, wanted: str) -> float:
    """A number between two others."""
    try:
        number = float(text)
    except ValueError:
        number = low
    if not low < number < high:
        raise ValueError(f"should be {wanted}, got {text!r:.40}")
    return number


# -- questions and answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """The questions in the order in which pictures are asked about.

    Attributes:
        questions: picture by picture.
        about: [questions] number of the question's picture, from 0.
        asked: [pictures] number of questions about each.
    """

    questions: tuple[Question, ...]
    about: NDArray[np.int64]
    asked: Array

    def first(self, pictures: int) -> tuple[Question, ...]:
        """All questions about the first pictures."""
        return self.questions[: int(self.asked[:pictures].sum())]

    def sums(self, values: Array, pictures: int) -> Array:
        """[pictures] sums of [questions] values about the first pictures."""
        return np.bincount(self.about[: len(values)], values, pictures).astype(float)


def shuffled(data: Dataset, seed: int, limit: int | None) -> Pictures:
    """The pictures in random order, as many as hold `limit` questions.

    Questions without a picture are left out: no method changes them.

    Raises:
        UserError: there are fewer than FEWEST_CLUSTERS pictures.
    """
    labels, by_picture = data.labels(), defaultdict[str, list[Question]](list)
    for question in data.questions:
        if question.images:
            by_picture[labels[question.id]].append(question)
    order = random.Random(seed).sample(list(by_picture), len(by_picture))
    taken, total = [], 0
    for picture in order:
        if limit is not None and total >= limit:
            break
        taken.append(by_picture[picture])
        total += len(by_picture[picture])
    if len(taken) < FEWEST_CLUSTERS:
        more = "a larger --limit" if len(order) >= FEWEST_CLUSTERS else "questions about more pictures"
        raise UserError(
            f"{data.title} has {total:,} questions about {len(taken)} different pictures here, and fewer than "
            f"{FEWEST_CLUSTERS} pictures show no loss; take {more}."
        )
    asked = np.array([len(own) for own in taken], float)
    about = np.repeat(np.arange(len(taken)), asked.astype(int))
    return Pictures(tuple(one for own in taken for one in own), about, asked)


def answers(job: Job, planned: Sequence[Question]) -> dict[str, str]:
    """Question id -> answer, of the store or of the model.

    Raises:
        UnansweredQuestions: some failed; a loss on the others would not be that on all.
    """
    job = replace(job, planned=tuple(planned))
    known = [question.id for question in job.data.questions]
    with AnswerStore(job.output, job.settings, known, False, process_of(job, Rank())) as store:
        check_reuse(job.data, job.planned, store.answers, job.output)
        if any(question.id not in store.answers for question in planned):
            answer_questions(job, store, tracking.Tracker(), Rank())
            job.check_unchanged()
        if lost := [question.id for question in planned if question.id not in store.answers]:
            reason = store.failures.get(lost[0], {}).get("reason", "unknown")
            raise UnansweredQuestions(
                f"{len(lost):,} questions have no answer in {job.output} (question {lost[0]}: {reason}); run the same "
                "command again to retry them, or leave them out."
            )
        return texts(job, store)


def sample_scores(job: Job, planned: Sequence[Question]) -> Array:
    """[questions] sample scores of the answers, in [0, 1]."""
    found = answers(job, planned)
    return np.array(job.sample_scores(planned, [found[question.id] for question in planned]))


def check_floor(job: Job, pictures: Pictures, scores: Array, level: float) -> None:
    """Refuse questions on which full is not shown to be better than one answer to all of them."""
    said = answers(job, pictures.questions)
    common = Counter([*said.values(), *(question.answer for question in pictures.questions)]).most_common(CONSTANTS)
    constants = {text: np.array(job.sample_scores(pictures.questions, [text] * len(scores))) for text, _ in common}
    best = max(constants, key=lambda text: constants[text].sum())
    clusters = {one.id: str(picture) for one, picture in zip(pictures.questions, pictures.about, strict=True)}
    own, same = (dict(zip(clusters, map(float, values), strict=True)) for values in (scores, constants[best]))
    above = compare(accuracy_terms(own, clusters), accuracy_terms(same, clusters))
    if above.difference <= 0 or above.p > 1 - level:
        raise UserError(
            f"Full scores {100 * scores.mean():.1f} % on these {len(scores):,} questions, and the answer {best!r} to "
            f"all of them {100 * constants[best].mean():.1f} %; full is not shown to be above that, so a small loss "
            "would say nothing. The labels or the prompt are wrong, or these are too few questions."
        )


# -- costs -------------------------------------------------------------------------------------------------------------


def costs_of(jobs: Sequence[Job], pictures: Pictures) -> tuple[list[float], str]:
    """The cost of each job until the first token, and in words what it is.

    On an accelerator it is the measured time, once for all; elsewhere the operations, which other work on the machine
    does not change.
    """
    if not device_name(jobs[0].model).startswith("cpu") and (times := measured(jobs, pictures)) is not None:
        device = hardware(device_name(jobs[0].model))
        return times, f"time to the first token of a batch of {jobs[0].config.batch_size} on {device}"
    found = []
    samples = [jobs[0].data.sample(question) for question in pictures.questions[:COUNTED]]
    for job in jobs:
        alone = generate(job.model, samples, job.reducer, max_new_tokens=1).operations.alone
        if "prefill" not in alone:
            raise UserError(f"Operations of {job.model.name} are not counted; run on an accelerator, which is timed.")
        found.append(sum(alone.values()) / len(samples) / 1e9)
    return found, f"operations up to the first token, mean of {len(samples)} questions"


def measured(jobs: Sequence[Job], pictures: Pictures) -> list[float] | None:
    """Milliseconds of each job, from a file if they were measured under the same conditions; None if too few batches
    of questions are there to time."""
    file = jobs[0].output.parent / COSTS
    keys = [f"{settings_hash(job.settings)} {settings_hash(measured_under(job))}" for job in jobs]
    known: dict[str, float] = read_json(file) if is_file(file) else {}
    for key, job in zip(keys, jobs, strict=True):
        if key not in known:
            timed = first_token_times(replace(job, planned=pictures.questions), Rank())
            if timed is None:
                return None
            known[key] = timed["median_ms"]
    make_folder(file.parent)
    write_json(file, known)
    return [known[key] for key in keys]


# -- the command -------------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    if Path(args.page).is_dir():
        raise UserError(f"--page {args.page} is a folder; name the HTML file to write.")
    full, jobs, refused = prepared(args)
    record = recommend(full, jobs, args)
    record |= {"left_out": refused, "made_by": shlex.join(["vtr", "recommend", *words])}
    write_file(Path(args.page), page(record))
    print_record(record, [*sentences(record), f"report: {args.page}"], args.json)
    return 0


def prepared(args: argparse.Namespace) -> tuple[Job, list[Job], list[str]]:
    """Full, the configurations, and sentences about those of the usual ones that this model cannot run.

    Raises:
        UserError: something cannot be run that was asked for by name; everything like that is named.
    """
    methods = args.method or METHODS
    if FULL in methods:
        raise UserError(f"{FULL} is what the others are compared with; leave it out of --method.")
    options = options_by_method(methods, args.set)
    several = [(FULL, None), *((method, size) for method in methods for size in args.budget)]
    made = (configuration(args, args.questions, method, size, options.get(method, {})) for method, size in several)
    # The command's seed and limit are those of the pictures, not of the runs.
    first, *configs = (replace(one, failed="again", quiet=True, seed=0, limit=None) for one in made)
    for config in configs:  # wrong names and options, before anything is read
        build_reducer(config, visual_tokens=None)
    data, _ = read_questions(first)
    if data.sample_score is None:
        raise UserError(f"{data.title} gives single answers no score, so there is no loss by picture; take another.")
    model = load_model(first)
    model.cache_bytes = CACHE_BYTES
    full, jobs, refused = prepare(first, model, data=data), [], []
    for config in configs:
        try:
            jobs.append(prepare(config, model, data=data))
        except UserError as error:
            refused.append(f"{config.method} at {budget_text(config.budget, config.retention_ratio)}: {error}")
    if refused and (args.method or not jobs):
        raise UserError("\n".join(["Nothing was run, because this cannot be:", *refused]))
    model.expect([job.reducer for job in (full, *jobs)])
    return full, jobs, refused


def recommend(full: Job, jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, Any]:
    """Ask what has to be asked, and choose; everything that the report says, in JSON types."""
    pictures = shuffled(full.data, args.seed, args.limit)
    note(f"{full.data.title}: {len(pictures.questions):,} questions about {len(pictures.asked):,} pictures.")
    note(f"Full answers all of them; then {len(jobs)} configurations are compared with it.")
    scores = sample_scores(full, pictures.questions)
    check_floor(full, pictures, scores, args.confidence)
    costs, measure = costs_of([full, *jobs], pictures)

    def lost(which: Iterable[int], planned: Sequence[Question], title: str) -> list[Array]:
        """For each of the configurations: [questions] full's sample score minus its own."""
        bar = tqdm(list(which), desc=title, unit="configuration", mininterval=0.5 if sys.stderr.isatty() else 30)
        return [scores[: len(planned)] - sample_scores(jobs[one], planned) for one in bar]

    first = int(np.searchsorted(np.cumsum(pictures.asked), FIRST)) + 1
    begin = pictures.first(min(first, -(-len(pictures.asked) // round(1 / LOOKS[0]))))
    differences = lost(range(len(jobs)), begin, f"first {len(begin)} questions")
    whole = len(pictures.questions), len(pictures.asked)
    about = pictures.about[: len(begin)]
    planned = plan(differences, about, whole[0], len(jobs), args.loss, args.confidence)
    note(what_can_be_shown(planned, len(begin), args.loss, whole[0]))
    asked = Counter[int]()

    def ask(which: Sequence[int], count: int) -> Array:
        planned = pictures.first(count)
        asked.update({one: len(planned) - asked[one] for one in which})
        title = f"{count:,} of {len(pictures.asked):,} pictures"
        return np.array([pictures.sums(one, count) for one in lost(which, planned, title)])

    choice = halve(ask, pictures.asked, costs[1:], costs[0], args.loss, args.confidence)
    for one in range(len(jobs)):  # also those that cost no less than full
        asked[one] = max(asked[one], len(begin))
    return {
        "title": full.data.title,
        "model": full.model.name,
        "banner": BANNER if is_toy(full.model.name) else "",
        "questions": whole[0],
        "pictures": whole[1],
        "tolerated": args.loss,
        "confidence": args.confidence,
        "full": {"score": 100 * float(scores.mean()), "cost": costs[0]},
        "cost": measure,
        "configurations": configurations(jobs, costs, choice, asked),
        "asked": whole[0] + sum(asked.values()),
        "sweep": whole[0] * (1 + len(jobs)),
        "planned": vars(planned),
        "can_show": what_can_be_shown(planned, len(begin), args.loss, whole[0]),
        "chosen": choice.chosen,
        "looks": [
            {"pictures": look.pictures, "asked": len(look.highs), "kept": len(look.kept)} for look in choice.looks
        ],
    }


def configurations(
    jobs: Sequence[Job], costs: Sequence[float], choice: Choice, asked: Mapping[int, int]
) -> list[dict[str, Any]]:
    """A row for every configuration: what it is and costs, what the last look showed, and what became of it.

    Args:
        costs: full's first.
    """
    rows = []
    for one, job in enumerate(jobs):
        seen = [look for look in choice.looks if one in look.highs]
        last = seen[-1] if seen else None
        options = job.config.options
        rows.append(
            {
                "method": job.reducer.name,
                "budget": budget_text(job.reducer.budget, job.config.retention_ratio),
                "tokens": job.reducer.budget,
                "options": changed_options(job.reducer.name, job.settings["config"]),
                "python": {key: text for key, text in options.items() if key != RETENTION_RATIO},
                "cost": costs[one + 1],
                "saved": 100 * (1 - costs[one + 1] / costs[0]),
                "questions": asked[one],
                "pictures": last.pictures if last else 0,
                "loss": last.estimates[one] if last else None,
                "low": last.lows[one] if last else None,
                "high": last.highs[one] if last else None,
                "tested": last is not None and last is choice.looks[-1],
                "fate": fate(one, last, choice),
            }
        )
    return rows


def fate(one: int, last: Look | None, choice: Choice) -> str:
    """What became of a configuration, in words."""
    if last is None:
        return "costs no less than full"
    if last is choice.looks[-1]:
        return "recommended" if one == choice.chosen else "passed" if one in last.kept else "not shown"
    return "loses too much" if one in last.worse else "others were better"


def what_can_be_shown(planned: Planned, first: int, tolerated: float, questions: int) -> str:
    """The plan as a sentence."""
    enough = "enough for" if planned.needed <= questions else "too few for"
    return (
        f"These {questions:,} questions can show a loss of at most about {planned.shown:.1f} points, {enough} "
        f"{tolerated:g}, which needs about {planned.needed:,}. (From the first {first}: about "
        f"{100 * planned.changed:.1f} % change their score under the configuration that changes fewest; design effect "
        f"{planned.design:.1f}.)"
    )


def note(sentence: str) -> None:
    """A sentence on the way, which is no part of the result."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
