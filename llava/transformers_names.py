"""What this project needs of transformers that another version may call otherwise, or no longer have.

Whatever transformers exports at its top level is public and is imported where it is used. All the rest stands here, so
that a release that renames something is answered in one file; tests/test_versions.py says what is gone. A name that has
changed already is told by what the installed version has, not by its number: 5.24 calls the cache of a call and of its
output `cache`, those before it `past_key_values`.

Read: transformers 5.20.0 to 5.24.0, modeling_outputs.py, configuration_utils.py, generation/utils.py, models/llama
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor

from llava.errors import UserError
from llava.versions import TESTED, advice, note_untested

# Before the imports below, one of which may fail in a version that nobody has tried.
note_untested("torch", torch.__version__)
note_untested("transformers", transformers.__version__)

from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, local_torch_dtype
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.pixtral import modeling_pixtral
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import output_capturing
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

# The cache of keys and values, as an argument of models and layers and in their outputs.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})

# Methods that `llava.hf` overrides: of every model that generates, and of Qwen3-VL's decoder.
EXPAND = "_expand_inputs_for_generation"
PREPARE_POSITIONS = "_prepare_position_ids_for_generation"
CANDIDATES = "_get_candidate_generator"
DEEPSTACK = "_deepstack_process"

KERNEL = "_attn_implementation"  # of a configuration: its attention kernel, "sdpa" or another of transformers' names
HOOK = "_hf_hook"  # of a module: accelerate's
RANKS = "_tp_size"  # of a model: over how many ranks transformers has split it (tp_plan); None for no split
# The module whose hooks stay on a model after a call with output_hidden_states; they do nothing in other calls.
CAPTURING = output_capturing.__name__


# vLLM 0.26 imports its LLaVA with names that Pixtral lost in 5.17 and 5.19; only a tower of Pixtral would call them.
PIXTRAL = ("PixtralRotaryEmbedding", "position_ids_in_meshgrid")
vars(modeling_pixtral).update({name: None for name in PIXTRAL if not hasattr(modeling_pixtral, name)})


def cache_of(given: Any) -> Any:
    """The cache among arguments by name, or of an output; None where there is none."""
    if not isinstance(given, Mapping):  # the output is a tuple
        return None
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def vision_arguments(tower: Any, grids: Sequence[tuple[int, int, int]], device: torch.device) -> dict[str, Any]:
    """Arguments of a Qwen2-VL or Qwen2.5-VL tower, worked out on the host, so that it waits for no value of the device.

    Args:
        grids: frames, rows and columns of patches of each image.
    """
    grid, config = torch.tensor(grids), tower.config
    merge = config.spatial_merge_size
    given = {
        "grid_thw": grid,
        "position_ids": get_vision_position_ids(grid, merge).to(device, non_blocking=True),
    }
    if hasattr(config, "window_size"):
        index, lengths = get_vision_window_index(grid, merge, config.window_size, config.patch_size)
        given |= {"window_index": index.to(device, non_blocking=True), "cu_window_seqlens": lengths}
    return given


def refuse_others(given: Mapping[str, Any], known: Collection[str], whose: str, caller: str = "transformers") -> None:
    """Raise UserError for an argument that a replaced function, or a hook, does not know.

    Without this, an argument with a new name would be ignored: the fused attention decoded without its cache.

    Args:
        given: arguments by name; None counts as not given.
        known: those that are used, and those that change nothing in what is computed.
        whose: the function, for the sentence.
        caller: the library that calls it.
    """
    if others := sorted(name for name, value in given.items() if value is not None and name not in known):
        raise UserError(
            f"The {whose} of this package does not know {', '.join(others)}, which the installed {caller} gives to it; "
            + (advice(caller) if caller in TESTED else f"install the {caller} that pyproject.toml names")
            + "."
        )


def set_kernel(config: Any, kernel: str) -> None:
    """Choose the attention kernel of a configuration and its parts."""
    setattr(config, KERNEL, kernel)
