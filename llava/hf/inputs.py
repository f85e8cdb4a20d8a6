"""From the token ids of a processor of transformers back to prompts with one slot per picture.

A processor writes the image token once per visual token. How many a picture has is known, so runs become slots again,
also where two of them touch; padding goes; and a question is found in its prompt by what the tokens spell.

Read: transformers 5.23.0, processing of llava, llava_next, video_llava, qwen2_vl and qwen2_5_vl
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.errors import UserError
from llava.hf.models import ONE_CALL, Ready
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Prompt
from llava.processing.sample import Sample


@dataclass(frozen=True)
class StockSample(Sample):
    """A question whose prompt is tokens already, about pictures that are Ready."""

    prompt: Prompt | None = None


def samples(
    ids: Tensor,
    mask: Tensor | None,
    ready: Mapping[int, Sequence[Ready]],
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[StockSample]:
    """The rows of a batch.

    Args:
        ids: [B, L].
        mask: [B, L], 0 where there is padding, on either side; None for none.
        ready: pictures of the whole batch in order, by the token that stands for them.
        questions: the bare question of every row, for methods that look at it; without them all text behind the last
            picture is the question.
        tokenizer: needed with `questions`.

    Raises:
        UserError: prompts and pictures do not fit, or a question is not in its prompt.
    """
    rows = _without_padding(ids, mask)
    if questions is not None and len(questions) != len(rows):
        raise UserError(f"There are {len(rows)} prompts and {len(questions)} questions; give one for each.")
    waiting = {token: iter(pictures) for token, pictures in ready.items()}
    cut = [_with_slots(row, waiting) for row in rows]
    used, count = sum(len(pictures) for _, pictures in cut), sum(map(len, ready.values()))
    if used < count:
        raise UserError(f"The prompts have room for {used} of {count} pictures; {ONE_CALL}")
    found = []
    for number, (row, pictures) in enumerate(cut):
        question, span = "" if questions is None else questions[number], _behind(row)
        if questions is not None and pictures:
            span = question_span(row, question, tokenizer)
        # A name that depends on the prompt alone, so that random choices do not change with the batch.
        name = hashlib.blake2b(str(row).encode(), digest_size=8).hexdigest()
        prompt = Prompt(tuple(row), question=span, instruction=span, text="")
        found.append(StockSample(name, question, image=tuple(pictures) or None, prompt=prompt))
    return found


def question_span(ids: Sequence[int], question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """[start, stop) of the tokens that hold a question; the last place where it stands, whatever its white space.

    Args:
        ids: with IMAGE_TOKEN_INDEX where pictures stand.
    """
    # There and back, so that what the tokenizer does not know looks as it does in the prompt.
    wanted = _spelled(tokenizer(question, add_special_tokens=False).input_ids, tokenizer)
    stop = len(ids)
    while wanted and stop > 0:
        start = stop
        while start > 0 and ids[start - 1] != IMAGE_TOKEN_INDEX:
            start -= 1
        span = _find(ids[start:stop], wanted, tokenizer)
        if span is not None:
            return start + span[0], start + span[1]
        stop = start - 1
    raise UserError(
        f"The question {question!r} is not in its prompt, or pictures stand inside it; give it as it was written there."
    )


def _without_padding(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    rows = ids.tolist()
    if mask is None:
        return rows
    if mask.shape != ids.shape:
        raise UserError(f"attention_mask must have the shape {tuple(ids.shape)} of input_ids, got {tuple(mask.shape)}.")
    kept = mask.bool().tolist()
    return [[token for token, keep in zip(*row, strict=True) if keep] for row in zip(rows, kept, strict=True)]


def _with_slots(row: list[int], waiting: dict[int, Iterator[Ready]]) -> tuple[list[int], list[Ready]]:
    """A prompt with one slot per picture, and its pictures."""
    ids, pictures, place = [], [], 0
    while place < len(row):
        token = row[place]
        if token not in waiting:
            ids.append(token)
            place += 1
            continue
        picture = next(waiting[token], None)
        if picture is None:
            raise UserError(f"The prompts have more image tokens than the pictures have visual tokens; {ONE_CALL}")
        # The length of each run is known, so neighbouring pictures are told apart.
        count = picture.arrangement.tokens
        if row[place : place + count] != [token] * count:
            room = next((n for n, other in enumerate(row[place:]) if other != token), len(row) - place)
            raise UserError(f"A picture gives {count} visual tokens, its prompt has room for {room}; {ONE_CALL}")
        ids.append(IMAGE_TOKEN_INDEX)
        pictures.append(picture)
        place += count
    return ids, pictures


def _behind(ids: Sequence[int]) -> tuple[int, int]:
    """All text behind the last picture; everything without one."""
    slots = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    return (slots[-1] + 1 if slots else 0), len(ids)


def _find(ids: Sequence[int], wanted: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """The tokens that hold a text without white space, or None; found in a few decodings, by bisection."""

    def length(count: int) -> int:
        return len(_spelled(ids[:count], tokenizer))

    at, counts = _spelled(ids, tokenizer).rfind(wanted), range(len(ids) + 1)
    if at < 0:
        return None
    return bisect_right(counts, at, key=length) - 1, bisect_left(counts, at + len(wanted), key=length)


def _spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What tokens spell, without white space."""
    return "".join(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).split())
