"""The answer-format instructions of LLaVA's benchmark files, by name."""

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
VIZ = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"

# VIZ ends with SHORT, so it has to be tried first.
SUFFIXES = (VIZ, SHORT, LETTER, LETTER_CN)


def split_suffix(text: str) -> tuple[str, str]:
    """A prompt of the question files -> (question, suffix), because query-aware methods look at the question alone.

    A text that ends with none of the known instructions is all question.
    """
    for suffix in SUFFIXES:
        if text.endswith(f"\n{suffix}"):
            return text[: -len(suffix) - 1], suffix
    return text, ""
