"""An engine under load: vLLM with methods and without one, at several numbers of requests in flight.

    python -m lab.bench.serving --budget 64
    python -m lab.bench.serving --budget 64 --shape llava-1.5-7b --layers 4 --blocks 3 --dtype bfloat16
    python -m lab.bench.serving --videos 0.5 --shape qwen2.5-vl-7b --layers 4 --blocks 3 --dtype bfloat16

It runs in the environment of scripts/serve_setup.sh. A closed loop keeps the same number of requests in flight: when
one is answered, the next is sent, always about a picture that was not seen before. One engine answers all rows of the
route "pixels", and is told between turns which method to use, so that they share weights and cache. Another engine
answers those of "embeds", whose client is a thread here. Both are vLLM's asynchronous engines, in processes of
their own as behind its server; only HTTP and the tokenizer are left out.

With --videos, Qwen2.5-VL is asked about videos instead, and compared with itself under EVS, vLLM's own reduction of
videos, in an engine that drops this share of their tokens.

Rows take turns, and ratios are taken within a round. Every turn is kept in a file, from which an interrupted benchmark
continues.
"""

import argparse
import asyncio
import importlib
import itertools
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from eval.command import STOPS, exit_on_user_error, make_parser, terminate, value
from eval.config import DEFAULT_MODEL, FULL, count
from eval.efficiency.latency import whole_numbers
from eval.efficiency.latency_table import ms, table, write
from eval.efficiency.measure import Measurements, over_rounds
from eval.efficiency.shapes import QUESTION, SHAPES, SUFFIX, hf_model, noise
from eval.results.report import hardware
from eval.results.statistics import plural
from llava.errors import MethodError, UserError
from llava.model.builder import DTYPES, device_of
from llava.model.checkpoint.config import CLIP_L_336
from llava.model.checkpoint.files import locate
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.stock_tower import StockTower
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import until_decoder
from llava.processing.json_files import read_json
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build
from llava.serving.client import EMBEDS, PIXELS, load_client_model
from llava.serving.engine_method import served_by
from llava.serving.engine_model import import_vllm

BATCH = 8  # prompts that the client embeds at once
WARM_UP = 8  # requests before the first turn of a row at a number in flight
# Row -> its route, method and options. VisionDrop itself reduces between decoder layers, where no engine can.
ROWS: dict[str, tuple[str, str, dict[str, str]]] = {
    FULL: (PIXELS, FULL, {}),
    "uniform": (PIXELS, "uniform", {}),
    "divprune": (PIXELS, "divprune", {}),
    "visiondrop, encoder stage alone": (PIXELS, "visiondrop", {"encoder_only": "true"}),
    "consensusdrop": (EMBEDS, "consensusdrop", {}),
}
WHOLE, EVS = "no pruning", "video_pruning_rate"
VIDEO_ROWS: dict[str, tuple[str, str, dict[str, str]]] = {FULL: (WHOLE, FULL, {}), "evs": (EVS, "evs", {})}
SHARES = {PIXELS: 0.56, EMBEDS: 0.34, WHOLE: 0.45, EVS: 0.45}  # of a GPU's memory
FRAMES = 8  # of a video
METADATA: dict[str, Any] = {
    "fps": 1.0,
    "duration": FRAMES,
    "total_num_frames": FRAMES,
    "frames_indices": [*range(FRAMES)],
}
METADATA |= {"video_backend": "none", "do_sample_frames": False}
QWEN_TOKENS = ("vision_start", "video_pad", "vision_end", "image_pad")
Ask = Callable[[int, Sample], Coroutine[Any, Any, "Answered"]]

# The model


