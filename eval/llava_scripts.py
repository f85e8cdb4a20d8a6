"""Everything behind LLaVA's evaluation scripts: its flags, its question files, and answers in its line format.

The modules of `llava.eval` have LLaVA's names and define the flags, questions and wording of each script. Questions are
answered as by `vtr eval`, in the same batches and order, so the answers equal those of `vtr eval --dtype float16`.

Official code read: haotian-liu/LLaVA@c121f04, llava/eval/model_vqa*.py
Differs from it: answers are greedy, and sampling and beams are refused; the method comes from --method, --budget and
--set or from the environment; a part without questions is an empty file; `answer_id` depends on question and settings.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.answers.jsonl import DurableLines, make_folder
from eval.answers.store import settings_hash
from eval.ask import BatchLimit, Failure, Job, ReadAhead, asking_order, chunks, outcomes
from eval.benchmarks.base import Dataset, Question, no_submission
from eval.benchmarks.llava_files import read_prompts
from eval.benchmarks.media import Folder, Images
from eval.command import Parser, make_parser
from eval.config import FULL, RunConfig, budget_of, build_reducer, options_by_method, plain
from eval.metrics import Score
from eval.results import cost, report
from eval.run import load_model
from llava.budget import budget_text, count_or_ratio, or_environment
from llava.conversation import MODES, conv_templates, conversation
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path
from llava.reduction import registry
from llava.reduction.budget import require

DTYPE = "float16"  # of LLaVA's own scripts


@dataclass(frozen=True)
class ScriptQuestion:
    """A question of one of LLaVA's files.

    Attributes:
        fields: what its answer line holds besides the answer: the id as in the file, the prompt as LLaVA records it,
            and more.
    """

    question: Question
    fields: Mapping[str, Any]


# -- flags -----------------------------------------------------------------------------------------------------------


def method_flags(p: Parser) -> Parser:
    """Add --method, --budget and --set, which LLaVA's own modules do not have."""
    p.add_argument("--method", help="reduce visual tokens by it; VTR_METHOD in the environment if left out, else full")
    p.add_argument("--budget", help="visual tokens per image, or the ratio of them (1/9); VTR_BUDGET if left out")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    return p


def questions_parser(module: str, documentation: str | None, conv_mode: str = "llava_v1") -> Parser:
    """A parser with the flags of all of LLaVA's model_vqa*.py, with its defaults, and those of the method."""
    p = make_parser(f"llava.eval.{module}", documentation)
    p.add_argument("--model-path", default="facebook/opt-350m", help="folder or hub name of a checkpoint")
    p.add_argument("--model-base", help="not supported: merge the weights first")
    p.add_argument("--image-folder", default="", help="folder of the images")
    p.add_argument("--question-file", default="tables/question.jsonl", help="LLaVA's questions")
    p.add_argument("--answers-file", default="answer.jsonl", help="file to write; an old one is replaced")
    p.add_argument("--conv-mode", default=conv_mode, help="template of the prompt")
    p.add_argument("--num-chunks", type=int, default=1, help="parts that the questions are cut into")
    p.add_argument("--chunk-idx", type=int, default=0, help="which of them to ask, from 0")
    p.add_argument("--temperature", type=float, default=0.2, help="must be 0: answers are greedy")
    return method_flags(p)


def decoding_flags(p: Parser) -> Parser:
    """Add --top_p and --num_beams, which all modules except the one for ScienceQA have."""
    p.add_argument("--top_p", type=float, help="has no effect on greedy answers")
    p.add_argument("--num_beams", type=int, default=1, help="must be 1: answers are greedy")
    return p


def chosen_method(args: Any) -> tuple[str, int | float | None, dict[str, str]]:
    """Method, budget and options from the flags, or else from the environment, with a note on standard error.

    Args:
        args: parsed flags, or an object made by a script, which may lack our flags.
    """
    size = getattr(args, "budget", None)
    name, text = or_environment(getattr(args, "method", None), size)
    method = name or FULL
    registry.method(method)
    options = options_by_method([method], getattr(args, "set", None) or [])[method]
    if name is None and text is not None:
        raise UserError(f"A budget of {text} needs a method; give --method, or set VTR_METHOD.")
    try:
        budget = None if text is None else count_or_ratio(text)
    except ValueError as error:
        raise UserError(f"{'VTR_BUDGET' if size is None else '--budget'} {error}.") from None
    return method, budget, options


def refuse(args: Any) -> None:
    """Raise UserError if LLaVA's flags ask for something that this package does not do."""
    if getattr(args, "model_base", None) is not None:
        raise UserError(f"--model-base is not supported; merge {args.model_path} into {args.model_base} first.")
    if args.temperature > 0:
        raise UserError(
            f"--temperature {args.temperature} (LLaVA's default is 0.2) asks for sampled answers, and benchmarks are "
            "answered greedily here; add --temperature 0. llava.eval.run_llava samples."
        )
    if getattr(args, "num_beams", 1) != 1:
        raise UserError(f"--num_beams {args.num_beams}: benchmarks are answered greedily here; leave it out.")
    if args.num_chunks < 1 or not 0 <= args.chunk_idx < args.num_chunks:
        raise UserError(f"--chunk-idx should be 0 to {args.num_chunks - 1} of --num-chunks, got {args.chunk_idx}.")


# -- questions -------------------------------------------------------------------------------------------------------


def file_of(text: str) -> Path:
    return Path(text).expanduser()


