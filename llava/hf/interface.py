"""The model that scripts written for LLaVA's own package get from `load_pretrained_model`.

Its `generate` takes LLaVA's arguments: ids with IMAGE_TOKEN_INDEX where an image stands, and what
`llava.mm_utils.process_images` made of the images. They become the arguments of the transformers model, which runs
inside `reduce`. The question, which many methods read, is the last turn of the prompt without its template and without
an answer-format instruction of LLaVA's benchmark files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py and llava/model/language_model/llava_llama.py
Differs from it: an image without a place in the prompts is an error, and so is what has another effect here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import ANSWER_FORMATS, MODES
from llava.errors import UserError
from llava.hf.models import WRAPPERS, PreparedImage
from llava.hf.reduce import reduce
from llava.model.checkpoint.load import Checkpoint
from llava.processing.json_files import read_json

# Settings of `generate` that read the prompt, which LLaVA's own `generate` hides from them.
READ_THE_PROMPT = ("repetition_penalty", "no_repeat_ngram_size", "prompt_lookup_num_tokens")


class ScriptModel(nn.Module):
    """A LLaVA under a method, with the interface of LLaVA's own model.

    Args:
        checkpoint: of LLaVA-1.5 or LLaVA-NeXT, on `device`.
        method: a name of `llava.reduction.registry.names`, with its budget and options.

    Attributes:
        config: the fields of config.json; those that scripts read are there for the transformers layout, too.
        reduced: see `llava.hf.patch.Reduced`; `reduced.accounting` counts the tokens of the last prompts.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, method: str, budget: Any = None, **options: Any
    ) -> None:
        super().__init__()
        family = checkpoint.family
        if family not in ("llava", "llava_next"):
            raise UserError(f"load_pretrained_model loads LLaVA-1.5 and LLaVA-NeXT; use llava.load for {family}.")
        self.runtime = WRAPPERS[family](checkpoint, device)
        self.reduced = reduce(self.runtime, method, budget, questions=[], tokenizer=checkpoint.tokenizer, **options)
        self.hf_model: Any = checkpoint.model
        own = {"mm_use_im_start_end": False, "image_aspect_ratio": "pad" if family == "llava" else "anyres"}
        self.config = SimpleNamespace(**own | read_json(checkpoint.files["config.json"].path))
        if self.config.mm_use_im_start_end:
            raise UserError(
                f"{checkpoint.name} was trained with <im_start> and <im_end> around images, which is not supported."
            )
        self.eval()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.hf_model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.hf_model.dtype
        return dtype

    def generate(
        self,
        inputs: Tensor,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | None = None,
        stopping_criteria: Iterable[Callable[..., Any]] | None = None,
        **settings: Any,
    ) -> Any:
        """Answer prompts.

        Args:
            inputs: [B, L] ids, IMAGE_TOKEN_INDEX for every image.
            images: pixels of all images in their order, [n, 3, S, S], [n, 1 + tiles, 3, S, S], or a list of such.
            image_sizes: (width, height) of every image before it was prepared; LLaVA-NeXT needs them.
            attention_mask: [B, L], 0 in the padding.
            stopping_criteria: called with the new ids [B, l] and their scores.
            settings: of transformers' `generate`: do_sample, num_beams, max_new_tokens and so on.

        Returns:
            [B, l] the new ids alone, end token included; a dictionary with them as `sequences` where that is asked for.

        Raises:
            UserError: images and prompts do not fit together, or a setting cannot be used.
        """
        for name in READ_THE_PROMPT:
            if settings.get(name) not in (None, 0, 1):
                raise UserError(f"{name} reads the prompt here, the answer alone in LLaVA's own; leave it out.")
        if not settings.get("do_sample") and not settings.get("temperature"):
            settings.pop("temperature", None)  # LLaVA's scripts give 0 for greedy decoding
        given = self._pixels(images, image_sizes)
        pictures = iter(self.runtime.ready(given)[self.hf_model.config.image_token_id] if given else ())
        mask = torch.ones_like(inputs) if attention_mask is None else attention_mask
        prompts = [row[kept].tolist() for row, kept in zip(inputs, mask.bool(), strict=True)]
        rows = [torch.tensor(self._with_visual_tokens(prompt, pictures)) for prompt in prompts]
        questions = [self._question(prompt) for prompt in prompts]
        # A method takes all text after the image where there is no question.
        self.reduced.questions = questions if all(questions) else None
        if unused := len(list(pictures)):
            raise UserError(f"The prompts have a place for all images but {unused}; put <image> into them for each.")
        held, length = [torch.ones_like(row) for row in rows], max(map(len, rows))
        ids, kept = (pad_sequence(one, True, 0, "left").to(self.device) for one in (rows, held))

        def on_answers(criterion: Callable[..., Any]) -> Callable[..., Any]:
            return lambda ids, scores, **more: criterion(ids[:, length:], scores, **more)

        runtime, rows_of_head = self.runtime, self.hf_model.config.text_config.vocab_size
        never = [*(settings.pop("suppress_tokens", None) or ()), *range(runtime.vocabulary, rows_of_head)]
        own = {"eos_token_id": sorted(runtime.end_ids), "pad_token_id": runtime.tokenizer.pad_token_id}
        with self.reduced:
            output = self.hf_model.generate(
                input_ids=ids,
                attention_mask=kept,
                stopping_criteria=[on_answers(criterion) for criterion in stopping_criteria or ()],
                suppress_tokens=never or None,
                **given | own | settings,
            )
        if isinstance(output, Tensor):
            return output[:, length:]
        output.sequences = output.sequences[:, length:]
        return output

    def _pixels(self, images: Any, sizes: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
        """Images as transformers' model takes them: crops of all images one after another, sizes (height, width)."""
        if images is None or not len(images):
            return {}
        crops = torch.cat([image if image.dim() == 4 else image[None] for image in images])
        given: dict[str, Any] = {"pixel_values": crops.to(self.device, self.dtype)}
        if sizes is not None and self.runtime.newline is not None:
            given["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
        return given

    def _with_visual_tokens(self, prompt: Sequence[int], pictures: Iterator[PreparedImage]) -> list[int]:
        """The ids of a prompt with the image token once per visual token."""
        ids: list[int] = []
        for token in prompt:
            if token != IMAGE_TOKEN_INDEX:
                ids.append(token)
                continue
            picture = next(pictures, None)
            if picture is None:
                raise UserError("The prompts have more <image> than there are images; give one image for each.")
            ids += [self.hf_model.config.image_token_id] * picture.arrangement.tokens
        return ids

    def _question(self, prompt: Sequence[int]) -> str:
        """The last turn after the last image of a prompt, without its template and answer format.

        If nothing is asked after the image, the text before it, back to the beginning of its turn.
        """
        places = [place for place, token in enumerate(prompt) if token == IMAGE_TOKEN_INDEX]
        pieces = [prompt[before + 1 : stop] for before, stop in pairwise((-1, *places, len(prompt)))]
        texts: list[str] = [self.runtime.tokenizer.decode(list(piece)) for piece in reversed(pieces)]
        for template in MODES.values():
            if found := re.search(rf"{spaced(template.assistant)}\s*$", texts[0]):
                texts[0] = re.split(spaced(template.stop + template.user), texts[0][: found.start()])[-1]
                # A turn that begins before an image may be the first one, behind the system's text.
                texts[1:] = [re.split(spaced(template.user), text)[-1] for text in texts[1:]]
                formats = "|".join(map(spaced, ANSWER_FORMATS))
                texts = [re.sub(rf"({formats})\s*$", "", text) for text in texts]
                break
        return next(filter(None, map(str.strip, texts)), "")


def spaced(text: str) -> str:
    """A pattern that finds a text however a tokenizer spaced it."""
    return r"\s*".join(re.escape(character) for character in text if not character.isspace())
