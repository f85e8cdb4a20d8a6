"""scripts/serve.sh with the real engine, asked over HTTP on both routes; prompts share blocks of keys and values."""

import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from eval import serving
from eval.command import open_dataset
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import Sample
from llava.reduction.registry import build
from llava.serving.client import Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_python")]


@contextmanager
def served(log: Path, *words: str) -> Iterator[str]:
    """The address of a server of scripts/serve.sh whose key is "secret"; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ | {"PORT": str(port), "KEY": "secret", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = ["bash", str(ROOT / "scripts" / "serve.sh"), *words, "--dtype", "float32"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=given, stdout=out, stderr=out, start_new_session=True)
    try:
        last = time.monotonic() + 400
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < last, log.read_text()[-6000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)


def questions(folder: Path) -> list[Sample]:
    """The first of the toy's GQA; writes their images, as NAME.png."""
    data = open_dataset("gqa", str(DEFAULT_DATA), None, None, "official")
    asked = [data.sample(one) for one in data.questions[:12]]
    for one in asked:
        one.images[0].save(folder / f"{one.image_ids[0]}.png")
    return asked


def in_message(file: bytes, link: str = "") -> dict[str, Any]:
    link = link or f"data:image/png;base64,{base64.b64encode(file).decode()}"
    return {"type": "image_url", "image_url": {"url": link}}


def test_prompts_as_embeddings(tmp_path, monkeypatch, capsys):
    asked, file = questions(tmp_path), tmp_path / "q.jsonl"
    lines = [{"question_id": one.id, "image": f"{one.image_ids[0]}.png", "text": one.message} for one in asked]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ("--set", "probe=contextual", "--set", "probe_layer=2")
    with served(tmp_path / "log", "consensusdrop", "64", *options) as url:
        monkeypatch.setenv("KEY", "secret")
        given = ["consensusdrop", "32,64", "--questions", str(file), "--device", "cpu", "--url", url, *options]
        assert serving.main(given) == 0
        with pytest.raises(UserError, match="refused with 401") as told:
            Server(url, "wrong").check("tinyllava")
        # These were answered, with nonsense.
        server, good = Server(url, "secret"), torch.randn(20, 160, generator=torch.Generator().manual_seed(0))
        before = server.complete("tinyllava", good, 8, [])
        for number in (float("nan"), float("-inf")):
            with pytest.raises(UserError, match="refused with 400: The prompt's embeddings should be finite"):
                server.complete("tinyllava", good.index_fill(0, torch.tensor([3]), number), 8, [])
        assert server.complete("tinyllava", good, 8, []) == before
    assert "\n" not in str(told.value) and "secret" not in (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(line["budget"], line["question_id"]): line["text"] for line in lines}
    model = load(DEFAULT_MODEL, device="cpu")
    for budget in (32, 64):
        reducer = build("consensusdrop", budget, {"probe": "contextual", "probe_layer": 2})
        expected = generate(model, asked, reducer).answers
        assert [found[str(budget), one.id] for one in asked] == [one.text for one in expected]


@pytest.mark.parametrize("method, options", [("divprune", {}), ("visionzip", {"contextual": "0.5"})])
def test_images_that_share_blocks(tmp_path, method, options):
    """One image asked twice, with two other questions, and its first question with another image."""
    several, model, reducer = questions(tmp_path), load(DEFAULT_MODEL, device="cpu"), build(method, 64, options)
    first, other = several[0], next(one for one in several if one.image_ids != several[0].image_ids)
    moved = Sample("moved", first.question, first.suffix, other.image, other.image_ids)
    cached = []
    words = ("--block-size", "32", *(f"--set={name}={value}" for name, value in options.items()))
    with served(tmp_path / "log", method, "64", *words, "--enable-prompt-tokens-details") as url:
        ask = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", timeout=120).chat.completions.create
        for sample in (first, first, *several[1:3], moved):
            image = in_message((tmp_path / f"{sample.image_ids[0]}.png").read_bytes())
            turn = {"role": "user", "content": [image, {"type": "text", "text": sample.message}]}
            more = {"logprobs": True, "top_logprobs": 5, "max_tokens": 32, "temperature": 0}
            answer = ask(model="tinyllava", messages=[turn], **more)
            (choice,), usage = answer.choices, answer.usage
            (expected,) = generate(model, [sample], reducer).answers
            assert choice.message.content.strip() == expected.text
            assert usage.prompt_tokens == expected.accounting.tokens_per_layer[0] + len(model.prompt(sample).ids) - 1
            best = torch.tensor([one.logprob for one in choice.logprobs.content[0].top_logprobs])
            whole = model.logits(prefill(model, [sample], reducer)[0].hidden).flatten().log_softmax(-1)
            torch.testing.assert_close(best, whole.topk(5).values, rtol=0, atol=5e-5)
            cached.append(usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0)
    start = model.prompt(first).ids.index(IMAGE_TOKEN_INDEX)
    assert cached[0] == 0 and min(cached[1:4]) > start >= cached[4], cached


