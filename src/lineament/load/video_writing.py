"""Films written with other chroma and everything else as it was: luma bit for bit, at its depth; times, sound, subtitles, chapters, metadata, pixel aspect,
rotation, range, matrix and, where the codec can, alpha.

:func:`planned` says what a film will be written as, and refuses what cannot be, before any frame of it is coloured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.core.files import atomic_write
from lineament.load.film_frames import DEPTHS, FilmFrame, Format, chroma_of, luma_of, luma_range
from lineament.load.picture_films import PictureFilm
from lineament.load.video import Film, av_module

# Frames may come at any time: a flag of containers, which some relatives of .mp4 do not show.
_ANY_TIME, _LIKE_MP4 = 0x400, ("ipod", "3gp", "3g2")


@dataclass(frozen=True)
class VideoOutput:
    """How a film is written.

    Attributes:
        layout, depth: the pixel format and its bits. across, down: pixels of a chroma sample.
        notes: what cannot be kept.
    """

    film: Film | PictureFilm
    path: Path
    codec: str
    format: Format
    layout: str
    depth: int
    across: int
    down: int
    notes: tuple[str, ...]

    def planes(self, frame: FilmFrame, rgb: Tensor, *, luma: bool = False) -> list[np.ndarray]:
        """Cb and Cr as they are stored of a frame's upright picture [height, width, 3] in [0, 1]; with ``luma`` its Y too, in place of the film's."""
        rgb = torch.rot90(rgb, -frame.turns)
        scale, full = 2 ** (self.depth - 8), frame.full_range
        reach = (255 if full else 224) * scale
        found = [
            self._stored(128 * scale + reach * (self._reduced(x) - 0.5)) for x in chroma_of(rgb, frame.matrix)
        ]
        if luma:
            low, width = luma_range(self.depth, full)
            found.append(self._stored(low + width * luma_of(rgb, frame.matrix)))
        return found

    def write(self, planes: Callable[[FilmFrame], Sequence[np.ndarray]]) -> None:
        """Write every frame of the film, with what ``planes`` gives for it: what :meth:`planes` gave."""
        with atomic_write(self.path) as temporary, av_module().open(str(temporary), "w") as out:
            encoder = _encoder(out, self.format, self.codec, self.layout)
            # Streams that are copied come after the film's own.
            for frame in self.film.frames(out):
                picture = self._picture(frame, *planes(frame))
                picture.time_base = self.format.time_base
                out.mux(encoder.encode(picture))
            out.mux(encoder.encode(None))

    def _reduced(self, x: Tensor) -> Tensor:
        """The mean over the pixels of each chroma sample."""
        height, width = x.shape
        x = torch.nn.functional.pad(
            x[None], (0, -width % self.across, 0, -height % self.down), mode="replicate"
        )[0]
        return x.unflatten(1, (-1, self.across)).unflatten(0, (-1, self.down)).mean((1, 3))

    def _stored(self, x: Tensor) -> np.ndarray:
        return (
            x.round()
            .clamp(0, 2**self.depth - 1)
            .cpu()
            .numpy()
            .astype(np.uint8 if self.depth == 8 else np.uint16)
        )

    def _picture(
        self, frame: FilmFrame, cb: np.ndarray, cr: np.ndarray, luma: np.ndarray | None = None
    ) -> Any:
        height, width = frame.luma.shape
        picture = av_module().VideoFrame(width, height, self.layout)
        planes = [self._deep(frame.luma, frame.depth) if luma is None else luma, cb, cr]
        if len(picture.planes) > 3:
            opaque = np.full((height, width), 255, np.uint8)
            planes.append(
                self._deep(opaque, 8) if frame.alpha is None else self._deep(frame.alpha, frame.depth)
            )
        for plane, values in zip(picture.planes, planes):
            kind = np.dtype(np.uint8 if self.depth == 8 else "<u2")
            rows = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
            rows[:, : values.shape[1]] = values
            plane.update(rows.tobytes())
        picture.pts = frame.pts
        for name in ("color_range", "colorspace"):
            if name in self.format.colours and hasattr(picture, name):
                setattr(picture, name, self.format.colours[name])
        return picture

    def _deep(self, plane: np.ndarray, depth: int) -> np.ndarray:
        """A plane of ``depth`` bits at the output's."""
        return plane if depth == self.depth else plane.astype(np.uint32) << self.depth >> depth


