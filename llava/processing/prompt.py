"""A question with its images, and its prompt: token ids with a placeholder per image, and the question's token range.

Official code read: haotian-liu/LLaVA@c121f04, llava/mm_utils.py, tokenizer_image_token, and the slow Llama tokenizer of
transformers 4.37.2, which it runs with
Differs from it: it also finds the range of the question's tokens.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import DEFAULT_MODE, conversation
from llava.errors import UserError, optional_imports
from llava.processing.json_files import read_json
from llava.processing.video import Video


@dataclass(frozen=True)
class Sample:
    """One question about no, one or several images.

    Attributes:
        id: stable name of the question; seeds the methods that draw random numbers.
        question: the question alone, the text whose tokens query-aware methods look at.
        suffix: answer-format instruction, appended on a new line (GQA's asks for a single word or phrase).
        image: RGB image, a video (llava.processing.video.Video), a tuple of them, or None for a text-only prompt.
            The budget holds for each of them.
        image_ids: a hash of each image's content: images with the same id share one pass of the vision tower. () if
            the images share it with no others.
    """

    id: str
    question: str
    suffix: str = ""
    image: "Image.Image | Video | tuple[Image.Image | Video, ...] | None" = None
    image_ids: tuple[str, ...] = ()

    @cached_property
    def images(self) -> "tuple[Image.Image | Video, ...]":
        """All images, in the order in which they come before the question."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @cached_property
    def message(self) -> str:
        """The user's turn as the benchmark scripts write it."""
        return f"{self.question}\n{self.suffix}" if self.suffix else self.question


SPACES = (" ", "\u2581")  # sentencepiece writes a space as the second


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids.

    Attributes:
        ids: token ids, with one IMAGE_TOKEN_INDEX in the place of each image's visual tokens.
        question: [start, stop) in ids, the tokens with any character of the question, without template, image
            placeholder and answer-format suffix.
        instruction: the same with the suffix.
        text: the prompt as text, with "<image>".
    """

    ids: tuple[int, ...]
    question: tuple[int, int]
    instruction: tuple[int, int]
    text: str

    def without_images(self) -> "Prompt":
        """The same prompt with nothing in the places of its images; UserError if nothing else is in it."""

        def moved(span: tuple[int, int]) -> tuple[int, int]:
            start, stop = (end - self.ids[:end].count(IMAGE_TOKEN_INDEX) for end in span)
            return start, stop

        ids = tuple(token for token in self.ids if token != IMAGE_TOKEN_INDEX)
        if not ids:
            raise UserError("A prompt is only an image, and nothing is left of it without; ask something about it.")
        return Prompt(ids, moved(self.question), moved(self.instruction), self.text)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, known: dict[str, list[int]] | None = None) -> list[int]:
    """Return the token ids of a prompt, with one IMAGE_TOKEN_INDEX per "<image>" and a BOS only at the beginning.

    The pieces between images are tokenised separately: a Llama tokenizer puts a dummy space before each of them, and
    the checkpoints were trained with that. A literal "</s>" or "<s>" in the text is a special token, as in the
    original.

    Args:
        known: piece -> its ids. It is filled here, so that pieces that several texts share are tokenised once.
    """
    known = {} if known is None else known
    words = text.split(DEFAULT_IMAGE_TOKEN)
    for piece in words:
        if piece in known:
            continue
        spaced = piece
        if isinstance(tokenizer, LlamaTokenizer) and tokenizer.add_prefix_space is not False:
            # The slow tokenizer puts a dummy space before the text and, in its "legacy" mode, after every special
            # token. transformers 5 leaves it out before a space.
            if tokenizer.legacy:
                special = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
                spaced = re.sub(rf"({special})(?=[{''.join(SPACES)}])", r"\1 ", spaced) if special else spaced
            spaced = f" {spaced}" if spaced.startswith(SPACES) else spaced
        known[piece] = list(tokenizer(spaced).input_ids)
    pieces = [known[piece] for piece in words]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = list(pieces[0])
    for own in pieces[1:]:
        ids += [IMAGE_TOKEN_INDEX, *own[has_bos:]]
    return ids


def build_prompt(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, mode: str = DEFAULT_MODE, longest: int | None = None
) -> Prompt:
    """Build the prompt of a sample. Its images come before the message.

    Args:
        longest: number of text tokens that the decoder has positions for; None for no limit.

    Raises:
        UserError: the text contains "<image>" or a lone surrogate, or is longer than `longest`.
    """
    if DEFAULT_IMAGE_TOKEN in sample.message:
        raise UserError(
            f"The text of sample {sample.id!r} contains {DEFAULT_IMAGE_TOKEN!r}, which would add an image; remove it "
            "from the question: images are given in the sample's image field."
        )
    try:
        sample.message.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text of sample {sample.id!r} contains a lone surrogate (U+{ord(sample.message[error.start]):04X} at "
            f"character {error.start}), which is no character; correct the text."
        ) from error
    template = conversation(mode)
    slot = template.slot * len(sample.images)
    front, message = template.system + template.user, slot + sample.message
    written = message.strip() if template.trim else message
    text = front + written + template.assistant
    known: dict[str, list[int]] = {}  # the beginnings of the text that are tried below share pieces with it
    ids = tokenize(text, tokenizer, known)
    length = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
    if longest is not None and length > longest:
        raise UserError(
            f"The text of sample {sample.id!r} has {length} tokens, but beside an image this model has positions for "
            f"{longest} tokens of text; shorten the question."
        )

    # Where the message and its question stand in the text, from which a template may have cut spaces at both ends.
    stop = len(front + written)
    begin = len(front + slot) - (len(message) - len(message.lstrip()) if template.trim else 0)
    start = min(max(len(front), begin), stop)

    def tokens_before(ends: Iterable[int], otherwise: int) -> int:
        """How many tokens come before the first of these places in the text at which a token ends.

        A sentencepiece tokenizer gives no offsets. Instead, a token ends where the ids of the text up to there are the
        first of `ids`.
        """
        for end in ends:
            head = tokenize(text[:end], tokenizer, known)
            if head == ids[: len(head)]:
                return len(head)
        return otherwise

    # A border inside a token moves outwards.
    first = tokens_before(range(start, -1, -1), 0)
    asked = tokens_before(range(min(max(start, begin + len(sample.question)), stop), len(text)), len(ids))
    whole = tokens_before(range(stop, len(text)), len(ids))
    return Prompt(tuple(ids), question=(first, max(first, asked)), instruction=(first, max(first, whole)), text=text)


# Tokenizers of checkpoints

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. If it has a sentencepiece model, the ids are that model's.

    Args:
        config: the HF model's configuration.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy it from the base model.")
    decoder = config.text_config
    # If tokenizer_config.json names no class, the config decides. transformers does not know the type of the original
    # config.json, and with Mistral's config it leaves out the space that sentencepiece puts before a text.
    known = LlamaConfig() if decoder.model_type in ("llama", "mistral") else decoder
    try:
        return AutoTokenizer.from_pretrained(directory, config=known, trust_remote_code=False, **_spacing(directory))
    except UserError:  # sentencepiece is missing
        raise
    # tokenizers and sentencepiece raise plain Exceptions for files that they cannot read.
    except Exception as error:
        raise UserError(
            f"Cannot read the tokenizer in {directory} ({' '.join(str(error).split())[:200]}); fetch its files again."
        ) from error


def _spacing(directory: Path) -> dict[str, bool]:
    """Return the arguments of the library's Llama tokenizer that place its dummy spaces as the slow tokenizer did.

    add_prefix_space: the library always puts a space before a text, but some models (Yi's) do not. The sentencepiece
    model decides, because tokenizer.json has been wrong about it (transformers issue 29774).

    legacy: whether a dummy space also follows every special token. If tokenizer_config.json does not say, transformers
    4 assumed True, and transformers 5 assumes False.
    """
    settings = directory / "tokenizer_config.json"
    stated = read_json(settings).get("legacy") if settings.is_file() else None
    if (directory / "tokenizer.model").is_file():
        with optional_imports():
            from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        if not model.encode("a", out_type=str)[0].startswith(SPACES[1]):
            return {"add_prefix_space": False}
        return {"legacy": True} if stated is None else {}
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    outer = [tokenizer.get(part) or {} for part in ("normalizer", "pre_tokenizer")]
    inner = [step.get("normalizers") or step.get("pretokenizers") or () for step in outer]
    steps = [*outer, *(step for several in inner for step in several)]
    replaces = [step for step in steps if step.get("type") == "Replace" and step.get("content") == SPACES[1]]
    metaspaces = [step for step in steps if step.get("type") == "Metaspace"]
    prefix = any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) for step in metaspaces
    )
    if not (replaces or metaspaces):
        return {}
    if not prefix:
        return {"add_prefix_space": False}
    first = any(step.get("prepend_scheme") == "first" for step in metaspaces)
    return {"legacy": True} if stated is None and not first else {}
