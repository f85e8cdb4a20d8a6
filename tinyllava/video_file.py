"""Frames to an MP4 file (H.264)."""

import io

import av
import numpy as np

RATE = 8  # frames per second: a video of 16 to 24 frames takes two to three seconds
QUALITY = "12"  # x264's constant rate factor, 0 is lossless


def encode_video(frames: np.ndarray) -> bytes:
    """[n, height, width, 3] uint8 -> the file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": QUALITY, "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