def planned(film: Film | PictureFilm, path: str | Path, *, codec: str = "libx264") -> VideoOutput:
    """How a film will be written.

    Args:
        codec: ``"libx264"`` (crf 16), ``"ffv1"`` (lossless), ``"prores_ks"``, ...

    Raises:
        InputError: an ending that is no video's, a codec that is not there or stores no luma, sound that the container cannot hold.
    """
    av, path, form = av_module(), Path(path), film.format
    layout, depth, notes = _layout(codec, form)
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = av.open(f"{folder}/film{path.suffix}", "w")
        except (av.FFmpegError, ValueError) as error:
            raise InputError(
                f"out: {path.suffix!r} is no video's ending, expected .mkv, .mp4 or .mov"
            ) from error
        require(
            bool(int(out.format.flags) & _ANY_TIME) or out.format.name in _LIKE_MP4,
            f"out: {path.suffix} does not keep the times of frames; write an .mkv, .mp4 or .mov",
        )
        try:
            encoder = _encoder(out, form, codec, layout)
        except (av.FFmpegError, ValueError) as error:
            raise InputError(
                f"out: {path.suffix} holds no {codec}; write an .mkv, or choose another codec"
            ) from error
        turns = hasattr(encoder, "set_display_rotation")
        notes += film.left_out(out)
        try:
            # Some codecs only say here what they cannot write, which should not be after the work.
            with out:
                out.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            width, height = form.sides
            raise InputError(
                f"codec: {codec!r} cannot write frames of {width} x {height} ({layout}) into {path.suffix or 'this file'} here; nearest: 'libx264', 'ffv1', 'prores_ks'"
            ) from error
    if form.rotation and not turns:
        notes.append(f"the film's rotation by {form.rotation} degrees is left out: this PyAV cannot write it")
    if not form.alpha and form.metadata.get("alpha_mode") == "1":
        notes.append("alpha is left out: the film keeps it beside its frames, where no decoder here reads it")
    sampled = av.VideoFormat(layout, 64, 64)
    across, down = 64 // sampled.chroma_width(), 64 // sampled.chroma_height()
    return VideoOutput(film, path, codec, form, layout, depth, across, down, tuple(notes))


def _layout(codec: str, form: Format) -> tuple[str, int, list[str]]:
    """The codec's pixel format that keeps most: luma's bits first, then alpha, then the usual size of chroma."""
    av = av_module()
    try:
        there = {each.name for each in av.Codec(codec, "w").video_formats or ()}
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"codec: {codec!r} is not there; nearest: 'libx264', 'ffv1', 'prores_ks'") from error
    deep = [d for d in DEPTHS if d >= form.depth] + [d for d in reversed(DEPTHS) if d < form.depth]
    even = not any(side % 2 for side in form.sides)
    for depth in deep:
        for alpha in ("a", "") if form.alpha else ("",):
            for chroma in ("420", "422", "444") if even else ("444", "422", "420"):
                name = f"yuv{alpha}{chroma}p{'' if depth == 8 else f'{depth}le'}"
                if name in there:
                    notes = []
                    if depth < form.depth:
                        notes.append(
                            f"luma of {form.depth} bits is cut to {depth}, which is all that {codec} has; ffv1 keeps it"
                        )
                    if form.alpha and not alpha:
                        notes.append(f"alpha is left out: {codec} holds none; ffv1 does")
                    return name, depth, notes
    raise InputError(f"codec: {codec!r} stores no plane of luma; nearest: 'libx264', 'ffv1', 'prores_ks'")


def _encoder(out: Any, form: Format, codec: str, layout: str) -> Any:
    """A stream of a film that is written."""
    options = {"crf": "16"} if codec in ("libx264", "libx265") else {}
    if codec == "libx265":
        options["x265-params"] = "log-level=error"  # it writes to the terminal itself
    stream = out.add_stream(codec, rate=form.rate, options=options)
    context = stream.codec_context
    context.width, context.height = form.sides
    context.pix_fmt = layout
    # On the stream alone, it would be rounded to the frame rate's.
    context.time_base = form.time_base
    if form.aspect:
        context.sample_aspect_ratio = form.aspect
    for name, value in form.colours.items():
        setattr(context, name, value)
    if form.rotation and hasattr(stream, "set_display_rotation"):
        stream.set_display_rotation(form.rotation)
    stream.metadata.update(
        {k: v for k, v in form.metadata.items() if k in ("language", "title", "handler_name")}
    )
    return stream
