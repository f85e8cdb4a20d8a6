"""The two judges that can be asked: a chat model at an OpenAI-compatible address, and one on this machine.

The address is read from the environment, through the `openai` client:

    JUDGE_MODEL    name of the model
    JUDGE_URL      base address such as https://api.openai.com/v1, or OPENAI_BASE_URL
    JUDGE_KEY      or OPENAI_API_KEY; local servers mostly need none
    JUDGE_WORKERS  requests in flight at once, 4 if not set

From there only: command lines end up in logs and shell histories, and a key must not. The model on this machine has
open weights and runs through transformers with its own chat template.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import HttpUrl, ValidationError

from eval.config import whole_number
from eval.judging import Request
from llava.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import BatchEncoding

# For judges without a limit on the reply; a verdict of these is one line.
LONGEST_REPLY = 256
# The client waits between tries, 0.5 to 8 s each and 31 s in all, or as long as the server's Retry-After says.
TRIES = 8
TIMEOUT = 120.0
PATH = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """A chat model at an address.

    Attributes:
        url: base address, without the path of the request.
        key: never printed and no part of repr.
        timeout: seconds until a request without an answer is sent again.
    """

    name: str
    url: str
    key: str | None = field(repr=False)
    workers: int = 4
    timeout: float = TIMEOUT

    @cached_property
    def client(self) -> "OpenAI":
        """The connection; all threads share it."""
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(
            api_key=self.key or "none",
            base_url=self.url,
            max_retries=TRIES - 1,
            timeout=self.timeout,
            # A redirect would carry the key to another host.
            http_client=DefaultHttpxClient(follow_redirects=False),
        )

    def reply(self, request: Request) -> tuple[str, str]:
        """The reply, and the model's name as the server gives it; busy servers are asked again after a while."""
        import openai

        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(request.messages),
            "temperature": openai.omit if request.temperature is None else request.temperature,
            "max_tokens": openai.omit if request.max_tokens is None else request.max_tokens,
            "extra_headers": None if self.key else {"Authorization": openai.Omit()},
        }
        try:
            answer = self.client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            problem = f"HTTP {error.status_code}: {self._clean(error.response.text[:300])}"
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise self._unanswered(problem) from None
            raise UserError(f"The judge at {self.url} refused a request ({problem}).") from None
        except openai.APIConnectionError as error:
            raise self._unanswered(self._clean(str(error.__cause__ or error))) from None
        except openai.OpenAIError as error:
            raise UserError(f"The judge at {self.url} cannot be asked ({self._clean(str(error))}).") from None
        return self._read(answer.text)

    def _read(self, text: str) -> tuple[str, str]:
        try:
            answer = json.loads(text)
            # An empty reply, as content filters give it, is null.
            return answer["choices"][0]["message"]["content"] or "", str(answer.get("model") or self.name)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            shown = self._clean(text[:200])
            raise UserError(f"{self.url} does not answer as a chat endpoint does; it sent {shown!r}.") from None

    def _unanswered(self, problem: str) -> UserError:
        return UserError(
            f"The judge at {self.url} did not answer in {TRIES} tries ({problem}); the verdicts so far are kept, "
            "run the same command to continue."
        )

    def _clean(self, text: str) -> str:
        """One line without the key, which some servers repeat in their errors."""
        text = " ".join(text.split())
        return text.replace(self.key, "***") if self.key else text


def configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an endpoint is set up completely, key included."""
    url = environment.get("JUDGE_URL") or environment.get("OPENAI_BASE_URL")
    key = environment.get("JUDGE_KEY") or environment.get("OPENAI_API_KEY")
    return bool(environment.get("JUDGE_MODEL") and url and key)


def endpoint(environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The endpoint that the environment describes."""
    model = environment.get("JUDGE_MODEL")
    url = environment.get("JUDGE_URL") or environment.get("OPENAI_BASE_URL")
    if not model or not url:
        lost = [name for name, value in (("JUDGE_MODEL", model), ("JUDGE_URL (or OPENAI_BASE_URL)", url)) if not value]
        raise UserError(f"--judge endpoint needs the environment variable {' and '.join(lost)}.")
    try:
        HttpUrl(url)
    except ValidationError:
        raise UserError(f"JUDGE_URL should be an address such as https://api.openai.com/v1, got {url!r}.") from None
    url = url.rstrip("/")
    key = (environment.get("JUDGE_KEY") or environment.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        # Said here: the error of the header it would go into shows the key.
        raise UserError("JUDGE_KEY (or OPENAI_API_KEY) holds characters that no key has; copy it again.")
    return Endpoint(
        model,
        url.removesuffix(PATH),
        key or None,
        workers=whole_number("JUDGE_WORKERS", environment.get("JUDGE_WORKERS") or "4"),
    )


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

    def _inputs(self, messages: Sequence[Mapping[str, str]]) -> "BatchEncoding":
        from jinja2.exceptions import TemplateError

        def apply(turns: Sequence[Mapping[str, str]]) -> "BatchEncoding":
            encoded = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            # transformers types every result of apply_chat_template alike; with return_dict it is this one.
            return cast("BatchEncoding", encoded).to(self.model.device)

        try:
            return apply(messages)
        except TemplateError:
            # Templates without a system turn refuse it; its text then opens the user's turn.
            return apply([{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}])
