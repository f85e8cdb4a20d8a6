"""The toy model of boxes: boxes around what is seen, sentences that fit one thing, their tokens, padded strips."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from eval.config import ROOT
from lab.toy.data import vocabulary
from lab.toy.data.corpus import Corpus, is_strip, padded, strip, write_boxed_scenes
from lab.toy.data.formats import INSTRUCT_WORDS
from lab.toy.data.regions import BOX_WORDS, KINDS, box_pair, box_text, kind_of, refer
from lab.toy.data.scenes import scene
from lab.toy.llava import box_table, build_boxes
from lab.toy.stages import overlap
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.processing.image import ImageProcessor
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample, build_prompt
from llava.reduction import registry
from tests.test_toy import NAMES, described

pytestmark = pytest.mark.lab

SCENES = [scene("val", index, dense) for index, dense in itertools.product(range(10), (False, True))]
DATA = ROOT / "assets" / "eval"
# LLaVA's sentence and lmms-eval's, letter by letter.
ASK = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
)


def test_a_box_is_the_smallest_around_the_pixels_of_a_thing():
    """Corners of a square, tips of a star: the drawn side of a square is 18 % shorter than its thing's."""
    seen = set()
    colors = np.array(list(vocabulary.COLORS.values()))
    for drawn in SCENES:
        for thing, box in zip(drawn.things, drawn.boxes, strict=True):
            left, top = round(thing.x - thing.side / 2), round(thing.y - thing.side / 2)
            if thing.kind != "shape":
                assert box == (left, top, left + thing.side, top + thing.side)
                continue
            pixels = drawn.image[top : top + thing.side, left : left + thing.side].astype(int)
            own = ((pixels - colors[thing.color]) ** 2).sum(-1) < 90**2
            rows, columns = (np.flatnonzero(own.sum(axis) > 1) for axis in (1, 0))
            found = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
            near = np.abs(np.array(box) - found) <= 2
            seen.add((thing.shape, bool(near.all())))
    assert {shape for shape, near in seen if near} == set(range(len(vocabulary.SHAPES)))


def fitting(things, text: str) -> list[int]:
    """Numbers of the things that a sentence fits, read word by word."""
    words = text.removeprefix("the ").split()
    if "panel" in words:
        return [n for n, t in enumerate(things) if t.pattern >= 0 and vocabulary.PATTERNS[t.pattern] == words[0]]
    if "frame" in words:
        frames = [(n, t) for n, t in enumerate(things) if t.kind == "frame"]
        return [n for n, t in frames if words[-1] == str(t.digit) or words[0] == vocabulary.COLOR_NAMES[t.color]]
    relation = next((word for word in words if word in ("left", "right", "above", "below")), None)
    if relation is None:
        return [things.index(thing) for thing in described(things, words)]
    at = words.index(relation)
    first = described(things, words[:at])
    (anchor,) = described(things, [word for word in words[at + 1 :] if word in NAMES])
    side = {
        "left": lambda t: t.x < anchor.x, "right": lambda t: t.x > anchor.x,
        "above": lambda t: t.y < anchor.y, "below": lambda t: t.y > anchor.y,
    }[relation]  # fmt: skip
    return [things.index(thing) for thing in first if thing != anchor and side(thing)]


def test_a_sentence_fits_one_thing_only():
    rng, read = np.random.default_rng(0), dict.fromkeys(KINDS, 0)
    for drawn, kind in itertools.product(SCENES * 5, KINDS):
        found = refer(drawn.things, kind, rng)
        if found is None:
            continue
        number, text = found
        assert fitting(drawn.things, text) == [number], text
        assert kind_of(drawn.things[number]) == kind
        assert all(word in INSTRUCT_WORDS.ids for word in text.split()), text
        read[kind] += 1
    assert min(read.values()) >= 50


def test_an_answer_is_nine_tokens_that_say_the_box_in_two_decimals():
    text = box_text((117, 69, 176, 192))
    assert text == "[0.61, 0.36, 0.92, 1.00]"
    ids = BOX_WORDS.encode(text)
    assert len(ids) == 9 and BOX_WORDS.ids[vocabulary.UNKNOWN] not in ids
    assert BOX_WORDS.tokenizer.decode(ids) == text
    # Other answers read as before.
    for other in ("red", "a big red star and a small blue circle", "A"):
        assert BOX_WORDS.encode(other) == INSTRUCT_WORDS.encode(other)
        assert BOX_WORDS.tokenizer.decode(BOX_WORDS.encode(other)) == other


@pytest.mark.parametrize(("lmms", "before"), [(0.0, ASK), (1.0, FORMAT + ASK)])
def test_the_question_is_the_benchmarks_and_its_instructions_are_single_tokens(lmms, before):
    drawn = SCENES[0]
    pair = box_pair(drawn.things, drawn.boxes, "big", np.random.default_rng(0), lmms)
    sentence = pair.message.removeprefix(before)
    number, text = refer(drawn.things, "big", np.random.default_rng(0))
    assert sentence == text and pair.answer == box_text(drawn.boxes[number])
    sample = Sample("q", pair.message, "", image=object())
    ids = list(build_prompt(sample, BOX_WORDS.tokenizer, "vicuna_v1").ids)
    said = [*BOX_WORDS.encode(pair.message), BOX_WORDS.ids[vocabulary.ASSISTANT]]
    assert ids == [*BOX_WORDS.prefix, IMAGE_TOKEN_INDEX, *said]
    assert len(said) == 2 + round(lmms) + len(sentence.split())


