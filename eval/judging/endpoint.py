"""A judge behind an OpenAI-compatible address.

    JUDGE_MODEL    name of the model
    JUDGE_URL      base address such as https://api.openai.com/v1, or OPENAI_BASE_URL
    JUDGE_KEY      or OPENAI_API_KEY; local servers mostly need none
    JUDGE_WORKERS  requests in flight at once, 4 if not set
    JUDGE_PRICE_IN, JUDGE_PRICE_OUT  price per million tokens, for the estimate

They come from the environment alone: a command line ends up in logs and shell histories, a key must not.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from eval.config import whole_number
from eval.judging import Request
from llava.errors import UserError

TRIES = 6
TIMEOUT = 120
LONGEST_WAIT = 60.0
# What a server says when it is busy or broken for the moment.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """A chat model at an address.

    Attributes:
        key: never printed and no part of repr.
        prices: per million tokens in and out.
        sleep: waits between tries; tests replace it.
    """

    name: str
    url: str
    key: str | None = field(repr=False)
    workers: int = 4
    prices: tuple[float, float] | None = None
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def reply(self, request: Request) -> tuple[str, str]:
        """The reply and the model's name as the server gives it; busy servers are asked again, ever more slowly."""
        for attempt in range(TRIES):
            try:
                return self._post(request)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {self._clean(error.read(300).decode(errors='replace'))}"
                if error.code not in PASSING:
                    raise UserError(f"The judge at {self.url} refused a request ({problem}).") from None
                wait = _seconds(error.headers.get("Retry-After"), 2.0**attempt)
            except (OSError, http.client.HTTPException) as error:
                problem = self._clean(str(getattr(error, "reason", None) or error))
                wait = 2.0**attempt
            if attempt + 1 < TRIES:
                self.sleep(min(wait, LONGEST_WAIT))
        raise UserError(
            f"The judge at {self.url} did not answer in {TRIES} tries ({problem}); the verdicts so far are kept, "
            "the same command goes on."
        )

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the currency of the prices."""
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6 if self.prices else None

    def _post(self, request: Request) -> tuple[str, str]:
        body: dict[str, Any] = {"model": self.name, "messages": list(request.messages)}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        call = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(call, timeout=TIMEOUT) as response:
            content = response.read()
        try:
            answer = json.loads(content)
            # A reply of nothing, as filters give it, is null.
            return answer["choices"][0]["message"]["content"] or "", str(answer.get("model") or self.name)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = self._clean(content[:200].decode(errors="replace"))
            raise UserError(f"{self.url} does not answer as a chat endpoint does; it sent {shown!r}.") from None

    def _clean(self, text: str) -> str:
        """Some servers repeat the key in their errors."""
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
    lost = [name for name, value in (("JUDGE_MODEL", model), ("JUDGE_URL (or OPENAI_BASE_URL)", url)) if not value]
    if lost:
        raise UserError(f"--judge endpoint needs the environment variable {' and '.join(lost)}.")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise UserError(f"JUDGE_URL should be an address such as https://api.openai.com/v1, got {url!r}.")
    url = url.rstrip("/")
    key = (environment.get("JUDGE_KEY") or environment.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        # Said here: the error of the header it would go into shows the key.
        raise UserError("JUDGE_KEY (or OPENAI_API_KEY) holds characters that no key has; copy it again.")
    return Endpoint(
        model,
        url if url.endswith("/chat/completions") else f"{url}/chat/completions",
        key or None,
        workers=whole_number("JUDGE_WORKERS", environment.get("JUDGE_WORKERS") or "4"),
        prices=_prices(environment),
    )


def _prices(environment: Mapping[str, str]) -> tuple[float, float] | None:
    texts = [environment.get(name) for name in ("JUDGE_PRICE_IN", "JUDGE_PRICE_OUT")]
    if not any(texts):
        return None
    try:
        given = [float(text or 0) for text in texts]
    except ValueError:
        raise UserError(
            f"JUDGE_PRICE_IN and JUDGE_PRICE_OUT should be prices per million tokens, got {texts[0]!r}, {texts[1]!r}."
        ) from None
    return given[0], given[1]


def _seconds(text: str | None, otherwise: float) -> float:
    """A Retry-After header; dates, which few servers send, are not read."""
    return float(text) if text is not None and text.isdigit() else otherwise