def pictures(image: Image.Image) -> Iterator[Image.Image]:
    """A photo wide, tall, as grey of 16 bits, and with transparency."""
    yield image.resize((384, 192))
    yield image.resize((192, 320))
    yield Image.fromarray(np.asarray(image.resize((320, 256)).convert("L")).astype(np.uint16) * 256 + 77)
    clear = image.resize((300, 200))
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    yield clear


def claiming(width: int, height: int) -> bytes:
    """A small PNG file whose head tells of many pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    sums = [struct.pack(">I", zlib.crc32(kind + own)) for kind, own in parts]
    chunks = [struct.pack(">I", len(own)) + kind + own + end for (kind, own), end in zip(parts, sums, strict=True)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pictures_of_any_shape_and_mode_and_bad_requests(tmp_path):
    """Sides were cropped instead of padded, 16 bits became white; what cannot be read was the server's fault (500)."""
    several, model, reducer = questions(tmp_path), load(DEFAULT_MODEL, device="cpu"), build("divprune", 64)
    with served(tmp_path / "log", "divprune", "64", "--mm-processor-cache-gb", "0") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", timeout=120, max_retries=0)

        def answer(image: dict[str, Any], text: str, **more: Any) -> str:
            turn = {"role": "user", "content": [image, {"type": "text", "text": text}]}
            more = {"max_tokens": 32, "temperature": 0} | more
            return client.chat.completions.create(model="tinyllava", messages=[turn], **more).choices[0].message.content

        asked = []
        for number, one in enumerate(several[:10:3]):
            for place, picture in enumerate(pictures(one.images[0])):
                picture.save(file := io.BytesIO(), "PNG")
                sample = Sample(f"{number} {place}", one.question, one.suffix, picture, (f"{number} {place}",))
                asked.append((sample, in_message(file.getvalue())))
        expected = [one.text for one in generate(model, [sample for sample, _ in asked], reducer).answers]
        assert [answer(image, sample.message).strip() for sample, image in asked] == expected

        Image.new("F", (30, 20)).save(floats := io.BytesIO(), "TIFF")
        unread = "Cannot fetch or read the image"
        for image, reason in (
            (in_message(claiming(20_000, 20_000)), f"{unread} data:image/png;base64 .*decompression bomb"),
            (in_message(b"", "file:///etc/hostname"), f"{unread} file:///etc/hostname .*allowed-local-media-path"),
            (in_message(b"", "http://127.0.0.1:9/x.png"), f"{unread} http://127.0.0.1:9/x.png"),
            (in_message(b"", "http://no-such-host.invalid/x.png"), f"{unread} http://no-such-host.invalid/x.png"),
            (in_message(b"no image"), "Failed to load image"),
            (in_message(floats.getvalue()), "no known white"),
        ):
            with pytest.raises(openai.BadRequestError, match=reason):
                answer(image, "What is it?")
        # An image that arrives first with a request that is refused: caches of server and engine must agree.
        new = in_message((tmp_path / f"{several[0].image_ids[0]}.png").read_bytes())
        with pytest.raises(openai.BadRequestError, match="context"):
            answer(new, "word " * 2000)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            answer(new, several[0].message, max_tokens=100_000)
        with pytest.raises(openai.BadRequestError, match="top_p"):  # with a cache of images, the next one got 500
            answer(new, several[0].message, top_p=7)
        (whole,) = generate(model, several[:1], reducer).answers
        assert [answer(new, several[0].message).strip() for _ in range(2)] == [whole.text] * 2
