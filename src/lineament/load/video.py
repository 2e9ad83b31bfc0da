"""Videos read frame by frame, with their timestamps and luma as stored, by PyAV (``pip install 'lineament[video]'``).

:mod:`lineament.load.video_writing` writes them with other chroma.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lineament.core.checks import InputError, require
from lineament.load.film_frames import (
    DEPTHS,
    FULL,
    LARGEST,
    MATRIX,
    FilmFrame,
    Format,
    has_colours,
    usual_matrix,
)
from lineament.load.film_gaps import Jump, checked, counted, ends_midway, jumps, lost, ranges, unsaid_end

_HDR = {16: "PQ", 18: "HLG"}
_LOOK = 24  # frames between two that are looked at for colours
# What a transport stream holds besides what its writer chooses by itself.
_TRANSPORT = {"aac", "ac3", "eac3", "mp2", "mp3", "dts", "opus", "dvb_subtitle", "dvb_teletext"}


@dataclass
class Film:
    """A video file's first video stream; ``gaps`` names what the last walk over it could not decode. ``colour``: frames have their picture, as RGB bytes.
    ``coloured``: whether a walk met colours.

    >>> Film("holiday.mkv").path.name
    'holiday.mkv'
    """

    path: Path
    gaps: list[str] = field(default_factory=list)
    colour: bool = False
    coloured: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    @property
    def length(self) -> int:
        """How many frames can be decoded; it decodes them all."""
        return sum(1 for _ in self.frames())

    @property
    def format(self) -> Format:
        """What a written film takes over."""
        with _opened(self.path) as film:
            video = _video(film, self.path)
            source = video.codec_context
            frame = next(self._decoded(film, [video], None), None)
            require(frame is not None, f"film: no frame of {str(self.path)!r} can be decoded")
            assert frame is not None
            names = ("color_range", "colorspace", "color_primaries", "color_trc")
            colours = {name: value for name in names if (value := getattr(source, name, None))}
            return Format(
                video.time_base, video.average_rate or Fraction(25), (frame.luma.shape[1], frame.luma.shape[0]),
                frame.depth, frame.alpha is not None, colours | ({"color_range": FULL} if frame.full_range else {}),
                source.sample_aspect_ratio, 90 * frame.turns, dict(video.metadata),
            )  # fmt: skip

    def frames(self, out: Any = None) -> Iterator[FilmFrame]:
        """The frames that can be decoded, one by one; the other streams are copied into ``out``, a container that holds its video stream."""
        self.gaps = []
        with _opened(self.path) as film:
            video = _video(film, self.path)
            copies = {}
            if out is not None:
                kept, _ = self._kept(film, video, out)
                copies = {stream.index: out.add_stream_from_template(stream) for stream in kept}
                out.metadata.update(film.metadata)
                if hasattr(film, "chapters") and hasattr(out, "set_chapters"):
                    out.set_chapters(film.chapters())

            def pass_on(packet: Any, container: Any = out) -> None:
                packet.stream = copies[packet.stream.index]
                container.mux(packet)

            streams = [video, *(s for s in film.streams if s.index in copies)]
            yield from self._decoded(film, streams, pass_on)

    def left_out(self, out: Any) -> list[str]:
        """What a container cannot take of the film's other streams; sound that it cannot is refused."""
        with _opened(self.path) as film:
            return self._kept(film, _video(film, self.path), out)[1]

    def _kept(self, film: Any, video: Any, out: Any) -> tuple[list[Any], list[str]]:
        """The streams that are copied, and a note for each that is not."""
        ending, kept, notes = Path(out.name).suffix, [], []
        holds = getattr(out, "supported_codecs", None)
        if holds is not None and out.format.name == "mpegts":
            holds = {*holds, *_TRANSPORT}
        for stream in film.streams:
            if stream is video:
                continue
            context = getattr(stream, "codec_context", None)
            name = getattr(context, "name", None) or stream.type
            canonical = getattr(getattr(context, "codec", None), "canonical_name", name)
            if stream.type == "video":
                notes.append(f"a second video stream ({name}, such as a cover picture) is left out")
            elif (holds is None or {name, canonical} & set(holds)) and _taken(
                out.format.name, self.path, stream.index
            ):
                kept.append(stream)
            else:
                require(
                    stream.type != "audio",
                    f"out: {ending} holds no {name} sound, which {str(self.path)!r} has; write an .mkv",
                )
                notes.append(f"the {stream.type} stream ({name}) is left out: {ending} cannot hold it")
        return kept, notes

    def _decoded(
        self, film: Any, streams: list[Any], pass_on: Callable[[Any], None] | None
    ) -> Iterator[FilmFrame]:
        av = av_module()
        video, index, last, end = streams[0], 0, None, None
        first: tuple[int, int] | None = None
        kind: tuple[int, bool, int] | None = None
        damaged: list[int] = []
        # Times of packets that their container calls damaged, and of FFV1's whose checksums are right and wrong.
        broken: set[int | None] = set()
        sums: dict[bool, set[int | None]] = {True: set(), False: set()}
        shown: dict[int, int | None] = {}
        times: list[int] = []
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
            if getattr(packet, "is_corrupt", False):
                broken.add(packet.pts)
            if video.codec_context.name == "ffv1" and packet.size:
                sums[checked(bytes(packet))].add(packet.pts)
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.gaps.append(f"after frame {index - 1}: {error.strerror}")
                continue
            for frame in frames:
                _check_frame(frame, self.path, index)
                first = first or (frame.height, frame.width)
                require(
                    (frame.height, frame.width) == first,
                    f"film: {str(self.path)!r} changes its size at frame {index}, from {first[1]} x {first[0]} to "
                    f"{frame.width} x {frame.height}; cut it there into two films",
                )
                # Missing or backward timestamps: a frame later than the one before.
                pts = shown[index] = frame.pts
                if pts is None or (last is not None and pts <= last):
                    pts = 0 if last is None else last + _step(video)
                times.append(pts)
                last, end = pts, pts + (getattr(frame, "duration", 0) or _step(video))
                if getattr(frame, "is_corrupt", False):
                    damaged.append(index)
                read = _film_frame(frame, index, pts)
                told = (read.depth, read.full_range, read.matrix)
                kind = kind or told
                require(
                    told == kind,
                    f"film: {str(self.path)!r} changes its format at frame {index}, from {_kind(kind)} to {_kind(told)}; cut it there into two films",
                )
                if index % _LOOK == 0 and not self.coloured:
                    self.coloured = has_colours(frame.to_ndarray(format="rgb24"))
                if self.colour:
                    rgb = np.rot90(frame.to_ndarray(format="rgb24"), read.turns)
                    read = replace(read, picture=np.ascontiguousarray(rgb))
                yield read
                index += 1
        if sums[True]:  # a film without checksums has no right one
            broken |= sums[False]
        damaged += [index for index, pts in shown.items() if pts is not None and pts in broken]
        if damaged:
            several = len(set(damaged)) > 1
            self.gaps.append(f"frame{'s' * several} {ranges(damaged)} {'are' if several else 'is'} damaged")
        self.gaps = list(counted(self.gaps))
        for jump in self._lost(jumps(times)):
            seconds = float((jump.ends - jump.begins) * video.time_base)
            self.gaps.append(f"after frame {jump.frame}: {seconds:.2f} s without a frame")
        missing = unsaid_end(video, end, times)
        if missing > 0:
            self.gaps.append(f"after frame {index - 1}: the film's last {missing:.2f} s are missing")
        elif film.format.name == "mpegts" and ends_midway(self.path):
            self.gaps.append(
                f"after frame {index - 1}: the file ends within a packet, and what follows is missing"
            )

    def _lost(self, candidates: list[Jump]) -> list[Jump]:
        if not candidates:
            return []
        with _opened(self.path) as again:
            return lost(candidates, _read(again), _video(again, self.path))


