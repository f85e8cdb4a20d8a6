"""From a question to token ids with a slot for every image, and where in them the question stands.

Official code read: haotian-liu/LLaVA@c121f04, llava/mm_utils.py, tokenizer_image_token
Differs from it: the ranges of the question's tokens are ours. The ids are the same except, with the Llama tokenizer of
transformers 5, for a piece that begins with a space (no dummy space is put before it); no prompt built here has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llava.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import DEFAULT_MODE, Turn, conversation, render
from llava.errors import UserError
from llava.processing.sample import Sample

HOLE = "\x00"  # stands for the last user message while its place in the template is looked up


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be embedded.

    Attributes:
        ids: token ids, with IMAGE_TOKEN_INDEX where the visual tokens go.
        question: [start, stop) in ids, the tokens that hold any of the last user turn's bare question: no template,
            no image slot, no answer-format suffix.
        instruction: the same with the suffix.
        text: the prompt as text, with "<image>".
    """

    ids: tuple[int, ...]
    question: tuple[int, int]
    instruction: tuple[int, int]
    text: str


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, one IMAGE_TOKEN_INDEX per "<image>", a BOS only at the very front.

    The pieces between images are tokenised one by one: a Llama tokenizer puts its dummy space in front of each of them,
    and the checkpoints were trained with that.
    """
    pieces = [list(tokenizer(piece).input_ids) for piece in text.split(IMAGE_PLACEHOLDER)]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = pieces[0]
    for piece in pieces[1:]:
        ids += [IMAGE_TOKEN_INDEX, *piece[has_bos:]]
    return ids


def build_prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase, mode: str = DEFAULT_MODE) -> Prompt:
    """The prompt of a sample. Its images stand in front of the first user message, before any history."""
    _refuse_placeholders(sample)
    slot = conversation(mode).slot * len(sample.images)
    turns: list[Turn] = [*sample.history, (sample.message, None)]
    turns[0] = (slot + turns[0][0], turns[0][1])
    text = render(mode, turns)
    ids = tokenize(text, tokenizer)

    start = render(mode, [*turns[:-1], (HOLE, None)]).rindex(HOLE)
    if not sample.history:
        start += len(slot)
    return Prompt(
        ids=tuple(ids),
        question=_token_range(text, ids, tokenizer, start, start + len(sample.question)),
        instruction=_token_range(text, ids, tokenizer, start, start + len(sample.message)),
        text=text,
    )


def _token_range(
    text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, start: int, stop: int
) -> tuple[int, int]:
    """[start, stop) in characters of `text` -> [start, stop) in `ids`: every token that holds one of the characters.

    Without offsets, which a sentencepiece tokenizer does not give: where the ids of a beginning of the text are the
    beginning of the ids, a token ends. Tokens that straddle a border are found by moving away from the range until
    that is so.
    """
    first = next((n for end in range(start, -1, -1) if (n := _clean_cut(text[:end], ids, tokenizer)) is not None), 0)
    ends = (n for end in range(stop, len(text)) if (n := _clean_cut(text[:end], ids, tokenizer)) is not None)
    return first, max(first, next(ends, len(ids)))


def _clean_cut(beginning: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens in a beginning of the text, or None if its end lies inside a token."""
    head = tokenize(beginning, tokenizer)
    return len(head) if head == list(ids[: len(head)]) else None


def _refuse_placeholders(sample: Sample) -> None:
    texts = [sample.message, *(text for turn in sample.history for text in turn)]
    if any(IMAGE_PLACEHOLDER in text for text in texts):
        raise UserError(
            f"The text of sample {sample.id!r} contains {IMAGE_PLACEHOLDER!r}, which would add an image slot; "
            "remove it from the question: the image comes from the sample's image field."
        )
