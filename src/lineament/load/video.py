"""Films: read frame by frame with their timestamps and luma, written with other chroma and everything else as it was.

PyAV decodes and encodes (``pip install 'lineament[video]'``). The luma plane passes through bit for bit, at its depth; sound, subtitles, chapters, metadata,
pixel aspect, range and matrix are copied. A folder of pictures is read in the order of the numbers in its names.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.core.files import atomic_write

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_HDR = {16: "PQ", 18: "HLG"}
_BT709, _FULL = 1, 2
# Kr and Kb of the matrices that are met in films: BT.709, BT.601 (two numbers), BT.2020.
_MATRIX = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


@dataclass(frozen=True)
class FilmFrame:
    """A frame: when it is shown, and its luma as stored, [height, width]."""

    index: int
    pts: int
    luma: np.ndarray
    depth: int
    full_range: bool
    matrix: int

    @property
    def grey(self) -> Tensor:
        """The luma as a grey picture in [0, 1]."""
        scale = 2 ** (self.depth - 8)
        low, width = (0, 2**self.depth - 1) if self.full_range else (16 * scale, 219 * scale)
        return ((torch.from_numpy(self.luma.astype(np.float32)) - low) / width).clamp(0, 1)


@dataclass
class Film:
    """A film's first video stream.

    >>> Film("holiday.mkv").path.name
    'holiday.mkv'
    """

    path: Path
    gaps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    def frames(self) -> Iterator[FilmFrame]:
        """The frames that can be decoded, one by one; what cannot is named in ``gaps``."""
        with _opened(self.path) as film:
            yield from self._decoded(film, [_video(film, self.path)], None)

    def _decoded(
        self, film: Any, streams: list[Any], pass_on: Callable[[Any], None] | None
    ) -> Iterator[FilmFrame]:
        av = _av()
        video, index, last = streams[0], 0, None
        first: tuple[int, int] | None = None
        packets = film.demux(*streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.FFmpegError as error:
                self.gaps.append(f"after frame {index - 1}: {error.strerror}")
                break
            if packet.stream is not video:
                if packet.dts is not None and pass_on is not None:
                    pass_on(packet)
                continue
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.gaps.append(f"after frame {index - 1}: {error.strerror}")
                continue
            for frame in frames:
                first = first or (frame.height, frame.width)
                require(
                    (frame.height, frame.width) == first,
                    f"film: {str(self.path)!r} changes its size at frame {index}, from {first[1]} x {first[0]} to "
                    f"{frame.width} x {frame.height}; cut it there into two films",
                )
                # Missing or backward timestamps: a frame later than the one before.
                pts = (
                    frame.pts
                    if frame.pts is not None and (last is None or frame.pts > last)
                    else (last or 0) + _step(video)
                )
                last = pts
                yield _film_frame(frame, index, pts)
                index += 1

    @property
    def length(self) -> int:
        """How many frames can be decoded; it decodes them all."""
        return sum(1 for _ in Film(self.path).frames())

    def written(
        self,
        path: str | Path,
        chroma: Callable[[FilmFrame], tuple[np.ndarray, ...]],
        *,
        codec: str = "libx264",
    ) -> list[str]:
        """Write the film with other chroma; returns what could not be copied.

        Args:
            chroma: Cb and Cr of a frame in [0, 1], 0.5 is grey, each [height, width]; a third plane is luma in place of the film's.
            codec: ``"libx264"`` (crf 16), ``"ffv1"`` (lossless), ``"prores_ks"``, ...

        Raises:
            InputError: sound that the container cannot hold, a codec that is not there.
        """
        av = _av()
        path = Path(path)
        first = next(Film(self.path).frames(), None)
        require(first is not None, f"film: no frame of {str(self.path)!r} can be decoded")
        with atomic_write(path) as temporary, _opened(self.path) as film, av.open(str(temporary), "w") as out:
            video = _video(film, self.path)
            encoder = _encoder(out, video, first, codec)  # type: ignore[arg-type]
            holds = getattr(out, "supported_codecs", None)
            notes, copies = [], {}
            for stream in film.streams:
                if stream is video or (stream.type == "video"):
                    continue
                name = getattr(getattr(stream, "codec_context", None), "name", None) or stream.type
                canonical = getattr(
                    getattr(getattr(stream, "codec_context", None), "codec", None), "canonical_name", name
                )
                if holds is not None and not {name, canonical} & set(holds):
                    require(
                        stream.type != "audio",
                        f"out: {path.suffix} holds no {name} sound, which {str(self.path)!r} has; write an .mkv",
                    )
                    notes.append(
                        f"the {stream.type} stream ({name}) is left out: {path.suffix} cannot hold it"
                    )
                    continue
                copies[stream.index] = out.add_stream_from_template(stream)
            out.metadata.update(film.metadata)
            if hasattr(film, "chapters") and hasattr(out, "set_chapters"):
                out.set_chapters(film.chapters())
            source = video.codec_context
            colours = {name: getattr(source, name, None) for name in ("color_range", "colorspace")}

            def pass_on(packet: Any) -> None:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)

            streams = [video, *(s for s in film.streams if s.index in copies)]
            for frame in self._decoded(film, streams, pass_on):
                picture = _planes(frame, *chroma(frame), layout=encoder.codec_context.pix_fmt)
                picture.pts, picture.time_base = frame.pts, video.time_base
                for name, value in colours.items():
                    if value is not None and hasattr(picture, name):
                        setattr(picture, name, value)
                out.mux(encoder.encode(picture))
            out.mux(encoder.encode(None))
        return notes


def check_written(path: str | Path, codec: str) -> None:
    """Refuse what :meth:`Film.written` could not write: an ending that is no video's, or a codec that is not there."""
    av = _av()
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = av.open(f"{folder}/film{path.suffix}", "w")
        except (av.FFmpegError, ValueError) as error:
            raise InputError(
                f"out: {path.suffix!r} is no video's ending, expected .mkv, .mp4 or .mov"
            ) from error
        with out:
            _stream(out, codec, 25)