def _read(film: Any) -> Iterator[Any]:
    """The packets of all streams, until one cannot be read."""
    with suppress(av_module().FFmpegError):
        yield from film.demux()


def av_module() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError("film: reading a video needs PyAV: pip install 'lineament[video]'") from error


def _opened(path: Path) -> Any:
    av = av_module()
    require(path.is_file(), f"film: {str(path)!r} is no file and no folder")
    try:
        # A playlist names other places: none but files are opened, and a name with a colon is no protocol.
        return av.open(f"file:{path}", options={"protocol_whitelist": "file,crypto,data"})
    except av.FFmpegError as error:
        raise InputError(f"film: {str(path)!r} cannot be read as a video: {error.strerror}") from error


def _video(film: Any, path: Path) -> Any:
    # Cover art is a video stream of one picture.
    cover = [s for s in film.streams.video if getattr(getattr(s, "disposition", 0), "value", 0) & 0x400]
    streams = [s for s in film.streams.video if s not in cover]
    require(bool(streams), f"film: {str(path)!r} has no video stream")
    video = streams[0]
    transfer = getattr(video.codec_context, "color_trc", 0) or 0
    require(transfer not in _HDR, _hdr(path, transfer))
    width, height = video.codec_context.width, video.codec_context.height
    require(
        width * height <= LARGEST,
        f"film: {str(path)!r} has frames of {width} x {height}, expected at most {LARGEST / 1e6:.0f} million pixels",
    )
    video.thread_type = "AUTO"
    # What the header does not say, a frame might.
    video.codec_context.options = {"max_pixels": str(LARGEST)}
    return video


