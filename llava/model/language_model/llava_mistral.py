"""Where scripts written for LLaVA import LlavaMistralForCausalLM from."""

from llava.model.official_names import LlavaMistralForCausalLM as LlavaMistralForCausalLM
