"""Benchmark questions answered by vLLM in this process, instead of by the pipeline's own decoder.

pixels  The engine gets the pipeline's token ids and images; the method runs inside it (llava/serving/plugin.py).
embeds  The engine gets whole prompts as embeddings, which the pipeline makes (llava/serving/client.py).

The route "pixels" is for LLaVA-1.5, with methods that can run inside an engine and are not random. Images are padded
and resized here, so the engine's image processor, which reads the same preprocessor_config.json, has nothing left to
resize. LLaVA-NeXT's tiles would be resized by other code than the pipeline's. A random method would not get the
question's name, which is its seed.

The engine starts with the first question, and ends with this process.

Official code read: vLLM 0.32.0, entrypoints/llm.py, sampling_params.py, v1/worker/utils.py (request_memory)
"""

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, DynamicCache

from llava.errors import MethodError, UserError
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer, Batch, Record, SeenImage, Timer, Timing
from llava.pipeline.decoder import Prefilled, Segment
from llava.pipeline.generate import until_decoder
from llava.processing.image import as_rgb, pad_to_square
from llava.processing.json_files import read_json
from llava.processing.prompt import Sample
from llava.reduction.budget import plan_image
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import on_padding, single
from llava.serving import register_models
from llava.serving.client import EMBEDS, PIXELS
from llava.serving.engine_method import refuse_gaps, served_by, why_not_anywhere

if TYPE_CHECKING:
    import llava.serving.plugin  # noqa: F401  # the engine imports it: answers depend on it (eval/answers/source_hash.py)

