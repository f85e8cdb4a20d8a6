"""Several questions about one image with the tokens of the first: the decoder, the command, and turns of `reduce`."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.benchmarks.gqa import BENCHMARK as GQA
from eval.efficiency import turns as command
from llava import reduce
from llava.errors import UserError
from llava.pipeline import decoder
from llava.pipeline.generate import generate, prefill
from llava.pipeline.turns import answer_turns
from llava.processing.prompt import Prompt, Sample, tokenize
from llava.reduction import registry
from tests.attention_maps import eager_attention, noted_logits
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.eval_fakes import write_gqa
from tests.stock_inputs import shared


def about_one_image(count: int = 3) -> list[Sample]:
    return [replace(one, image=drawn_image(1)) for one in samples(count)]


# The decoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_tokens_at_once_are_one_after_the_other(tiny, monkeypatch, attention):
    """Padded prompts of another length in every layer; without a causal mask, tokens would see those behind them."""
    monkeypatch.setattr(tiny.llm.config, "_attn_implementation", attention)
    for batch in (samples(4), samples(1)):
        reducer, ids = registry.build("visiondrop", 6), torch.tensor([[5, 9, 7]] * len(batch))
        with torch.inference_mode():
            (one, _), (other, _) = prefill(tiny, batch, reducer), prefill(tiny, batch, reducer)
            tokens = tiny.llm.embed_tokens(ids)
            single = torch.cat([decoder.step(tiny.llm, one, token[:, None]) for token in tokens.unbind(1)], 1)
            # What was forgotten leaves no trace.
            decoder.step(tiny.llm, other, tokens.flip(1))
            decoder.forget_last(other.cache.layers, other.segments, 3)
            torch.testing.assert_close(decoder.step(tiny.llm, other, tokens), single, atol=2e-5, rtol=0)
        for held, expected in zip(other.segments, one.segments, strict=True):
            assert torch.equal(held.next_position, expected.next_position)


@pytest.mark.parametrize("method", ["divprune", "v2drop"])
def test_a_method_that_reads_no_question_answers_as_if_it_chose_again(tiny, method):
    """Other questions, of other lengths; v2drop reduces between decoder layers."""
    reducer, asked = registry.build(method, 6), about_one_image()
    with noted_logits(tiny) as first:
        found = answer_turns(tiny, asked, reducer, False, max_new_tokens=1)
    with noted_logits(tiny) as each:
        expected = [generate(tiny, [one], reducer, max_new_tokens=1).answers[0] for one in asked]
    assert torch.equal(first[0], each[0])
    torch.testing.assert_close(torch.cat(first), torch.cat(each), atol=2e-5, rtol=0)
    assert [turn.token_ids for turn in found] == [one.token_ids for one in expected]
    assert [turn.kv_bytes for turn in found] == [one.accounting.kv_bytes for one in expected]


def test_turns_are_the_whole_conversation(tiny, monkeypatch):
    """The template's text stands here in full: answers, ends of turns, and no second system text."""
    asked, reducer = about_one_image(), registry.build("divprune", 6)
    with noted_logits(tiny) as logits:
        turns = answer_turns(tiny, asked, reducer, True, max_new_tokens=3)
    starts = [0]
    for turn in turns[:-1]:
        starts.append(starts[-1] + min(3, len(turn.token_ids) + 1))
    text = tiny.prompt(asked[0]).text
    for number, one in enumerate(asked):
        if number:
            text += f" {turns[number - 1].text}</s>USER: {one.message} ASSISTANT:"
        whole = Prompt(tuple(tokenize(text, tiny.tokenizer)), (0, 1), (0, 1), text)
        monkeypatch.setitem(vars(tiny), "prompt", lambda _, whole=whole: whole)
        with torch.inference_mode():
            expected = tiny.logits(prefill(tiny, [one], reducer)[0].hidden)
        torch.testing.assert_close(logits[starts[number]], expected, atol=2e-5, rtol=0)