def chroma_of(rgb: Tensor, matrix: int) -> tuple[Tensor, Tensor]:
    """Cb and Cr in [0, 1], 0.5 being grey, of RGB [height, width, 3] in [0, 1].

    >>> [round(float(x), 3) for x in chroma_of(torch.tensor([[[0.0, 0.0, 1.0]]]), 1)]
    [1.0, 0.454]
    """
    kr, kb = _MATRIX.get(matrix, _MATRIX[_BT709])
    y = luma_of(rgb, matrix)
    return 0.5 + (rgb[..., 2] - y) / (2 * (1 - kb)), 0.5 + (rgb[..., 0] - y) / (2 * (1 - kr))


def luma_of(rgb: Tensor, matrix: int) -> Tensor:
    """Y in [0, 1] of RGB [height, width, 3] in [0, 1].

    >>> luma_of(torch.ones(1, 1, 3), 1).tolist()
    [[1.0]]
    """
    kr, kb = _MATRIX.get(matrix, _MATRIX[_BT709])
    r, g, b = rgb.unbind(-1)
    return kr * r + (1 - kr - kb) * g + kb * b


def picture_folder(path: str | Path) -> list[Path]:
    """The pictures of a folder, in the order of the numbers in their names: 2.png before 10.png."""
    path = Path(path)
    found = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
    require(
        bool(found), f"film: {str(path)!r} holds no pictures; expected {', '.join(PICTURES)}, or a video file"
    )
    return sorted(found, key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", p.name)])


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError("film: reading a video needs PyAV: pip install 'lineament[video]'") from error


def _opened(path: Path) -> Any:
    av = _av()
    require(path.is_file(), f"film: {str(path)!r} is no file and no folder")
    try:
        return av.open(str(path))
    except av.FFmpegError as error:
        raise InputError(f"film: {str(path)!r} cannot be read as a video: {error.strerror}") from error


def _video(film: Any, path: Path) -> Any:
    # Cover art is a video stream of one picture.
    cover = [s for s in film.streams.video if getattr(getattr(s, "disposition", 0), "value", 0) & 0x400]
    streams = [s for s in film.streams.video if s not in cover]
    require(bool(streams), f"film: {str(path)!r} has no video stream")
    video = streams[0]
    transfer = getattr(video.codec_context, "color_trc", 0) or 0
    require(
        transfer not in _HDR,
        f"film: {str(path)!r} is HDR ({_HDR.get(transfer)}), which no network here knows; convert it first: "
        "ffmpeg -i IN -vf zscale=t=linear,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT",
    )
    video.thread_type = "AUTO"
    return video


def _step(video: Any) -> int:
    rate = video.average_rate or Fraction(25)
    return max(1, round(1 / (rate * video.time_base))) if video.time_base else 1


def _film_frame(frame: Any, index: int, pts: int) -> FilmFrame:
    name = frame.format.name
    depth = frame.format.components[0].bits
    planar = name.startswith(("yuv", "gray", "nv", "p0"))
    if not planar or depth not in (8, 10, 12, 16) or name.startswith(("p0", "yuyv", "yuvj4")) or "be" in name:
        full = name.startswith("yuvj")
        frame = frame.reformat(format="yuvj444p" if full else "yuv444p")
        depth = 8
    plane = frame.planes[0]
    kind = np.uint8 if depth == 8 else np.dtype("<u2")
    rows = np.frombuffer(plane, kind).reshape(-1, plane.line_size // np.dtype(kind).itemsize)
    matrix = int(getattr(frame, "colorspace", 2) or 2)
    if matrix not in _MATRIX:
        matrix = _BT709 if frame.height >= 720 else 6
    full = int(getattr(frame, "color_range", 0) or 0) == _FULL or name.startswith("yuvj")
    full |= name.startswith("gray") and int(getattr(frame, "color_range", 0) or 0) != 1
    return FilmFrame(index, pts, rows[: frame.height, : frame.width].copy(), depth, full, matrix)


def _stream(out: Any, codec: str, rate: Any) -> Any:
    """A new stream of a film that is written."""
    options = {"crf": "16"} if codec in ("libx264", "libx265") else {}
    try:
        return out.add_stream(codec, rate=rate, options=options)
    except (_av().FFmpegError, ValueError) as error:
        raise InputError(f"codec: {codec!r} is not there; nearest: 'libx264', 'ffv1', 'prores_ks'") from error


def _encoder(out: Any, video: Any, frame: FilmFrame, codec: str) -> Any:
    height, width = frame.luma.shape
    fine = height % 2 or width % 2 or codec.startswith("prores")
    layout = ("yuv422p" if codec.startswith("prores") else "yuv444p") if fine else "yuv420p"
    high = frame.depth > 8 or codec.startswith("prores")
    stream = _stream(out, codec, video.average_rate or 25)
    context = stream.codec_context
    context.width, context.height = width, height
    context.pix_fmt = layout + ("10le" if high else "")
    # On the stream alone, it would be rounded to the frame rate's.
    context.time_base = video.time_base
    source = video.codec_context
    if source.sample_aspect_ratio:
        context.sample_aspect_ratio = source.sample_aspect_ratio
    for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
        if getattr(source, name, None):
            setattr(context, name, getattr(source, name))
    if frame.full_range:
        context.color_range = _FULL
    return stream


def _planes(
    frame: FilmFrame, cb: np.ndarray, cr: np.ndarray, y: np.ndarray | None = None, *, layout: str
) -> Any:
    """An encoder's frame of luma as it was, and chroma at the layout's resolution."""
    av = _av()
    depth = 10 if layout.endswith("10le") else 8
    height, width = frame.luma.shape
    picture = av.VideoFrame(width, height, layout)
    luma = frame.luma if depth == frame.depth else (frame.luma.astype(np.uint32) << depth >> frame.depth)
    scale = 2 ** (depth - 8)
    if y is not None:
        low, width_ = (0, 2**depth - 1) if frame.full_range else (16 * scale, 219 * scale)
        luma = np.round(low + width_ * y)
    _fill(picture.planes[0], luma, depth)
    middle, reach = 128 * scale, (255 if frame.full_range else 224) * scale
    for plane, x in zip(picture.planes[1:], (cb, cr)):
        fy, fx = height // plane.height, width // plane.width
        x = x[: plane.height * fy, : plane.width * fx].reshape(plane.height, fy, plane.width, fx).mean((1, 3))
        _fill(plane, np.clip(np.round(middle + reach * (x - 0.5)), 0, 2**depth - 1), depth)
    return picture


def _fill(plane: Any, values: np.ndarray, depth: int) -> None:
    kind = np.dtype(np.uint8 if depth == 8 else "<u2")
    rows = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
    rows[:, : values.shape[1]] = values
    plane.update(rows.tobytes())
