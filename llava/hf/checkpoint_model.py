"""The families of `llava.hf.families` in the evaluation pipeline: loading their checkpoints, and answering questions.

The checkpoint's own processor makes the prompt from its chat template, with images before the message of the benchmark.
Frames of a video are those that the benchmark reads, so the processor chooses none; it is told when each was shown.
transformers' `generate` decodes it greedily inside `FamilyReductionContext`. Of the checkpoint's
generation_config.json, only the end tokens are used.

Without torchvision, a processor is built without its video part, and videos are refused.

Read: transformers 5.23.0, processing_utils.py, models/auto/processing_auto.py, generation/utils.py
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    PROCESSOR_MAPPING,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    is_torchvision_available,
)

from llava.errors import MethodError, UserError
from llava.file_state import FileState
from llava.hf.families import FamilyWrapper, kinds_of, why_not
from llava.hf.models import StockSample
from llava.hf.reduce import FamilyReductionContext, require_any
from llava.model.checkpoint.config import refuse_activations
from llava.model.checkpoint.files import about_snapshot, files_of, locate, name_of
from llava.model.checkpoint.load import real_vocabulary, refuse_long_vocabulary
from llava.model.llava_arch import LoadedModel
from llava.pipeline.accounting import Answer, Batch, Timer, Timing
from llava.processing.json_files import read_json
from llava.processing.prompt import Prompt, Sample
from llava.processing.video import Video
from llava.reduction.modules import prefill_flops
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import ModelSpec, PatchGrid
from llava.transformers_names import cache_of, no_init_weights, set_kernel

SIZE = 1024  # the model's number of visual tokens is that of an image with edges of so many pixels

TILES = "Tiles between which the prompt has text count as images: budgets and means per image are those of a tile."


class FamilyModel(FamilyWrapper, LoadedModel):
    """A checkpoint that answers questions about images, and about videos in the families that have them.

    Args:
        model: the model, in evaluation mode.
        processor: the checkpoint's own processor.
        name: hub id or folder name.
        files: the checkpoint's files by name, in their state before they were read.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, name: str, files: Mapping[str, FileState]):
        super().__init__(model, processor.tokenizer)
        self.processor, self.name, self._files = processor, name, files
        self.stop, self.spread, title = None, False, self.family.title
        self.takes_videos = self.family.videos
        self.conversation = f"chat template of {title}"
        rows = self.head.out_features
        refuse_long_vocabulary(processor.tokenizer, rows, name)
        self.vocabulary = real_vocabulary(processor.tokenizer, rows, self.token("image"), self.token("video"))
        padding = processor.tokenizer.pad_token_id
        padding = min(self.end_ids) if padding is None else padding
        model.generation_config = GenerationConfig(eos_token_id=sorted(self.end_ids), pad_token_id=padding)
        self.notes = (
            f"{name} runs as transformers' {title}, with its own chat template and image processor "
            f"({self.conventions['image_processor']}).",
            "Its budgets as ratios are of each image's tokens; the budget in tokens that stands beside them is that of "
            f"an image of {SIZE} x {SIZE} pixels.",
            "Operations of its vision tower and projector are not counted"
            + (", nor those of its decoder." if not self._countable else "."),
            *about_snapshot(files["config.json"].path.parent),
        )

    @property
    def conventions(self) -> dict[str, Any]:
        return {"image_processor": type(self.processor.image_processor).__name__}

    @cached_property
    def spec(self) -> ModelSpec:
        given = self.inputs([Sample("", "?", image=Image.new("RGB", (SIZE, SIZE)))])
        tokens = int((given["input_ids"] == self.token("image")).sum())
        has_cls = self.family.cls is not None
        return ModelSpec(tokens, len(self.llm.layers), PatchGrid(1, tokens), len(self.stock_tower.blocks), has_cls)

    @cached_property
    def _countable(self) -> bool:
        """Whether operations can be counted: all matrices of the decoder are linear layers that every token passes."""
        parts = [part for layer in self.llm.layers for part in layer.modules() if not hasattr(part, "in_features")]
        plain = all(weight.dim() < 2 for part in parts for weight in part.parameters(recurse=False))
        return plain and all(hasattr(getattr(layer, "self_attn", None), "q_proj") for layer in self.llm.layers)

    @cached_property
    def windows(self) -> list[int]:
        """For each decoder layer, the largest number of keys that a token attends to."""
        window, kinds = getattr(self.llm.config, "sliding_window", None) or 0, kinds_of(self.hf_model.config)
        return [window if kind == "sliding_attention" else sys.maxsize for kind in kinds]

    def prompt(self, sample: Any) -> Prompt:
        if isinstance(sample, StockSample):
            return super().prompt(sample)
        raise UserError(f"{self.name} ({self.family.title}) only answers benchmarks and runs in reduce().")

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments of the model's forward, with prompts padded on the left."""
        shown = [image for sample in samples for image in sample.images]
        videos = [image for image in shown if isinstance(image, Video)]
        chats = []
        for sample in samples:
            content: list[dict[str, Any]] = [
                {"type": "video"} if isinstance(image, Video) else {"type": "image", "image": image}
                for image in sample.images
            ]
            chats.append([{"role": "user", "content": [*content, {"type": "text", "text": sample.message}]}])
        if videos:
            given = self._with_videos(chats, [image for image in shown if not isinstance(image, Video)], videos)
            return dict(given.to(self.device, self.hf_model.dtype))
        given = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(given.to(self.device, self.hf_model.dtype))

    def _with_videos(self, chats: list[Any], images: list[Any], videos: list[Video]) -> Any:
        """Arguments of the model's forward for prompts of which some have videos."""
        if getattr(self.processor, "video_processor", None) is None:
            raise UserError(
                f"{self.name} prepares videos with the package torchvision, which is not installed; install the "
                "torchvision that belongs to this torch."
            )
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        about = [
            {
                "total_num_frames": video.total or len(video.frames),
                "fps": video.rate,
                "frames_indices": list(video.indices or range(len(video.frames))),
            }
            for video in videos
        ]
        return self.processor(
            text=texts,
            images=images or None,
            videos=[list(video.frames) for video in videos],
            video_metadata=about,
            do_sample_frames=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def answers(
        self, samples: Sequence[Sample], reducer: Reducer, max_new_tokens: int, ignore_eos: bool, timer: Timer
    ) -> Batch:
        """See `llava.pipeline.generate.generate`."""
        if why := why_not(self.family, self.hf_model.config, reducer):
            raise MethodError(why)
        require_any(self, reducer)
        given = self.inputs(samples)
        timer.mark("preprocess")
        length, passes = given["input_ids"].shape[1], [0]

        def answerable(ids: Tensor, scores: Tensor) -> Tensor:
            """Check that scores are finite, and rule out the rows of the head that stand for no token."""
            known = scores[:, : self.vocabulary]
            for sample, sound in zip(samples, known.sum(-1).isfinite().tolist(), strict=True):
                if not sound:
                    raise UserError(
                        f"The logits for question {sample.id} are not finite: check the weights of {self.name}, or use "
                        "another --dtype."
                    )
            return F.pad(known, (0, scores.shape[1] - self.vocabulary), value=-torch.inf)

        def watch(ids: Tensor, scores: Any, **more: Any) -> Tensor:
            if not passes[0]:
                timer.mark("prefill")
            passes[0] += 1
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ends = [-1] if ignore_eos else sorted(self.end_ids)
        questions, names = [sample.question for sample in samples], [sample.id for sample in samples]
        with FamilyReductionContext(self, reducer, questions, timer, names) as reduced:
            output: Any = self.hf_model.generate(
                **given,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                logits_processor=[answerable],
                stopping_criteria=[watch],
                return_dict_in_generate=True,
            )
        timer.mark("decode")
        record, answers = reduced.record, []
        layouts = [tuple(image.layout for image in images) for images in record.images]
        canvases = [tuple(image.canvas for image in images) for images in record.images]
        if any(len(own) != len(sample.images) for own, sample in zip(layouts, samples, strict=True)):
            self.notes = tuple(dict.fromkeys([*self.notes, TILES]))
        for row, sample in enumerate(samples):
            ids = output.sequences[row, length:].tolist()
            ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
            account, trace = reduced.accounting[row], reduced.traces[row]
            text = self.decode(ids).strip()
            answers.append(Answer(sample.id, text, tuple(ids), account, trace, layouts[row], canvases[row]))
            if self._countable:
                lengths = tuple(one.lengths[row] for one in reduced.segments for _ in one.layers)
                keys = tuple(map(min, lengths, self.windows))
                record.operations.add("prefill", prefill_flops, self.llm.layers, lengths, self.head, keys)
        spent = timer.seconds
        timing = Timing(**{known.name: spent.get(known.name, 0.0) for known in fields(Timing)})
        room = bytes_of(cache_of(output))
        images = sum(len(sample.images) for sample in samples)
        return Batch(
            tuple(answers), timing, reduced.kv_bytes, record.operations, passes[0] - 1, images, kv_bytes_allocated=room
        )


def bytes_of(cache: Any) -> int:
    """Bytes of the keys and values of a cache."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)


def load_family(
    source: str | Path, container: str, dtype: torch.dtype, device: torch.device, weights: bool = True
) -> FamilyModel:
    """A checkpoint in the layout of transformers, from safetensors alone.

    Args:
        container: the class of the model, a key of `llava.hf.families.FAMILIES`.
        weights: False reads no weights. The model is then on the meta device: it makes prompts but answers nothing.

    Raises:
        UserError: the checkpoint is incomplete, or its processor needs a package that is not installed.
    """
    name, folder = name_of(source), locate(source, "checkpoint", weights=weights)
    files = files_of(folder)
    kind = getattr(transformers, container)
    refuse_activations(read_json(folder / "config.json"), folder)
    try:
        processor = read_processor(folder, kind)
        if not processor.chat_template:
            raise UserError("it has no chat template, by which questions are asked; take a chat checkpoint.")
        if not weights:
            config = kind.config_class.from_pretrained(folder)
            set_kernel(config, "sdpa")
            with torch.device("meta"), no_init_weights():
                empty = kind(config).eval()
            empty.tie_weights()
            outline = FamilyModel(empty, processor, name, files)
            outline.device = torch.device("cpu")  # of the prompts
            return outline
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"Cannot load {name}: {' '.join(str(error).split())[:600]}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} weights, {missing[0]} among them; fetch it again.")
    return FamilyModel(model.eval(), processor, name, files)


def read_processor(folder: Path, kind: Any) -> Any:
    """The processor of a checkpoint of the model class `kind`; without its video part if torchvision is missing."""
    whole: Any = PROCESSOR_MAPPING[kind.config_class]
    parts = whole.get_attributes()
    # Processors take their parts by position, so only the last one can be left out.
    if is_torchvision_available() or parts[-1] != "video_processor":
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    alone: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts[:-1])})
    return alone.from_pretrained(folder, trust_remote_code=False)
