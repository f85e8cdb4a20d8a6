"""Constants of the model of scale: measured on this machine, and for GPUs derived from operations and bytes.

Two settings: "cpu" is the toy model on this machine, all of it measured, to check the model of scale against two real
ranks; "gpu" is LLaVA-1.5-7B on eight-GPU nodes, whose times on the GPU are extrapolated.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.answers import AnswerStore
from eval.answers.files import answer_id, seal_of
from eval.answers.shards import Shard
from eval.config import ROOT
from eval.metrics import ratio_terms
from eval.parallel.control import Control
from eval.results.provenance import hardware
from eval.results.statistics import interval
from eval.tables.memory import expected
from llava.processing.clip_image import ImageProcessor, open_image

BUDGET, BATCH = 64, 8
REPEATS = 3  # of every measured run; the fastest counts
COMMAND = "python -m eval --method consensusdrop --budget 64 --batch-size 8 --device cpu --wandb disabled"
# eval/asking.py and eval/parallel/ranks.py: a claim, a report (a number and its text), and two counters of progress.
OPERATIONS_PER_BATCH = 5
# eval/parallel/watch.py: ten times a second, whether there is a report, and the report.
POLLS_PER_RANK = 20
STEPS = 2  # decoded after the first token: GQA's answers are a word of one or two tokens and the end token

# The GPU that times are extrapolated to: an H100 SXM by its data sheet, dense bfloat16, and what of it is assumed to be
# reached.
PEAK, BANDWIDTH, NAME = 989e12, 3.35e12, "an H100 SXM (989 TFLOP/s in bfloat16, 3.35 TB/s)"
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6


@dataclass(frozen=True)
class Constant:
    """A number of the model of scale.

    Attributes:
        unit: in words.
        kind: "measured"; "given" for a setting and for what is counted in the code; "extrapolated" where it was not
            measured on the hardware that it stands for.
        how: command and machine, or what it is extrapolated from.
    """

    value: float
    unit: str
    kind: str
    how: str


def measure(questions: int, answers: int) -> dict[str, dict[str, dict[str, Any]]]:
    """All constants as JSON types.

    Args:
        questions: asked by each run of the toy model.
        answers: merged and scored.
    """
    here = f"{hardware('cpu')}, {os.cpu_count()} cores"
    shared = shared_constants(answers, here)
    toy = toy_constants(questions, here)
    settings = {"cpu": {**shared, **toy}, "gpu": {**shared, **gpu_constants(toy, here)}}
    return {name: {key: asdict(one) for key, one in found.items()} for name, found in settings.items()}


# What does not depend on the model


def shared_constants(answers: int, here: str) -> dict[str, Constant]:
    """Dealing, storing, merging, scoring and logging."""
    merged, per_line = merge_seconds(answers)
    return {
        "batch_size": Constant(BATCH, "questions", "given", "the default of --batch-size"),
        "store": Constant(
            per_line, "s per question", "measured", f"{answers // 2:,} answers added in batches of {BATCH}; {here}"
        ),
        "store_operation": Constant(
            operation_seconds(), "s", "measured", f"20,000 additions to a counter by one client over loopback; {here}"
        ),
        "operations_per_batch": Constant(
            OPERATIONS_PER_BATCH, "operations", "given", "counted in the code: a claim, a report, two counters"
        ),
        "polls_per_rank": Constant(
            POLLS_PER_RANK,
            "operations/s",
            "given",
            "counted in the code: the parent process looks ten times a second",
        ),
        "merge": Constant(
            merged / answers, "s per answer", "measured", f"two shards of {answers // 2:,} answers each; {here}"
        ),
        "scoring": Constant(
            scoring_seconds(answers) / answers,
            "s per answer",
            "measured",
            f"95 % interval over {answers:,} answers about {answers // 5:,} images; {here}",
        ),
        "wandb": Constant(
            wandb_seconds(), "s", "measured", f"start and finish of an offline run with 100 steps; {here}"
        ),
    }


def operation_seconds(count: int = 20_000) -> float:
    """Seconds of one operation on the store that ranks share."""
    server = Control.serve()
    client = Control.connect(server.address)
    return fastest(lambda: [client.count("x") for _ in range(count)]) / count


def merge_seconds(answers: int) -> tuple[float, float]:
    """Seconds of merging two shards, and of adding one answer to a shard in batches."""
    names = [f"{number:09d}" for number in range(answers)]
    settings = {"benchmark": "scale"}
    seal = seal_of(settings)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with AnswerStore(folder, settings, names) as store:
            began = time.perf_counter()
            for rank in range(2):
                with Shard(folder, "scale", rank, {"run": "scale"}) as shard:
                    own = names[rank::2]
                    for start in range(0, len(own), BATCH):
                        shard.add([line(seal, name) for name in own[start : start + BATCH]], {"questions": BATCH})
            added = time.perf_counter() - began
            began = time.perf_counter()
            store.merge()
            return time.perf_counter() - began, added / answers


def line(seal: str, name: str) -> dict[str, Any]:
    """An answer of the usual size."""
    audit = {
        "entering": [BUDGET] * 32,
        "mean": float(BUDGET),
        "planned": float(BUDGET),
        "visual_tokens": 576,
        "merged": 12,
        "kv_bytes": 50_331_648,
    }
    return {
        "question_id": name,
        "prompt": "What is on the left of the small red square?\nAnswer the question using a single word or phrase.",
        "text": "circle",
        "answer_id": answer_id(seal, name),
        "model_id": "scale",
        "metadata": {"audit": audit, "pictures": name},
    }


def scoring_seconds(answers: int) -> float:
    """Seconds of the interval of an accuracy, five questions about each image."""
    credits = {f"{number}": float(number % 3 > 0) for number in range(answers)}
    terms = ratio_terms(credits, {name: str(int(name) // 5) for name in credits}, proportion=True)
    return fastest(lambda: interval(terms), 1)


def wandb_seconds() -> float:
    """Seconds that W&B takes at both ends of a run, without the network."""
    import wandb

    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        run = wandb.init(mode="offline", dir=place, project="scale", settings=wandb.Settings(silent=True))
        for step in range(100):
            run.log({"accuracy": step / 100})
        run.finish()
        return time.perf_counter() - began


# The toy model on this machine


def toy_constants(questions: int, here: str) -> dict[str, Constant]:
    """Times of one rank with one thread, and what two such ranks and one rank with two threads do."""
    settings = (
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "1", "RANKS": "2"},
        {"OMP_NUM_THREADS": "2"},
    )
    (one, start_alone), (two, start_ranks), (wide, _) = fastest_runs(questions, settings)
    per_question = {name: value / 1000 for name, value in one["timing"]["ms_per_question"].items()}
    whole = one["throughput"]["seconds"] / one["throughput"]["questions"]
    model = {
        "vision": per_question["vision"],
        "prefill": per_question["selection"] + per_question["prefill"],
        "decode": per_question["decode"],
    }
    how = f"{COMMAND} --limit {questions}, one thread; {here}"
    both = f"RANKS=2 {COMMAND} --limit {questions}, one thread each; {here}"
    return {
        **{name: Constant(BATCH * value, "s per batch", "measured", how) for name, value in model.items()},
        "preprocess": Constant(
            max(0.0, whole - sum(model.values())), "s per question", "measured", f"the rest of the time; {how}"
        ),
        "start_alone": Constant(start_alone, "s", "measured", f"from the command to the first question; {how}"),
        "start_ranks": Constant(start_ranks, "s", "measured", f"from the command to the first question; {both}"),
        "start_per_node": Constant(0.0, "s per further node", "given", "one machine"),
        "gpus_per_node": Constant(2, "ranks", "given", "one machine"),
        "weights": Constant(0.0, "bytes", "given", "in the start, which includes loading the toy model"),
        "read_per_node": Constant(1e9, "bytes/s", "given", "without effect: see weights"),
        "read_shared": Constant(1e9, "bytes/s", "given", "without effect: see weights"),
        "check_questions": Constant(questions, "questions", "given", both),
        "check_two_ranks": Constant(rate(two), "questions/s", "measured", both),
        "check_two_threads": Constant(
            rate(wide),
            "questions/s",
            "measured",
            f"one rank with two threads; {COMMAND} --limit {questions}; {here}",
        ),
    }


def fastest_runs(questions: int, settings: Sequence[dict[str, str]]) -> list[tuple[dict[str, Any], float]]:
    """For each environment the result of its run with the highest throughput, and its shortest start in seconds.

    They take turns, so that other work on the machine disturbs all of them.
    """
    found: list[list[tuple[dict[str, Any], float]]] = [[] for _ in settings]
    for _ in range(REPEATS):
        for runs, environment in zip(found, settings, strict=True):
            runs.append(run(questions, environment))
    return [(max((result for result, _ in runs), key=rate), min(start for _, start in runs)) for runs in found]


def rate(result: dict[str, Any]) -> float:
    """Questions per second of a run."""
    return result["throughput"]["questions_per_second"]


def run(questions: int, environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """result.json of one run of the toy model, and the seconds from the command to the first question."""
    plain = {name: text for name, text in os.environ.items() if name not in ("RANKS", "GPUS", "HOSTFILE")}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, *COMMAND.split()[1:], "--limit", str(questions), "--output", place]
        began = time.time()
        subprocess.run(command, cwd=ROOT, env=plain | environment, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(next(Path(place).rglob("result.json")).read_text())
    return result, result["throughput"]["ranks"][0]["began"] - began


# LLaVA-1.5-7B on GPUs


def gpu_constants(toy: dict[str, Constant], here: str) -> dict[str, Constant]:
    """Times by operations and bytes over what the GPU is assumed to reach."""
    model = expected("LLaVA-1.5-7B", BUDGET)
    work, parts = model.operations, model.weights.device
    step = (parts["decoder"] + parts["head"] + model.kv(model.reducer, 0)) / (OF_BANDWIDTH * BANDWIDTH)
    reached = f"{100 * OF_PEAK:.0f} % of {NAME}"
    of = "LLaVA-1.5-7B in bfloat16, ConsensusDrop at 64, batch of 8"

    def compute(part: str) -> Constant:
        how = f"{work[part] / 1e12:.2f} TFLOP at {reached}; {of}"
        return Constant(work[part] / (OF_PEAK * PEAK), "s per batch", "extrapolated", how)

    start = toy["start_ranks"]
    return {
        "vision": compute("vision"),
        "prefill": compute("prefill"),
        "decode": Constant(
            STEPS * step,
            "s per batch",
            "extrapolated",
            f"{STEPS} steps that read weights and cache at {100 * OF_BANDWIDTH:.0f} % of the bandwidth of {NAME}; {of}",
        ),
        "preprocess": Constant(
            preprocess_seconds(), "s per question", "measured", f"a JPEG of 640 x 480 opened, padded, resized; {here}"
        ),
        "start_alone": Constant(
            toy["start_alone"].value, "s", "extrapolated", f"from the toy model on {here}; CUDA is not in it"
        ),
        "start_ranks": Constant(start.value, "s", "extrapolated", f"from two ranks on {here}; CUDA is not in it"),
        "start_per_node": Constant(0.5, "s per further node", "extrapolated", "assumed: srun or ssh to a further node"),
        "gpus_per_node": Constant(8, "GPUs", "given", "the usual node"),
        "weights": Constant(
            model.weights.total, "bytes", "extrapolated", "from the shapes of LLaVA-1.5-7B in bfloat16"
        ),
        "read_per_node": Constant(2e9, "bytes/s", "extrapolated", "assumed: one node reads the files once"),
        "read_shared": Constant(
            8e9, "bytes/s", "extrapolated", "assumed: all nodes together from a shared file system"
        ),
    }


def preprocess_seconds() -> float:
    """Seconds of preparing one photograph on one core."""
    rows, columns = np.mgrid[0:480, 0:640]
    waves = [np.sin(rows / a) + np.cos(columns / b) for a, b in ((17, 23), (31, 11), (7, 41))]
    pixels = np.stack(waves, axis=-1) * 50 + 128 + np.random.default_rng(0).normal(0, 8, (480, 640, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    process, threads = ImageProcessor(336, 336), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fastest(lambda: [process(open_image(io.BytesIO(file.getvalue()), "a test")) for _ in range(20)]) / 20
    finally:
        torch.set_num_threads(threads)


def fastest(call: Callable[[], Sequence[Any] | object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)