def test_operations_of_a_later_question_are_those_that_run(tiny):
    reducer, asked = registry.build("visiondrop", 6), about_one_image(2)
    counted = []
    for count in (1, 2):
        with eager_attention(tiny), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            turns = answer_turns(tiny, asked[:count], reducer, False, max_new_tokens=1)
        counted.append(counter.get_total_flops())
    tower = prefill(tiny, asked[:1], reducer)[1].operations.alone["tower"]
    assert turns[0].flops == counted[0] - tower and turns[1].flops == counted[1] - counted[0]


def test_what_cannot_be_asked_in_turns_is_refused(tiny, monkeypatch):
    reducer, asked = registry.build("divprune", 6), about_one_image(2)
    several = replace(asked[1], image=(drawn_image(1), drawn_image(2)))
    for wrong in ([], [replace(asked[0], image=None)]):
        with pytest.raises(UserError, match="Needs questions about an image"):
            answer_turns(tiny, wrong, reducer, False)
    with pytest.raises(UserError, match="differs from that of 'q0' before the end of the image"):
        answer_turns(tiny, [asked[0], several], reducer, False)
    monkeypatch.setitem(vars(tiny), "longest_text", len(tiny.prompt(asked[0]).ids) + 2)
    assert len(answer_turns(tiny, asked, reducer, False, 1)) == 2
    with pytest.raises(UserError, match=r"'q1' the conversation about its image has .* ask fewer"):
        answer_turns(tiny, asked, reducer, True, 1)


# The command


def test_images_are_told_apart_by_content_and_taken_whole(tmp_path):
    """n0 to n4 in the fakes; n1 becomes a copy of n0, and questions keep the order of the file."""
    folder = write_gqa(tmp_path, 20)
    images = folder / "gqa" / "data" / "images"
    (images / "n1.jpg").write_bytes((images / "n0.jpg").read_bytes())
    data = GQA.load(folder, "testdev")
    found = command.images_of(data, None)
    names = {question.id: int(question.images[0][1]) for question in data.questions}
    order = [question.id for question in data.questions]
    together = [[one for one in order if names[one] in own] for own in ((0, 1), (2,), (3,), (4,))]
    assert [[question.id for question in own] for own in found] == together
    sizes = [len(own) for own in found]
    for limit in range(sizes[0], sum(sizes) + 1):
        taken = [len(own) for own in command.images_of(data, limit)]
        assert taken == sizes[: len(taken)] and sum(taken) <= limit
        assert len(taken) == len(sizes) or sum(taken) + sizes[len(taken)] > limit
    with pytest.raises(UserError, match="no image with several questions among its first 2"):
        command.images_of(data, 2)


