"""The choice between two routes to serve a method, and the client of the second route.

pixels  The method runs inside the engine (llava/serving/plugin.py). Requests hold images and text.
embeds  The engine knows no method. Requests hold whole prompts as embeddings, which `prompt_embeddings` makes with the
        code that answers benchmarks (llava/pipeline/generate.py). Methods that read the question take this route.

Official code read: vLLM 0.32.0, renderers/embed_utils.py (a request's embeddings are a file of torch.save, in base64)
and entrypoints/openai/completion
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig

from llava.budget import BLIND, FULL
from llava.conversation import conversation
from llava.errors import UserError, optional_imports
from llava.hf.checkpoint_model import FamilyModel, load_family
from llava.hf.families import FAMILIES, why_not
from llava.hf.reduce import FamilyReductionContext
from llava.model.builder import DTYPES, declared_class, device_of, runtime
from llava.model.checkpoint.config import default_mode, identify
from llava.model.checkpoint.files import folder_of, locate, name_of
from llava.model.checkpoint.load import load_checkpoint
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import until_decoder
from llava.processing.json_files import read_json
from llava.processing.prompt import Sample, read_tokenizer
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build
from llava.reduction.token_layout import ModelSpec
from llava.serving import MODELS
from llava.serving.engine_method import CLIP, refuse_gaps, served_by, why_not_anywhere

if TYPE_CHECKING:
    from openai import OpenAI

PIXELS, EMBEDS = "pixels", "embeds"
NUMBERED = "an engine numbers a prompt of embeddings 0, 1, 2, ..., and this family an image by rows and columns"
# Where a checkpoint may keep a chat template of its own.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FIELDS = ("tokenizer_config.json", "processor_config.json")


# The route


def route(
    method: str, budget: str | None, source: str | Path, options: dict[str, str] | None = None
) -> tuple[str, list[str]]:
    """The route of a method, PIXELS or EMBEDS, and the engine's command-line arguments for it.

    Args:
        budget: visual tokens per image, or the ratio to keep; None for `full`.
        source: folder or hub id of the checkpoint.
        options: options of the method, as text.

    Raises:
        UserError: no engine can serve the method, the budget or the checkpoint.
    """
    directory = locate(source, "checkpoint", weights=False)
    raw = read_json(directory / "config.json")
    if not set(raw.get("architectures") or ()) & MODELS.keys():
        named = ", ".join(raw.get("architectures") or ["an unnamed class"])
        raise UserError(
            f"vLLM serves reduced prompts of {', '.join(MODELS)}, in transformers' layout; {source} is {named}."
        )
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config.vtr = {"method": FULL}
    whole = served_by(config)
    assert whole is not None
    reducer = configured(method, budget, replace(whole.spec, has_text_tower=True), options)
    arguments = ["--model", str(folder_of(source) or source), "--served-model-name", name_of(source)]
    config.vtr = {"method": method, "budget": budget} | ({"options": options} if options else {})
    try:
        served_by(config)
    except UserError as inside:
        if whole.family.axes:
            reason, title = str(inside).partition("; send ")[0].rstrip("."), whole.family.title
            raise UserError(f"{reason}; {NUMBERED}. Use scripts/eval for this method on {title}.") from None
        if whole.family is not CLIP and (why := why_not(whole.family, config, reducer)):
            raise UserError(why) from None
        refuse_gaps(reducer)
        return EMBEDS, [*arguments, "--enable-prompt-embeds", "--limit-mm-per-prompt", '{"image": 0}']
    arguments += ["--hf-overrides", json.dumps({"vtr": config.vtr})]
    if whole.family is CLIP:  # the plug-in converts images itself, as benchmarks do
        arguments += ["--media-io-kwargs", json.dumps({"image": {"image_mode": None}})]
    stored = (read_json(directory / name) for name in TEMPLATE_FIELDS if (directory / name).is_file())
    if whole.family is CLIP and not (
        any((directory / name).is_file() for name in TEMPLATE_FILES) or any("chat_template" in file for file in stored)
    ):
        mode = default_mode(identify(raw, directory), read_tokenizer(directory, config).get_vocab())
        arguments += ["--chat-template", chat_template(mode)]
    return PIXELS, arguments


def configured(method: str, budget: str | None, spec: ModelSpec, options: dict[str, str] | None = None) -> Reducer:
    """A method at a budget, for a model; UserError if they do not fit together or no engine serves the method."""
    if method == BLIND:
        raise UserError(f"{method} cannot be served: an engine keeps at least one visual token of an image.")
    if budget is None and method != FULL:
        raise UserError(f"{method} needs a budget: visual tokens per image (64), or their ratio (1/9).")
    reducer = build(method, spec.visual_tokens if budget is None else budget, options, spec.visual_tokens)
    if why := why_not_anywhere(reducer):
        raise UserError(why)
    require(reducer, spec)
    return reducer


def chat_template(mode: str) -> str:
    """A conversation mode as a Jinja template, so that a chat request gets the same prompt as a benchmark's question.

    The engine itself puts "<image>" and a line end before the text of a message with an image.
    """
    template = conversation(mode)
    before, after = template.answered.split("{}")
    text = "{{ message['content'] | trim }}" if template.trim else "{{ message['content'] }}"

    def written(*parts: str) -> str:
        return f"{{{{ {json.dumps(''.join(parts))} }}}}"

    return (
        f"{{{{ bos_token }}}}{written(template.system)}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}"
        f"{written(template.user)}{text}{{% elif message['role'] == 'assistant' %}}"
        f"{written(template.assistant, before)}{text}{written(after)}{{% else %}}"
        "{{ raise_exception('This prompt has its own system text; leave system messages out.') }}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{written(template.assistant)}{{% endif %}}"
    )


# Embeddings


def load_client_model(
    source: str | Path,
    reducer: Reducer,
    dtype: str = "float32",
    device: str = "auto",
    text_tower: str | None = None,
    **conventions: Any,
) -> Llava:
    """Load a checkpoint with only those decoder layers that the method reads before the decoder, and at least one.

    Args:
        text_tower, conventions: see `llava.model.builder.load`.
    """
    probes = [getattr(reducer, option.name) for option in fields(reducer) if option.name.endswith("probe_layer")]
    place, layers = device_of(device), max(probes, default=0) + 1
    if container := declared_class(source, text_tower, None, 1, None, conventions):
        family = FAMILIES[container]
        if container not in MODELS or family.axes:
            why = NUMBERED if family.axes else f"vLLM serves reduced prompts of {', '.join(MODELS)}"
            raise UserError(f"No prompt embeddings are made of {family.title}: {why}.")
        whole = load_family(source, container, DTYPES[dtype], place)
        del whole.llm.layers[layers:]
        return cast(Llava, whole)
    checkpoint = load_checkpoint(source, DTYPES[dtype], place, text_tower, decoder_layers=layers)
    model = runtime(checkpoint, place, conventions)
    if model.axes:
        raise UserError(f"No prompt embeddings are made of {model.name}: {NUMBERED}.")
    return model


@torch.inference_mode()
def prompt_embeddings(model: Llava | FamilyModel, samples: Sequence[Sample], reducer: Reducer) -> list[Tensor]:
    """For each sample, the embeddings [L, H] of its text and reduced images as they enter decoder layer 0.

    Args:
        samples: questions with or without images.
    """
    refuse_gaps(reducer)
    if isinstance(model, FamilyModel):
        questions, ids = [sample.question for sample in samples], [sample.id for sample in samples]
        with FamilyReductionContext(model, reducer, questions, names=ids) as reduced:
            sequence = reduced.until_decoder(model.inputs(samples))
    else:
        sequence = until_decoder(model, samples, reducer, Timer(model.device)).start
    return [row[-length:].cpu() for row, length in zip(sequence.hidden, sequence.lengths, strict=True)]


# Requests


def encoded(embeddings: Tensor) -> str:
    """The embeddings of a prompt in the form that vLLM reads: a file of torch.save in base64."""
    file = io.BytesIO()
    torch.save(embeddings.clone(), file)  # cloned, because a view is saved with its whole storage
    return base64.b64encode(file.getvalue()).decode()


class Server:
    """An OpenAI-compatible server that takes embeddings.

    Args:
        url: address without a path, such as http://127.0.0.1:8000.
        key: the server's API key, or ""; it is never printed.
    """

    def __init__(self, url: str, key: str):
        with optional_imports():
            import openai
        self.url, self._key, self._openai = url.rstrip("/"), key, openai

    @cached_property
    def _client(self) -> "OpenAI":
        # A redirect would carry the key to another host.
        http = self._openai.DefaultHttpxClient(follow_redirects=False)
        key = self._key or "none"
        return self._openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=600, http_client=http)

    def check(self, name: str) -> None:
        """Raise UserError if the server does not answer, or does not serve the model that made the embeddings."""
        served = [one.id for one in self._ask(lambda: self._client.models.list())]
        if name not in served:
            raise UserError(
                f"The embeddings are of {name}, and the server at {self.url} has {', '.join(served)}; start it with "
                "MODEL set to the same checkpoint."
            )

    def complete(self, name: str, embeddings: Tensor, tokens: int, end_ids: Sequence[int]) -> str:
        """The greedy answer to a prompt [L, H], of at most `tokens` tokens."""
        more: dict[str, Any] = {"prompt_embeds": encoded(embeddings), "stop_token_ids": list(end_ids)}
        more["repetition_penalty"] = 1  # of generation_config.json, the pipeline uses the end tokens alone
        create = self._client.completions.create
        # An empty text instead of None would be a prompt of its own: a second answer, or an error if it has no token.
        answer = self._ask(lambda: create(model=name, prompt=None, temperature=0, max_tokens=tokens, extra_body=more))
        return str(answer.choices[0].text).strip()

    def _ask(self, request: Any) -> Any:
        """Send a request and return its result; an error becomes a UserError with the server's reason."""
        try:
            return request()
        except self._openai.APIStatusError as error:
            body: Any = error.body if isinstance(error.body, dict) else {}
            reason = " ".join(str(body.get("message") or error.response.text).split())[:300].rstrip(".")
            reason = reason.replace(self._key, "***") if self._key else reason
            hint = " Set KEY to the server's key." if error.status_code == 401 else ""
            raise UserError(f"The server at {self.url} refused with {error.status_code}: {reason}.{hint}") from None
        except self._openai.OpenAIError as error:
            problem = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise UserError(
                f"No answer from the server at {self.url} ({problem}); start it by scripts/serve.sh and give its --url."
            ) from None
