"""One run: ask the questions that have no answer yet, store the answers, score all of them, write result.json."""

import dataclasses
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from eval import benchmarks
from eval.answers import AnswerStore, result_folder
from eval.answers.jsonl import write_file, write_json
from eval.answers.reuse import check_reuse
from eval.answers.source_hash import answer_sources, combined
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import digest_of
from eval.config import RunConfig
from eval.judging.choice import check_judge, score_answers
from eval.results import cost, provenance, report, tracking
from eval.settings import build_reducer, default_output, device_name, flat_config, store_settings
from llava.errors import UserError
from llava.pipeline.generate import generate
from llava.reduction.crop_budget import require

if TYPE_CHECKING:
    from llava.pipeline.answer import Batch
    from llava.processing.sample import Sample
    from llava.reduction.reducer import Reducer

# What a method may be off its budget if it does not document its own rounding, in tokens per layer.
ROUNDING = 0.5


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence about what is kept."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a run works with once its inputs are read and checked.

    Attributes:
        planned: the questions of this run, answered already or not.
        settings: what the answers depend on.
        sources: source file that the answers depend on -> hash of its code.
        started: ISO time; the name of this process in timing.jsonl.
    """

    config: RunConfig
    data: Dataset
    planned: tuple[Question, ...]
    model: Any
    reducer: "Reducer"
    settings: dict[str, Any]
    sources: dict[str, str]
    output: Path
    started: str

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.data.max_new_tokens

    @property
    def results(self) -> Path:
        """Folder of the result and the submission files."""
        return result_folder(self.output, len(self.planned), len(self.data.questions))

    def credits(self, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """What each answer is worth; nothing where the benchmark has no sample score for a single answer."""
        judge = self.data.sample_score
        return [] if judge is None else [judge(q, text) for q, text in zip(questions, texts, strict=True)]

    def check_budget(self, lines: Sequence[dict[str, Any]]) -> None:
        audits = [line["metadata"]["audit"] for line in lines]
        cost.check_budget_kept(audits, getattr(self.reducer, "rounding", ROUNDING))


def run(config: RunConfig, model: Any = None, reducer: "Reducer | None" = None) -> dict[str, Any]:
    """Run or continue an evaluation.

    Args:
        model: a loaded model, to share one between runs; otherwise `config.model` is loaded.
        reducer: a built method, for methods that are not registered; otherwise `config.method` is built.

    Returns:
        The content of result.json.
    """
    job = prepare(config, model, reducer)
    known = [question.id for question in job.data.questions]
    process = {
        "run": job.started,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "code": combined(job.sources),
    }
    with AnswerStore(job.output, job.settings, known, config.restart, job.sources, process) as store:
        unknown_pictures = check_reuse(job.data, job.planned, store.answers, job.output)
        job.results.mkdir(exist_ok=True)
        flat = flat_config(config, job.settings, job.data, job.reducer)
        tracker = tracking.start_evaluation(config, job.results, job.settings, flat)
        finished = False
        try:
            answer_questions(job, store, tracker)
            files = job.data.submission(texts(job, store))
            result = {**summarise(job, store, unknown_pictures), "config": flat, "submission": list(files)}
            write_json(job.results / "result.json", result)
            for name, content in files.items():
                write_file(job.results / name, content)
            tracker.finish(result, lambda: sample_table(job, store))
            finished = True
        except KeyboardInterrupt:
            done = sum(question.id in store.answers for question in job.planned)
            raise Interrupted(
                f"Stopped. {done:,} of {len(job.planned):,} answers are kept in {job.output}; "
                "run the same command again to go on."
            ) from None
        finally:
            tracker.close(failed=not finished)
    remarks = [f"note: {remark}" for remark in result["remarks"]]
    print("\n".join([*report.score_lines(result), *remarks, *report.cost_lines(result)]))
    print(f"result: {job.results / 'result.json'}")
    print(result["sentence"], flush=True)
    return result


def prepare(config: RunConfig, model: Any, reducer: "Reducer | None") -> Job:
    """Read and check everything that can be wrong, the cheapest first and the weights last."""
    benchmark = benchmarks.get(config.benchmark)
    split = benchmarks.check_split(benchmark, config.split, Path(config.data))
    if reducer is None:
        build_reducer(config, visual_tokens=None)
    if model is None:
        check_device(config.device)
    profile = benchmarks.check_profile(benchmark, config.profile)
    data = benchmark.load(Path(config.data), split, profile, config.source)
    check_judge(data, config.judge)
    planned = data.questions[: config.limit]
    data.check_images(planned)
    if model is None:
        model = load_model(config)
    if data.pictures.noun == "videos" and not getattr(model, "takes_videos", True):
        raise UserError(
            f"{data.title} asks about videos, and {model.name} takes images only; choose a Video-LLaVA with --model, "
            "or leave --model out for the bundled toy model."
        )
    if reducer is None:
        reducer = build_reducer(config, model.visual_tokens)
        require(reducer, model.spec)
        plain = dataclasses.replace(config, options={}, seed=0, budget=reducer.budget)
        standard = build_reducer(plain, model.visual_tokens)
    else:
        standard = reducer
    seed_everything(config.seed)
    return Job(
        config=config,
        data=data,
        planned=planned,
        model=model,
        reducer=reducer,
        settings=store_settings(config, split, data, model, reducer),
        sources=answer_sources(model, reducer),
        output=Path(config.output or default_output(config, split, model, reducer, standard)),
        started=datetime.now(UTC).isoformat(),
    )


def check_device(name: str) -> None:
    """Refuse a device that is not there before any file is read."""
    from llava.model.builder import device_of

    device_of(name)


def load_model(config: RunConfig) -> Any:
    """The model of this run; its libraries are imported here so that every check before it is fast."""
    from llava.model.builder import load

    return load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        text_tower=config.text_tower,
        quantization=config.quantization,
        **config.picture,
    )


def seed_everything(seed: int) -> None:
    """Methods draw from their sample's id; this covers whatever else might draw."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def answer_questions(job: Job, store: AnswerStore, tracker: tracking.Tracker) -> None:
    """Ask what is not answered yet, in the benchmark's order, and store every batch before the next one starts."""
    pending = [question for question in job.planned if question.id not in store.answers]
    done = [question for question in job.planned if question.id in store.answers]
    credits = job.credits(done, [store.answers[question.id]["text"] for question in done])
    seal = hashlib.sha256(json.dumps(job.settings, sort_keys=True).encode()).hexdigest()
    conditions = measured_under(job) | {"run": job.started}
    bar = tqdm(
        total=len(job.planned),
        initial=len(job.planned) - len(pending),
        desc=f"{job.reducer.name} {job.reducer.budget}",
        unit="question",
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no line per batch
    )
    with bar:
        for number, questions in enumerate(batched(pending, job.config.batch_size)):
            pictures = [digest_of(job.data.pictures, question.images) for question in questions]
            samples = [job.data.sample(question) for question in questions]
            batch = answer_batch(job, samples)
            if [answer.id for answer in batch.answers] != [question.id for question in questions]:
                raise AssertionError("the model's answers are not in the order of the samples")
            lines = answer_lines(samples, batch, pictures, job.model.name, seal)
            store.add(lines, cost.timing_record(batch, conditions | {"first": len(store.answers)}))
            if number == 0:
                warn_off_budget(job, lines)
            fresh = job.credits(questions, [answer.text for answer in batch.answers])
            credits += fresh
            bar.update(len(questions))
            accuracy = 100 * sum(credits) / len(credits) if credits else None
            tracker.batch(samples, batch, fresh, answered=int(bar.n), accuracy=accuracy)


