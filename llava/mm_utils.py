"""The functions that scripts written for LLaVA call to prepare images and prompts, with LLaVA's names and arguments.

They forward to `llava.processing`, so that pixels and ids are the same as in every other command here.

Official code read: haotian-liu/LLaVA@c121f04, llava/mm_utils.py
Differs from it: KeywordsStoppingCriteria looks at the answer alone, and an empty keyword ends nothing; an unknown
aspect ratio is an error.
"""

import ast
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase, StoppingCriteria

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError, unknown
from llava.model.checkpoint.files import CACHED, snapshot_of
from llava.processing.image import (
    Size,
    as_rgb,
    best_resolution,
    cut,
    on_canvas,
    open_image,
    pad_to_square,
    parse_pinpoints,
    resize,
)
from llava.processing.prompt import tokenize


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path or hub id; FOLDER_checkpoint-NUMBER for a checkpoint of a training.

    For a folder in the hub's cache it is the model's name, by which scripts choose the conversation, not the commit.
    """
    snapshot = snapshot_of(model_path.rstrip("/"))
    *folders, name = (snapshot[0] if snapshot else model_path).strip("/").split("/")
    if name.startswith(CACHED):
        return name.rpartition("--")[2]
    return f"{folders[-1]}_{name}" if name.startswith("checkpoint-") and folders else name


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The RGB image of a file that is encoded as base64, as in MMBench's tables."""
    return open_image(BytesIO(b64decode(image)), "in base64")


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of one colour."""
    side = max(pil_img.size)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return canvas


def process_images(images: Sequence[Image.Image], image_processor: CLIPImageProcessorPil, model_cfg: Any) -> Any:
    """Prepare pixels as `image_aspect_ratio` of the model's configuration says.

    Returns:
        [B, 3, S, S], padded to squares ("pad") or with the sides cut off (None, "square"); for "anyres"
        [B, 1 + tiles, 3, S, S], or a list of [1 + tiles, 3, S, S] if images have different numbers of tiles.
    """
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect == "anyres":
        tiled = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
        return torch.stack(tiled) if len({len(crops) for crops in tiled}) == 1 else tiled
    if aspect not in (None, "square", "pad"):
        raise unknown("image_aspect_ratio", aspect, ("anyres", "pad", "square"))
    whole = [as_rgb(image) for image in images]
    if aspect == "pad":
        red, green, blue = (int(255 * value) for value in image_processor.image_mean)
        size = image_processor.size["shortest_edge"]
        whole = [pad_to_square(image, (red, green, blue), size) for image in whole]
    return image_processor(whole, return_tensors="pt")["pixel_values"]


def process_anyres_image(image: Image.Image, processor: CLIPImageProcessorPil, grid_pinpoints: Any) -> Tensor:
    """[1 + tiles, 3, S, S] pixels of LLaVA-NeXT: the whole image, then the tiles of the best of the resolutions."""
    tile, size, image = processor.crop_size["height"], processor.size["shortest_edge"], as_rgb(image)
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, _resolutions(grid_pinpoints, tile)))
    crops = [resize(image, (size, size)), *divide_to_patches(canvas, tile)]
    pixels: Tensor = processor(crops, return_tensors="pt")["pixel_values"]
    return pixels


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The (width, height) that keeps most of an image's pixels; on a tie the smallest, then the first."""
    return best_resolution(original_size, possible_resolutions)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The image, as large as fits, in the middle of a black canvas of this (width, height)."""
    return on_canvas(as_rgb(image), target_resolution)


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of an image, row by row, `patch_size` pixels wide; black where they extend beyond the image."""
    return cut(image, patch_size)


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: Any, patch_size: int) -> tuple[int, int]:
    """Columns and rows of tiles, `patch_size` pixels wide, into which an image of this (width, height) is divided."""
    width, height = select_best_resolution(image_size, _resolutions(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def _resolutions(grid_pinpoints: Any, tile: int) -> tuple[Size, ...]:
    """Resolutions of a configuration, which may be given as text."""
    if isinstance(grid_pinpoints, str):
        with suppress(ValueError, SyntaxError):  # then parse_pinpoints raises an error that says what is expected
            grid_pinpoints = ast.literal_eval(grid_pinpoints)
    return parse_pinpoints(grid_pinpoints, tile)


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Ids of a prompt, `image_token_index` for each "<image>": a list, or a tensor [L] with return_tensors="pt"."""
    if return_tensors not in (None, "pt"):
        raise UserError(f"return_tensors must be 'pt' or None, got {return_tensors!r}.")
    ids = [image_token_index if token == IMAGE_TOKEN_INDEX else token for token in tokenize(prompt, tokenizer)]
    return torch.tensor(ids) if return_tensors else ids


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops when every answer of a batch contains one of the keywords.

    Args:
        input_ids: [B, L] ids of the prompts. Output ids may begin with them.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: Tensor):
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer, self.prompts = tokenizer, input_ids

    def __call__(self, output_ids: Tensor, scores: Any = None, **kwargs: Any) -> bool:
        prompts = self.prompts.to(output_ids.device)
        repeated = torch.equal(output_ids[:, : prompts.shape[1]], prompts)
        answers = self.tokenizer.batch_decode(output_ids[:, prompts.shape[1] :] if repeated else output_ids)
        return all(any(keyword in answer for keyword in self.keywords) for answer in answers)