def test_a_strip_is_what_llava_makes_of_its_picture():
    """So a box in pixels of the scene is a box in the padded square."""
    drawn, processor = SCENES[1], ImageProcessor(192, 192)
    for row in (2, 3, 10, 11):
        shown = strip(row)
        picture = Image.fromarray(drawn.image).crop(shown)
        assert picture.size != (192, 192) and 96 <= min(picture.size) <= 160
        ours = processor(Image.fromarray(padded(drawn.image, shown)))
        torch.testing.assert_close(processor(picture), ours, atol=0, rtol=0)
    assert {strip(row)[0] > 0 for row in range(9)} == {True, False}, "lying and upright"


def test_a_strip_asks_for_no_box_that_it_does_not_show(tmp_path):
    tower = build_boxes(ROOT / "assets" / "tinyllava_instruct").model.vision_tower
    write_boxed_scenes(tmp_path, "val", 4, tower)
    corpus = Corpus(tmp_path, "val")
    for row in range(4):
        boxes = [box for box in corpus.boxes[row].tolist() if any(box)]
        assert len(boxes) <= len(corpus.list_things(row)) and is_strip(row) == (row >= 2)
        left, top, right, bottom = strip(row) if is_strip(row) else (0, 0, 192, 192)
        for box in boxes:
            assert left <= box[0] < box[2] <= right and top <= box[1] < box[3] <= bottom
        if not is_strip(row):
            assert len(boxes) == len(corpus.list_things(row))
    assert sum(map(any, corpus.boxes[2].tolist())) < len(corpus.list_things(2))


def test_near_coordinates_start_alike_and_old_words_as_they_were():
    table = torch.randn(len(INSTRUCT_WORDS), 160, generator=torch.Generator().manual_seed(1))
    grown = box_table(table, 1.0)
    old = INSTRUCT_WORDS.words[:-1]
    assert torch.equal(grown[: len(old)], table[: len(old)]) and torch.equal(grown[-1], table[-1])
    rows = grown[[BOX_WORDS.ids[f"{value:.2f}"] for value in (0.4, 0.41, 0.8)]]
    near, far = torch.dist(rows[0], rows[1]), torch.dist(rows[0], rows[2])
    assert near < 0.5 * far
    with pytest.raises(UserError, match="84 words; this stage starts from a toy model of 165 words"):
        build_boxes(ROOT / "assets" / "tinyllava")


def test_overlap_is_counted_in_cells():
    """Slow: every box as a set of unit cells."""
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.integers(0, 9, (200, 4))) for _ in range(2))
    b[:, 2:] = b[:, :2] + 1 + torch.tensor(rng.integers(0, 5, (200, 2)))  # a true box has an area

    def cells(box):
        x1, y1, x2, y2 = box
        return set(itertools.product(range(x1, x2), range(y1, y2)))

    pairs = [(cells(p), cells(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    slow = [len(x & y) / len(x | y) for x, y in pairs]
    assert overlap(a, b).tolist() == pytest.approx(slow) and max(slow) > 0.3


def test_the_sentences_of_the_toy_benchmark_fit_the_boxes_of_its_scenes():
    """testA asks for big shapes, testB for the others; a strip's pixels count from its own corner."""
    for split in ("testA", "testB", "val"):
        rows = [json.loads(line) for line in (DATA / "refcoco" / f"refcoco_{split}.jsonl").read_text().splitlines()]
        assert len(rows) >= 300
        for row in rows[::10] + [row for row in rows if row["width"] != row["height"]][::5]:
            part, index, kind = re.search(r"(test|val)(\d{5})([nd])\.jpg", row["image"]).groups()
            drawn = scene(part, int(index), kind == "d")
            (number,) = fitting(drawn.things, row["sent"])
            big = kind_of(drawn.things[number]) == "big"
            assert split == "val" or big == (split == "testA")
            left, top = (192 - row["width"]) // 2, (192 - row["height"]) // 2
            x1, y1, x2, y2 = row["bbox"]
            assert drawn.boxes[number] == (x1 + left, y1 + top, x2 + left, y2 + top)
            with Image.open(DATA / row["image"]) as picture:
                assert picture.size == (row["width"], row["height"])


@pytest.mark.training
def test_the_shipped_model_finds_big_shapes():
    """Every tenth sentence of testA; without the picture hardly a box is right."""
    model = load(str(ROOT / "assets" / "tinyllava_boxes"), device="cpu")
    rows = [json.loads(line) for line in (DATA / "refcoco" / "refcoco_testA.jsonl").read_text().splitlines()][::10]
    true = torch.tensor([row["bbox"] for row in rows]) / 192

    def accuracy(seen: bool) -> float:
        grey = Image.new("RGB", (192, 192), (122, 116, 104))
        pictures = [Image.open(DATA / row["image"]) if seen else grey for row in rows]
        samples = [Sample(row["sent"], ASK + row["sent"], "", one) for row, one in zip(rows, pictures, strict=True)]
        answers = generate(model, samples, registry.build("full", model.visual_tokens), max_new_tokens=12).answers
        said = torch.tensor([[float(part) for part in re.findall(r"\d\.\d\d", answer.text)] for answer in answers])
        return float((overlap(1e6 * said, 1e6 * true) >= 0.5).float().mean())

    assert accuracy(True) >= 0.6 and accuracy(False) <= 0.1
