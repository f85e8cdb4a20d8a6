"""Loading a checkpoint of any family into the class that runs it, with choices of how images are read."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    CLIPImageProcessorPil,
    PreTrainedTokenizerBase,
)

from llava.budget import or_environment
from llava.errors import UserError, unknown
from llava.model.checkpoint.config import QWEN
from llava.model.checkpoint.files import locate
from llava.model.checkpoint.load import Checkpoint, load_checkpoint
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.parallel import device_of_rank, parallel_of
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.places import ASSETS
from llava.processing.json_files import read_json
from llava.reduction import registry

if TYPE_CHECKING:
    from llava.hf.interface import ScriptModel

TOY_MODEL = ASSETS / "tinyllava"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FAMILIES: dict[str, type[Llava]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "video_llava": VideoLlava,
    "qwen2_5_vl": QwenVL,
    "qwen2_vl": QwenVL,
}


def runtime(checkpoint: Checkpoint, device: torch.device, conventions: dict[str, Any]) -> Llava:
    """The running model of a checkpoint.

    Args:
        conventions: keyword arguments of the family's class, possibly as text from the command line. None leaves a
            choice to the class.

    Raises:
        UserError: the family has no such keyword argument.
    """
    cls = FAMILIES[checkpoint.family]
    known = list(inspect.signature(cls).parameters)[2:]
    for name in [name for name in conventions if name not in known]:
        if not known:
            raise UserError(f"{checkpoint.name} leaves no choice of {name} in reading images; leave it out.")
        raise unknown(f"choice of {checkpoint.family} in reading images", name, known)
    chosen = {name: parse(name, value) for name, value in conventions.items() if value is not None}
    return cls(checkpoint, device, **chosen)


def parse(name: str, value: Any) -> Any:
    """Convert text from the command line: "672x672" to a size, digits to a number. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    if name == "force":
        width, _, height = value.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise UserError(f"force should be WIDTHxHEIGHT such as 672x672, got {value!r}.")
        return int(width), int(height)
    if name in ("min_pixels", "max_pixels"):
        if not value.isdigit():
            raise UserError(f"{name} should be a whole number, got {value!r}.")
        return int(value)
    return value


def load(
    source: str | Path | None = None,
    dtype: str = "float32",
    device: str = "auto",
    text_tower: str | Path | None = None,
    quantization: str | None = None,
    tensor_parallel: int = 1,
    zero: str | None = None,
    videos: bool = False,
    **conventions: Any,
) -> Llava:
    """Load a checkpoint of any family.

    A checkpoint of `llava.hf.families.FAMILIES` only answers questions, and takes only source, dtype and device.

    Args:
        source: directory or hub id, in the transformers or the original layout; None for the bundled toy model.
        dtype: float32, bfloat16 or float16.
        device: "cpu", "cuda", "cuda:1", or "auto".
        text_tower: folder or hub id of the CLIP that the vision tower comes from, if the checkpoint names none.
        quantization: "8bit" or "4bit", with bitsandbytes.
        tensor_parallel: number of ranks that each hold a part of every decoder layer. More than 1 needs a process group
            of that size, see `llava.model.parallel.join`. All its ranks load the model and answer the same questions.
        zero: ZeRO-Inference, for a decoder that does not fit on one device. Its weights are partitioned over the ranks
            of the process group (a group of one is made if there is none) and fetched layer by layer: from the host's
            memory with "cpu", from the devices of the ranks with "none".
        videos: load a Qwen2-VL or Qwen2.5-VL as one of these families, too, so that it takes videos.
        conventions: choices of how images are read: `merge`, `anyres_rule` and `force` for
            llava.model.llava_next.LlavaNext, `min_pixels` and `max_pixels` for llava.model.qwen_vl.QwenVL.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    place, source = device_of(device), source or TOY_MODEL
    if container := declared_class(source, text_tower, quantization, tensor_parallel, zero, conventions, videos):
        # Imported here, because modules of llava.model must not import the pipeline when they are loaded.
        from llava.hf.checkpoint_model import load_family

        family = load_family(source, container, DTYPES[dtype], place)
        family.loaded_with = {"source": str(source), "dtype": dtype, "videos": videos}
        return cast(Llava, family)  # it answers questions like a Llava
    parallel = parallel_of(tensor_parallel, zero, quantization)
    if parallel is not None:
        place = device_of_rank(place)
    checkpoint = load_checkpoint(source, DTYPES[dtype], place, text_tower, quantization, parallel)
    model = runtime(checkpoint, place, conventions)
    # With these arguments another process can load the same model, on a device of its own.
    model.loaded_with = {
        "source": str(source),
        "dtype": dtype,
        "text_tower": None if text_tower is None else str(text_tower),
        "quantization": quantization,
        "tensor_parallel": tensor_parallel,
        "zero": zero,
        **conventions,
    }
    return model


def declared_class(
    source: str | Path,
    text_tower: str | Path | None,
    quantization: str | None,
    tensor_parallel: int,
    zero: str | None,
    conventions: Mapping[str, Any],
    videos: bool = False,
) -> str | None:
    """The key in `llava.hf.families.FAMILIES` of a checkpoint's class; None if it is not of these families.

    Args: see `load`.

    Raises:
        UserError: the checkpoint is of these families, and an argument is given that they do not support.
    """
    raw = read_json(locate(source, "checkpoint", weights=False) / "config.json")
    kind = str(raw.get("model_type"))
    if (kind in FAMILIES and not (videos and kind in QWEN)) or kind not in CONFIG_MAPPING:
        return None
    from llava.hf.families import FAMILIES as DECLARED

    container: str | None = getattr(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(CONFIG_MAPPING[kind], None), "__name__", None
    )
    if container not in DECLARED:
        return None
    others = {"--text-tower": text_tower, "--quantization": quantization, "--zero": zero, **conventions}
    others["--tensor-parallel"] = tensor_parallel if tensor_parallel > 1 else None
    others["quantization_config (in its config.json)"] = raw.get("quantization_config")
    if refused := [name for name, value in others.items() if value is not None]:
        raise UserError(f"{', '.join(refused)} cannot be used with {source}, a {kind}; leave it out.")
    return container


def device_of(name: str) -> torch.device:
    """A device of this machine: "cpu", "cuda", "cuda:1", "mps", or "auto" for CUDA if there is a GPU, otherwise CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"The device should be auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}.")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device.type]:
        raise UserError(
            f"Device {name!r} was asked for, but this machine has no {device.type.upper()} device; use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {name!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA devices."
        )
    return device


