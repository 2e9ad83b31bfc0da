"""Small films made with PyAV, for tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

TIMES = [0, 33, 90, 100, 141]


def greys(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Frames of noise that moves to the left."""
    base = np.random.default_rng(0).integers(30, 220, (size[1], size[0] + count), dtype=np.uint8)
    return [np.ascontiguousarray(base[:, t : t + size[0]]) for t in range(count)]


def made(
    av: Any,
    path: Path,
    layout: str = "yuv420p",
    codec: str = "ffv1",
    times: list[int] | range = TIMES,
    size: tuple[int, int] = (64, 48),
    *,
    sound: str | None = "aac",
    rotation: int = 0,
    options: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """A film, with sound unless there is to be none, whose frames come at these milliseconds."""
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "a film"
        video = out.add_stream(codec, rate=25, options=options or {})
        video.codec_context.width, video.codec_context.height = size
        video.codec_context.pix_fmt, video.codec_context.time_base = layout, Fraction(1, 1000)
        for name, value in context.items():
            setattr(video.codec_context, name, value)
        if rotation:
            video.set_display_rotation(rotation)
        heard = out.add_stream(sound, rate=48000) if sound else None
        for grey, time in zip(greys(len(times), size), times):
            frame = av.VideoFrame.from_ndarray(np.dstack([grey] * 3), format="rgb24").reformat(format=layout)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        rng = np.random.default_rng(0)
        for index in range(4 if heard else 0):
            part = (rng.random((1, 1024)) - 0.5).astype(np.float32)
            tone = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 48000, 1024 * index, Fraction(1, 48000)
            out.mux(heard.encode(tone))
        if heard:
            out.mux(heard.encode(None))
    return path
