"""The placeholders of LLaVA's prompts, under the names and with the values of LLaVA's own package.

Official code read: haotian-liu/LLaVA@c121f04, llava/constants.py
"""

IGNORE_INDEX = -100  # of a label that counts in no loss
IMAGE_TOKEN_INDEX = -200  # outside every vocabulary: an image slot can never be taken for a word
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"  # where a user of LLaVA's scripts wants the image in the question

# Of LLaVA's servers, whose modules are not part of this package: seconds, and where logs go.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."
