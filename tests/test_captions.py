"""Caption scores against pycocoevalcap's numbers, its tokenizer string by string, and the two caption benchmarks."""

import json
import sys
from pathlib import Path

import pytest

from eval.metrics import captions
from eval.metrics.captions import tokenize_ptb
from eval.results.report import scored
from llava.errors import UserError
from tests.benchmark_files import cell, load, write_hub, write_image

VECTORS = Path(__file__).parent / "data" / "captions"


@pytest.fixture(scope="module")
def synthetic() -> dict:
    return json.loads((VECTORS / "synthetic.json").read_text())


@pytest.fixture(scope="module")
def score(synthetic):
    return captions.captions_score(synthetic["references"], synthetic["captions"], java=False)


def test_every_string_is_tokenized_as_by_the_official_program():
    pairs = json.loads((VECTORS / "tokens.json").read_text())
    assert len(pairs) > 900
    assert [(text, tokenize_ptb(text)) for text, _ in pairs] == [(text, expected) for text, expected in pairs]


def test_corpus_numbers_equal_the_packages(synthetic, score):
    expected = synthetic["expected"]
    assert score.values["cider"] == pytest.approx(100 * expected["CIDEr"], rel=1e-12)
    assert score.values["rouge_l"] == pytest.approx(100 * expected["ROUGE-L"], rel=1e-12)
    bleus = [score.values[f"bleu_{n}"] for n in (1, 2, 3, 4)]
    assert bleus == pytest.approx([100 * value for value in expected["BLEU"]], rel=1e-12)
    assert score.values["meteor"] is None
    assert any("METEOR" in note for note in score.notes)


def test_cider_of_every_image_equals_the_packages(synthetic, score):
    by_image = dict(zip(score.terms.names, score.terms.sums[:, 0], strict=True))
    assert by_image == pytest.approx(synthetic["expected"]["CIDEr by image"], rel=1e-9, abs=1e-12)


@pytest.mark.java
@pytest.mark.skipif(not captions.has_java(), reason="Java is not installed")
def test_java_gives_the_same_numbers_and_meteor(synthetic, score):
    official = captions.captions_score(synthetic["references"], synthetic["captions"], java=True)
    assert official.values["meteor"] == pytest.approx(100 * synthetic["expected"]["METEOR"], rel=1e-9)
    rest = {name: value for name, value in official.values.items() if name != "meteor"}
    assert rest == pytest.approx({name: score.values[name] for name in rest}, rel=1e-9)
    assert not any("METEOR" in note for note in official.notes)


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match="package pycocoevalcap"):
        captions.captions_score({"1": ["a dog"]}, {"1": "a dog"})


@pytest.mark.parametrize("mark", ["\n", "\r", "\r\n", "\u2028", "\x85", "\x0b"])
def test_a_line_break_does_not_shift_the_captions_of_other_images(mark):
    """The package's tokenizer reads captions as lines of a file."""
    references = {"1": ["a dog runs on grass"], "2": ["two cats sleep on a bed"]}
    broken = captions.captions_score(references, {"1": f"a dog{mark}runs", "2": "two cats sleep"}, java=False)
    whole = captions.captions_score(references, {"1": "a dog runs", "2": "two cats sleep"}, java=False)
    assert broken.values == whole.values


def test_cider_by_the_formula():
    """Two images, one word each: idf is log 2, all longer n-grams are absent, so the mean over four lengths is 1/4."""
    found = captions.cider({"1": ["dog"], "2": ["cat"]}, {"1": ["dog"], "2": ["dog"]})
    assert found == pytest.approx({"1": 2.5, "2": 0.0})


def test_an_empty_caption_scores_nothing_and_breaks_nothing():
    found = captions.captions_score({"1": ["a dog"], "2": ["a cat"]}, {"1": "", "2": ""}, java=False)
    assert {name: value for name, value in found.values.items() if value} == {}
    wordless = captions.captions_score({"1": ["..."], "2": ["!"]}, {"1": "a dog", "2": "a cat"}, java=False)
    assert wordless.values["cider"] == 0 and wordless.values["rouge_l"] == 0


@pytest.fixture
def no_java(monkeypatch):
    """Also where Java is installed: starting it several times takes longer than all other tests of this file."""
    monkeypatch.setattr(captions, "has_java", lambda: False)