def answer_batch(job: Job, samples: Sequence["Sample"]) -> "Batch":
    """One batch through the model; a batch that does not fit into memory is the user's to make smaller."""
    import torch

    try:
        return generate(job.model, samples, job.reducer, max_new_tokens=job.max_new_tokens)
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0].splitlines()[0]
        raise UserError(
            f"A batch of {len(samples)} questions does not fit into memory ({first}); everything before it is kept, "
            "so run the same command again with a smaller --batch-size."
        ) from error


def batched(questions: Sequence[Question], size: int) -> Iterator[tuple[Question, ...]]:
    iterator = iter(questions)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


def measured_under(job: Job) -> dict[str, Any]:
    """The conditions that belong to every timing."""
    import torch

    device = device_name(job.model)
    return {
        "device": device,
        "hardware": provenance.hardware(device),
        "threads": torch.get_num_threads(),
        "batch_size": job.config.batch_size,
        "dtype": job.config.dtype,
        # A sweep keeps the tower's output between runs: its vision times are not those of a single run.
        "remembered_features": getattr(job.model, "remembers_features", False),
    }


def answer_lines(
    samples: Sequence["Sample"], batch: "Batch", pictures: Sequence[str], model: str, seal: str
) -> list[dict[str, Any]]:
    """LLaVA's answer lines. The answer id depends on question and settings, so equal runs write equal files.

    Args:
        pictures: hash of the images of each sample.
        seal: hash of the settings.
    """
    return [
        {
            "question_id": sample.id,
            "prompt": sample.message,
            "text": answer.text,
            "answer_id": hashlib.sha256(f"{seal} {sample.id}".encode()).hexdigest()[:22],
            "model_id": model,
            "metadata": {"audit": cost.audit_record(answer.accounting), "pictures": digest},
        }
        for sample, answer, digest in zip(samples, batch.answers, pictures, strict=True)
    ]


