"""Ask one question about images and print the answer, as LLaVA's module of this name does.

    python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file dog.jpg --query "What is this?"

Differs from LLaVA's: the method comes from --method, --budget and --set or from the environment.
"""

import io
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from PIL import Image

from eval.command import exit_on_user_error, make_parser
from eval.llava_scripts import chosen_method, method_flags
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.processing.image import open_image

IMAGE_PLACEHOLDER = "<image-placeholder>"
# Part of a model's name -> its template; the first that fits.
TEMPLATES = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
    "": "llava_v0",
}
SECONDS = 60  # for an image of the web


def load_image(image_file: str) -> Image.Image:
    """An RGB image from a file or an address."""
    if not image_file.startswith(("http://", "https://")):
        return open_image(image_file)
    try:
        with urllib.request.urlopen(image_file, timeout=SECONDS) as reply:
            return open_image(io.BytesIO(reply.read()), image_file)
    except OSError as error:
        raise UserError(f"Cannot fetch {image_file} ({error}); download it and give its path.") from error


def prompt_of(query: str, mode: str) -> str:
    """The prompt, with the image at the placeholder in the query, or else before the query."""
    placed = query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    turns = conv_templates[mode].copy()
    turns.append_message(turns.roles[0], placed if placed != query else f"{DEFAULT_IMAGE_TOKEN}\n{query}")
    turns.append_message(turns.roles[1], None)
    return turns.get_prompt()


def eval_model(args: Any) -> None:
    """Print the answer.

    Args:
        args: model_path, model_base, query, conv_mode (None to choose by the model's name), image_file (one or several,
            separated by `sep`), temperature, top_p, num_beams, max_new_tokens; also method, budget and set.
    """
    method, budget, given = chosen_method(args)
    options: dict[str, Any] = {**given}
    name = get_model_name_from_path(args.model_path)
    mode = next(template for part, template in TEMPLATES.items() if part in name.lower())
    if args.conv_mode not in (None, mode):
        print(f"{name} would be asked with the template {mode}; --conv-mode {args.conv_mode} is used.", file=sys.stderr)
    prompt = prompt_of(args.query, args.conv_mode or mode)
    images = [load_image(file) for file in args.image_file.split(args.sep)]
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, method=method, budget=budget, **options
    )
    with torch.inference_mode():
        (ids,) = model.generate(
            tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
            images=process_images(images, processor, model.config),
            image_sizes=[image.size for image in images],
            do_sample=args.temperature > 0,
            temperature=args.temperature,
            top_p=args.top_p,
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
        )
    print(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = method_flags(make_parser("llava.eval.run_llava", __doc__))
    p.add_argument("--model-path", default="facebook/opt-350m", help="folder or hub name of a checkpoint")
    p.add_argument("--model-base", help="not supported: merge the weights first")
    p.add_argument("--image-file", required=True, help="path or address of an image, or of several")
    p.add_argument("--query", required=True, help="the question")
    p.add_argument("--conv-mode", help="template of the prompt; by the model's name if left out")
    p.add_argument("--sep", default=",", help="between several images")
    p.add_argument("--temperature", type=float, default=0.2, help="0: greedy")
    p.add_argument("--top_p", type=float, help="of sampling")
    p.add_argument("--num_beams", type=int, default=1, help="beams")
    p.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")
    eval_model(p.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