class UnknownArgumentError(UserError, TypeError):
    """An unknown keyword argument. It is a TypeError too, because some callers catch that and try without it."""


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: Any = "cuda",
    use_flash_attn: bool = False,
    method: str | None = None,
    budget: int | float | str | None = None,
    torch_dtype: Any = torch.float16,
    attn_implementation: str | None = None,
    customized_config: Any = None,
    **options: Any,
) -> tuple[PreTrainedTokenizerBase, "ScriptModel", CLIPImageProcessorPil, int]:
    """Load a LLaVA-1.5 or LLaVA-NeXT for a script written for LLaVA's own package.

    Args:
        model_path: folder or hub id, in the transformers or the original layout.
        model_base: refused; merge the weights first.
        model_name: unused, because config.json says what the checkpoint is.
        device_map: "auto", a device, or {"": device}. The whole model is on one device.
        device: used instead of `device_map` unless it is "cuda".
        method: by default the environment variable VTR_METHOD, whose use is reported on standard error. Without either,
            all visual tokens are kept. `ScriptModel.use` can choose another method later.
        budget: visual tokens of an image, or the ratio of them to keep; by default the variable VTR_BUDGET.
        torch_dtype: a dtype or its name.
        attn_implementation: None or "sdpa", which lmms-eval gives. SDPA is always used.
        customized_config: refused.
        options: options of the method.

    Returns:
        Tokenizer, model, image processor for `llava.mm_utils.process_images`, and longest prompt in tokens.

    Raises:
        UserError: an argument is not supported, or the checkpoint or the method cannot be used. For an unknown argument
            the error is also a TypeError.
    """
    # Imported here, because modules of llava.model must not import the pipeline when they are loaded.
    from llava.hf.interface import ScriptModel

    if model_base is not None:
        raise UserError(f"model_base is not supported; merge the weights of {model_path} into {model_base} first.")
    if use_flash_attn or attn_implementation not in (None, "sdpa"):
        asked = "use_flash_attn" if use_flash_attn else f"attn_implementation={attn_implementation!r}"
        raise UserError(f"{asked} is not supported: attention runs torch's own fused kernel; leave it out.")
    if customized_config is not None:
        raise UserError(
            "customized_config is not supported: the model is what its config.json says; edit a copy of it."
        )
    method, budget = or_environment(method, budget)
    cls = registry.method(method or "full")  # a wrong name is found before the weights are read
    for name in options:
        try:
            registry.option_key(cls, name)
        except UserError as error:
            raise UnknownArgumentError(
                f"load_pretrained_model has no argument {name!r}, so it was taken for an option of a method: {error}"
            ) from None
    if method is None and (budget is not None or options):
        raise UserError(f"A budget ({budget}) or options ({options}) need a method; set VTR_METHOD or give method=...")
    dtype = DTYPES.get(torch_dtype, torch_dtype)
    if dtype not in DTYPES.values():
        raise UserError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {torch_dtype!r}.")
    place = device if str(device) != "cuda" else device_map
    if isinstance(place, dict) and place.keys() == {""}:
        place = place[""]
    place = device_of(f"cuda:{place}" if isinstance(place, int) else str(place))
    bits = "8bit" if load_8bit else "4bit" if load_4bit else None
    checkpoint = load_checkpoint(model_path, dtype, place, quantization=bits)
    model = ScriptModel(checkpoint, place, method or "full", budget, **options)
    processor = model.get_vision_tower().image_processor
    return checkpoint.tokenizer, model, processor, getattr(model.config, "max_sequence_length", 2048)
