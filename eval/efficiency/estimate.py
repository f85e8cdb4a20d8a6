"""Expected memory and time of a run, before any weight is read: `python -m eval ... --dry-run`.

This reads config.json, the tokenizer and the questions, and the sizes of some images if the number of visual tokens
depends on them. Weights and key/value cache are exact for a batch of the longest sampled prompts; activations are
metered on the meta device (eval/efficiency/memory.py). Times are lower bounds: operations and bytes, divided by the
rates measured on the device. They leave out preprocessing on the CPU, a method's own functions, launches of kernels,
and loading.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import CLIPConfig

from eval.ask import asking_order, chunks
from eval.benchmarks.base import Dataset, Question
from eval.config import FULL, RunConfig, build_reducer
from eval.efficiency import memory
from eval.efficiency.memory import QuestionShape, duration, layout_of, listed, size_text
from eval.feature_cache import RUN_BYTES, can_remember
from eval.parallel.placement import Placement
from eval.results.report import hardware
from eval.run import read_questions
from llava.budget import budget_text
from llava.errors import UserError
from llava.model.builder import DTYPES, declared_class, device_of, runtime
from llava.model.checkpoint.files import locate
from llava.model.checkpoint.load import free_memory, outline_checkpoint
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.clip_text_encoder import ClipText
from llava.model.qwen_vl import QwenVL
from llava.processing.json_files import read_json
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.modules import projector_flops
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import frames, single

SAMPLED = 64  # questions whose prompts and images are read
SPENT = 0.5  # seconds of each measurement
LONGEST = 0.2  # seconds of one matrix product
FEWEST = 16  # rows of the first matrix product
COPIED = 1 << 28  # bytes of each copy
MEASURED = "the image decides: mean n/a until measured"


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        device: its name, with the number of threads on a CPU.
        operations: floating point operations per second of a matrix product.
        bandwidth: bytes per second that a copy inside its memory reads and writes.
        bus: bytes per second from the machine's memory to the device; without CUDA it is `bandwidth` / 2.
    """

    device: str
    operations: float
    bandwidth: float
    bus: float


@dataclass(frozen=True)
class Workload:
    """The questions of a run, as far as a sample of them shows.

    Attributes:
        shapes: sampled questions.
        steps: mean decoding steps of a batch after the first token, if answers are as long as the reference answers; 0
            if there are no references.
        questions: number of all questions of the run.
        passes: images that the vision tower sees in the whole run, at least.
        remembers: the tower's output is kept for later questions (eval/feature_cache.py).
    """

    shapes: tuple[QuestionShape, ...]
    steps: float
    questions: int
    passes: int
    remembers: bool = False


