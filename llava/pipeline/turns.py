"""Answer several questions about one image with the tokens that were kept for the first of them.

The first question is answered as by `generate`. What the decoder then holds of the prompt up to the end of the image
(the template's text and the image's remaining tokens, merged ones included) stays, in every layer. For a later question
only text runs. There are two ways:

first   the question's text follows the image; earlier questions and their answers are forgotten
turns   the question follows the earlier questions and answers, as in a conversation

A method that reduces between decoder layers leaves another number of tokens in each layer. Text of a later question
sees in each layer the tokens that the first question left there, in layers before the reduction therefore all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conversation, render
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline import decoder
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import decode, prefill, text_of
from llava.processing.prompt import Sample, tokenize
from llava.reduction.budget import require
from llava.reduction.modules import prefill_flops
from llava.reduction.reducer import Reducer


@dataclass(frozen=True)
class Turn:
    """One answer and what it cost up to its first token.

    Attributes:
        token_ids: generated ids, without the end token.
        flops: floating point operations, without those of the vision tower, which needs to see an image only once.
        kv_bytes: bytes of all keys and values that the decoder holds before the first token is decoded.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    flops: int
    kv_bytes: int


@torch.inference_mode()
def answer_turns(
    model: Llava, samples: Sequence[Sample], reducer: Reducer, in_context: bool, max_new_tokens: int = 128
) -> list[Turn]:
    """Answer questions about one image; the method chooses and merges tokens for the first of them alone.

    Args:
        samples: the questions in order; all have the same image or images.
        in_context: "turns" if True, "first" if False.

    Raises:
        UserError: there is no question or no image, the prompts differ before the end of the image, a conversation is
            longer than the decoder, or the method cannot run on this model at its budget.
    """
    if model.answers is not None or not samples or not samples[0].images:
        raise UserError(
            "Needs questions about an image, and a model whose decoder runs here: neither vLLM nor a family that runs "
            "its own forward."
        )
    require(reducer, model.spec)
    template, timer = conversation(model.conversation), Timer(model.device)
    text, before = "", list[int]()  # the conversation, and its ids up to the end of the image
    held: list[int] = []  # ids that the cache holds after the image
    turns: list[Turn] = []
    for sample in samples:
        prompt = model.prompt(sample)
        if not (turns and in_context):
            text, ids = prompt.text, list(prompt.ids)
        else:
            text += template.answered.replace("{}", turns[-1].text)
            text += render(model.conversation, sample.message).removeprefix(template.system)
            ids = tokenize(text, model.tokenizer)
        end = len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX)
        shown, ids = ids[:end], ids[end:]
        if model.longest_text is not None and len(shown) + len(ids) > model.longest_text:
            raise UserError(
                f"At question {sample.id!r} the conversation about its image has {len(shown) + len(ids)} tokens of "
                f"text, and this model has positions for {model.longest_text}; ask fewer questions in a conversation."
            )
        if not turns:
            before = shown
            state, record = prefill(model, [sample], reducer, timer)
            layers: list[Any] = state.cache.layers
            operations = record.operations.alone
            flops = sum(operations.values()) - operations.get("tower", 0)
        else:
            if shown != before:
                raise UserError(
                    f"The prompt of question {sample.id!r} differs from that of {samples[0].id!r} before the end of "
                    "the image, so nothing of it can be kept; ask about one image at a time."
                )
            # Text that two turns share stays. A tokenizer may join the end of an answer with what follows it.
            same = 0
            while in_context and same < min(len(held), len(ids)) and held[same] == ids[same]:
                same += 1
            decoder.forget_last(layers, state.segments, len(held) - same)
            new = model.llm.embed_tokens(torch.tensor([ids[same:]]).to(model.device))
            state.hidden = decoder.step(model.llm, state, new)[:, -1:]
            lengths = [layer.keys.shape[2] for layer in layers]
            flops = prefill_flops(model.llm.layers, [new.shape[1]] * len(lengths), model.head, lengths)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        (written,), steps = decode(model, state, [sample.id], max_new_tokens, False, timer)
        held = ids + written[:steps]
        turns.append(Turn(sample.id, text_of(model, written), tuple(written), flops, kv_bytes))
    return turns
