"""A plug-in that runs reduced prompts in vLLM. Its entry point in the group `vllm.general_plugins` is `register`."""

import importlib

from llava.serving.refusals import refuse_bad_requests
from llava.versions import note_untested

# Architecture, as checkpoints name it -> its class in llava.serving.plugin, imported when an engine asks for it.
MODELS = {
    "LlavaForConditionalGeneration": "ReducedLlava",
    "LlavaNextForConditionalGeneration": "ReducedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "ReducedQwen25",
    "Qwen3VLForConditionalGeneration": "ReducedQwen3",
    "Qwen3_5ForConditionalGeneration": "ReducedQwen35",
    "InternVLForConditionalGeneration": "ReducedInternVL",
}


def register() -> None:
    """Have the engine of this process serve the models, and refuse bad requests instead of answering with nonsense."""
    refuse_bad_requests()
    register_models()


def register_models() -> None:
    """Replace vLLM's model classes by classes with reduction; without a method they behave like vLLM's."""
    vllm = importlib.import_module("vllm")
    note_untested("vllm", vllm.__version__)
    for architecture, name in MODELS.items():
        vllm.ModelRegistry.register_model(architecture, f"llava.serving.plugin:{name}")
