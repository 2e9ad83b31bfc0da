"""The subcommand ``lineament colorize``: a grey film in colour, from pictures that show the colours; imports no torch before it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineament.cli.parser import Parser

if TYPE_CHECKING:
    from lineament.load.video import FilmFrame

_SEGMENT = 24  # frames after which a killed run goes on
_WEIGHTS = (
    "the published ones are at https://github.com/yyang181/colormnet (releases), under CC BY-NC-SA 4.0 "
    "(no commercial use); give the .pth file, or a folder that ColorMNet.save_pretrained wrote"
)
_EPILOG = """examples:
  lineament colorize film.mkv --suggest 5 --weights colormnet.pth
  lineament colorize film.mkv --exemplar first.png --exemplar 240=later.png --weights colormnet.pth --out colour.mkv
  lineament colorize frames/ --exemplar first.png --weights ./my-colormnet --max-side 512 --out coloured/"""


def add_parser(subparsers: Any) -> Parser:
    """Add ``colorize`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "colorize",
        help="colour a grey film from one or more coloured pictures",
        description="Colour a grey film from coloured pictures of it. The film keeps its own luma, timestamps, sound and subtitles.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("film", metavar="FILM", help="a video file, or a folder of pictures")
    add(
        "--exemplar", metavar="[FRAME=]IMAGE", action="append", default=[],
        help="a coloured picture for a frame (default: the first, 0); may be given several times",
    )  # fmt: skip
    add(
        "--weights", metavar="PATH", help="the published checkpoint, or a folder of ColorMNet.save_pretrained"
    )
    add("--out", metavar="PATH", help="the coloured film: a video file, or a folder")
    add("--suggest", metavar="N", type=int, help="only say which N frames to colour by hand")
    add("--every", metavar="N", type=int, default=5, help="remember every Nth frame (default: 5)")
    add("--max-side", metavar="PIXELS", type=int, help="colour at most this large, and bring the colour up")
    add("--guided", action="store_true", help="bring it up along the film's edges")
    add(
        "--flip", action="store_true", help="also colour the mirror image, and take the mean (twice the time)"
    )
    add(
        "--cuts",
        metavar="DISTANCE",
        type=float,
        help="forget the scene where keys change by more than this, such as 0.8",
    )
    add("--parity", action="store_true", help="the published loop, as its authors run it")
    add(
        "--luma", metavar="WHICH",
        help="film (default): the film's own plane, bit for bit; lab: of the coloured picture, as published",
    )  # fmt: skip
    add(
        "--codec",
        metavar="NAME",
        help="libx264 (default, crf 16), ffv1 (lossless), prores_ks",
    )
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, mps (default: cpu)")
    add("--overwrite", action="store_true", help="replace an existing film")
    # What the library calls them.
    parser.names |= {"path": "--weights", "folder": "--weights", "exemplars": "--exemplar"}
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Colour the film, and say where it is and which frames want another exemplar."""
    from lineament.core.checks import number, one_of, require

    a = arguments
    require(Path(a.film).exists(), f"FILM: {a.film!r} is no file and no folder")
    require(a.weights is not None, f"--weights: none given; {_WEIGHTS}")
    require(Path(a.weights).exists(), f"--weights: {a.weights!r} does not exist; {_WEIGHTS}")
    if a.suggest is not None:
        number("--suggest", a.suggest, low=1, integer=True)
        return _suggest(a)
    require(a.out is not None, "--out: none given, expected where the coloured film goes")
    one_of("--luma", a.luma or "film", ("film", "lab"))
    require(not a.guided or a.max_side is not None, "--guided: is for --max-side, and none is given")
    out, folder = Path(a.out), Path(a.film).is_dir()
    require(out.resolve() != Path(a.film).resolve(), "--out: is the film itself; give another name")
    for option in ("luma", "codec"):
        require(
            not folder or getattr(a, option) is None,
            f"--{option}: is for a video, and {a.film!r} is a folder of pictures, which become .png",
        )
    a.luma, a.codec = a.luma or "film", a.codec or "libx264"
    source = _Source(a.film)
    work = out.with_name(f"{out.name}.parts")
    if folder:
        _check_folder(a, out, work, {f"{file.stem}.png" for file in source.files})
    else:
        _check_video(a, out, work)
    return _colour(a, source, out, work, _exemplars(a.exemplar, source.length))


def _check_folder(a: argparse.Namespace, out: Path, work: Path, frames: set[str]) -> None:
    """Whether coloured pictures may go there: a new or empty folder, or one of an earlier run."""
    from lineament.core.checks import require

    require(
        out.is_dir() or (not out.exists() and (out.suffix == "" or a.out.endswith("/"))),
        f"--out: {a.out!r} is no folder, and FILM is one of pictures; give a folder ({str(out.with_suffix(''))!r}) for coloured pictures, "
        "or a video as FILM for a video",
    )
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    strange = sorted(present - frames - {"colorize.json"})
    require(
        not strange,
        f"--out: {a.out!r} holds files that are no coloured frames ({strange[:1]} ...); give an empty or new folder",
    )
    require(
        a.overwrite or work.exists() or not present,
        f"--out: {a.out!r} exists; give --overwrite to replace it, or another name",
    )


def _check_video(a: argparse.Namespace, out: Path, work: Path) -> None:
    """Whether the coloured video can be written there, before any frame is coloured."""
    from lineament.core.checks import require
    from lineament.load.video import check_written

    require(
        out.suffix != "" and not out.is_dir(),
        f"--out: {a.out!r} is a folder or has no ending, expected a video file such as film.mkv",
    )
    require(
        a.overwrite or work.exists() or not out.exists(),
        f"--out: {a.out!r} exists; give --overwrite to replace it, or another name",
    )
    check_written(out, a.codec)


def _exemplars(given: list[str], length: int) -> dict[int, Path]:
    from lineament.core.checks import require

    found: dict[int, Path] = {}
    for text in given:
        frame, equals, name = text.partition("=")
        if not equals or Path(text).is_file():
            frame, name = "0", text
        require(
            frame.isdecimal(),
            f"--exemplar: {frame!r} in {text!r} is no frame number, expected FRAME=IMAGE, such as 0=first.png",
        )
        require(
            int(frame) < length,
            f"--exemplar: frame {frame} does not exist; the film has {length} frames, 0 to {length - 1}",
        )
        require(int(frame) not in found, f"--exemplar: two are for frame {int(frame)}")
        require(Path(name).is_file(), f"--exemplar: {name!r} is no file")
        found[int(frame)] = Path(name)
    require(0 in found, "--exemplar: none is for the first frame; give one, such as --exemplar 0=first.png")
    return found


def _model(a: argparse.Namespace) -> Any:
    from lineament.modules.colormnet.naming import from_official
    from lineament.modules.colormnet.network import ColorMNet

    load = ColorMNet.from_pretrained if Path(a.weights).is_dir() else from_official
    model = load(a.weights)
    if model.licence:
        print(model.licence, file=sys.stderr)
    return model.to(a.device)


class _Source:
    """Frames of a video or a folder, one by one: what the network sees, and the decoded frame of a video."""

    def __init__(self, path: str):
        from lineament.load.video import Film, picture_folder

        self.files = picture_folder(path) if Path(path).is_dir() else []
        self.film = None if self.files else Film(Path(path))
        self.length = len(self.files) or self.film.length  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[tuple[Any, FilmFrame | None]]:
        from lineament.load.video import Film

        if self.film is None:
            yield from ((_picture("FILM", file), None) for file in self.files)
        else:
            yield from ((frame.grey, frame) for frame in Film(self.film.path).frames())


def _picture(option: str, path: Path) -> Any:
    from PIL import Image

    from lineament.core.checks import InputError

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{option}: the picture {str(path)!r} cannot be read: {error}") from error


def _suggest(a: argparse.Namespace) -> int:
    from lineament.modules.colormnet.colorize import suggest

    frames = suggest((picture for picture, _ in _Source(a.film)), a.suggest, _model(a))
    few = f" (the film has only {len(frames)})" if len(frames) < a.suggest else ""
    print(f"colour these frames by hand{few}: {', '.join(map(str, frames))}")
    return 0


def _colour(a: argparse.Namespace, source: _Source, out: Path, work: Path, exemplars: dict[int, Path]) -> int:
    from lineament.core.batching import progress
    from lineament.core.checkpoint import Checkpoint
    from lineament.modules.colormnet.colorize import Colorizer
    from lineament.modules.colormnet.film import Colorizing

    settings = {"every": a.every, "max_side": a.max_side, "guided": a.guided, "flip": a.flip, "cuts": a.cuts}
    options = Colorizing.published(**settings) if a.parity else Colorizing(**settings)
    pictures = {frame: _picture("--exemplar", path) for frame, path in exemplars.items()}
    key = {
        "settings": settings, "parity": a.parity, "luma": a.luma, "device": a.device, "frames": source.length,
        "files": [_stamp(Path(path)) for path in (a.film, a.weights, *exemplars.values())], "at": sorted(exemplars),
    }  # fmt: skip
    colorizer = Colorizer(_model(a), options, truncate=a.parity)
    checkpoint = Checkpoint(work / "state", key)
    facts: list[Any] = []
    segments = -(-source.length // _SEGMENT)
    frames = enumerate(source)
    loop = checkpoint.loop("film", segments, {"colorizer": colorizer, "facts": facts}, every=1)
    for segment in progress(loop, "colouring", total=segments):
        rows = []
        for index, (picture, frame) in frames:
            if index < colorizer.done:  # coloured before this process
                continue
            last = index == source.length - 1
            found = colorizer.frame(picture, pictures.get(index), last=last)
            facts.append([index, found.confidence, found.cut])
            if frame is None:
                _write_picture(out / f"{source.files[index].stem}.png", found.picture)
            else:
                rows.append(_chroma(found, frame, a.luma))
            if last or colorizer.done == (segment + 1) * _SEGMENT:
                break
        if rows:
            _write_segment(work / f"{segment:06d}.npz", rows)
    notes = source.film.written(out, _stored(work, a.luma), codec=a.codec) if source.film else []
    gaps = source.film.gaps if source.film else []
    _finish(a, out, facts, exemplars, colorizer.model.licence, [*notes, *gaps])
    checkpoint.finish()
    for path in work.glob("*.npz"):
        path.unlink()
    work.rmdir()
    return 1 if gaps else 0


def _stamp(path: Path) -> list[Any]:
    if path.is_dir():
        return [str(path.resolve()), *(_stamp(p) for p in sorted(path.iterdir()) if p.is_file())]
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _write_picture(path: Path, picture: Any) -> None:
    from PIL import Image

    from lineament.core.files import atomic_write

    with atomic_write(path) as temporary:
        Image.fromarray(picture.cpu().numpy()).save(temporary)


def _chroma(found: Any, frame: FilmFrame, luma: str) -> list[Any]:
    """What is kept of a coloured frame of a video: Cb, Cr, and with ``luma="lab"`` its Y too, as 16-bit integers."""
    import numpy as np
    import torch

    from lineament.core.pictures import lab_to_rgb, rgb_to_lab
    from lineament.load.video import chroma_of, luma_of
    from lineament.modules.colormnet.colorize import as_rgb

    lightness = rgb_to_lab(as_rgb("frame", frame.grey))[:1].to(found.ab)
    rgb = lab_to_rgb(torch.cat([lightness, found.ab])).movedim(0, -1)
    planes = [*chroma_of(rgb, frame.matrix), *([luma_of(rgb, frame.matrix)] if luma == "lab" else [])]
    return [(x.clamp(0, 1) * 65535).round().cpu().numpy().astype(np.uint16) for x in planes]


def _write_segment(path: Path, rows: list[list[Any]]) -> None:
    import numpy as np

    from lineament.core.files import atomic_write

    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, *(np.stack(plane) for plane in zip(*rows)))


def _stored(work: Path, luma: str) -> Callable[[FilmFrame], tuple[Any, ...]]:
    """The planes of each frame, from the segments that were written."""
    import numpy as np

    held: dict[int, list[Any]] = {}

    def planes(frame: FilmFrame) -> tuple[Any, ...]:
        segment, row = divmod(frame.index, _SEGMENT)
        if segment not in held:
            held.clear()
            with np.load(work / f"{segment:06d}.npz", allow_pickle=False) as stored:
                held[segment] = [stored[name] for name in stored.files]
        return tuple(plane[row] / 65535 for plane in held[segment])

    return planes


def _finish(
    a: argparse.Namespace,
    out: Path,
    facts: list[Any],
    exemplars: dict[int, Path],
    licence: str,
    notes: list[str],
) -> None:
    import statistics

    from lineament.core.files import write_json

    confidence = [row[1] for row in facts]
    # The frames that are least sure, far from one another: half as sure as the film's middle.
    limit, wanted = statistics.median(confidence) / 2, []
    for index in sorted(range(len(facts)), key=confidence.__getitem__):
        if confidence[index] < limit and all(abs(index - other) > _SEGMENT for other in wanted):
            wanted.append(index)
    wanted = sorted(wanted[:5])
    report = out / "colorize.json" if out.is_dir() else out.with_name(f"{out.stem}.colorize.json")
    write_json(
        report,
        {
            "film": str(a.film), "frames": len(facts), "exemplars": {str(k): str(v) for k, v in exemplars.items()},
            "weights": str(a.weights), "licence": licence, "confidence": [round(x, 6) for x in confidence],
            "cuts": [row[0] for row in facts if row[2]], "frames_that_want_an_exemplar": wanted, "notes": notes,
        },
    )  # fmt: skip
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(facts)} frames coloured: {out} (confidence of each frame: {report})")
    if wanted:
        print("these frames want an exemplar: " + ", ".join(map(str, wanted)))