SENTENCES = [["A dog runs.", "The dog is running."], ["Two cats sleep.", "Cats on a bed."], ["A red car.", "One car"]]


def test_flickr30k_from_the_mirror(tmp_path, no_java):
    rows = [{"image": cell(), "caption": c, "img_id": str(70 + n)} for n, c in enumerate(SENTENCES)]
    write_hub(tmp_path, "lmms-lab/flickr30k", "test", rows)
    data = load("flickr30k", tmp_path)
    data.check_images(data.questions)
    assert [question.id for question in data.questions] == ["70", "71", "72"]
    assert data.questions[0].message == "Provide a one-sentence caption for the provided image."
    assert data.max_new_tokens == 64
    assert data.facts["images"] == 3 and data.facts["references"] == 6
    assert data.facts["source"] == "lmms-lab/flickr30k" and data.facts["caption scorer"]
    texts = {"70": "a dog runs", "71": "a dog runs", "72": "a car"}
    record = scored(data.score(list(texts), texts), data.questions, data.labels())
    assert record["confidence"]["cider"]["unit"] == "image" and record["questions"] == 3
    assert any("3 scored images" in note for note in record["notes"])
    assert data.submission(texts)["flickr30k_test_results.json"][0] == {"image_id": 70, "caption": "a dog runs"}


def test_flickr30k_from_karpathys_file(tmp_path):
    root = tmp_path / "flickr30k"
    write_image(root / "flickr30k-images" / "7.jpg")
    records = [
        {"imgid": 7, "filename": "7.jpg", "split": "test", "sentences": [{"raw": text} for text in SENTENCES[0]]},
        {"imgid": 8, "filename": "8.jpg", "split": "train", "sentences": [{"raw": "unused"}]},
    ]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": records}))
    data = load("flickr30k", tmp_path)
    data.check_images(data.questions)
    assert [(q.id, q.images) for q in data.questions] == [("7", ("7.jpg",))]
    assert data.facts["source"].startswith("official")


@pytest.fixture
def nocaps(tmp_path) -> Path:
    root = tmp_path / "nocaps"
    domains = ["in-domain", "out-domain", "out-domain"]
    images = [{"id": n, "file_name": f"{n}.png", "domain": d} for n, d in enumerate(domains)]
    for image in images:
        write_image(root / "validation" / image["file_name"])
    notes = [{"image_id": n, "id": 9, "caption": text} for n, texts in enumerate(SENTENCES) for text in texts]
    (root / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    (root / "nocaps_test_image_info.json").write_text(json.dumps({"images": images}))
    return tmp_path


def test_nocaps_from_the_official_file_by_domain(nocaps, no_java):
    data = load("nocaps", nocaps)
    data.check_images(data.questions)
    texts = {"0": "a dog runs", "1": "two cats", "2": "a red car"}
    found = data.score(list(texts), texts)
    counts = {domain: count for domain, (_, count) in found.groups["domain"].items()}
    assert counts == {"in-domain": 1, "out-domain": 2} and "domain" in found.points
    parts = sum(value * count for value, count in found.groups["domain"].values())
    assert parts / 3 == pytest.approx(found.values["cider"])


def test_nocaps_test_has_no_score_but_a_file_to_upload(nocaps):
    data = load("nocaps", nocaps, split="test")
    found = data.score(["0"], {"0": "a dog"})
    assert found.values == {"cider": None}
    assert "upload nocaps_test_results.json" in found.notes[0]
    assert set(data.submission({"0": "a dog"})) == {"nocaps_test_results.json"}


def test_nocaps_from_the_mirror_has_no_domains(tmp_path, no_java):
    rows = [{"image": cell(), "image_id": n, "annotations_captions": texts} for n, texts in enumerate(SENTENCES)]
    write_hub(tmp_path, "lmms-lab-encoder/NoCaps", "validation", rows)
    data = load("nocaps", tmp_path)
    assert data.score(["0"], {"0": "a dog"}).groups == {}
    assert data.facts["source"] == "lmms-lab-encoder/NoCaps"


def test_a_repeated_image_id_is_refused(nocaps):
    path = nocaps / "nocaps" / "nocaps_val_4500_captions.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="more than once: 0"):
        load("nocaps", nocaps)
