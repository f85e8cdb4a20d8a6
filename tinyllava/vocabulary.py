"""The words of the embedded model, and its tokenizer in the transformers format.

One token per word. The fixed phrases of the `vicuna_v1` conversation (system sentence, roles, answer-format
suffix) are single tokens, so that the small model sees exactly the prompt text that a 7B model sees and still
pays only a few tokens for it.
"""

from collections.abc import Sequence
from functools import cache

COLORS = {
    "red": (214, 38, 36),
    "green": (44, 162, 62),
    "blue": (42, 78, 222),
    "yellow": (238, 218, 44),
    "purple": (134, 48, 172),
    "orange": (248, 138, 28),
    "cyan": (52, 208, 222),
    "pink": (248, 122, 188),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
PATTERNS = ("striped", "checkered", "dotted")
SIZES = ("small", "big")
DIGITS = tuple(str(digit) for digit in range(10))

PAD, BOS, UNKNOWN, IMAGE, EOS = "<pad>", "<s>", "<unk>", "<image>", "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER, ASSISTANT = "USER:", "ASSISTANT:"
SHORT_ANSWER = "Answer the question using a single word or phrase."

_FUNCTION_WORDS = """
what color is the ? of has which shape how many are there in image a number frame digit written does say contain
object objects panel left right above below or on side top bottom half yes no
"""


@cache
def words() -> tuple[str, ...]:
    """All tokens in id order. The end token is the last one: CLIP's text tower finds it by the largest id."""
    plain = sorted({*_FUNCTION_WORDS.split(), *COLOR_NAMES, *SHAPES, *PLURALS.values(), *PATTERNS, *SIZES, *DIGITS})
    return (PAD, BOS, UNKNOWN, IMAGE, SYSTEM, USER, ASSISTANT, SHORT_ANSWER, *plain, EOS)


@cache
def ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Ids of lower-case words split at spaces; raises KeyError for a word that is not in the vocabulary."""
    table = ids()
    return [table[word] for word in text.lower().replace("?", " ?").split()]


def tokenizer(
    vocabulary: Sequence[str] | None = None,
    phrases: Sequence[str] = (),
    special: Sequence[str] = (),
    longest: int = 1024,
):
    """The same vocabulary as a transformers tokenizer (BOS in front of every text, as Llama's does).

    Args:
        vocabulary: all tokens in id order; `words()` if None.
        phrases: further sentences that are single tokens.
        special: further special tokens.
        longest: tokens of the longest prompt, visual tokens included.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {word: index for index, word in enumerate(vocabulary or words())}
    backend = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])])
    sentences = (SYSTEM, USER, ASSISTANT, SHORT_ANSWER, *phrases)
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in sentences])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, *special],
        padding_side="left",
        model_max_length=longest,
    )
