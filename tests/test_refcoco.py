"""RefCOCO: what is asked, which boxes are refused, and the metric against a definition that counts pixels."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.refcoco import Target, evaluate, read_box
from eval.results.report import confidence
from llava.errors import UserError
from tests.benchmark_files import edit_line, load, write_hub, write_lines

WIDE, TALL = (64, 48), (30, 50)
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
)
ASKED = "Please provide the bounding box coordinate of the region this sentence describes: the red star {0}"


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(size=WIDE, colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_official(data, name="refcoco", file="refcoco_val.jsonl", image="coco/train2014/a.png"):
    """Two sentences about one picture of 64 x 48."""
    (data / "coco" / "train2014").mkdir(parents=True)
    (data / "coco" / "train2014" / "a.png").write_bytes(picture())
    line = {"image": image, "sent": "the red star {0}", "bbox": [16.0, 12.0, 48, 36], "width": 64, "height": 48}
    return write_lines(data / name / file, [line, line | {"sent": "left", "bbox": [0, 0, 20.5, 48.4]}])


def hub_rows():
    image = {"bytes": picture(), "path": None}
    row = {"question_id": "7", "answer": ["the red star {0}", "star"], "bbox": [16.0, 12.0, 32.0, 24.0], "image": image}
    tall = {"bytes": picture(TALL), "path": None}
    return [row, row | {"answer": ["blue"], "bbox": [0.0, 10.0, 30.0, 40.0], "image": tall}]


def test_official_lines_are_asked_as_llava_and_lmms_eval_ask(tmp_path):
    """A brace in a sentence is no place to fill in, and "data/" of the authors' paths is the data folder."""
    write_official(tmp_path, image="data/coco/train2014/a.png")
    data = load("refcoco", tmp_path)
    data.check_images(data.questions)
    first, second = data.questions
    assert first.message == ASKED and first.answer == "[0.250, 0.250, 0.750, 0.750]" and first.images == second.images
    assert (first.id, second.id, data.max_new_tokens, data.facts["source"]) == ("1", "2", 32, "official")
    assert load("refcoco", tmp_path, "lmms").questions[0].message == FORMAT + ASKED
    score = data.score(["1", "2"], {"1": "The box is [0.25, 0.25, 0.75, 0.75].", "2": "on the left"})
    assert score.main == "acc@0.5" and score.values["acc@0.5"] == 50 and score.values["unparsed"] == 1
    assert data.sample_score is not None and data.sample_score(first, first.answer) == 1
    assert data.normalise is not None and data.normalise("[0.10, 0, 1, 1]") == data.normalise("It is [0.1, 0.0, 1, 1]")


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("refcoco_plus", "refcoco+", "refcoco+_val.jsonl"),
        ("refcoco_plus", "refcoco", "refcoco+_val.jsonl"),
        ("refcocog", "refcocog", "refcocog_val.jsonl"),
    ],
)
def test_each_benchmark_reads_its_own_file(tmp_path, name, folder, file):
    write_official(tmp_path, folder, file)
    assert len(load(name, tmp_path).questions) == 2
    with pytest.raises(UserError, match="No RefCOCO val questions at"):
        load("refcoco", tmp_path)


