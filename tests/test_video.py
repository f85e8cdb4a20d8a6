"""Reading video files that the test writes, and pixels and the video tower against the official code's."""

import struct
import sys
from pathlib import Path
from zlib import crc32

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, VideoLlavaImageProcessor

from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import TowerMerger, encode
from llava.model.video_llava import LanguageBindVideoTower
from llava.processing.image import ImageProcessor
from llava.processing.video import LanguageBindImageProcessor, Video, VideoProcessor, frame_indices, read_video
from llava.reduction.modules import tower_flops
from llava.reduction.scores import TOWER_SCORES, TowerScore, clip_attention

WIDTH, HEIGHT = 64, 48
FRAMES = 4  # of the small video tower
RECORDED = Path(__file__).parent / "data" / "video_llava"


def level(number: int) -> int:
    """The grey of frame `number`: apart enough to survive compression."""
    return 16 + 7 * number


def write(path: Path, count: int, codec: str = "mpeg4", turn: int = 0) -> Path:
    """A video of grey frames with a bright left edge, to be shown with a counter-clockwise turn."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        if turn:
            stream.set_display_rotation(turn)
        for number in range(count):
            image = np.full((HEIGHT, WIDTH, 3), level(number), np.uint8)
            image[:, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path


def levels(video: Video) -> list[int]:
    """Which frame each frame of the video was, read from its grey."""
    greys = [np.asarray(frame)[:, WIDTH // 2 :].mean() for frame in video.frames]
    numbers = [round((grey - 16) / 7) for grey in greys]
    assert all(abs(grey - level(number)) < 3 for grey, number in zip(greys, numbers, strict=True))
    return numbers


# Reading.


@pytest.mark.parametrize("frames", [1, 2, 8, 16])
def test_indices_are_an_even_spread_rounded_down(frames):
    for count in [1, 7, 8, 9, 15, 16, 17, 100, 299, 300, 301, 1799]:
        exact = [number * (count - 1) // (frames - 1) if frames > 1 else 0 for number in range(frames)]
        assert frame_indices(count, frames) == exact


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv"])
@pytest.mark.parametrize("count", [8, 9, 30])
def test_the_right_frames_are_read(tmp_path, name, count):
    path = write(tmp_path / name, count)
    video = read_video(path)
    assert levels(video) == frame_indices(count)
    assert levels(read_video(str(path), frames=3)) == frame_indices(count, 3)
    assert levels(read_video(path, frames=1)) == [0]
    assert all(frame.mode == "RGB" and frame.size == (WIDTH, HEIGHT) for frame in video.frames)


@pytest.mark.parametrize("claimed", [3, 500])
def test_the_containers_own_count_is_not_believed(tmp_path, claimed):
    path = write(tmp_path / "clip.avi", 20)
    content = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        place = content.index(tag) + offset
        assert struct.unpack_from("<I", content, place) == (20,)
        struct.pack_into("<I", content, place, claimed)
    path.write_bytes(content)
    assert levels(read_video(path)) == frame_indices(20)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_quarter_turns_of_the_metadata_are_applied(tmp_path, turn):
    """The bright edge is stored on the left; a turn of 90 degrees counter-clockwise puts it at the bottom."""
    frame = np.asarray(read_video(write(tmp_path / "clip.mp4", 8, turn=turn)).frames[0])[..., 0]
    assert frame.shape == ((HEIGHT, WIDTH) if turn == 180 else (WIDTH, HEIGHT))
    edges = {90: frame[-8:], 180: frame[:, -8:], -90: frame[:8]}
    assert edges[turn].mean() > 230
    assert abs(frame.mean() - edges[turn].mean()) > 100


def sound(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        tone.sample_rate = 8000
        container.mux(stream.encode(tone))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No video at .*; check the path"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (
            lambda path: path.write_text("no video " * 400),
            r"Cannot read .* \(Invalid data .*; the file is damaged or no video",
        ),
        (lambda path: path.write_text("ffconcat version 1.0\nfile other.mp4"), "damaged"),
        (lambda path: write(path, 7), "has 7 frames, but 8 are needed"),
        (lambda path: write(path, 1), "has 1 frames, but 8 "),
        (lambda path: shorten(write(path, 20)), "damaged"),
        (lambda path: spoil(write(path, 20), 12), "Invalid data "),
        (sound, "no video stream"),
    ],
    ids=["missing", "folder", "empty", "text", "list", "seven frames", "one frame", "cut off", "bad frame", "sound"],
)
def test_files_that_cannot_be_used(tmp_path, make, message):
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(UserError, match=message) as refused:
        read_video(path)
    assert str(path) in str(refused.value)


def test_text_by_its_name_is_no_video(tmp_path):
    """FFmpeg makes frames of a .txt file: the text as a terminal shows it."""
    path = tmp_path / "questions.txt"
    path.write_text("What happens in the video?\n" * 200)
    with pytest.raises(UserError, match="it is text"):
        read_video(path)


def shorten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def spoil(path: Path, number: int, start: int = 8) -> Path:
    """Overwrite packet `number` from its byte `start` on."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    content = bytearray(path.read_bytes())
    content[packet.pos + start : packet.pos + packet.size] = b"\xa5" * (packet.size - start)
    path.write_bytes(content)
    return path


def test_an_incomplete_frame_matters_where_it_is_chosen(tmp_path):
    path = spoil(write(tmp_path / "clip.mp4", 20), 12, start=40)
    assert levels(read_video(path)) == frame_indices(20)
    with pytest.raises(UserError, match="frame 12 is incomplete"):
        read_video(path, frames=20)