def save_random(shape: Mapping[str, Any], folder: Path, dtype: str) -> None:
    """Write a LLaVA-1.5 of random weights in transformers' layout, with the tokenizer of the toy model.

    Args:
        shape: an entry as in SHAPES.
    """
    toy = locate(DEFAULT_MODEL, "checkpoint")
    known = read_json(toy / "config.json")
    ids = {name: known["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = shape.get("vision", CLIP_L_336)
    made = hf_model("llava", {**shape["text"], **ids}, vision, DTYPES[dtype], torch.device("cpu"))
    made.config.image_token_index = known["image_token_index"]
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        shutil.copy(toy / name, folder)
    side = vision["image_size"]
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)


def save_qwen(folder: Path, layers: int, blocks: int) -> list[int]:
    """Write a Qwen2.5-VL-7B of fewer layers without weights; returns a prompt with a video.

    Args:
        layers, blocks: of decoder and tower.
    """
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in QWEN_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    start, video, end, image = (words.get_vocab()[f"<|{name}|>"] for name in QWEN_TOKENS)
    sizes = SHAPES["qwen2.5-vl-7b"]
    config = Qwen2_5_VLConfig(
        # The head of all 152,064 tokens would fill the memory of a CPU's two engines.
        text_config={**sizes["text"], "num_hidden_layers": layers, "vocab_size": 32_000},
        vision_config={**sizes["vision"], "depth": blocks, "fullatt_block_indexes": [blocks - 1]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()).save_pretrained(folder)
    return [start, video, end] + [0] * len(f"{QUESTION} {SUFFIX}".split())


def without_weights(folder: Path, layers: int) -> Path:
    """A copy of a checkpoint with another number of decoder layers, for an engine that makes up its weights."""
    bare = folder.with_name(f"{folder.name}-{layers}-layers")
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = read_json(bare / "config.json")
    config["text_config"]["num_hidden_layers"] = layers
    (bare / "config.json").write_text(json.dumps(config))
    return bare


# The engine


class Switch:
    """What the bench asks of an engine's worker, by `collective_rpc`; vLLM makes it a base class of the worker."""

    def switch(self, setting: Mapping[str, Any]) -> None:
        """Answer with another method from now on, and count its time from zero."""
        worker: Any = self
        model, config = worker.model_runner.get_model(), worker.model_runner.model_config.hf_config
        config.vtr = dict(setting)
        model.served = served_by(config)
        model.__dict__.pop("engine_tower", None)
        kind = type(model.served.reducer)
        for owner, name in ((StockTower, "scores_of_tokens"), (kind, "encoder"), (kind, "prompt")):
            if not hasattr(stage := getattr(owner, name), "counted"):
                setattr(owner, name, counted(stage))
        Switch.spent = 0.0

    def renumber(self) -> None:
        """Number tokens anew after EVS, which the runner for CPUs leaves out."""
        worker: Any = self
        worker.model_runner.is_multimodal_pruning_enabled = True

    def selection_seconds(self) -> float:
        """Seconds of the engine's loop since `switch` in the scores and the choice of tokens."""
        return Switch.spent

    spent: float


def counted(function: Any) -> Any:
    """The function, adding its seconds on the host to `Switch.spent`."""

    @wraps(function)
    def timed(*args: Any, **given: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **given)
        finally:
            Switch.spent += time.perf_counter() - began

    timed.counted = True  # type: ignore[attr-defined]
    return timed


class Watch:
    """Collects an engine's own numbers of every step; vLLM makes its logger by `factory`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.usage, self.running, self.preempted = 0.0, 0, 0
        self.prefix, self.pictures = [0, 0], [0, 0]  # hits, queries

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            if scheduler_stats.kv_cache_usage > self.usage:
                self.usage, self.running = scheduler_stats.kv_cache_usage, scheduler_stats.num_running_reqs
            add(self.prefix, scheduler_stats.prefix_cache_stats)
        if iteration_stats is not None:
            self.preempted += iteration_stats.num_preempted_reqs
        if mm_cache_stats is not None:
            add(self.pictures, mm_cache_stats)

    def factory(self) -> Callable[..., Any]:
        """What vLLM calls to make its logger: this object behind vLLM's interface."""
        base: Any = importlib.import_module("vllm.v1.metrics.loggers").StatLoggerBase
        own = {"__init__": lambda *_, **__: None, "record": lambda _, *args, **given: self.record(*args, **given)}
        return type("Watching", (base,), own | {"log_engine_initialized": lambda _: None})


def add(sums: list[int], stats: Any) -> None:
    sums[0] += stats.hits
    sums[1] += stats.queries


class StoppedWhileStarting(BaseException):
    """Raised in place of KeyboardInterrupt, which vLLM drops while it starts, and then waits for ten minutes."""


@contextmanager
def engine_may_be_stopped() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what is inside although it drops KeyboardInterrupt, and raise that afterwards."""

    def stop(number: int, frame: object) -> None:
        try:
            terminate(number, frame)
        except KeyboardInterrupt as error:
            raise StoppedWhileStarting from error

    taken = [number for number in STOPS if signal.getsignal(number) is terminate]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except StoppedWhileStarting as stopped:
        raise stopped.__cause__ or stopped from None
    finally:
        for number in taken:
            if signal.getsignal(number) is stop:
                signal.signal(number, terminate)


def start_engine(
    vllm: Any, directory: Path, args: argparse.Namespace, route: str, watch: Watch, running: ExitStack
) -> Any:
    """An asynchronous engine for the rows of a route, which share it. `running` shuts it down."""
    cached, cuda = args.caches == "on", device_of(args.device).type == "cuda"
    given: dict[str, Any] = {
        "model": str(directory),
        "dtype": args.dtype,
        "max_num_seqs": max(args.at_once),
        "seed": 0,
        "enable_prefix_caching": cached,
        "mm_processor_cache_gb": 1 if cached else 0,
        "enforce_eager": not cuda,  # on a CPU, compiling takes longer than it saves
        "load_format": "dummy" if args.shape else "safetensors",
        "worker_extension_cls": f"{Switch.__module__}.{Switch.__name__}",
        "disable_log_stats": False,
    }
    if cuda:  # graphs for decoding, without minutes of compilation
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        given |= {"gpu_memory_utilization": SHARES[route], "compilation_config": graphs}
    if args.videos:  # for the model's own length, vLLM would measure the memory of hours of video
        given |= {"max_model_len": 4096, EVS: args.videos if route == EVS else None}
    elif route == EMBEDS:
        given |= {"enable_prompt_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    arguments, space = vllm.AsyncEngineArgs(**given), int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4"))
    # GiB, read in the engine's process. By embeddings, prompts are never those of `full`.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-space // 4) if route == EMBEDS else space)
    try:
        with engine_may_be_stopped():
            engine = vllm.AsyncLLMEngine.from_engine_args(arguments, stat_loggers=[watch.factory()])
    except Exception as error:
        raise MethodError(f"vLLM does not start: {' '.join(str(error).split())[:600]}") from error
    finally:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(space)
    running.callback(setattr, engine, "shutdown", lambda: None)  # its destructor would call it where modules are gone
    running.callback(engine.shutdown)
    return engine


# One request


@dataclass(frozen=True)
class Answered:
    """When a request was sent, had its first token and its last, in seconds of `time.monotonic`."""

    sent: float
    first: float
    last: float


async def ask_pixels(engine: Any, ids: list[int], sampling: Any, number: int, sample: Sample) -> Answered:
    """Send a question with its picture or video."""
    seen, shown = sample.image, dict[str, Any]()
    if isinstance(seen, Video):
        shown["video"] = np.stack([np.asarray(frame) for frame in seen.frames]), METADATA
    else:
        shown["image"] = seen
    prompt = {"prompt_token_ids": ids, "multi_modal_data": shown}
    return await answered(engine, prompt, sampling, number, time.monotonic())


async def ask_embeds(engine: Any, client: "Client", sampling: Any, number: int, sample: Sample) -> Answered:
    """Send a question as embeddings, once the client has made them."""
    sent = time.monotonic()
    return await answered(engine, {"prompt_embeds": await client.embed(sample)}, sampling, number, sent)


async def answered(engine: Any, prompt: dict[str, Any], sampling: Any, number: int, sent: float) -> Answered:
    """Wait for the answer to a prompt. vLLM prepares it in a thread, as for its server."""
    (rendered,) = await engine.renderer.render_cmpl_async([prompt])
    first = None
    async for _ in engine.generate(rendered, sampling, str(number)):
        first = first or time.monotonic()
    assert first is not None
    return Answered(sent, first, time.monotonic())


class Client:
    """Makes embeddings in a thread of its own, of all prompts that wait there, at most BATCH at once.

    Attributes:
        selection: seconds spent in the choice of tokens.
    """

    def __init__(self, model: Llava, reducer: Reducer):
        self.model, self.reducer, self.selection = model, reducer, 0.0
        self._waiting: queue.Queue[tuple[Sample, asyncio.Future[Tensor]]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    async def embed(self, sample: Sample) -> Tensor:
        """The prompt's embeddings [L, H]."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put((sample, future))
        made: Tensor = await future
        return made

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(batch) < BATCH:
                    batch.append(self._waiting.get_nowait())
            samples, futures = zip(*batch, strict=True)
            loop = futures[0].get_loop()
            try:
                timer = Timer(self.model.device)
                sequence = until_decoder(self.model, samples, self.reducer, timer).start
                rows = zip(sequence.hidden, sequence.lengths, strict=True)
                made = [row[-length:].clone().cpu() for row, length in rows]
                self.selection += timer.seconds.get("selection", 0.0)
            except Exception as error:
                for future in futures:
                    loop.call_soon_threadsafe(future.set_exception, error)
                continue
            for future, own in zip(futures, made, strict=True):
                loop.call_soon_threadsafe(future.set_result, own)


# One turn


async def closed_loop(ask: Ask, samples: Sequence[Sample], at_once: int, halfway: Callable[[], None]) -> list[Answered]:
    """Ask all questions with `at_once` of them in flight; `halfway` is called after a fifth of them."""
    numbers, done = iter(enumerate(samples)), list[Answered]()

    async def slot() -> None:
        for number, sample in numbers:
            done.append(await ask(number, sample))
            if len(done) == max(1, len(samples) // 5):
                halfway()

    await asyncio.gather(*(slot() for _ in range(at_once)))
    return sorted(done, key=lambda one: one.last)


def summary(done: Sequence[Answered], at_once: int, tokens: int) -> dict[str, Any]:
    """Requests per second and times of a turn. If there are more than 2 * at_once, the first and last do not count."""
    settled = len(done) > 2 * at_once
    counted = done[at_once : len(done) - at_once] if settled else done
    began = done[at_once - 1].last if settled else min(one.sent for one in done)
    waits = [one.first - one.sent for one in counted]
    return {
        "seconds": (counted[-1].last - began) / len(counted),
        "ttft": median(waits),
        "ttft_99": float(np.quantile(waits, 0.99)),
        "token": median((one.last - one.first) / max(1, tokens - 1) for one in counted),
        "requests": len(counted),
    }


def resident() -> int:
    """Bytes that this process and its engines hold."""
    own = psutil.Process()
    return sum(one.memory_info().rss for one in (own, *own.children(recursive=True)))


class Bench:
    """The engines, and a function that asks them for each row."""

    def __init__(self, args: argparse.Namespace, directory: Path, vllm: Any, running: ExitStack):
        self.args, self.rows = args, VIDEO_ROWS if args.videos else ROWS
        self.watches = {way: Watch() for way, _, _ in self.rows.values()}
        served = directory
        if args.videos:
            self.ids = save_qwen(directory, args.layers, args.blocks)
        elif args.shape:
            vision = {**CLIP_L_336, "num_hidden_layers": args.blocks}
            text = {**SHAPES[args.shape]["text"], "num_hidden_layers": 1}  # the client probes the first
            save_random({"text": text, "vision": vision}, directory, args.dtype)
            served = without_weights(directory, args.layers)
        self.engines = {
            way: start_engine(vllm, served, args, way, watch, running) for way, watch in self.watches.items()
        }
        for way, method, options in self.rows.values():
            if way == EMBEDS:
                reducer = build(method, args.budget, options)
                model = load_client_model(directory, reducer, args.dtype, args.device)
                require(reducer, model.spec)
                self.client, slot = Client(model, reducer), model.hf_model.config.image_token_id
                asked = model.prompt(Sample("0", QUESTION, SUFFIX, noise(0)))
                self.ids = [slot if token < 0 else token for token in asked.ids]
        self.sampling = partial(
            vllm.SamplingParams,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )

    async def turn(self, row: str, samples: Sequence[Sample], at_once: int, tokens: int) -> dict[str, Any]:
        """Ask a row all questions; what was measured.

        Args:
            tokens: length of the answers.
        """
        way, method, options = self.rows[row]
        engine, watch, sampling = self.engines[way], self.watches[way], self.sampling(max_tokens=tokens)
        ask, before = partial(ask_pixels, engine, self.ids, sampling), 0.0
        if way == EMBEDS:
            ask, before = partial(ask_embeds, engine, self.client, sampling), self.client.selection
        elif way == EVS:
            await engine.collective_rpc("renumber")
        elif way == PIXELS:
            setting = {"method": method, "budget": None if method == FULL else self.args.budget, "options": options}
            engine.vllm_config.model_config.hf_config.vtr = setting
            await engine.collective_rpc("switch", args=(setting,))
        watch.start()
        held = list[int]()
        done = await closed_loop(ask, samples, at_once, lambda: held.append(resident()))
        found = summary(done, at_once, tokens)
        spent = None
        if way == EMBEDS:
            spent = self.client.selection - before
        elif way == PIXELS:
            (spent,) = await engine.collective_rpc("selection_seconds")
        cache = engine.vllm_config.cache_config
        return found | {
            "selection": None if spent is None else spent / (done[-1].last - min(one.sent for one in done)),
            "blocks": watch.usage * (cache.num_gpu_blocks - 1) / max(1, watch.running),
            "block": cache.block_size,
            "cache": cache.num_gpu_blocks,
            "preempted": watch.preempted,
            "prefix": watch.prefix,
            "pictures": watch.pictures,
            "grown": resident() / held[0],
        }


def measure(args: argparse.Namespace, directory: Path, kept: Measurements, vllm: Any) -> None:
    """Ask all rows in turns, at every number of requests in flight, until the deadline.

    Every second round goes the other way round, and the first turn of a row has a warm-up before it. What `kept`
    already holds is not measured again.
    """
    rows = VIDEO_ROWS if args.videos else ROWS
    turns = [
        (number, row, tokens, size)
        for tokens in args.new_tokens
        for size in args.at_once
        for number in range(1, args.repeats + 1)
        for row in (rows if number % 2 else reversed(rows))
        if (number, named(row, tokens), size) not in kept.rows
    ]
    if not turns:
        return
    end = time.monotonic() + args.deadline
    seeds, warm = itertools.count(), set[tuple[str, int]]()

    pixels, frames = np.asarray(noise(0)), FRAMES if args.videos else 1

    def samples(size: int) -> list[Sample]:
        """Questions about pictures or videos that no turn before has asked about: noise, moved by rows and columns."""
        found = list[Sample]()
        for seed in itertools.islice(seeds, size):
            rows, columns = divmod(seed, pixels.shape[1])
            shown = [Image.fromarray(np.roll(pixels, (rows, columns + 9 * n), (0, 1))) for n in range(frames)]
            found.append(Sample(f"s{seed}", QUESTION, SUFFIX, Video(tuple(shown)) if args.videos else shown[0]))
        return found

    async def all_turns() -> None:
        with ExitStack() as running:
            bench = Bench(args, directory, vllm, running)
            for number, row, tokens, size in tqdm(turns, unit="turn", disable=None):
                if time.monotonic() > end:
                    break
                if (row, size) not in warm:
                    await bench.turn(row, samples(min(size, WARM_UP)), size, min(args.new_tokens))
                    warm.add((row, size))
                found = await bench.turn(row, samples(size * args.per_slot), size, tokens)
                kept.add(number, named(row, tokens), size, found)

    asyncio.run(all_turns())


def named(row: str, tokens: int) -> str:
    """The name of a row in the file, with the length of its answers."""
    return f"{row}, {tokens} tokens"


# How it is shown


def page(kept: Measurements, args: argparse.Namespace) -> str:
    """The conditions of the measurement, and a table with a line for each row at each number of requests in flight."""
    lines, rows = [], VIDEO_ROWS if args.videos else ROWS
    for tokens, size in itertools.product(args.new_tokens, args.at_once):
        turns = [[kept.rows.get((n, named(row, tokens), size)) for row in rows] for n in range(1, args.repeats + 1)]
        whole = [turn for turn in turns if all(turn)]
        for place, (row, (way, _, _)) in enumerate(rows.items() if whole else ()):
            full, ours = ([turn[one] or {} for turn in whole] for one in (0, place))

            def of(key: str, ours: Sequence[Mapping[str, Any]] = ours) -> float:
                return float(median(one[key] for one in ours))

            faster = over_rounds([one["seconds"] for one in full], [one["seconds"] for one in ours])
            line = [
                ("tokens", str(tokens)),
                ("in flight", str(size)),
                ("", row),
                ("route", way),
                ("requests/s", f"{1 / of('seconds'):.3g}"),
            ]
            line += [("times full", "" if row == FULL else str(faster))]
            line += [("TTFT ms, p50", ms(of("ttft"))), ("p99", ms(of("ttft_99"))), ("ms per token", ms(of("token")))]
            line += [("KV blocks", f"{of('blocks'):.2g}"), ("preempted", f"{of('preempted'):g}")]
            line.append(("selection", "" if ours[0]["selection"] is None else f"{100 * of('selection'):.1f} %"))
            for title, key in (("prefix hits", "prefix"), ("picture hits", "pictures")):
                hits, asked = (sum(one[key][place] for one in ours) for place in (0, 1))
                line.append((title, f"{100 * hits / asked:.0f} %" if asked else "off"))
            lines.append(line)
    if not lines:
        raise UserError("No round is complete yet; give more time, or the same command again.")
    return f"{about(kept)}\n\n{table(lines)}"


def about(kept: Measurements) -> str:
    """The conditions of the measurement, in a few sentences."""
    known, rows = kept.settings, [row for row in kept.rows.values() if row]
    words = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    rounds = max(number for number, _, _ in kept.rows)
    kept_share = f"EVS drops {known['videos']:.0%}" if known["videos"] else f"budget {known['budget']}"
    return (
        f"{known['model']}, {kept_share}, {known['dtype']}, "
        f"{known['per_slot']} requests for each in flight, caches {known['caches']}, "
        f"{known['device']} "
        f"({known['hardware']}), {known['threads']} {plural('thread', known['threads'])}, medians of at most {rounds} "
        f"rounds after a warm-up, ratios of the same round with their range; {rows[0]['cache']} blocks of "
        f"{rows[0]['block']} tokens in the engine; {words}, commit {', '.join(sorted(kept.commits))}. The most that "
        f"memory grew within a turn, from a fifth of its requests to its end: {max(row['grown'] for row in rows):.3f} "
        "times."
    )


# The command


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = make_parser("lab.bench.serving", __doc__)
    add = flags.add_argument
    add("--budget", type=value(count), default=64, help="visual tokens to keep per image")
    add("--model", type=Path, default=Path(DEFAULT_MODEL), help="folder of a LLaVA-1.5 in transformers' layout")
    known = [name for name in SHAPES if name.startswith(("llava-1.5", "qwen2.5"))]
    add("--shape", choices=known, help="random weights instead")
    add("--videos", type=value(float), default=0.0, help="with a shape of Qwen2.5-VL: the share that EVS drops")
    add("--layers", type=value(count), default=4, help="with --shape: decoder layers")
    add("--blocks", type=value(count), default=3, help="with --shape: blocks of the tower")
    add("--at-once", type=value(whole_numbers), default=(1, 8, 32, 64), help="requests in flight: 1,8,32,64")
    add("--per-slot", type=value(count), default=2, help="requests of a turn for each in flight; 8 on a GPU")
    add("--new-tokens", type=value(whole_numbers), default=(16,), help="tokens of an answer, or several: 16,256")
    add("--caches", choices=("off", "on"), default="off", help="prefix cache and cache of processed pictures")
    add("--repeats", type=value(count), default=3, help="rounds after a warm-up")
    add("--deadline", type=value(float), default=float("inf"), help="seconds after which no turn begins")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    add("--device", default="auto", help="torch device")
    add("--measurements", type=Path, help="keep every turn here, and go on from it")
    add("--json", type=Path, help="also write the numbers here")
    add("--markdown", type=Path, help="also write the table here")
    return flags


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    if bool(args.videos) != str(args.shape).startswith("qwen"):
        raise UserError("--videos belongs to --shape qwen2.5-vl-7b; the other models are asked about pictures.")
    os.environ.pop("OMP_WAIT_POLICY", None)  # of the client, whose process has read it; engines are left as they are
    vllm, device = import_vllm(), str(device_of(args.device))
    name = args.model.name
    if args.shape:
        name = f"{args.shape} shapes with {args.layers} decoder layers and {args.blocks} tower blocks, random weights"
    settings = {
        "model": name,
        "threads": torch.get_num_threads(),
        "device": device,
        "hardware": hardware(device),
        "versions": {"vLLM": vllm.__version__, "torch": torch.__version__},
    } | {key: getattr(args, key) for key in ("budget", "videos", "dtype", "per_slot", "caches")}
    kept = Measurements(args.measurements, settings)
    with tempfile.TemporaryDirectory() as folder:
        directory = locate(args.model, "checkpoint") if not args.shape else Path(folder) / "model"
        measure(args, directory, kept, vllm)
    shown = page(kept, args)
    print(shown)
    rows = [
        {"round": number, "row": row, "in_flight": size} | found for (number, row, size), found in kept.rows.items()
    ]
    write(args, {**settings, "commits": sorted(kept.commits), "rows": rows}, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
