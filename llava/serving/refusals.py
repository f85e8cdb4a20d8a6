"""Requests that an engine answers with an internal error, or with nonsense, are refused with a sentence and status 400.

Official code read: vLLM 0.32.0, v1/engine (input_processor.py; async_llm.py, which hides errors of other classes than
vLLM's own), multimodal/media (connector.py, image.py) and entrypoints/serve/exception_handling/error_response.py
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from PIL import Image

from llava.errors import UserError


def refuse_bad_requests() -> None:
    """Have the engine in this process refuse embeddings that are not finite, and images that cannot be fetched or read.

    Raises:
        UserError: this version of vLLM lacks a method by which requests are refused.
    """
    refused = importlib.import_module("vllm.exceptions").VLLMValidationError
    # RuntimeError: local files that are not allowed, and data in another encoding than base64.
    unreadable = OSError, RuntimeError, Image.DecompressionBombError, importlib.import_module("aiohttp").ClientError

    def process_inputs(self: Any, stock: Any, request_id: str, prompt: Any, *args: Any, **more: Any) -> Any:
        embeddings = prompt.get("prompt_embeds") if isinstance(prompt, dict) else None
        if embeddings is not None and not embeddings.isfinite().all():
            raise refused("The prompt's embeddings should be finite, and hold NaN or infinity; check what made them.")
        return stock(self, request_id, prompt, *args, **more)

    @contextmanager
    def readable(url: str) -> Iterator[None]:
        try:
            yield
        except unreadable as error:
            name, why = url.partition(",")[0][:200], " ".join(str(error).split()) or type(error).__name__
            raise refused(f"Cannot fetch or read the image {name} ({why}); check its address and size.") from error

    def load_from_url(self: Any, stock: Any, url: str, *args: Any, **more: Any) -> Any:
        with readable(url):
            return stock(self, url, *args, **more)

    async def load_from_url_async(self: Any, stock: Any, url: str, *args: Any, **more: Any) -> Any:
        with readable(url):
            return await stock(self, url, *args, **more)

    media = "multimodal.media.connector.MediaConnector"
    changes: list[tuple[str, Callable[..., Any]]] = [("v1.engine.input_processor.InputProcessor", process_inputs)]
    for place, change in (*changes, (media, load_from_url), (media, load_from_url_async)):
        module, _, owner = place.rpartition(".")
        kind, name = getattr(importlib.import_module(f"vllm.{module}"), owner, object), change.__name__
        if not hasattr(kind, name):
            version = importlib.import_module("vllm").__version__
            raise UserError(f"vLLM {version} has no {place}.{name}, which refuses bad requests; install 0.32.")
        if not isinstance(vars(kind).get(name), partialmethod):  # plug-ins may be loaded twice
            setattr(kind, name, partialmethod(change, getattr(kind, name)))