def test_every_sentence_of_a_row_of_the_hub_is_asked(tmp_path):
    """The hub has width and height where the official files have the second corner, and one id for several rows."""
    write_hub(tmp_path, "lmms-lab/RefCOCO", "val", hub_rows())
    data = load("refcoco", tmp_path)
    assert [question.id for question in data.questions] == ["7#1", "7#2", "7#3"]
    assert data.questions[0].message == ASKED and data.questions[1].answer == "[0.250, 0.250, 0.750, 0.750]"
    assert data.questions[2].answer == "[0.000, 0.200, 1.000, 1.000]", "30 x 50, not the first picture's size"
    assert [question.images for question in data.questions] == [("0/image",), ("0/image",), ("1/image",)]
    score = data.score(["7#1"], {"7#1": "[0.25, 0.25, 0.75, 0.75]"})
    assert score.values["acc@0.5"] == 100 and "another set than the official one" in score.notes[0]
    write_hub(tmp_path, "lmms-lab/RefCOCO", "testA", hub_rows())
    assert load("refcoco", tmp_path, split="testA").score(["7#1"], {"7#1": ""}).notes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bbox": [16, 12, 66, 36]}, "outside its picture of 64 x 48 pixels"),
        ({"bbox": [-2, 12, 48, 36]}, "outside its picture"),
        ({"bbox": [16, 12, 16, 36]}, "width and height should be above 0"),
        ({"bbox": [16, 36, 48, 12]}, "width and height should be above 0"),
        ({"bbox": [16, 12, 48]}, "four numbers as bbox .x1, y1, x2 and y2., got 3"),
        ({"width": 640, "height": 480}, "640 x 480 pixels, but .*a.png has 64 x 48"),
        ({"width": 48, "height": 64}, "48 x 64 pixels, but .*a.png has 64 x 48"),
        ({"image": "../a.png"}, "not inside the image folder"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named(tmp_path, changes, said):
    path = write_official(tmp_path)
    edit_line(path, 2, **changes)
    with pytest.raises(UserError, match=f"refcoco_val.jsonl line 2 .*{said}"):
        load("refcoco", tmp_path)


@pytest.mark.parametrize("bbox", [[16, 12, 0, 24], [16, 12, 32, -4], [40, 12, 32, 24]])
def test_a_wrong_row_of_the_hub_is_named(tmp_path, bbox):
    first, second = hub_rows()
    write_hub(tmp_path, "lmms-lab/RefCOCO", "val", [first, second | {"bbox": list(map(float, bbox))}])
    with pytest.raises(UserError, match=r"row 1 has the bbox .* read as x, y, width and height: "):
        load("refcoco", tmp_path)


def test_sizes_are_compared_where_the_images_are_there(tmp_path):
    """Scores of answer files need no images, and a damaged one is named."""
    image = write_official(tmp_path).parents[1] / "coco" / "train2014" / "a.png"
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"Cannot read the size of the image coco/train2014/a\.png"):
        load("refcoco", tmp_path)
    image.unlink()
    assert len(load("refcoco", tmp_path).questions) == 2


# -- the metric ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.61, 0.36, 0.92, 0.83]", (0.61, 0.36, 0.92, 0.83)),
        ("It is [ 0,.5, 1, 1] or [0,0.5,  1,1 ].", (0, 0.5, 1, 1)),  # ".5" is no number for the official script
        ("[-0.1, 0, 1.25, 1] [0, 0, 1, 1]", (-0.1, 0, 1.25, 1)),
        ("[0.1, 0.2, 0.3]", None),
        ("0.1, 0.2, 0.3, 0.4", None),
        (f"[{'9' * 400}, 0, 1, 1]", None),
        ("", None),
    ],
)
def test_the_first_four_numbers_in_brackets_are_the_answer(text, box):
    assert read_box(text) == box


def drawn(box, width, height, left=0, top=0, canvas=(0, 0)):
    """The cells of a box on a canvas; all numbers are whole cells."""
    cells = np.zeros((canvas[1] or height, canvas[0] or width), bool)
    x1, y1, x2, y2 = (round(part) for part in box)
    cells[max(0, y1 + top) : max(0, y2 + top), max(0, x1 + left) : max(0, x2 + left)] = True
    return cells


def counted(said, target, frame) -> float:
    """Intersection over union by counting cells; the square frame pads the picture, its answers are parts of that."""
    side = max(target.width, target.height)
    left, top = (side - target.width) // 2, (side - target.height) // 2
    if frame == "image":
        width, height, left, top = target.width, target.height, 0, 0
    else:
        width = height = side
    box = [part * size for part, size in zip(said, (width, height) * 2, strict=True)]
    a = drawn(box, width, height, canvas=(side, side))
    b = drawn(target.box, width, height, left, top, (side, side))
    return (a & b).sum() / (a | b).sum()


