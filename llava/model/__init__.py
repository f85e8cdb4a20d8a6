"""Checkpoints and the models in them; scripts written for LLaVA import its classes from here."""

from llava.model.official_names import LlavaLlamaForCausalLM as LlavaLlamaForCausalLM
from llava.model.official_names import LlavaMistralForCausalLM as LlavaMistralForCausalLM