def warn_off_budget(job: Job, lines: Sequence[dict[str, Any]]) -> None:
    """Say after the first batch what will be an error after the last: that may be hours later."""
    try:
        job.check_budget(lines)
    except UserError as error:
        print(f"Warning, first batch: {error}", file=sys.stderr)


def summarise(job: Job, store: AnswerStore, unknown_pictures: int = 0) -> dict[str, Any]:
    """The result of all answers to the planned questions, whichever process gave them.

    Args:
        unknown_pictures: answers that were stored without a hash of their images.
    """
    lines = [store.answers[question.id] for question in job.planned]
    job.check_budget(lines)
    asked = [question.id for question in job.planned]
    answers = job.output / "answers.jsonl"
    score, judged = score_answers(job.data, job.config.judge, asked, texts(job, store), answers)
    timed = store.timing_of(asked)
    flops = cost.summarise_flops(timed)
    made = provenance.made_by(store.origins(asked))
    remarks = [*getattr(job.model, "notes", ()), *made.pop("notes"), *cost.notes(timed)]
    if unknown_pictures:
        remarks.append(
            f"{unknown_pictures:,} answers were stored by a former version without a hash of their "
            f"{job.data.pictures.noun}: whether these have changed is not known"
        )
    result = {
        "title": job.data.title,
        "facts": {**job.data.facts, **judged},
        "method": job.reducer.name,
        "budget": job.reducer.budget,
        "visual_tokens": job.model.visual_tokens,
        "asked": len(job.planned),
        "available": len(job.data.questions),
        "partial": len(job.planned) < len(job.data.questions),
        **report.scored(score, job.planned, job.config.seed),
        "audit": cost.summarise_audit([line["metadata"]["audit"] for line in lines]),
        "timing": cost.summarise_timing(timed, job.started),
        "flops": flops,
        "flops_per_question": flops["per_question"],
        "settings": job.settings,
        "limit": job.config.limit,
        "remarks": remarks,
        "conditions": measured_under(job),
        **made,
        "scored_with": {"commit": provenance.commit(), "versions": provenance.versions()},
        "started": job.started,
        "finished": datetime.now(UTC).isoformat(),
    }
    return {"sentence": report.sentence(result), **result}


def texts(job: Job, store: AnswerStore) -> dict[str, str]:
    """Raw answer text by id, for the planned questions."""
    return {question.id: store.answers[question.id]["text"] for question in job.planned}


def sample_table(job: Job, store: AnswerStore) -> list[list[Any]]:
    """Rows of tracking.COLUMNS for the first questions."""
    rows = []
    for number, question in enumerate(job.planned[: tracking.TABLE_ROWS]):
        line = store.answers[question.id]
        mean = line["metadata"]["audit"]["mean"]
        picture = job.data.sample(question).image if number < tracking.TABLE_PICTURES else None
        credit = job.data.sample_score(question, line["text"]) if job.data.sample_score is not None else None
        rows.append([question.id, picture, None, question.question, question.answer, line["text"], credit, mean])
    return rows
