"""The toy Video-LLaVA: drawn videos, questions about them, token sequences; and what is shipped."""

import itertools

import numpy as np
import pytest
import torch
from transformers import VideoLlavaForConditionalGeneration

from eval import benchmarks
from eval.config import ROOT
from lab.toy.benchmarks.gqa_and_videos import VIDEO_SPLITS as SPLITS
from lab.toy.benchmarks.gqa_and_videos import video_questions
from lab.toy.clip import build_clip
from lab.toy.data import vocabulary
from lab.toy.data.corpus import FRAME_TOKENS, RUN, Corpus, tower_states, write_videos
from lab.toy.data.questions import PlainQuestion
from lab.toy.data.videos import FAMILIES, SEEN, VIDEO_SIDE, ask_video, draw_video, plan_video
from lab.toy.data.vocabulary import COLOR_NAMES, SHAPES, VIDEO_WORDS
from lab.toy.llava import Trainee, crop_tower
from lab.toy.long_stages import choose_frame_tokens, frame_tokens, visuals
from lab.toy.packing import forward, pack, predict, question_line, whole
from llava.processing.image import ImageProcessor
from llava.processing.video import VideoProcessor, frame_indices, read_video

pytestmark = pytest.mark.lab

WHOLE = frame_tokens(np.arange(RUN))

DATA, MODEL = ROOT / "assets" / "eval_video", ROOT / "assets" / "tinyllava_video"
PLANS = [plan_video("val", index) for index in range(120)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, "train", 3, crop_tower(build_clip(width=32, layers=2).vision_model))
    return Corpus(folder, "train")


def test_shapes_and_colours_are_unique_in_a_video():
    for plan in PLANS:
        shapes = [actor.shape for actor in plan.actors]
        colors = [color for actor in plan.actors for color in set(actor.colors)]
        assert len(set(shapes)) == len(shapes) and len(set(colors)) == len(colors)
        onsets = [actor.visible.index(True) for actor in plan.actors if actor.action == "appear"]
        assert len(set(onsets)) == len(onsets) and 0 not in onsets


def test_what_is_planned_is_what_the_eight_frames_show():
    """Read the drawn owners at the eight frames: visibility, direction and colour of every actor."""
    for plan in PLANS[:25]:
        video, owners = draw_video(plan)
        assert video.shape == (plan.frames, VIDEO_SIDE, VIDEO_SIDE, 3) and 16 <= plan.frames <= 24
        shown, owned = video[frame_indices(plan.frames)], owners[frame_indices(plan.frames)]
        for number, actor in enumerate(plan.actors):
            masks = owned == number
            assert tuple(masks.any((1, 2)).tolist()) == actor.visible
            centres = [np.argwhere(mask).mean(0) for mask in masks if mask.any()]
            down, across = centres[-1] - centres[0]
            moved = {"left": -across, "right": across, "up": -down, "down": down}
            if actor.action == "move":
                assert moved[actor.direction] >= 38 and sum(abs(value) > 3 for value in (down, across)) == 1
            else:
                assert abs(down) < 1 and abs(across) < 1
            for frame in np.flatnonzero(actor.visible):
                seen = shown[frame][masks[frame]].astype(float).mean(0)
                nearest = min(vocabulary.COLORS, key=lambda name: np.abs(seen - vocabulary.COLORS[name]).sum())
                assert nearest == COLOR_NAMES[actor.colors[frame]]


def test_answers_are_right_by_an_independent_reading():
    rng, asked = np.random.default_rng(0), dict.fromkeys(FAMILIES, 0)
    for plan in PLANS:
        for family in FAMILIES:
            question = ask_video(plan, family, rng)
            if question is not None:
                assert read_answer(plan, question.text) == question.answer, question
                words = question.text.lower().replace("?", " ?").split()
                assert VIDEO_WORDS.encode(question.text) == [VIDEO_WORDS.ids[word] for word in words]
                asked[family] += 1
    assert min(asked.values()) >= 20, asked