@dataclass(frozen=True)
class Spread:
    """How a run is spread over devices.

    Attributes:
        replicas: groups of ranks that hold one model each and share the questions.
        sharing: ranks that share the memory and the cores of one device: all ranks of a machine on CPUs, else 1.
        tensor_parallel: ranks over which one model is split.
        zero: where ZeRO-Inference keeps decoder and head, as given by --zero; None without it.
        zero_ranks: ranks that each keep a part of decoder and head.
    """

    replicas: int = 1
    sharing: int = 1
    tensor_parallel: int = 1
    zero: str | None = None
    zero_ranks: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        rates: measured rates of the device; None leaves the times out.
        free: bytes free on the device of a rank; None if the device is not there.
    """

    model: Llava
    reducer: Reducer
    work: Workload
    batch_size: int
    max_new_tokens: int
    dtype: torch.dtype
    quantization: str | None = None
    spread: Spread = Spread()
    rates: Rates | None = None
    free: int | None = None
    device: str = "cpu"

    # Memory of one rank

    @cached_property
    def batch(self) -> tuple[QuestionShape, ...]:
        """A batch of the longest sampled prompts."""
        count = min(self.batch_size, max(1, self.work.questions))
        order = sorted(self.work.shapes, key=lambda shape: -max(memory.lengths(self.model, self.reducer, shape)))
        rows = [order[i % len(order)] for i in range(count)]
        return tuple(replace(row, names=f"{i}") for i, row in enumerate(rows))

    @cached_property
    def whole(self) -> memory.Weights:
        """The weights of a rank without ZeRO-Inference."""
        split = self.spread.tensor_parallel
        return memory.weights(self.model, self.dtype.itemsize, self.quantization, split)

    @cached_property
    def weights(self) -> memory.Weights:
        """The weights of a rank."""
        place, ranks = self.spread.zero, self.spread.zero_ranks
        if place is None:
            return self.whole
        return memory.partitioned(self.model, self.dtype.itemsize, self.whole, place, ranks)

    @cached_property
    def by_image(self) -> bool:
        """Whether images decide how many tokens are kept, so that only their most is known before the run."""
        return memory.by_image(self.model, self.reducer, self.batch)

    def kv(self, reducer: Reducer, new_tokens: int, most: bool = True) -> int:
        """Bytes of the key/value cache of `batch` under a method after `new_tokens` decoded tokens.

        Args:
            most: where the image decides, with the most tokens that the method may keep, in place of the budget.
        """
        prompts = [memory.lengths(self.model, reducer, shape, most) for shape in self.batch]
        split = self.spread.tensor_parallel
        return memory.kv_bytes(self.model, prompts, self.dtype.itemsize, new_tokens, split)

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of the cache at the end of the longest answer."""
        return self.kv(self.reducer, self.max_new_tokens - 1)

    @cached_property
    def activations(self) -> memory.Activations:
        split, on_host = self.spread.tensor_parallel, self.device.startswith("cpu")
        return memory.activations(self.model, self.reducer, self.batch, self.dtype.itemsize, split, on_host)

    @property
    def remembered(self) -> int:
        """Upper bound on the bytes of the tower's output that a rank keeps (eval/feature_cache.py)."""
        return RUN_BYTES if self.work.remembers else 0

    @cached_property
    def peak(self) -> int:
        """The most bytes that a rank needs on its device at once."""
        return self.weights.total + self.remembered + self.activations.peak(self.kv_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether all ranks of a device fit into its free memory; None if the free memory is not known."""
        return None if self.free is None else self.peak * self.spread.sharing <= self.free

    # Time

    @cached_property
    def batches(self) -> int:
        return ceil(self.work.questions / self.batch_size)

    @cached_property
    def operations(self) -> dict[str, float]:
        """Operations of an average batch: "vision", "prefill" and one decoding "step"."""
        model, reducer, shapes = self.model, self.reducer, self.work.shapes
        count = self.work.questions / self.batches
        images = [image for shape in shapes for image in shape.images]
        passes = self.work.passes / self.batches
        # Qwen's merger makes the tokens that a method reduces, so it sees all of them.
        merged, projector = isinstance(model, QwenVL), memory.projector_of(model)
        early = not merged and not reducer.acts_in.isdisjoint(("tower", "input_grid", "encoder"))
        spent = []  # operations of each image before the decoder
        for image in images:
            projected = memory.visual_plan(model, reducer, image)[0] if early else image.patches
            tower = memory.tower_operations(model, reducer, image)
            spent.append(tower + projector_flops(projector, projected))
        vision = passes * sum(spent) / len(spent) if spent else 0.0
        prompts = [memory.lengths(model, reducer, shape) for shape in shapes]
        split = self.spread.tensor_parallel
        mean = count / len(prompts) / split
        prefill = mean * sum(memory.decoder_operations(model, prompt) for prompt in prompts)
        step = mean * sum(memory.step_operations(model, prompt) for prompt in prompts)
        return {"vision": vision, "prefill": prefill, "step": step}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """At least how many seconds an average batch takes on one replica: "ttft", one decoding "step", and "batch".

        Ranks that share a device share its rates.
        """
        assert self.rates is not None
        rate = self.rates.operations / self.spread.sharing
        bandwidth = self.rates.bandwidth / self.spread.sharing
        parts, work = self.whole.device, self.operations
        decoder = parts["decoder"] + parts["head"]
        # A stage computes its products and reads its weights once; the slower of the two bounds it.
        read = (parts["vision tower"] + parts["projector"]) / bandwidth
        vision = max(work["vision"] / rate, read) if work["vision"] else 0.0
        read = max(decoder / bandwidth, sum(self.weights.host.values()) / self.rates.bus)
        prefill = max(work["prefill"] / rate, read)
        step = max(work["step"] / rate, read + self.kv(self.reducer, 0, most=False) / bandwidth)
        return {"ttft": vision + prefill, "step": step, "batch": vision + prefill + self.work.steps * step}

    @property
    def run_seconds(self) -> float:
        """At least how many seconds the whole run takes."""
        return ceil(self.batches / self.spread.replicas) * self.seconds["batch"]

    # Output

    def lines(self) -> list[str]:
        """The estimate in words."""
        outside, split = sum(self.weights.host.values()), self.spread.tensor_parallel
        ranks = f" on each of the {split} ranks of a replica" if split > 1 else ""
        lines = [f"weights {listed(self.weights.device)}{ranks}"]
        if outside:
            each = " for each rank" if self.spread.zero_ranks > 1 else ""
            lines.append(f"kept in {self.spread.zero}: {size_text(outside)} of decoder and head{each}")
        budget, full = self.reducer.budget, self.model.visual_tokens
        unreduced = registry.build(FULL, full)
        kept = f"all {full}" if budget >= full else f"{budget} of {full}"
        if self.reducer.retention_ratio:
            kept = f"{budget_text(budget, self.reducer.retention_ratio)} of each image's"
        if self.by_image:
            images = [image for shape in self.batch for image in shape.images]
            most = max(memory.visual_plan(self.model, self.reducer, image, most=True)[0] for image in images)
            kept = f"most {most} of {full} ({MEASURED}; {budget} asked)"
        lines.append(
            f"KV cache {size_text(self.kv_bytes)} for {len(self.batch)} questions at {kept} visual tokens and "
            f"{self.max_new_tokens} new tokens (full: {size_text(self.kv(unreduced, self.max_new_tokens - 1))})"
        )
        stages = asdict(self.activations)
        del stages["prefill_with_cache"]
        lines.append(f"activations about {listed(stages, max(stages.values()))}")
        if self.remembered:
            lines.append(
                f"remembered images up to {size_text(self.remembered)}: the vision tower sees at least "
                f"{self.work.passes:,} for {self.work.questions:,} questions"
            )
        need = f"about {size_text(self.peak)} on {self.device} for each rank"
        if self.free is None:
            lines.append(f"{need}; how much is free there is not known")
        else:
            share = f", {self.spread.sharing} ranks share it" if self.spread.sharing > 1 else ""
            room = f"{size_text(self.free)} are free{share}"
            advice = "a smaller --batch-size, --dtype bfloat16, TP=2, --zero cpu or --quantization 8bit needs less"
            lines.append(f"fits: {need}, {room}" if self.fits else f"does not fit: {need}, {room}; {advice}")
        return lines + self._times()

    def _times(self) -> list[str]:
        if self.rates is None:
            return []
        seconds, count = self.seconds, self.spread.replicas
        each = seconds["ttft"] + (self.max_new_tokens - 1) * seconds["step"]
        longest = ceil(self.batches / count) * each
        answers = "of one token"
        if self.work.steps:
            answers = f"as long as the references ({self.work.steps:.3g} more tokens)"
        return [
            f"measured here: {self.rates.operations / 1e12:.3g} TFLOP/s and {self.rates.bandwidth / 1e9:.3g} GB/s on "
            f"{self.rates.device}",
            f"a batch: at least {duration(seconds['ttft'])} to the first token, {duration(seconds['step'])} for each "
            "further token",
            f"expected: {self.work.questions:,} questions in at least {duration(self.run_seconds)} on {count} "
            f"replica{'s' if count > 1 else ''} with answers {answers}, {duration(longest)} if each has "
            f"{self.max_new_tokens} tokens",
            *["these times are at the budget that is asked for; images decide the number"] * self.by_image,
            "not in these times: preparing images, the method's own functions, starting and loading",
        ]

    def record(self) -> dict[str, Any]:
        """The estimate as JSON types; bytes and seconds."""
        return {
            "weights": self.weights.device,
            "weights_outside_device": self.weights.host,
            "kv_bytes": self.kv_bytes,
            "activations": asdict(self.activations),
            "remembered_bytes": self.remembered,
            "tower_passes": self.work.passes,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "fits": self.fits,
            "adaptive": self.by_image,
            "device": self.device,
            "questions": self.work.questions,
            "batches": self.batches,
            "rates": None if self.rates is None else asdict(self.rates),
            **({"seconds": self.seconds, "run_seconds": self.run_seconds} if self.rates else {}),
        }


# The estimate of a run


def estimate(config: RunConfig, place: Placement | None = None) -> "Estimate | FamilyEstimate":
    """The estimate of a run.

    Args:
        place: the ranks of the run; None for one process.

    Raises:
        UserError: the run could not start: an unknown method, a budget that the model cannot meet, missing files, or
            questions about videos for a model that takes images only.
    """
    data, _ = read_questions(config)
    planned, device = data.questions[: config.limit], device_of(config.device)
    unusual = config.text_tower, config.quantization, config.tensor_parallel, config.zero, config.image_options
    if container := declared_class(config.model, *unusual, data.images.noun == "videos"):
        return estimate_family(config, container, data, planned, device)
    checkpoint = outline_checkpoint(config.model, config.text_tower)
    model = runtime(checkpoint, torch.device("meta"), dict(config.image_options))
    if data.images.noun == "videos" and not model.takes_videos:
        raise UserError(f"{data.title} asks about videos, and {model.name} takes images only; choose a Video-LLaVA.")
    reducer = build_reducer(config, model.visual_tokens)
    require(reducer, model.spec)
    here = len(place.hosts[0][1]) if place is not None and device.type == "cpu" else 1
    spread = Spread(
        1 if place is None else place.replicas, here, config.tensor_parallel, config.zero, config.zero_ranks
    )
    longest = config.max_new_tokens or data.max_new_tokens
    dtype = DTYPES[config.dtype]
    work = workload(model, data, planned, config.batch_size, longest, reducer)
    llm: Any = model.llm
    rows = sum(max(memory.lengths(model, reducer, shape)) for shape in work.shapes[: config.batch_size])
    rates = measure_rates(device, dtype, max(1, rows), llm.embed_tokens.embedding_dim, llm.config.intermediate_size)
    if reducer.needs_text_tower and model.text_tower is not None:
        model.clip = outline_text_tower(model)
    return Estimate(
        model=model,
        reducer=reducer,
        work=work,
        batch_size=config.batch_size,
        max_new_tokens=longest,
        dtype=dtype,
        quantization=config.quantization,
        spread=spread,
        rates=rates,
        free=free_memory(device),
        device=str(device),
    )


@dataclass(frozen=True)
class FamilyEstimate:
    """What a run of a checkpoint of `llava.hf.families` will need, as far as its configuration and processor tell.

    Attributes:
        weights: bytes by part.
        kv_bytes, full_kv_bytes: bytes of the keys and values of a batch of the longest sampled prompts and their
            answers, under the method and with all visual tokens.
        cached, layers: number of decoder layers with keys and values, and of all decoder layers.
        batch: number of questions of that batch.
        budget: visual tokens of an image, in words.
        free: bytes free on the device; None if the device is not there.
    """

    title: str
    weights: dict[str, int]
    kv_bytes: int
    full_kv_bytes: int
    cached: int
    layers: int
    batch: int
    budget: str
    max_new_tokens: int
    questions: int
    free: int | None
    device: str

    @property
    def need(self) -> int:
        """Bytes of weights and cache."""
        return sum(self.weights.values()) + self.kv_bytes

    def lines(self) -> list[str]:
        """The estimate in words."""
        where = "" if self.cached == self.layers else f" in {self.cached} of {self.layers} layers, the others have none"
        room = "how much is free there is not known" if self.free is None else f"{size_text(self.free)} are free"
        return [
            f"weights {listed(self.weights)}",
            f"KV cache {size_text(self.kv_bytes)} for {self.batch} questions at {self.budget} visual tokens and "
            f"{self.max_new_tokens} new tokens (full: {size_text(self.full_kv_bytes)}){where}",
            f"weights and cache need {size_text(self.need)} on {self.device} for each rank, activations not counted; "
            f"{room}",
            f"not estimated for {self.title}, whose own forward runs: activations, images that are remembered, and "
            f"times; {self.questions:,} questions would be asked",
        ]

    def record(self) -> dict[str, Any]:
        """The estimate as JSON types; bytes."""
        return asdict(self) | {"fits": False if self.free is not None and self.need > self.free else None}


def estimate_family(
    config: RunConfig, container: str, data: Dataset, planned: Sequence[Question], device: torch.device
) -> FamilyEstimate:
    """Weights and cache. Sampled images are read, because only the processor knows how many tokens each one has."""
    from llava.hf.checkpoint_model import load_family
    from llava.hf.families import why_not
    from llava.hf.reduce import require_any

    dtype = DTYPES[config.dtype]
    model: Any = load_family(config.model, container, dtype, device, weights=False)
    videos = data.images.noun == "videos"
    if videos and not model.takes_videos:
        raise UserError(f"{data.title} asks about videos, and {model.name} takes images only; choose a Video-LLaVA.")
    reducer = build_reducer(config, model.visual_tokens)
    require_any(model, reducer)
    if why := why_not(model.family, model.hf_model.config, reducer):
        raise UserError(why)
    token, breaks, shapes = model.token("video" if videos else "image"), model.family.breaks, []
    for question in sampled(data, planned):
        given = model.inputs([data.sample(question)])
        ids = given["input_ids"][0]
        shown = (ids == token).long()
        ends = torch.cat([shown.diff(), -shown[-1:]])
        # Lengths of the unbroken runs of visual tokens. A family with breaks puts one after each row of an image.
        runs = torch.cat([shown.new_zeros(1), shown.cumsum(0)[ends < 0]]).diff().tolist()
        pieces = [sum(runs) // len(question.images)] * len(question.images) if breaks and question.images else runs
        images = tuple(single(1, tokens) for tokens in pieces)
        if videos and "decoder" not in reducer.acts_in:  # the text between frames does not divide a video
            times = int(given["video_grid_thw"][0, 0])
            images = (frames(times, 1, sum(runs) // times),)
        shapes.append(QuestionShape(len(ids) - int(shown.sum()), images))
    longest = config.max_new_tokens or data.max_new_tokens
    count = min(config.batch_size, len(planned))
    layers: list[Any] = [getattr(layer, "self_attn", None) for layer in model.llm.layers]
    widths = [one.k_proj.out_features + one.v_proj.out_features if hasattr(one, "k_proj") else 0 for one in layers]

    def kv(method: Reducer) -> int:
        prompts = sorted((memory.lengths(model, method, shape, most=True) for shape in shapes), key=max, reverse=True)
        rows = [prompts[number % len(prompts)] for number in range(count)]
        held = 0
        for layer, window, width in zip(zip(*rows, strict=True), model.windows, widths, strict=True):
            held += width * min(max(layer) + longest - 1, window - 1)  # a window counts the token that asks
        return count * dtype.itemsize * held

    budget, ratio, total = reducer.budget, reducer.retention_ratio, "each image's" if reducer.retention_ratio else ""
    kept = f"{budget_text(budget, ratio)} of {total}" if total else "all" if config.method == FULL else str(budget)
    if memory.by_image(model, reducer, shapes):
        most = max(memory.visual_plan(model, reducer, one, most=True)[0] for shape in shapes for one in shape.images)
        kept = f"most {most} ({MEASURED}; {budget} asked)"
    return FamilyEstimate(
        model.family.title,
        {part: number * dtype.itemsize for part, number in parts_of(model).items()},
        kv(reducer),
        kv(registry.build(FULL, model.visual_tokens)),
        sum(map(bool, widths)),
        len(widths),
        count,
        kept,
        longest,
        len(planned),
        free_memory(device),
        str(device),
    )


def parts_of(model: Any) -> dict[str, int]:
    """How many numbers the weights of a model of `llava.hf.families` have by part; shared weights count once."""
    tower = model.inner.get_submodule(model.family.tower.partition(".")[0])
    seen: set[int] = set()
    found = {}
    for part, module in (
        ("vision tower", tower),
        ("decoder", model.llm),
        ("head", model.head),
        ("rest", model.hf_model),
    ):
        own = {id(weight): weight.numel() for weight in module.parameters() if id(weight) not in seen}
        seen |= own.keys()
        found[part] = sum(own.values())
    return found


def outline_text_tower(model: Llava) -> ClipText:
    """The CLIP text tower that belongs to the vision tower, made from its config.json on the meta device."""
    folder = locate(model.text_tower, "CLIP text tower", weights=False)
    config: Any = CLIPConfig.from_dict(read_json(folder / "config.json")).text_config
    tower: Any = model.tower
    with torch.device("meta"):
        return ClipText(
            config, tower.config.hidden_size, tower.post_layernorm, lambda text: [0] * len(text.split()), 0, 0
        )


# The questions of a run as memory and time see them


def sampled(data: Dataset, planned: Sequence[Question]) -> Sequence[Question]:
    """Evenly spaced questions of a run."""
    if not planned:
        raise UserError(f"{data.title} has no question to estimate; raise --limit.")
    return planned[:: max(1, len(planned) // SAMPLED)][:SAMPLED]


def workload(
    model: Llava,
    data: Dataset,
    planned: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    reducer: Reducer,
) -> Workload:
    """Prompts and images of evenly spaced questions, the length of their reference answers, and passes of the tower.

    If features are remembered, the tower sees an image once; otherwise once for every batch that asks about it. For the
    control `none` it sees nothing.
    """
    chosen = sampled(data, planned)
    shapes = tuple(shape_of(model, data, question) for question in chosen)
    answers = [len(model.tokenizer(q.answer, add_special_tokens=False).input_ids) for q in chosen if q.answer]
    groups = [answers[i : i + batch_size] for i in range(0, len(answers), batch_size)]
    steps = sum(min(max(group), max_new_tokens - 1) for group in groups) / len(groups) if groups else 0.0
    # Methods that act before or inside the tower change its output, so later questions cannot use it.
    kept = can_remember(model) and reducer.acts_in.isdisjoint(("tower", "input_grid"))
    batches = [planned] if kept else chunks(asking_order(planned, planned, model), batch_size)
    passes = sum(len({name for question in batch for name in question.images}) for batch in batches)
    if reducer.blind:
        passes, kept = 0, False
    return Workload(shapes, steps, len(planned), passes, kept)


def shape_of(model: Llava, data: Dataset, question: Question) -> QuestionShape:
    """The shape of a question. Its images are opened only if the model's visual tokens depend on their size."""
    video = data.images.noun == "videos"
    blank = Image.new("RGB", (1, 1))
    stand_in = Video((blank,)) if video else blank
    prompt = model.prompt(
        Sample(question.id, question.question, question.suffix, tuple(stand_in for _ in question.images) or None)
    )
    by_size = not video and (hasattr(model, "anyres") or model.axes)
    images = []
    for name in question.images:
        size = None  # the largest image
        if by_size:
            with suppress(UserError, OSError):  # an image that cannot be read counts as the largest
                opened: Any = data.images.open(name)
                size = opened.size
        images.append(layout_of(model, size, video))
    return QuestionShape(sum(token >= 0 for token in prompt.ids), tuple(images), " ".join(question.images))


# How fast the device multiplies and copies, measured in about a second


def measure_rates(device: torch.device, dtype: torch.dtype, rows: int, width: int, inner: int) -> Rates:
    """Time products of [rows, width] with [width, inner], and copies, and take the fastest of each.

    It starts with fewer rows and doubles them, as long as a product takes no more than LONGEST seconds.
    """
    right = torch.randn(width, inner, device=device).to(dtype)
    operations, count = 0.0, min(FEWEST, rows)
    while True:
        left = torch.randn(count, width, device=device).to(dtype)
        spent = fastest("left @ right", SPENT / 4, left=left, right=right)
        operations = max(operations, 2 * count * width * inner / spent)
        if count == rows or 2 * spent > LONGEST:
            break
        count = min(2 * count, rows)
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    copied = 2 * COPIED / fastest("target.copy_(source)", SPENT, target=target, source=source)
    bus = copied / 2
    if device.type == "cuda":
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
        bus = COPIED / fastest("target.copy_(source, non_blocking=True)", SPENT, target=target, source=host)
    name = hardware(str(device))
    if device.type == "cpu":
        name = f"{name}, {torch.get_num_threads()} threads"
    return Rates(name, operations, copied, bus)


def fastest(statement: str, seconds: float, **tensors: Tensor) -> float:
    """Seconds of a statement on named tensors: the fastest of the blocks timed within `seconds`.

    The device is synchronised before and after each block.
    """
    timer = Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)
