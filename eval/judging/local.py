"""An open-weight chat model as the judge, on this machine, through transformers and the model's own chat template."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from eval.judging import Request
from llava.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding

# For judges without a limit on the reply; a verdict of these is one line.
LONGEST_REPLY = 256


class LocalModel:
    """A causal language model with a chat template. Code that comes with a checkpoint is not run."""

    workers = 1

    def __init__(self, path: str, device: str = "auto"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = Path(path).name if Path(path).is_dir() else path
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False)
        # Wrong folders, configurations and names of the hub raise errors without a common base.
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"Cannot load the judge {path} ({line}).") from error
        if not self.tokenizer.chat_template:
            raise UserError(f"The judge {path} has no chat template; take an instruction-tuned model.")
        self.model = model.eval().to(device)

    def reply(self, request: Request) -> tuple[str, str]:
        """Greedy without a temperature, else a draw that depends on the question alone."""
        import torch

        inputs = self._inputs(request.messages)
        hot = bool(request.temperature)
        # Sampling settings of the checkpoint have no place in a greedy search.
        sampling = {"temperature": request.temperature} if hot else dict.fromkeys(("temperature", "top_p", "top_k"))
        torch.manual_seed(zlib.crc32(f"{request.id} {request.fingerprint} {request.temperature}".encode()))
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=hot,
                **sampling,
                max_new_tokens=request.max_tokens or LONGEST_REPLY,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        fresh = output[0, inputs["input_ids"].shape[1] :]
        # transformers types the text of one sequence and the texts of a batch alike.
        text = cast(str, self.tokenizer.decode(fresh, skip_special_tokens=True))
        return text.strip(), self.name

    def cost(self, tokens_in: int, tokens_out: int) -> None:
        """Time, no money."""
        return None

    def _inputs(self, messages: Sequence[Mapping[str, str]]) -> "BatchEncoding":
        from jinja2.exceptions import TemplateError

        def apply(turns: Sequence[Mapping[str, str]]) -> "BatchEncoding":
            found = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            # transformers types every result of apply_chat_template alike; with return_dict it is this one.
            return cast("BatchEncoding", found).to(self.model.device)

        try:
            return apply(messages)
        except TemplateError:
            # Templates without a system turn refuse it; its text then opens the user's turn.
            return apply([{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}])