def read_answer(plan, text: str) -> str:
    """Answer from the plan's raw tables of places, visibility and colours alone; names of actions are not looked at."""
    words = text.lower().replace("?", "").split()
    spells = lambda a: sum(1 for shown, _ in itertools.groupby(a.visible) if shown)  # noqa: E731
    verbs = {
        "move": lambda a: a.start != a.end,
        "appear": lambda a: not a.visible[0] and a.visible[-1],
        "disappear": lambda a: a.visible[0] and not a.visible[-1],
    }
    if words[0] == "how" and words[2] == "times":
        return str(spells(fitting(plan, words)))
    if words[0] == "how":
        return str(sum(map(verbs[words[-1]], plan.actors)))
    if words[0] == "is":
        return "yes" if fitting(plan, words) else "no"
    if words[0] == "does":
        return "yes" if verbs["move"](fitting(plan, words)) else "no"
    if words[0] == "where":
        return direction(fitting(plan, words))
    if "that" not in words:
        target = fitting(plan, words)
        return COLOR_NAMES[target.colors[-1 if words[-1] == "end" else 0]]
    clause = words[words.index("that") + 1 :]
    found = [a for a in plan.actors if verbs[clause[0].removesuffix("s")](a)]
    if clause[-1] in ("first", "last"):
        found = sorted(found, key=lambda a: a.visible.index(True))[:: 1 if clause[-1] == "first" else -1][:1]
    elif len(clause) == 2:
        found = [a for a in found if direction(a) == clause[1]]
    (target,) = found
    return COLOR_NAMES[target.color] if words[1] == "color" else SHAPES[target.shape]


def fitting(plan, words):
    """The one actor that the words name, or None."""
    colors = [w for w in words if w in COLOR_NAMES]
    shapes = [w for w in words if w in SHAPES]
    found = [
        a
        for a in plan.actors
        if all(COLOR_NAMES[a.color] == c for c in colors) and all(SHAPES[a.shape] == s for s in shapes)
    ]
    assert len(found) <= 1
    return found[0] if found else None


def direction(actor) -> str:
    across, down = actor.end[0] - actor.start[0], actor.end[1] - actor.start[1]
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def test_runs_hold_a_cls_in_front_of_every_frame(corpus):
    assert RUN == 2056
    seen = visuals(corpus, [1], [WHOLE])
    table = torch.from_numpy(np.array(corpus.features[1])).view(torch.bfloat16)
    assert torch.equal(seen.features[0].view(SEEN, FRAME_TOKENS, -1), table) and seen.total.tolist() == [RUN]
    rng = np.random.default_rng(0)
    for blind in (False, True):
        places = choose_frame_tokens(corpus, 1, 208, rng, blind=blind).positions
        assert len(set(places.tolist())) == 208 and (np.diff(places) > 0).all()
    firsts = choose_frame_tokens(corpus, 1, 208, rng).positions
    assert set(range(0, RUN, FRAME_TOKENS)) <= set(firsts.tolist())


def test_the_benchmark_is_what_the_generator_draws():
    for split, (first, count) in SPLITS.items():
        data = benchmarks.get("video_qa").load(DATA, split)
        data.check_images(data.questions)
        expected = [
            (f"{split}{index:05d}.mp4", q.text, q.answer)
            for index in range(first, first + count)
            for q in video_questions(split, index, plan_video(split, index))
        ]
        assert [(q.image, q.question, q.answer) for q in data.questions] == expected
    video, _ = draw_video(plan_video("test", 7))
    frames = read_video(DATA / "video_qa" / "videos" / "test00007.mp4").frames
    shown = video[frame_indices(len(video))].astype(float)
    assert np.abs(np.stack([np.asarray(frame) for frame in frames]) - shown).mean() < 4
    sample = data.sample(data.questions[0])
    assert len(sample.images[0].frames) == SEEN and sample.question == data.questions[0].question


def test_transformers_gives_the_logits_of_training():
    """Its class on a shipped video, whole prompt and frames, against our run and packed forward."""
    model = VideoLlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    data = benchmarks.get("video_qa").load(DATA, "test")
    question = data.questions[5]
    line = question_line(VIDEO_WORDS, PlainQuestion("", question.question, question.answer))
    video, lines, parts = data.images.open(question.image), pack([[line]]), Trainee(model)
    with torch.inference_mode():
        frames = np.stack([np.asarray(frame) for frame in video.frames])
        seen = whole(tower_states(model.model.video_tower, frames).flatten(0, 1)[None])
        decoded = forward(parts, VIDEO_WORDS.prefix, seen, lines)
        ours = predict(parts, decoded.states, decoded.start, lines.target)[0]
        prompt = [*VIDEO_WORDS.prefix, *[VIDEO_WORDS.ids[vocabulary.VIDEO]] * RUN, *line.asked]
        pixels = VideoProcessor(ImageProcessor(VIDEO_SIDE, VIDEO_SIDE))(video)[None]
        theirs = model(input_ids=torch.tensor([prompt]), pixel_values_videos=pixels).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
