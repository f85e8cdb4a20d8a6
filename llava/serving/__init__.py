"""Reduced prompts in vLLM: an out-of-tree plug-in. `register` is its entry point `vllm.general_plugins`."""

import importlib

# Architecture, as checkpoints name it -> its class in llava.serving.plugin, imported when an engine asks for it.
MODELS = {
    "LlavaForConditionalGeneration": "ReducedLlava",
    "LlavaNextForConditionalGeneration": "ReducedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "ReducedQwen25",
    "Qwen3VLForConditionalGeneration": "ReducedQwen3",
    "InternVLForConditionalGeneration": "ReducedInternVL",
}


def register() -> None:
    """Put the reduced classes in the place of vLLM's; without a method they are the same models."""
    registry = importlib.import_module("vllm").ModelRegistry
    for architecture, name in MODELS.items():
        registry.register_model(architecture, f"llava.serving.plugin:{name}")