PIXEL_CLASS = "LlavaForConditionalGeneration"
CLASSES = (PIXEL_CLASS, "LlavaNextForConditionalGeneration")
SIZES = ("budget", "retention_ratio")
SETUP = (
    "scripts/serve_setup.sh of a checkout makes its environment, for ENGINE=vllm scripts/eval/*.sh and scripts/bench"
)
# Set before vLLM is imported. Without multiprocessing, killing this process leaves no engine running.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENVIRONMENT |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def import_vllm() -> Any:
    """The vllm module; UserError if it is not installed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(f"vLLM cannot be imported ({' '.join(str(error).split())}): {SETUP}.") from error
    register_models()  # an old *.egg-info in the working folder would hide the entry point
    return vllm


def engine_arguments(reducer: Reducer, directory: Path) -> tuple[str, dict[str, Any]]:
    """The route of a method on a checkpoint, and vLLM's arguments for it.

    Raises:
        UserError: no engine can give the same answers as the pipeline.
    """
    if why := why_not_anywhere(reducer):
        raise UserError(why)
    architectures = read_json(directory / "config.json").get("architectures") or ["an unnamed class"]
    if not {*architectures} & {*CLASSES}:
        raise UserError(
            f"--engine vllm takes {' and '.join(CLASSES)} in transformers' layout, and {directory.name} is "
            f"{', '.join(architectures)}; use --engine own, or serve it by scripts/serve.sh."
        )
    refuse_gaps(reducer)
    embeds = {"enable_prompt_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    if PIXEL_CLASS not in architectures or any(option.name.split("__")[-1] == "seed" for option in fields(reducer)):
        return EMBEDS, embeds
    chosen = {option.name: getattr(reducer, option.name) for option in fields(reducer) if option.name not in SIZES}
    options = {name: ",".join(map(str, value)) if type(value) is tuple else value for name, value in chosen.items()}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config.vtr = {"method": reducer.name, "budget": reducer.retention_ratio or reducer.budget, "options": options}
    try:
        served_by(config)
    except UserError:
        return EMBEDS, embeds
    return PIXELS, {"hf_overrides": {"vtr": config.vtr}}


@dataclass
class Engine:
    """vLLM with one reduction method.

    Args:
        model: makes prompts, images and embeddings; from `llava.serving.client.load_client_model`.
        reducer: the method.
        directory: folder of the checkpoint.
        dtype: dtype of the weights.
        batch_size: number of questions that are asked at once.

    Attributes:
        outputs: vLLM's own outputs for the last batch.
    """

    model: Llava
    reducer: Reducer
    directory: Path
    dtype: str
    batch_size: int

    def __post_init__(self) -> None:
        self.vllm = import_vllm()
        self.route, self.arguments = engine_arguments(self.reducer, self.directory)
        self.settings = {"name": "vLLM", "version": self.vllm.__version__, "route": self.route}
        inside = ", nor are those of tower and method, nor merged tokens" if self.route == PIXELS else ""
        self.model.notes += (
            f"vLLM {self.vllm.__version__} answered, by {self.route}: all its time stands under decode; operations of "
            f"the decoder are not counted{inside}; bytes of keys and values are those of its blocks.",
        )

    @cached_property
    def llm(self) -> Any:
        device = self.model.device
        given: dict[str, Any] = {"enforce_eager": True}  # on a CPU, compiling takes longer than it saves
        if device.type == "cuda":  # the client's model is already in the memory
            free, total = torch.cuda.mem_get_info(device)
            given = {"gpu_memory_utilization": 0.9 * free / total}
        try:
            with torch.inference_mode(False):  # the engine's tensors outlive the batch that starts it
                return self.vllm.LLM(
                    model=str(self.directory),
                    dtype=self.dtype,
                    load_format="safetensors",
                    max_num_seqs=self.batch_size,
                    seed=0,
                    **(given | self.arguments),
                )
        except Exception as error:
            raise MethodError(f"vLLM does not start: {' '.join(str(error).split())[:600]}") from error

    def answers(
        self, samples: Sequence[Sample], reducer: Reducer, max_new_tokens: int, ignore_eos: bool, timer: Timer
    ) -> Batch:
        """See `llava.pipeline.generate.generate`."""
        assert reducer == self.reducer, "an engine holds one method"
        llm, model = self.llm, self.model
        timer.mark("start")  # starting the engine counts for no question
        asked, record, visual = (self._pixels if self.route == PIXELS else self._embeds)(samples, timer)
        ends, stop = (frozenset[int](), None) if ignore_eos else (model.end_ids, model.stop)
        sampling = self.vllm.SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=sorted(ends),
            stop=[stop] if stop else None,
            detokenize=bool(stop),
            skip_special_tokens=False,
            logprobs=0,
        )
        self.outputs = outputs = llm.generate(asked, sampling, use_tqdm=False)
        timer.mark("decode")
        written, lengths = [], []
        for sample, given, visible, output in zip(samples, asked, visual, outputs, strict=True):
            (made,) = output.outputs
            if not math.isfinite(made.cumulative_logprob):
                raise UserError(
                    f"The logits for question {sample.id} are not finite: check the weights of {model.name}, or use "
                    "another --dtype."
                )
            ids = list(made.token_ids)
            written.append(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])
            lengths.append(len(output.prompt_token_ids) if self.route == PIXELS else len(given["prompt_embeds"]))
            if self.route == PIXELS and lengths[-1] != len(given["prompt_token_ids"]) - len(sample.images) + visible:
                raise MethodError(
                    f"The engine's prompt of question {sample.id} has {lengths[-1]} tokens, and not {visible} of its "
                    f"images: it runs without this package's plug-in. {SETUP}."
                )
        texts = [model.decode(ids) for ids in written]
        segment = Segment(range(model.spec.layers), tuple(lengths), tuple(visual), None, torch.empty(0))
        held = [length * self._token_bytes for length in lengths]
        accounts = record.accounting(Prefilled(torch.empty(0), DynamicCache(), [segment], held, sum(held)))
        parts = zip(samples, texts, written, accounts, record.steps, record.images, strict=True)
        known = self.route == EMBEDS  # whether it is known which tokens are kept
        answers = tuple(
            Answer(
                sample.id,
                (text.split(stop, 1)[0] if stop else text).strip(),
                tuple(ids),
                account,
                trace,
                tuple(image.layout for image in images) if known else (),
                tuple(image.canvas for image in images) if known else (),
            )
            for sample, text, ids, account, trace, images in parts
        )
        counts, spent = [len(output.outputs[0].token_ids) for output in outputs], timer.seconds
        return Batch(
            answers,
            Timing(**{known.name: spent.get(known.name, 0.0) for known in fields(Timing)}),
            sum(map(self._block_bytes, lengths)),
            record.operations,
            max(counts) - 1,
            images=sum(len(sample.images) for sample in samples),
            kv_bytes_allocated=sum(self._block_bytes(a + b) for a, b in zip(lengths, counts, strict=True)),
        )

    def _pixels(self, samples: Sequence[Sample], timer: Timer) -> tuple[list[dict[str, Any]], Record, list[int]]:
        """Requests with images, the record of these images, and the number of visual tokens of each prompt."""
        model, slot = self.model, self.model.hf_model.config.image_token_id
        processor, layout = model.image_processor, single(model.layout.rows, model.layout.columns)
        plan = plan_image(self.reducer, model.spec, layout)
        planned, whole = plan.tokens, layout.with_cls if self.reducer.keep_cls and not plan.fits else layout
        assert planned is not None, "refused by served_by"
        asked: list[dict[str, Any]] = []
        for sample in samples:
            shown: tuple[Any, ...] = sample.images  # no videos: `generate` refuses them
            images = [pad_to_square(as_rgb(one), processor.padding_colour, processor.size) for one in shown]
            ids = [slot if token < 0 else token for token in model.prompt(sample).ids]
            asked.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {}))
        timer.mark("preprocess")
        seen = list[list[SeenImage]]()
        for sample in samples:
            # It is not known which tokens are kept, so tokens on padding can be counted only if nothing is dropped or
            # there is no padding.
            canvases: list[Any] = [model.canvas(image) for image in sample.images]
            known = [one if plan.fits or not on_padding(layout, one).any() else None for one in canvases]
            seen.append([SeenImage(layout, whole.tokens, planned, plan.asked, canvas) for canvas in known])
        return asked, Record(seen, [[] for _ in samples]), [planned[0] * len(sample.images) for sample in samples]

    def _embeds(self, samples: Sequence[Sample], timer: Timer) -> tuple[list[dict[str, Any]], Record, list[int]]:
        """Requests with prompt embeddings, the record of their images, and the number of visual tokens of each."""
        stages = until_decoder(self.model, samples, self.reducer, timer)
        timer.mark("prefill")
        sequence, record = stages.start, stages.record
        rows = zip(sequence.hidden, sequence.lengths, strict=True)
        asked = [{"prompt_embeds": row[-length:].clone().cpu()} for row, length in rows]
        return asked, record, [sum(stop - start for start, stop in spans) for spans in sequence.visual]

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        decoder = self.model.hf_model.config.get_text_config()
        width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        weight = self.model.llm.embed_tokens.weight
        return int(2 * self.model.spec.layers * decoder.num_key_value_heads * width * weight.element_size())

    def _block_bytes(self, tokens: int) -> int:
        """Bytes of the cache blocks that hold so many tokens."""
        block: int = self.llm.llm_engine.vllm_config.cache_config.block_size
        return math.ceil(tokens / block) * block * self._token_bytes
