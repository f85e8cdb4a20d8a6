"""Build the prompt of a sample: token ids with a placeholder per image, and the token range of the question.

Official code read: haotian-liu/LLaVA@c121f04, llava/mm_utils.py, tokenizer_image_token, and the slow Llama tokenizer of
transformers 4.37.2, which it runs with
Differs from it: the ranges of the question's tokens are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from llava.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import DEFAULT_MODE, Turn, conversation, render
from llava.errors import UserError
from llava.processing.sample import Sample

HOLE = "\x00"  # stands for the last user message to find its position in the template
SPACES = (" ", "\u2581")  # sentencepiece writes a space as the second


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids.

    Attributes:
        ids: token ids, with one IMAGE_TOKEN_INDEX in the place of each image's visual tokens.
        question: [start, stop) in ids, the tokens with any character of the last user turn's question; not the
            template, the image placeholder and the answer-format suffix.
        instruction: the same with the suffix.
        text: the prompt as text, with "<image>".
    """

    ids: tuple[int, ...]
    question: tuple[int, int]
    instruction: tuple[int, int]
    text: str


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, known: dict[str, list[int]] | None = None) -> list[int]:
    """Return the token ids of a prompt, with one IMAGE_TOKEN_INDEX per "<image>" and a BOS at the front only.

    The pieces between images are tokenised separately: a Llama tokenizer puts a dummy space before each, and the
    checkpoints were trained with that. A literal "</s>" or "<s>" in the text is a special token, as in the original.

    Args:
        known: piece -> its ids, filled here, so that the pieces that texts share are tokenised once.
    """
    known = {} if known is None else known
    words = text.split(IMAGE_PLACEHOLDER)
    for piece in words:
        if piece not in known:
            known[piece] = list(tokenizer(_dummy_spaces(piece, tokenizer)).input_ids)
    pieces = [known[piece] for piece in words]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [IMAGE_TOKEN_INDEX, *piece[has_bos:]]
    return ids


def _dummy_spaces(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Add the dummy space of the slow Llama tokenizer where transformers 5 leaves it out: before a space.

    The slow tokenizer puts a dummy space before the text and, in its "legacy" mode, after every special token.
    """
    if not isinstance(tokenizer, LlamaTokenizer) or tokenizer.add_prefix_space is False:
        return text
    if tokenizer.legacy:
        special = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
        text = re.sub(rf"({special})(?=[{''.join(SPACES)}])", r"\1 ", text) if special else text
    return f" {text}" if text.startswith(SPACES) else text


def build_prompt(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, mode: str = DEFAULT_MODE, longest: int | None = None
) -> Prompt:
    """Build the prompt of a sample. Its images come before the first user message, also with a history.

    Args:
        longest: text tokens that the decoder has positions for; None does not limit them.

    Raises:
        UserError: the text contains "<image>" or a lone surrogate, or is longer than `longest`.
    """
    _check_text(sample)
    slot = conversation(mode).slot * len(sample.images)
    turns: list[Turn] = [*sample.history, (sample.message, None)]
    turns[0] = (slot + turns[0][0], turns[0][1])
    text = render(mode, turns)
    known: dict[str, list[int]] = {}  # the beginnings tried below share pieces with the text
    ids = tokenize(text, tokenizer, known)
    length = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
    if longest is not None and length > longest:
        raise UserError(
            f"The text of sample {sample.id!r} has {length} tokens, but beside an image this model has positions for "
            f"{longest} tokens of text; shorten the question."
        )

    start = render(mode, [*turns[:-1], (HOLE, None)]).rindex(HOLE)
    before, message, cut = "" if sample.history else slot, sample.message, 0
    if conversation(mode).trim:  # spaces at the ends of a turn are not in the text
        message = message.rstrip()
        cut = 0 if before else len(message) - len(message.lstrip())
        before = before if message else before.rstrip()
    start += len(before)
    stop = start + len(message) - cut
    return Prompt(
        ids=tuple(ids),
        question=_token_range(
            text, ids, tokenizer, known, start, min(stop, start + max(0, len(sample.question) - cut))
        ),
        instruction=_token_range(text, ids, tokenizer, known, start, stop),
        text=text,
    )


def _token_range(
    text: str,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    known: dict[str, list[int]],
    start: int,
    stop: int,
) -> tuple[int, int]:
    """Turn a range of characters of `text` into the range of `ids` with any of these characters.

    Works without offsets, which a sentencepiece tokenizer does not give: a token ends after a prefix of the text if the
    prefix's ids are a prefix of `ids`. For tokens across a border, the border moves outwards until that holds.
    """
    first = next(
        (n for end in range(start, -1, -1) if (n := _clean_cut(text[:end], ids, tokenizer, known)) is not None), 0
    )
    ends = (n for end in range(stop, len(text)) if (n := _clean_cut(text[:end], ids, tokenizer, known)) is not None)
    return first, max(first, next(ends, len(ids)))


def _clean_cut(
    beginning: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, known: dict[str, list[int]]
) -> int | None:
    """Return the number of tokens in a prefix of the text, or None if it ends inside a token."""
    head = tokenize(beginning, tokenizer, known)
    return len(head) if head == list(ids[: len(head)]) else None


def _check_text(sample: Sample) -> None:
    texts = [sample.message, *(text for turn in sample.history for text in turn)]
    if any(IMAGE_PLACEHOLDER in text for text in texts):
        raise UserError(
            f"The text of sample {sample.id!r} contains {IMAGE_PLACEHOLDER!r}, which would add an image; remove it "
            "from the question: images are given in the sample's image field."
        )
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text of sample {sample.id!r} contains a lone surrogate (U+{ord(text[error.start]):04X} at "
                f"character {error.start}), which is no character; correct the text."
            ) from error
