"""Names and numbers with the values of the original LLaVA."""

IMAGE_PLACEHOLDER = "<image>"
IMAGE_TOKEN_INDEX = -200  # outside every vocabulary: an image slot can never be taken for a word