def _step(video: Any) -> int:
    rate = video.average_rate or Fraction(25)
    return max(1, round(1 / (rate * video.time_base))) if video.time_base else 1


def _taken(form: str, path: Path, index: int) -> bool:
    """Whether a container of a format takes a stream of a film: only its header, a packet and its end tell of some, such as FLAC in .mov."""
    av = av_module()
    with _opened(path) as film:
        stream, first = film.streams[index], None
        if stream.type == "audio":
            with suppress(av.FFmpegError):
                first = next((packet for packet in film.demux(stream) if packet.dts is not None), None)
        try:
            with av.open(io.BytesIO(), "w", format=form) as trial:
                copy = trial.add_stream_from_template(stream)
                trial.start_encoding()
                if first is not None:
                    first.stream = copy
                    trial.mux(first)
        except (av.FFmpegError, ValueError):
            return False
    return True


def _check_frame(frame: Any, path: Path, index: int) -> None:
    """Refuse what a frame shows that no stream had to say."""
    require(
        (getattr(frame, "color_trc", 0) or 0) not in _HDR,
        _hdr(path, getattr(frame, "color_trc", 0)),
    )
    require(
        not getattr(frame, "interlaced_frame", False),
        f"film: {str(path)!r} is interlaced{f' at frame {index}' * (index > 0)}: a frame is two moments, whose colours would mix; make it progressive first: "
        "ffmpeg -i IN -vf bwdif OUT (or setfield=prog, where both are one moment)",
    )


def _hdr(path: Path, transfer: int) -> str:
    return (
        f"film: {str(path)!r} is HDR ({_HDR.get(transfer)}), which no network here knows; convert it first: "
        "ffmpeg -i IN -vf zscale=t=linear,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT"
    )


def _film_frame(frame: Any, index: int, pts: int) -> FilmFrame:
    name, parts = frame.format.name, frame.format.components
    depth, alpha = parts[0].bits, any(part.is_alpha for part in parts)
    full = name.startswith("yuvj") or int(getattr(frame, "color_range", 0) or 0) == FULL
    full |= name.startswith("gray") and int(getattr(frame, "color_range", 0) or 0) != 1
    own = name.startswith(("yuv", "gray", "nv")) and not frame.format.is_big_endian
    if not own or not _is_plane(parts, 0) or depth not in DEPTHS:
        depth = depth if depth in DEPTHS else 8
        full &= not frame.format.is_rgb  # which becomes luma of the usual range
        frame = frame.reformat(format=f"yuv{'a' if alpha else ''}444p{'' if depth == 8 else f'{depth}le'}")
    matrix = int(getattr(frame, "colorspace", 2) or 2)
    matrix = matrix if matrix in MATRIX else usual_matrix(frame.height)
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    opacity = _plane(frame, 3, depth) if alpha and len(frame.planes) == 4 else None
    return FilmFrame(index, pts, _plane(frame, 0, depth), depth, full, matrix, opacity, turns)


def _kind(told: tuple[int, bool, int]) -> str:
    depth, full, matrix = told
    return f"{depth} bits of {'full' if full else 'limited'} range (matrix {matrix})"


def _is_plane(parts: Any, which: int) -> bool:
    """Whether a plane holds one component alone."""
    return [part.plane for part in parts].count(which) == 1 and parts[which].plane == which


def _plane(frame: Any, which: int, depth: int) -> np.ndarray:
    plane, kind = frame.planes[which], np.dtype(np.uint8 if depth == 8 else "<u2")
    rows = np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind.itemsize)
    return rows[: frame.height, : frame.width].copy()
