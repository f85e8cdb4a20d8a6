"""The model that `load_pretrained_model` returns to scripts written for LLaVA's own package.

Its `generate` and `forward` take LLaVA's arguments: ids with IMAGE_TOKEN_INDEX in place of each image, and the pixels
that `llava.mm_utils.process_images` makes. These are translated for the transformers model, which runs inside `reduce`.
Many methods read the question. It is taken from the last turn of the prompt, without its template and without the
answer-format instructions of LLaVA's benchmark files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, language_model/llava_llama.py and
multimodal_encoder/clip_encoder.py
Differs from it: an image without a place in the prompts is an error, and so is an argument that would have another
effect here; text-only prompts need no dummy image, and prompts are not cut to `tokenizer_model_max_length`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, zip_longest
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import ANSWER_FORMATS, MODES
from llava.errors import UserError
from llava.hf.models import WRAPPERS, PreparedImage
from llava.hf.patch import ReductionContext
from llava.hf.reduce import reduce
from llava.model.checkpoint.load import Checkpoint
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.model.official_names import (
    CLIPVisionTower,
    LlavaLlamaForCausalLM,
    LlavaMetaForCausalLM,
    LlavaMistralForCausalLM,
)
from llava.processing.json_files import read_json
from llava.transformers_names import CACHE, CausalLMOutputWithPast, cache_of

# Settings of `generate` that read the prompt. In LLaVA's own `generate`, they see only the answer.
READ_THE_PROMPT = ("repetition_penalty", "no_repeat_ngram_size", "prompt_lookup_num_tokens")
DECODERS = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}


class ScriptConfig(SimpleNamespace):
    """The fields of a LLaVA checkpoint's config.json, which scripts read and set."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class VisionTower:
    """What `get_vision_tower` returns, in place of LLaVA's CLIPVisionTower. Its weights are already loaded.

    Attributes:
        vision_tower: the CLIPVisionModel.
        image_processor: the processor for `llava.mm_utils.process_images`.
    """

    stands_for = (CLIPVisionTower,)
    is_loaded, select_feature = True, "patch"

    def __init__(self, checkpoint: Checkpoint):
        own: Any = checkpoint.image_processor  # both families have CLIP's
        self.vision_tower: Any = checkpoint.model.model.vision_tower
        self.select_layer: int = checkpoint.model.config.vision_feature_layer
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": own.size},
            crop_size={"height": own.crop, "width": own.crop},
            image_mean=list(own.mean),
            image_std=list(own.std),
        )
        self.config = self.vision_tower.config
        self.hidden_size: int = self.config.hidden_size
        self.num_patches_per_side: int = self.config.image_size // self.config.patch_size
        self.num_patches = self.num_patches_per_side**2

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vision_tower.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vision_tower.dtype
        return dtype

    def load_model(self, device_map: Any = None) -> None:
        """Do nothing, because the tower was loaded with the model."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "VisionTower":
        """Return the tower as it is; UserError if it would have to move or change its dtype."""
        place = self.device if device is None else torch.device(device)
        if (place.type, place.index or 0, dtype or self.dtype) != (
            self.device.type,
            self.device.index or 0,
            self.dtype,
        ):
            raise UserError(
                f"The vision tower is on {self.device} in {self.dtype}, as the whole model; move or convert the model."
            )
        return self

    def __call__(self, images: Tensor | Sequence[Tensor]) -> Any:
        """Patch features [B, N, D] of pixels [B, 3, S, S], without any reduction; for a list, a list of [1, N, D]."""
        if not isinstance(images, Tensor):
            return [self(image[None]) for image in images]
        with torch.no_grad():
            pixels = images.to(self.device, self.dtype)
            return encode(self.vision_tower, pixels, self.select_layer).features.to(images.dtype)


class ScriptModel(nn.Module):
    """A LLaVA model that runs with a reduction method and has the interface of LLaVA's own model.

    Args:
        checkpoint: a LLaVA-1.5 or LLaVA-NeXT, loaded on `device`.
        method: a name from `llava.reduction.registry.names`; `budget` and `options` are its own.

    Attributes:
        config: the fields of config.json, under LLaVA's names for a checkpoint in the transformers layout too.
        reduced: the `llava.hf.patch.ReductionContext`; `reduced.accounting` counts the tokens of the last prompts.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, method: str = "full", budget: Any = None, **options: Any
    ) -> None:
        super().__init__()
        family = checkpoint.family
        if family not in ("llava", "llava_next"):
            raise UserError(f"load_pretrained_model loads LLaVA-1.5 and LLaVA-NeXT; use llava.load for {family}.")
        self.checkpoint = checkpoint
        self.hf_model: Any = checkpoint.model
        self.config = config_of(checkpoint)
        if self.config.mm_use_im_start_end:
            raise UserError(
                f"{checkpoint.name} was trained with <im_start> and <im_end> around images, which is not supported."
            )
        self._vision_tower = VisionTower(checkpoint)
        self.use(method, budget, **options)
        self.eval()

    def use(self, method: str, budget: Any = None, **options: Any) -> ReductionContext:
        """Use another method from the next call on.

        Args: see `llava.reduce`.

        Returns:
            The new `self.reduced`.
        """
        runtime = WRAPPERS[self.checkpoint.family](self.checkpoint, self.device)
        tokenizer = self.checkpoint.tokenizer
        self.reduced = reduce(runtime, method, budget, questions=[], tokenizer=tokenizer, **options)
        self.runtime, self._method = runtime, (method, budget, options)
        return self.reduced

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScriptModel":
        """Called by `to`, `cuda`, `half` and so on. On another device, the reduction is set up again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if self.device != self.runtime.device:
            method, budget, options = self._method
            self.use(method, budget, **options)
        return self

    # What scripts ask of the model

    @property
    def stands_for(self) -> tuple[type, ...]:
        """The LLaVA classes for which `isinstance` returns True with this model."""
        return LlavaMetaForCausalLM, DECODERS[self.hf_model.config.text_config.model_type]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.hf_model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.hf_model.dtype
        return dtype

    def tie_weights(self) -> None:
        self.hf_model.tie_weights()

    def get_vision_tower(self) -> VisionTower:
        return self._vision_tower

    def get_model(self) -> SimpleNamespace:
        """The parts of the model under LLaVA's names. None of them reduces anything."""
        inner, llm = self.hf_model.model, self.runtime.llm
        return SimpleNamespace(
            config=self.config,
            get_vision_tower=self.get_vision_tower,
            vision_tower=self._vision_tower,
            mm_projector=inner.multi_modal_projector,
            image_newline=getattr(inner, "image_newline", None),
            embed_tokens=llm.embed_tokens,
            layers=llm.layers,
            norm=llm.norm,
        )

    # Answers and likelihoods

    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: Sequence[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stopping_criteria: Iterable[Callable[..., Any]] | None = None,
        **settings: Any,
    ) -> Any:
        """Answer prompts.

        Args:
            inputs: [B, L] ids, with IMAGE_TOKEN_INDEX in place of every image. Older scripts call it `input_ids`.
            images: pixels of all images in order, [n, 3, S, S] or [n, 1 + tiles, 3, S, S], or a list with one tensor
                per image. As in LLaVA, a prompt without an image may come with a dummy image, which is ignored.
            image_sizes: (width, height) of every image before preprocessing; LLaVA-NeXT needs them.
            modalities: "image" for each image; videos are refused.
            attention_mask: [B, L], 0 in the padding.
            stopping_criteria: functions that are called with the new ids [B, l] and their scores.
            settings: for `generate` of transformers: do_sample, num_beams, max_new_tokens and so on.

        Returns:
            Only the new ids, [B, l], with the end token; or a dictionary with these as `sequences` if the settings ask
            for one.

        Raises:
            UserError: images and prompts do not fit together, or a setting cannot be used.
        """
        for name in READ_THE_PROMPT:
            if settings.get(name) not in (None, 0, 1):
                raise UserError(f"{name} reads the prompt here, the answer alone in LLaVA's own; leave it out.")
        ids = input_ids if inputs is None else inputs
        if ids is None or (inputs is not None and input_ids is not None):
            raise UserError("generate takes the ids of the prompts as `inputs` or as `input_ids`; give one of the two.")
        if not settings.get("do_sample") and not settings.get("temperature"):
            settings.pop("temperature", None)  # LLaVA's scripts give 0 for greedy decoding
        refuse_videos(modalities)
        prompts = unpadded(ids, attention_mask)
        given = self._arguments(prompts, *without_dummies(prompts, images, image_sizes))
        length = given["input_ids"].shape[1]

        def on_answers(criterion: Callable[..., Any]) -> Callable[..., Any]:
            return lambda ids, scores, **more: criterion(ids[:, length:], scores, **more)

        runtime, rows_of_head = self.runtime, self.hf_model.config.text_config.vocab_size
        never = [*(settings.pop("suppress_tokens", None) or ()), *range(runtime.vocabulary, rows_of_head)]
        own = {"eos_token_id": sorted(runtime.end_ids), "pad_token_id": runtime.tokenizer.pad_token_id}
        with self.reduced:
            output = self.hf_model.generate(
                stopping_criteria=[on_answers(criterion) for criterion in stopping_criteria or ()],
                suppress_tokens=never or None,
                **given | own | settings,
            )
        if isinstance(output, Tensor):
            return output[:, length:]
        output.sequences = output.sequences[:, length:]
        return output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: None = None,
        past_key_values: None = None,
        inputs_embeds: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        modalities: Sequence[str] | None = None,
    ) -> Any:
        """Compute the logits of whole prompts and the loss of their labels, without gradients.

        Use it for likelihoods of given answers. The answer begins at the first label after the images, and the method
        sees only the prompt up to there. The answer then continues the reduced prompt token by token, as if it had been
        generated, so it cannot influence which visual tokens are kept.

        Args:
            input_ids, attention_mask, images, image_sizes, modalities: see `generate`.
            labels: [B, L], IGNORE_INDEX where there is no label. There can be none between two images.
            position_ids, past_key_values, inputs_embeds, output_attentions, output_hidden_states: refused.
            use_cache: has no effect.

        Returns:
            `logits` [B, M, V], in which every image has as many positions as it has visual tokens in the last layer;
            and `loss`, the mean over all labels, or None without labels. Shorter prompts are padded on the side that
            `tokenizer_padding_side` in the configuration names, by default on the right.
        """
        refused: dict[str, Any] = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        for name, value in refused.items():
            if value is not None and value is not False:
                raise UserError(f"forward runs whole prompts under a method and takes no {name}; leave it out.")
        if input_ids is None:
            raise UserError("forward needs input_ids, with IMAGE_TOKEN_INDEX for every image.")
        refuse_videos(modalities)
        prompts = unpadded(input_ids, attention_mask)
        images, image_sizes = without_dummies(prompts, images, image_sizes)
        targets = [[IGNORE_INDEX] * len(row) for row in prompts] if labels is None else unpadded(labels, attention_mask)
        # Without images nothing is reduced, so prompts need not be cut before their answers.
        ends = [
            len(prompt) if images is None else start_of_answer(prompt, own)
            for prompt, own in zip(prompts, targets, strict=True)
        ]
        rows, visual = self._last_states(prompts, ends, images, image_sizes)
        side, loss = getattr(self.config, "tokenizer_padding_side", "right"), None
        with torch.no_grad():
            logits = self.hf_model.lm_head(self.runtime.llm.norm(pad_sequence(rows, True, 0, side)))
        if labels is not None:
            spread = [torch.tensor(with_visual(*one)) for one in zip(prompts, targets, visual, strict=True)]
            wanted = pad_sequence(spread, True, IGNORE_INDEX, side)[:, 1:].to(logits.device)
            loss = F.cross_entropy(logits[:, :-1][wanted != IGNORE_INDEX].float(), wanted[wanted != IGNORE_INDEX])
        result = CausalLMOutputWithPast(loss=loss, logits=logits)
        return result.to_tuple() if return_dict is False else result

    def _last_states(
        self, prompts: Sequence[Sequence[int]], ends: Sequence[int], images: Any, sizes: Any
    ) -> tuple[list[Tensor], Sequence[int]]:
        """For each prompt, the hidden states [M, D] after the last layer, and how many of them are visual tokens.

        Args:
            ends: where the answer begins in each prompt; the method does not see the answer.
        """
        questions, answers = zip(*((row[:end], row[end:]) for row, end in zip(prompts, ends, strict=True)), strict=True)
        with self.reduced, torch.no_grad(), outputs_of(self.runtime.llm.layers[-1]) as hidden:
            output = self.hf_model(**self._arguments(questions, images, sizes), use_cache=True)
            del hidden[:-1]  # a method that reads deep layers may have run the last layer before the prefill
            for tokens in zip_longest(*answers, fillvalue=0):
                ids = torch.tensor(tokens, device=self.device)[:, None]
                output = self.hf_model(input_ids=ids, **{CACHE: cache_of(output)}, use_cache=True)
        lengths, visual = tuple(map(len, questions)), (0,) * len(questions)
        if images is not None:
            lengths, visual = self.reduced.segments[-1].lengths, self.reduced.segments[-1].visual
        width, states = hidden[0].shape[1], torch.cat(hidden, 1)  # padded on the left up to the answers
        rows = zip(states, lengths, answers, strict=True)
        return [row[width - length : width + len(answer)] for row, length, answer in rows], visual

    # Arguments of the transformers model

    def _arguments(
        self, prompts: Sequence[Sequence[int]], images: Any, sizes: Sequence[tuple[int, int]] | None
    ) -> dict[str, Any]:
        """Arguments of the transformers model: padded ids, mask and pixels. Also sets the questions of `reduced`."""
        given = self._pixels(images, sizes)
        prepared = iter(self.runtime.ready(given)[self.hf_model.config.image_token_id] if given else ())
        rows = [torch.tensor(self._with_visual_tokens(prompt, prepared)) for prompt in prompts]
        questions = [self._question(prompt) for prompt in prompts]
        # If a prompt has no question, methods take all text after the image for it.
        self.reduced.questions = questions if all(questions) else None
        if unused := len(list(prepared)):
            raise UserError(f"The prompts have a place for all images but {unused}; put <image> into them for each.")
        held = [torch.ones_like(row) for row in rows]
        ids, kept = (pad_sequence(one, True, 0, "left").to(self.device) for one in (rows, held))
        return {"input_ids": ids, "attention_mask": kept, **given}

    def _pixels(self, images: Any, sizes: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
        """The image arguments of the transformers model: crops of all images one after another, and (height, width)."""
        if images is None:
            return {}
        crops = torch.cat([image if image.dim() == 4 else image[None] for image in images])
        given: dict[str, Any] = {"pixel_values": crops.to(self.device, self.dtype)}
        if sizes is not None and self.runtime.newline is not None:
            given["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
        return given

    def _with_visual_tokens(self, prompt: Sequence[int], prepared: Iterator[PreparedImage]) -> list[int]:
        """The ids of a prompt, with each image's placeholder replaced by one image token per visual token."""
        ids: list[int] = []
        for token in prompt:
            if token != IMAGE_TOKEN_INDEX:
                ids.append(token)
                continue
            image = next(prepared, None)
            if image is None:
                raise UserError("The prompts have more <image> than there are images; give one image for each.")
            ids += [self.hf_model.config.image_token_id] * image.layout.tokens
        return ids

    def _question(self, prompt: Sequence[int]) -> str:
        """The question of a prompt: its last turn after the last image, without template and answer format.

        If there is no text after the image, it is the text before it, back to the beginning of that turn.
        """
        places = [place for place, token in enumerate(prompt) if token == IMAGE_TOKEN_INDEX]
        pieces = [prompt[before + 1 : stop] for before, stop in pairwise((-1, *places, len(prompt)))]
        texts: list[str] = [self.runtime.tokenizer.decode(list(piece)) for piece in reversed(pieces)]
        for template in MODES.values():
            if found := re.search(rf"{spaced(template.assistant)}\s*$", texts[0]):
                texts[0] = re.split(spaced(template.stop + template.user), texts[0][: found.start()])[-1]
                # A turn that begins before an image may be the first one, which follows the system text.
                texts[1:] = [re.split(spaced(template.user), text)[-1] for text in texts[1:]]
                formats = "|".join(map(spaced, ANSWER_FORMATS))
                texts = [re.sub(rf"({formats})\s*$", "", text) for text in texts]
                break
        return next(filter(None, map(str.strip, texts)), "")


def config_of(checkpoint: Checkpoint) -> ScriptConfig:
    """The fields of config.json; for the transformers layout, those that scripts read are added under LLaVA's names."""
    config, tiles = checkpoint.model.config, checkpoint.family == "llava_next"
    text = {name: value for name, value in config.get_text_config().to_dict().items() if value is not None}
    own = {
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad" if tiles else "flat",
        "image_aspect_ratio": "anyres" if tiles else "pad",
    }
    return ScriptConfig(**text | own | read_json(checkpoint.files["config.json"].path))


def unpadded(rows: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Ids or labels [B, L] as lists, without the padding."""
    if mask is None:
        return [list(row) for row in rows.tolist()]
    return [list(row[kept].tolist()) for row, kept in zip(rows, mask.bool(), strict=True)]


def refuse_videos(modalities: Sequence[str] | None) -> None:
    """Raise UserError for anything but images."""
    if others := {*([modalities] if isinstance(modalities, str) else modalities or ())} - {"image"}:
        raise UserError(f"modalities must be 'image' for each image, got {', '.join(map(repr, sorted(others)))}.")


def without_dummies(prompts: Sequence[Sequence[int]], images: Any, sizes: Any) -> tuple[Any, Any]:
    """Leave out the dummy image that LLaVA expects for each prompt of text alone.

    Args:
        images: one for every place in the prompts, and possibly one more for every prompt without an image.
        sizes: sizes of all of these images, or only of those that have a place.

    Returns:
        The images, None if there are none, and their sizes.
    """
    counts = [row.count(IMAGE_TOKEN_INDEX) for row in prompts]
    if images is not None and len(images) == sum(counts) + counts.count(0):
        used, place = list[int](), 0
        for count in counts:
            used += range(place, place + count)
            place += max(count, 1)
        sizes = [sizes[index] for index in used] if sizes is not None and len(sizes) == len(images) else sizes
        images = [images[index] for index in used]
    return (images if images is not None and len(images) else None), sizes


def start_of_answer(prompt: Sequence[int], labels: Sequence[int]) -> int:
    """The place of the first label after the last image of a prompt; the length of the prompt if there is none."""
    behind = max((place + 1 for place, token in enumerate(prompt) if token == IMAGE_TOKEN_INDEX), default=1)
    return next((place for place in range(behind, len(prompt)) if labels[place] != IGNORE_INDEX), len(prompt))


def with_visual(prompt: Sequence[int], labels: Sequence[int], visual: int) -> list[int]:
    """The labels of a prompt whose images are replaced by `visual` visual tokens, which get no label.

    Args:
        visual: number of visual tokens of all images together.
    """
    places = [place for place, token in enumerate(prompt) if token == IMAGE_TOKEN_INDEX]
    if not places:
        return list(labels)
    first, last = places[0], places[-1]
    if any(labels[place] != IGNORE_INDEX for place in range(first, last) if place not in places):
        raise UserError(f"A label between two images has no loss here; set it to {IGNORE_INDEX}.")
    unlabelled = visual + last + 1 - first - len(places)
    return [*labels[:first], *[IGNORE_INDEX] * unlabelled, *labels[last + 1 :]]


@contextmanager
def outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs [B, L, D] of a layer inside the context."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def spaced(text: str) -> str:
    """A regular expression that finds a text, whatever white space a tokenizer put into it."""
    return r"\s*".join(re.escape(character) for character in text if not character.isspace())