def questions_of_lines(args: Any) -> tuple[list[ScriptQuestion], Images]:
    """The questions of a file whose JSON lines have question_id, image and text, and the folder of their images."""
    asked = [
        ScriptQuestion(
            Question(str(one.id), one.question, one.suffix, (one.image,), ""),
            {"question_id": one.id, "prompt": one.text},
        )
        for one in read_prompts(file_of(args.question_file))
    ]
    return asked, Folder(file_of(args.image_folder))


def chunk(asked: Sequence[ScriptQuestion], count: int, number: int) -> list[ScriptQuestion]:
    """Part `number` (from 0) of `count`, cut as LLaVA does; the last parts may be empty."""
    size = math.ceil(len(asked) / count)
    return list(asked[number * size : (number + 1) * size])


def told_apart(asked: Sequence[ScriptQuestion]) -> list[ScriptQuestion]:
    """The questions with unique ids: TextVQA's file has ids of images, and MMBench asks in several rounds."""
    seen: Counter[str] = Counter()
    named = []
    for one in asked:
        name = one.question.id
        named.append(replace(one, question=replace(one.question, id=f"{name}/{seen[name]}")) if seen[name] else one)
        seen[name] += 1
    return named


# -- answers ---------------------------------------------------------------------------------------------------------


def answer(args: Any, read: Callable[[Any], tuple[list[ScriptQuestion], Images]], max_new_tokens: int) -> None:
    """Answer this process's part of the questions, and write LLaVA's answer lines in the order of the file.

    An answers file of an earlier run is deleted first, because LLaVA's scripts go on after an error, and their next
    step would score the old answers. Every line of the new file is complete.

    Args:
        read: flags -> the questions, and their images.

    Raises:
        UserError: the flags ask for something that cannot be done, or a question cannot be answered; the answers to
            questions before it are in the file.
    """
    path = file_of(args.answers_file)
    make_folder(path.parent)
    path.unlink(missing_ok=True)
    refuse(args)
    method, size, options = chosen_method(args)
    budget, ratio = budget_of(size)
    config = RunConfig(method, budget, model=str(file_of(args.model_path)), dtype=DTYPE, options=options | ratio)
    build_reducer(config, visual_tokens=None)  # refuses wrong options before the weights are read
    asked, images = read(args)
    part = told_apart(chunk(asked, args.num_chunks, args.chunk_idx))
    # The questions have no references, and nothing here scores the answers.
    questions = tuple(one.question for one in part)
    data = Dataset("", questions, images, "", lambda *_: Score({}, {}, {}), None, no_submission, max_new_tokens)
    data.check_images(data.questions)
    model = load_model(config)
    use_template(model, args.conv_mode)
    reducer = build_reducer(config, model.visual_tokens)
    require(reducer, model.spec)
    settings = {"model": model.name, "conversation": model.conversation, "config": plain(reducer)}
    started = datetime.now(UTC).isoformat()
    job = Job(config, data, data.questions, model, reducer, settings, path.parent, started)
    name, lines = get_model_name_from_path(args.model_path), DurableLines(path)
    try:
        accounts = write_lines(job, part, lines, name)
    finally:
        lines.close()
    if accounts and method != FULL:
        tokens = report.tokens_text(cost.summarise_accounting(accounts))
        kept = budget_text(reducer.budget, reducer.retention_ratio)
        print(f"{method} at {kept}: {tokens} visual tokens per layer.", file=sys.stderr)
        if off := cost.off_budget(accounts, reducer):
            print(f"Warning: {off['remark']}", file=sys.stderr)


def use_template(model: Any, name: str) -> None:
    """Make the model write prompts with one of LLaVA's templates, which may have several names."""
    asked = conv_templates.get(name)
    mode = next((mode for mode in MODES if asked and conv_templates.get(mode) == asked), name)
    own = MODES.get(str(model.conversation))
    if own is None or own.slot != conversation(mode).slot:
        raise UserError(f"--conv-mode {name} is no template of {model.name}; LLaVA's scripts ask LLaVA's checkpoints.")
    model.use_template(mode)


def write_lines(job: Job, asked: Sequence[ScriptQuestion], lines: DurableLines, model: str) -> list[dict[str, Any]]:
    """Answer all questions and return their accounting records.

    A line is written as soon as the lines of all questions before it are.
    """
    settings, limit = settings_hash(job.settings), BatchLimit()
    order = asking_order(job.planned, job.planned, job.model)
    done: dict[str, dict[str, Any]] = {}
    failed: Failure | None = None
    waiting = iter(asked)
    next_one = next(waiting, None)
    bar = tqdm(total=len(asked), unit="question", mininterval=0.5 if sys.stderr.isatty() else 30)
    with bar, ReadAhead(job) as images:
        for _, batch in images.batches(iter(list(chunks(order, job.config.batch_size)))):
            for outcome in outcomes(job, batch, limit):
                if isinstance(outcome, Failure):
                    failed = failed or outcome
                    continue
                done |= {str(line["question_id"]): line for line in outcome.lines(model, settings)}
                bar.update(len(outcome.parts))
            ready = []
            while next_one is not None and next_one.question.id in done:
                ready.append({**done[next_one.question.id], **next_one.fields})
                next_one = next(waiting, None)
            lines.append(ready, sync=False)
            if failed is not None:
                break
    if failed is not None:
        raise UserError(f"Question {failed.question} failed: {failed.reason}") from failed.error
    return [line["metadata"]["accounting"] for line in done.values()]
