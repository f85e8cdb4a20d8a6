"""Checkpoints of the families of transformers' own forward in the evaluation pipeline, against stock `generate`."""

import itertools
import json
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers

from eval import __main__ as cli
from eval import benchmarks
from llava import reduce
from llava.errors import MethodError, UserError
from llava.hf import families
from llava.model.builder import load
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import Sample
from llava.reduction import registry
from tests.checkpoint_files import drop_weights, edit
from tests.conftest import QUESTIONS, SHORT, drawn_image
from tests.eval_fakes import write_gqa
from tests.family_checkpoints import SAVED, save_family
from tests.stock_families import tiny

SIZES = ((112, 112), (200, 90), (90, 150), (60, 44))
BATCH = tuple(Sample(f"q{i}", QUESTIONS[i], SHORT, drawn_image(i, size)) for i, size in enumerate(SIZES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> folder, the model that was saved, and the model as it is loaded."""

    @cache
    def one(name):
        folder = tmp_path_factory.mktemp("families") / name
        return folder, save_family(name, folder), load(folder, device="cpu")

    return one


def ask(model, samples=BATCH, method="full", budget=None, **options):
    reducer = registry.build(method, budget or model.visual_tokens, {}, model.visual_tokens)
    return generate(model, samples, reducer, **{"max_new_tokens": 6, **options})


def operations(model, inputs):
    """Of a prefill with all tokens, by the shapes of weights and the keys that masks leave to the last token."""
    masks, length = [], inputs["input_ids"].shape[1]
    hooks = [
        layer.register_forward_pre_hook(lambda *seen: masks.append(seen[2]["attention_mask"]), with_kwargs=True)
        for layer in model.llm.layers
    ]
    with torch.no_grad():
        model.hf_model(**inputs)
    for hook in hooks:
        hook.remove()
    total = 2 * model.head.weight.numel()
    for layer, mask in zip(model.llm.layers, masks, strict=True):
        keys = length if mask is None else int(mask[0, 0, -1].sum())
        total += sum(2 * length * weight.numel() for weight in layer.parameters() if weight.dim() == 2)
        total += 4 * length * keys * layer.self_attn.q_proj.out_features
    return total


def test_random_tokens_follow_the_id_of_the_question(saved):
    """They followed the token ids of its prompt, so that `random` kept other tokens than the pipeline does."""
    model, first = saved("internvl3")[2], BATCH[0]
    batch = [first, replace(first, id="other"), BATCH[1], first]
    kept = [answer.trace[0].reduction.kept.tolist() for answer in ask(model, batch, "random", 4).answers]
    assert kept[0] == kept[3] != kept[1]
    state = SimpleNamespace(ids=("q0", "other"), tokens=torch.zeros(2, 16, 1))  # as the pipeline asks the method
    assert registry.build("random", 4).prompt(state).kept.tolist() == [kept[0][0], kept[1][0]]


@pytest.mark.parametrize("name", SAVED)
def test_all_tokens_give_the_answers_of_stock_generate(saved, name):
    """Each alone, from the processor's text and images; and the sampling settings of the checkpoint are not used.

    Rows of the head that no token has were answered: id 123 of 116.
    """
    _, stock, model = saved(name)
    batch, whole, rows = ask(model), 0, model.head.out_features
    assert model.vocabulary <= len(model.tokenizer) < rows
    never = list(range(model.vocabulary, rows))
    for sample, answer in zip(BATCH, batch.answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": sample.message}]
        text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = model.processor(text=[text], images=[[sample.image]], return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=6, suppress_tokens=never)[0]
        ids = ids[inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == (ids[: ids.index(model.tokenizer.eos_token_id)] if 2 in ids else ids)
        tokens = int((inputs["input_ids"] == model.token("image")).sum())
        assert answer.accounting.tokens_per_layer == (tokens,) * 4 == (answer.accounting.visual_tokens,) * 4
        whole += operations(model, inputs)
    assert any("those of a tile" in note for note in model.notes) == (name == "idefics3")
    assert len({answer.token_ids for answer in batch.answers}) > 1
    assert batch.operations.alone == {"projector": 0, "prefill": whole} and batch.images == 4


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("method", ["full", "consensusdrop"])
def test_a_batch_gives_what_each_question_gives(saved, name, method):
    model = saved(name)[2]
    budget = None if method == "full" else "1/3"
    batch = ask(model, method=method, budget=budget, clock=itertools.count().__next__)
    for sample, answer in zip(BATCH, batch.answers, strict=True):
        (alone,) = ask(model, [sample], method, budget).answers
        assert (answer.token_ids, answer.text) == (alone.token_ids, alone.text)
        assert answer.accounting == alone.accounting
        if budget:
            images, tokens = answer.accounting.images, answer.accounting.visual_tokens
            assert set(answer.accounting.tokens_per_layer) == {images * round(tokens / images / 3)}
    timing = batch.timing
    assert min(timing.preprocess, timing.vision, timing.prefill, timing.decode) > 0
    assert (timing.selection > 0) == (method != "full") and batch.kv_bytes_allocated >= batch.kv_bytes > 0


@pytest.mark.parametrize("name", SAVED)
def test_questions_without_an_image_are_answered_by_the_stock_model(saved, name):
    """Alone, together and among others, as ScienceQA asks them; they ended in an error."""
    _, stock, model = saved(name)
    text, seen = [Sample("t0", QUESTIONS[1], SHORT), Sample("t1", QUESTIONS[0], SHORT)], {}
    for batch in ([text[0]], [text[1]], text, [BATCH[0], *text, BATCH[1]]):
        result = ask(model, batch, "fastervlm", 8, ignore_eos=True)
        for sample, answer in zip(batch, result.answers, strict=True):
            if sample.image is not None:
                assert answer.accounting.mean == 8
                continue
            assert seen.setdefault(sample.id, answer) == answer  # its keys and values among others, too
            inputs = model.inputs([sample])
            length = inputs["input_ids"].shape[1]
            never = list(range(model.vocabulary, model.head.out_features))
            ids = stock.generate(**inputs, max_new_tokens=6, eos_token_id=-1, suppress_tokens=never)[0, length:]
            assert list(answer.token_ids) == ids.tolist() and not answer.trace and not answer.runs
            assert answer.accounting.tokens_per_layer == (0,) * 4 and answer.accounting.kv_bytes > 0
            if len(batch) == 1:
                assert result.operations.alone["prefill"] == operations(model, inputs)


@pytest.mark.parametrize("name", SAVED)
def test_a_method_reads_the_question_alone(saved, name):
    """Not its answer format and not the template: the tokens that `reduce` keeps of the stock model."""
    _, stock, model = saved(name)
    for sample, answer in zip(BATCH, ask(model, method="attnmix", budget="1/3").answers, strict=True):
        words = {"questions": [sample.question], "tokenizer": model.tokenizer}
        with reduce(stock, "attnmix", "1/3", **words) as reduced, torch.no_grad():
            stock(**model.inputs([sample]))
        for ours, theirs in zip(answer.trace, reduced.traces[0], strict=True):
            assert torch.equal(ours.reduction.kept, theirs.reduction.kept)


@pytest.mark.parametrize("method", ["consensusdrop", "fastv"])
def test_after_full_memory_a_family_answers_as_before(saved, method):
    """Hooks and replaced configurations of the tower and the decoder must not outlive a batch that did not fit."""
    _, _, model = saved("internvl3")
    parts = [model.stock_tower.blocks[0], model.llm.layers[0], model.llm.layers[-1]]
    expected = [answer.token_ids for answer in ask(model, method=method, budget="1/2").answers]

    def state():
        modules = list(model.hf_model.modules())
        hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules]
        return hooks, [id(getattr(one, "config", None)) for one in modules], [sorted(vars(one)) for one in modules]

    def full(*args, **kwargs):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    before = state()
    for part in parts:
        part.forward = full
        with pytest.raises(RuntimeError, match="CUBLAS"):
            ask(model, method=method, budget="1/2")
        del part.forward
        assert state() == before
    assert [answer.token_ids for answer in ask(model, method=method, budget="1/2").answers] == expected


def test_a_run_says_what_was_run_and_what_was_not_counted(saved, tmp_path, capsys):
    folder, _, model = saved("internvl3")
    flags = ["--data", str(write_gqa(tmp_path, count=5)), "--wandb", "disabled", "--device", "cpu"]
    flags += ["--method", "consensusdrop", "--budget", "1/4", "--model", str(folder)]
    results = []
    for size in ("1", "2"):
        output = tmp_path / f"out{size}"
        assert cli.main([*flags, "--output", str(output), "--batch-size", size]) == 0
        results.append((output / "answers.jsonl").read_text())
    assert sorted(results[0].splitlines()) == sorted(results[1].splitlines())
    result, printed = json.loads((output / "result.json").read_text()), capsys.readouterr().out
    assert (
        result["accounting"]["entering_per_layer"] == [4.0] * 4 and result["accounting"]["visual_tokens_before"] == 16
    )
    assert result["settings"]["image_options"] == {"image_processor": type(model.processor.image_processor).__name__}
    assert result["settings"]["conversation"] == "chat template of InternVL3"
    assert {"config.json", "chat_template.jinja", "model.safetensors"} <= set(result["settings"]["model_files"])
    assert any("transformers' InternVL3" in remark for remark in result["remarks"])
    assert result["flops_per_question"] is None and result["flops"]["tower_per_image"] is None
    assert "GFLOP per question after the tower" in printed and "GFLOP per image" not in printed


def test_answers_end_at_every_end_token_of_the_checkpoint(tmp_path):
    save_family("gemma3", tmp_path)
    (answer,) = ask(load(tmp_path, device="cpu"), BATCH[:1], ignore_eos=True).answers
    edit(tmp_path / "generation_config.json", eos_token_id=[answer.token_ids[3], 1])
    batch = ask(load(tmp_path, device="cpu"), BATCH[:1])
    end = answer.token_ids.index(answer.token_ids[3])
    assert batch.answers[0].token_ids == answer.token_ids[:end] and batch.decode_steps == end


@pytest.mark.parametrize("name", ["gemma3", "smolvlm"])
def test_transformers_without_an_argument_for_visual_tokens_is_refused(monkeypatch, name):
    """5.17 ignored the tokens that were left and made all again; 5.20's SmolVLM takes multiples of its patch size."""
    if name == "gemma3":
        monkeypatch.setattr(type(tiny(name)), "forward", lambda self, input_ids: None)
    else:
        monkeypatch.delattr(type(tiny(name).model), "get_placeholder_mask", raising=False)
    title = families.declared(tiny(name)).title
    with pytest.raises(UserError, match=rf"^{title} cannot be reduced .* {re.escape(transformers.__version__)}"):
        reduce(tiny(name), "full")


def test_what_cannot_be_done_is_refused(saved, tmp_path):
    folder, _, model = saved("gemma3")
    for options in ({"quantization": "4bit"}, {"tensor_parallel": 2}, {"zero": "cpu"}, {"merge": "spatial"}):
        with pytest.raises(UserError, match=f"{next(iter(options))[:5]}.* cannot be used with .*gemma3"):
            load(folder, device="cpu", **options)
    with pytest.raises(MethodError, match=r"pyramiddrop .* decoder layers"):
        ask(model, method="pyramiddrop", budget=8)
    with pytest.raises(UserError, match="only answers benchmarks"):
        prefill(model, BATCH, registry.build("full", 16))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: drop_weights(folder / "model.safetensors", "language_model.model.norm.weight"), "lacks 1 weig"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "Cannot load .*safetens"),
        (lambda folder: edit(folder / "config.json", model_type="gemma9"), "family gemma9, .* `vtr show models`"),
    ],
)
def test_damaged_checkpoints_end_in_a_sentence(tmp_path, damage, sentence):
    save_family("gemma3", tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_end_in_a_sentence(tmp_path):
    model = save_family("gemma3", tmp_path)
    model.model.language_model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="question q0 are not finite"):
        ask(load(tmp_path, device="cpu"))


@pytest.mark.parametrize("name", SAVED)
def test_the_dry_run_knows_weights_and_cache(saved, name, tmp_path, capsys):
    """It said of every one of these families that it was not supported."""
    folder, _, model = saved(name)
    data = write_gqa(tmp_path / "data", 8)
    words = ["--method", "fastervlm", "--budget", "1/3", "--model", str(folder), "--data", str(data)]
    words += ["--max-new-tokens", "4", "--batch-size", "2", "--device", "cpu", "--dry-run"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["weights"].values()) == 4 * sum(one.numel() for one in model.hf_model.parameters())
    questions = benchmarks.get("gqa").load(data, "testdev")
    held = []
    for start in range(0, 8, 2):
        batch = [questions.sample(one) for one in questions.questions[start : start + 2]]
        held.append(ask(model, batch, "fastervlm", "1/3", max_new_tokens=4, ignore_eos=True).kv_bytes_allocated)
    assert max(held) == found["kv_bytes"] <= found["full_kv_bytes"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "1/3 of each image's visual tokens" in text and f"not estimated for {model.family.title}" in text
