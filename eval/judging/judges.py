"""A judge that can be asked: a chat model at an OpenAI-compatible address, reached through the `openai` client.

A model served on this machine has such an address too. The judge is configured by environment variables only, because
command lines end up in logs and shell histories, and a key must not.

    JUDGE_MODEL    name of the model
    JUDGE_URL      base address such as https://api.openai.com/v1, or OPENAI_BASE_URL
    JUDGE_KEY      or OPENAI_API_KEY; most local servers need none
    JUDGE_WORKERS  requests in flight at once, 4 if not set
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import HttpUrl, ValidationError

from eval.config import whole_number
from eval.judging import Request
from llava.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI

# The client waits 0.5 to 8 s between tries, 31 s in all, or as long as the server's Retry-After says.
TRIES = 8
TIMEOUT = 120.0
PATH = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """A chat model at an address.

    Attributes:
        url: base address, without the path of the request.
        key: never printed, also not by repr.
        timeout: seconds after which an unanswered request is sent again.
    """

    name: str
    url: str
    key: str | None = field(repr=False)
    workers: int = 4
    timeout: float = TIMEOUT

    @cached_property
    def client(self) -> "OpenAI":
        """The connection, shared by all threads."""
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
        """Ask the judge; a busy server is asked again after a while.

        Returns:
            The reply, and the model's name as the server gives it.

        Raises:
            UserError: the server refuses the request, does not answer, or does not answer as a chat endpoint does.
        """
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
        try:
            read = json.loads(answer.text)
            # Content filters give null for an empty reply.
            return read["choices"][0]["message"]["content"] or "", str(read.get("model") or self.name)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            shown = self._clean(answer.text[:200])
            raise UserError(f"{self.url} does not answer as a chat endpoint does; it sent {shown!r}.") from None

    def _unanswered(self, problem: str) -> UserError:
        return UserError(
            f"The judge at {self.url} did not answer in {TRIES} tries ({problem}); the verdicts so far are kept, "
            "run the same command to continue."
        )

    def _clean(self, text: str) -> str:
        """The text on one line and without the key, which some servers repeat in their errors."""
        text = " ".join(text.split())
        return text.replace(self.key, "***") if self.key else text


def address(environment: Mapping[str, str]) -> tuple[str, str, str]:
    """Name of the model, base address and key from the environment; "" for what is not set."""
    url = environment.get("JUDGE_URL") or environment.get("OPENAI_BASE_URL") or ""
    key = environment.get("JUDGE_KEY") or environment.get("OPENAI_API_KEY") or ""
    return environment.get("JUDGE_MODEL", ""), url, key.strip()


def configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment describes an endpoint completely, key included."""
    return all(address(environment))


def endpoint(environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The endpoint that the environment describes."""
    model, url, key = address(environment)
    if not model or not url:
        lost = [name for name, value in (("JUDGE_MODEL", model), ("JUDGE_URL (or OPENAI_BASE_URL)", url)) if not value]
        raise UserError(f"--judge endpoint needs the environment variable {' and '.join(lost)}.")
    try:
        HttpUrl(url)
    except ValidationError:
        raise UserError(f"JUDGE_URL should be an address such as https://api.openai.com/v1, got {url!r}.") from None
    url = url.rstrip("/")
    if not (key.isascii() and key.isprintable()):
        # Checked here, because the error about an invalid header would show the key.
        raise UserError("JUDGE_KEY (or OPENAI_API_KEY) holds characters that no key has; copy it again.")
    return Endpoint(
        model,
        url.removesuffix(PATH),
        key or None,
        workers=whole_number("JUDGE_WORKERS", environment.get("JUDGE_WORKERS") or "4"),
    )