def test_every_number_equals_a_count_of_pixels():
    """Answers whose corners are whole pixels in both frames, about wide, tall and square pictures."""
    rng, targets, said, texts = np.random.default_rng(0), {}, {}, {}
    for number in range(300):
        # 32 x 16 in a square of 32: quarters of the one are whole pixels of the other.
        width, height = ((32, 16), (16, 32), (32, 32))[number % 3]
        x1, y1 = rng.integers(0, width - 4), rng.integers(0, height - 4)
        box = (x1, y1, rng.integers(x1 + 2, width + 1), rng.integers(y1 + 2, height + 1))
        targets[str(number)] = Target(tuple(map(float, box)), width, height)
        near = targets[str(number)].relative("square" if number % 2 else "image")
        parts = np.clip(np.round(np.array(near) * 16) + rng.integers(-1, 2, 4), 0, 16)
        parts[2:] = np.maximum(parts[2:], parts[:2] + 1)
        said[str(number)] = parts / 16
        texts[str(number)] = str([float(part) for part in parts / 16])
    image, square = (
        [counted(said[n], target, frame) for n, target in targets.items()] for frame in ("image", "square")
    )
    values = evaluate(targets, texts).values
    for name, overlaps, least in (
        ("acc@0.5", image, 0.5),
        ("acc@0.3", image, 0.3),
        ("acc@0.7", image, 0.7),
        ("acc@0.5_square", square, 0.5),
    ):
        assert values[name] == pytest.approx(100 * np.mean([value >= least for value in overlaps])), name
        assert 5 < values[name] < 95, "the answers tell nothing apart"
    assert values["mean_iou"] == pytest.approx(100 * np.mean(image))
    assert abs(values["acc@0.5"] - values["acc@0.5_square"]) > 3, "the frames are the same here"
    centres = [
        t.box[0] <= (said[n][0] + said[n][2]) / 2 * t.width <= t.box[2]
        and t.box[1] <= (said[n][1] + said[n][3]) / 2 * t.height <= t.box[3]
        for n, t in targets.items()
    ]
    assert values["centre_in_box"] == pytest.approx(100 * np.mean(centres))


def test_the_frames_of_a_photograph_differ_by_an_eighth():
    """At 640 x 480 the square has 80 rows of padding above the picture."""
    target = Target((0, 0, 640, 480), 640, 480)
    assert target.relative("image") == (0, 0, 1, 1) and target.relative("square") == (0, 0.125, 1, 0.875)
    assert Target((0, 0, 480, 640), 480, 640).relative("square") == (0.125, 0, 0.875, 1)


def test_answers_without_a_box_and_inverted_ones_are_wrong_and_counted():
    """The box of zeros that stands for no answer officially has its centre in a box at the corner; here it has none."""
    targets = {name: Target((0, 0, 50, 50), 100, 100) for name in "abcd"}
    texts = {"a": "in the corner", "b": "[0.5, 0.5, 0, 0]", "c": "[0.5, 0, 0, 0.5]", "d": "[0, 0, 0.5, 0.5]"}
    score = evaluate(targets, texts, ["note"])
    assert score.correct == {"a": 0, "b": 0, "c": 0, "d": 1} and score.notes == ("note",)
    assert score.values == {
        "acc@0.5": 25,
        "acc@0.5_square": 25,
        "acc@0.3": 25,
        "acc@0.7": 25,
        "mean_iou": 25,
        "centre_in_box": 25,
        "unparsed": 1,
        "inverted": 2,
    }
    assert score.points == {"unparsed", "inverted"}
    with pytest.raises(UserError, match="1 question without a prediction: b"):
        evaluate(targets, {name: texts[name] for name in "acd"})


def test_one_frame_holds_for_all_answers():
    """Of an answer right in the one frame and one right in the other, half is right; the better of both made it all."""
    targets = dict.fromkeys(("image", "square"), Target((0, 0, 32, 6), 32, 16))
    score = evaluate(targets, {"image": "[0, 0, 1, 0.375]", "square": "[0, 0.25, 1, 0.4375]"})
    assert score.values["acc@0.5"] == score.values["acc@0.5_square"] == 50
    assert score.correct == {"image": 1, "square": 0}


def test_further_numbers_have_intervals_over_images():
    """A table may show the padded frame or the mean overlap with an interval, as it does the main number."""
    names = [str(number) for number in range(60)]
    targets = {name: Target((0, 0, 32, 16), 32, 16) for name in names}
    texts = {name: f"[0, 0, 1, {0.3 + int(name) / 100}]" for name in names}
    found = confidence(evaluate(targets, texts), {name: f"image {int(name) // 2}" for name in names})
    for name in ("acc@0.5", "acc@0.5_square", "acc@0.7", "mean_iou"):
        assert found[name]["unit"] == "image" and found[name]["low"] < found[name]["mean"] < found[name]["high"]
