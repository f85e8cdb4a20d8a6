"""Where scripts written for LLaVA import LlavaLlamaForCausalLM from."""

from llava.model.official_names import LlavaLlamaForCausalLM as LlavaLlamaForCausalLM