def test_packets_without_a_frame_do_not_count(tmp_path):
    """The MPEG-2 decoder leaves out what it cannot read: 20 packets, 19 frames."""
    video = read_video(spoil(write(tmp_path / "clip.mkv", 20, "mpeg2video"), 12))
    assert levels(video) == [number + (number >= 12) for number in frame_indices(19)]


def test_a_video_cut_off_within_a_frame_is_damaged(tmp_path):
    """AVI can be read up to where it ends, so the decoder itself does not complain."""
    path = write(tmp_path / "clip.avi", 30)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"00dc", 0, content.index(b"idx1")) + 10])
    with pytest.raises(UserError, match=r"clip\.avi .*incomplete"):
        read_video(path)


# Pixels.


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def clip(width: int, height: int, frames: int = 8) -> Video:
    return Video(tuple(noise(width, height, seed) for seed in range(frames)))


def test_pixels_of_the_official_transforms():
    """Every 32nd pixel of what the official transforms gave at 224; see tests/data/video_llava/README.md."""
    recorded = np.load(RECORDED / "pixels.npz")
    for index, (width, height) in enumerate(recorded["sizes"].tolist()):
        pixels = VideoProcessor(ImageProcessor(224, 224))(clip(width, height))[:, :, ::32, ::32]
        assert np.abs(pixels.numpy() - recorded["videos"][index]).max() < 1e-5
        image = LanguageBindImageProcessor(224, 224)(noise(width, height))[:, ::32, ::32]
        assert np.abs(image.numpy() - recorded["images"][index]).max() < 1e-5


def test_pixels_of_the_transformers_reading():
    processor = VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    for size in [(97, 40), (40, 97), (31, 31), (63, 56)]:
        video = clip(*size)
        outputs = processor(list(video.frames), return_tensors="pt", return_legacy_image_output=False)
        pixels = VideoProcessor(ImageProcessor(56, 48), reading="transformers")(video)
        assert (pixels - outputs["pixel_values"]).abs().max() < 1e-5
        assert (pixels - VideoProcessor(ImageProcessor(56, 48))(video)).abs().max() > 0.1


# The video tower


def config(**changes) -> CLIPVisionConfig:
    """4 x 4 patches and CLS, 3 blocks, width 32."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**sizes, image_size=28, patch_size=7, hidden_act="quick_gelu", **changes)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that depends on its name alone, so that the official module can be given the same ones."""
    noise = np.random.RandomState(crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + noise / 5
    return noise / 2 if len(shape) == 1 else noise / np.sqrt(shape[-1])


def random_tower(frames: int = FRAMES) -> LanguageBindVideoTower:
    tower = LanguageBindVideoTower(config(), frames)
    tower.load_state_dict({key: torch.from_numpy(drawn(key, value.shape)) for key, value in tower.state_dict().items()})
    return tower.eval()


@pytest.fixture(scope="module")
def tower() -> LanguageBindVideoTower:
    return random_tower()


def frames_of_two_videos() -> torch.Tensor:
    return torch.randn(2 * FRAMES, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_the_official_module_gives_the_same():
    """All hidden states of the official module on the same weights and pixels; see tests/data/video_llava/README.md."""
    recorded = np.load(RECORDED / "tower.npz")
    tower = random_tower(int(recorded["frames"]))
    images = torch.from_numpy(drawn("pixels", (2 * tower.frames, 3, 28, 28)))
    with torch.inference_mode():
        for index, expected in enumerate(recorded["hidden_states"]):
            features = encode(tower, images, index, keep_cls=True).features
            assert np.abs(features.numpy() - expected).max() < 2e-5, f"hidden state {index}"
            assert np.abs(expected).max() > 1


@pytest.mark.parametrize("block", [0, 2, -2])
def test_signals_are_those_of_the_spatial_attention(tower, block):
    """This catches signals computed from the block's input, in front of the attention over time."""
    wanted = [TowerScore(kind, block) for kind in TOWER_SCORES]
    images = frames_of_two_videos()
    layer = tower.encoder.layers[block]
    with torch.inference_mode():
        found = encode(tower, images, -2, wanted).scores
        hidden = encode(tower, images, block % 3, keep_cls=True).features
        seen = layer.before_space(hidden)
        spatial, input_alone = (clip_attention(layer.self_attn, layer.layer_norm1(one)) for one in (seen, hidden))
        for signal in wanted:
            compute = TOWER_SCORES[signal.kind].compute
            torch.testing.assert_close(found[signal], compute(spatial), atol=2e-5, rtol=1e-4)
            assert (found[signal] - compute(input_alone)).abs().max() > 1e-3


def test_operations_are_those_that_torch_counts():
    tower, images = random_tower(), frames_of_two_videos()
    tower.config._attn_implementation = "eager"  # torch does not count its fused kernel on a CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoded = encode(tower, images, -2)
    assert counter.get_total_flops() == len(images) * tower_flops(tower, 16, encoded.tokens)


def test_merging_in_the_tower_is_refused(tower):
    """Merged tokens stand elsewhere in every frame, so attention over time would mix different places."""
    with pytest.raises(UserError, match="video tower"):
        encode(tower, frames_of_two_videos(), -2, merger=TowerMerger(None, None, tower, [0], [1]))


def test_a_missing_pyav_is_told_where_a_video_is_opened(tmp_path, monkeypatch):
    """Everything imported PyAV, so no model ran without it."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="package av"):
        read_video(tmp_path / "clip.mp4")