def test_the_command_compares_later_questions(tiny, tiny_path, tmp_path, monkeypatch, capsys):
    folder, kept = write_gqa(tmp_path, 20), tmp_path / "kept.jsonl"
    data = replace(GQA.load(folder, "testdev"), max_new_tokens=3)
    # With words that the model knows, and images that are not of one colour, other questions keep other tokens.
    known = (replace(one, question=QUESTIONS[number // 2 % 5]) for number, one in enumerate(data.questions))
    data = replace(data, questions=tuple(known))
    for number in range(5):
        drawn_image(number).save(folder / "gqa" / "data" / "images" / f"n{number}.jpg")
    monkeypatch.setattr(command, "open_dataset", lambda *_: data)
    asked = f"--method divprune,attnmix --budget 6 --model {tiny_path} --data {folder} --limit 13 --measurements {kept}"
    assert command.main([*asked.split(), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "reads the question: attnmix.\nSelection does not read the question: divprune." in shown
    record = json.loads((tmp_path / "out.json").read_text())
    images = command.images_of(data, 13)
    later = [question for own in images for question in own[1:]]
    assert f"{len(later)} later questions about {len(images)} images" in shown
    for name in ("divprune", "attnmix"):
        reducer, rows = registry.build(name, 6), [row for row in record["rows"] if row["method"] == name]
        each, first, turns = rows
        shared_tokens = all_tokens = changed = right = 0
        for own in images:
            answers = [generate(tiny, [data.sample(one)], reducer, data.max_new_tokens).answers[0] for one in own]
            reused = answer_turns(tiny, [data.sample(one) for one in own], reducer, False, data.max_new_tokens)
            tokens = [set(one.trace[-1].reduction.kept[0].tolist()) for one in answers]
            for question, answer, turn, chosen in list(zip(own, answers, reused, tokens, strict=True))[1:]:
                shared_tokens, all_tokens = shared_tokens + len(chosen & tokens[0]), all_tokens + len(chosen)
                changed += answer.text != turn.text
                right += data.sample_score(question, turn.text)
        assert first["overlap"] == turns["overlap"] == shared_tokens / all_tokens
        assert (first["overlap"] == 1) == (name == "divprune")
        assert first["changed"] == changed / len(later)
        assert first["accuracy"]["mean"] == pytest.approx(100 * right / len(later))
        assert first["difference"]["difference"] == pytest.approx(first["accuracy"]["mean"] - each["accuracy"]["mean"])
        assert each["difference"] is None and first["later_flops"] < min(turns["later_flops"], each["later_flops"])
    # A second call asks nothing again, and another budget does not go into the same file.
    monkeypatch.setattr(command, "answer_image", lambda *_: pytest.fail("asked again"))
    assert command.main(asked.split()) == 0 and capsys.readouterr().out.splitlines() == shown.splitlines()
    assert command.main([*asked.split(), "--budget", "5"]) == 2
    assert "budget 6 there, 5 here" in capsys.readouterr().err


# Turns of `reduce`

TEXT = f"USER: <image> {QUESTIONS[1]} ASSISTANT:"


@pytest.mark.parametrize("family", ["llava", "next", "video"])
@pytest.mark.parametrize("method", ["divprune", "consensusdrop", "attnmix", "visiondrop"])
def test_a_second_turn_is_the_whole_conversation(family, method):
    """With the same tokens kept: the question of the first turn is given, which is also where queries stand."""
    case = shared(family)
    inputs = case.prepare([TEXT], [drawn_image(1, (60, 110))])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    slots = [case.tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>")]
    options |= {"output_logits": True, "suppress_tokens": slots}  # which a model without training may write
    with reduce(case.model, method, budget=6, questions=QUESTIONS[1:2], tokenizer=case.tokenizer) as reduced:
        first = case.model.generate(**inputs, **options)
        counted = reduced.accounting
        more = torch.tensor([case.tokenizer(QUESTIONS[0], add_special_tokens=False).input_ids])
        ids = torch.cat([first.sequences, more], 1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given.pop("mm_token_type_ids", None)
        mask = given["attention_mask"]
        second = case.model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
        assert reduced.accounting == counted
        whole = case.model.generate(**given, **options)
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(whole.logits), atol=2e-5, rtol=0)
    assert torch.equal(second.sequences, whole.sequences)
    assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1


def test_turns_that_do_not_fit_are_refused():
    case = shared("llava")
    inputs = case.prepare([TEXT], [drawn_image(1)])
    with reduce(case.model, "divprune", budget=6):
        held = case.model(**inputs).past_key_values
        ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
        other = ids.clone()
        other[0, 1] += 1
        begun = {"past_key_values": held, "max_new_tokens": 2}
        for wrong in (inputs["input_ids"], other, ids[:, 5:]):
            with pytest.raises(UserError, match=f"begin with the {inputs['input_ids'].shape[1]} tokens"):
                case.model.generate(wrong, **begun)
        with pytest.raises(UserError, match="leave pixels out"):
            case.model.generate(ids, pixel_values=inputs["pixel_values"], **begun)
        with pytest.raises(UserError, match="For several answers to a later turn give the whole"):
            case.model.generate(ids, num_beams=2, **begun)
        image = torch.full((1, 3), case.model.config.image_token_id)
        with pytest.raises(UserError, match="cannot show another image"):
            case.model.generate(torch.cat([ids, image], 1), **begun)
        mask = torch.ones_like(ids)
        mask[0, -2] = 0
        with pytest.raises(UserError, match="has no padding"):
            case.model.generate(ids, attention_mask=mask, **begun)
        # Nothing of this has changed the cache.
        assert held.get_seq_length() == inputs["input_ids"].shape[1]
        case.model.generate(ids, **begun)
