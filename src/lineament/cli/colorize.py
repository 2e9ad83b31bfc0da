"""The subcommand ``lineament colorize``: a grey film in colour, from pictures that show the colours; imports no torch before it runs."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineament.cli.parser import Parser

if TYPE_CHECKING:
    from lineament.load.picture_films import PictureFilm
    from lineament.load.video import Film

_WEIGHTS = (
    "the published ones are at https://github.com/yyang181/colormnet (releases), under CC BY-NC-SA 4.0 "
    "(no commercial use); give the .pth file, or a folder that ColorMNet.save_pretrained wrote"
)
_EPILOG = """examples:
  lineament colorize film.mkv --suggest 5 --weights colormnet.pth
  lineament colorize film.mkv --exemplar first.png --exemplar 240=later.png --weights colormnet.pth --out colour.mkv
  lineament colorize frames/ --exemplar first.png --weights ./my-colormnet --max-side 512 --out coloured/
  lineament colorize frames/ --exemplar first.png --weights ./my-colormnet --fps 24 --out colour.mp4
  lineament colorize --train films/ --weights colormnet.pth --epochs 5 --accumulate 2 --recompute --out my-colormnet/"""


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
    add("film", metavar="FILM", nargs="?", help="a video file, or a folder of pictures")
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
    add("--scenes", metavar="FRAMES", help="new scenes begin at these frames, such as 120,340")
    add("--parity", action="store_true", help="the published loop, as its authors run it")
    add(
        "--luma", metavar="WHICH",
        help="film (default): the film's own plane, bit for bit (with --codec ffv1 also in the file); lab: of the coloured picture, as published",
    )  # fmt: skip
    add(
        "--codec",
        metavar="NAME",
        help="libx264 (default, crf 16), ffv1 (lossless), prores_ks",
    )
    add("--fps", metavar="RATE", help="frames a second of a video from a folder of pictures (default: 25)")
    add("--precision", metavar="DTYPE", default="float32", help="float32 (default), bfloat16, float16")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, mps (default: cpu)")
    add("--overwrite", action="store_true", help="replace an existing film")
    add(
        "--train", metavar="FOLDER",
        help="train on a folder of videos or of folders of pictures, in colour, into --out (from --weights, or anew); the rest is for it",
    )  # fmt: skip
    for option, metavar, what in (
        ("epochs", "N", "160"), ("clips", "N", "in an epoch, 2000"), ("frames", "N", "of a clip, 8"), ("size", "PIXELS", "of a crop, 448"),
        ("batch-size", "N", "2"), ("accumulate", "N", "parts of a batch, one after the other, 1"),
    ):  # fmt: skip
        add(f"--{option}", metavar=metavar, type=int, help=f"(default, as published: {what})")
    add("--lr", metavar="RATE", type=float, help="(default, as published: 2e-5)")
    add(
        "--recompute",
        action="store_true",
        help="keep no activations for the gradient: slower, in less memory",
    )
    add(
        "--tiny",
        action="store_true",
        help="a network of a few hundred thousand weights, in place of the published size",
    )
    add("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    # What the library calls them.
    parser.names |= {
        "path": "--weights",
        "folder": "--weights",
        "exemplars": "--exemplar",
        "films": "--train",
    }
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Colour the film, and say where it is and which frames want another exemplar."""
    from lineament.cli.colorize_run import colour, picture_names
    from lineament.core.checks import number, one_of, require
    from lineament.core.files import possible_folder
    from lineament.load.video_writing import planned

    a = arguments
    training = ("epochs", "clips", "frames", "size", "batch_size", "accumulate", "lr")
    if a.train is None:
        for option in (*training, "recompute", "tiny"):
            require(
                not getattr(a, option), f"--{option.replace('_', '-')}: is for --train, and none is given"
            )
    else:
        require(
            a.film is None and not a.exemplar,
            f"--train: trains on {a.train!r}; colour a film with another command",
        )
        colouring = (
            "suggest",
            "max_side",
            "guided",
            "flip",
            "cuts",
            "scenes",
            "parity",
            "luma",
            "codec",
            "fps",
        )
        for option in colouring:
            require(
                not getattr(a, option),
                f"--{option.replace('_', '-')}: is for colouring a film, and --train trains a network",
            )
        one_of("--precision", a.precision, ("float32", "bfloat16"))
        require(a.out is not None, "--out: none given, expected a folder for the trained network")
        require(not (a.tiny and a.weights), "--tiny: is for a new network; --weights has a size of its own")
        from lineament.cli.colorize_train import train

        return train(a)
    require(a.film is not None, "FILM: none given, expected a video file or a folder of pictures")
    require(Path(a.film).exists(), f"FILM: {a.film!r} is no file and no folder")
    require(a.weights is not None, f"--weights: none given; {_WEIGHTS}")
    require(Path(a.weights).exists(), f"--weights: {a.weights!r} does not exist; {_WEIGHTS}")
    if a.suggest is not None:
        number("--suggest", a.suggest, low=1, integer=True)
        return _suggest(a)
    require(a.out is not None, "--out: none given, expected where the coloured film goes")
    one_of("--luma", a.luma or "film", ("film", "lab"))
    require(not a.guided or a.max_side is not None, "--guided: is for --max-side, and none is given")
    one_of("--precision", a.precision, ("float32", "bfloat16", "float16"))
    out, pictures = Path(a.out), Path(a.film).is_dir()
    folder = out.is_dir() or out.suffix == "" or a.out.endswith("/")
    require(not _same(out, Path(a.film)), "--out: is the film itself; give another name")
    for option in ("luma", "codec"):
        require(
            not folder or getattr(a, option) is None,
            f"--{option}: is for a video, and {a.out!r} is a folder of pictures, which become .png",
        )
    require(
        a.fps is None or (pictures and not folder),
        "--fps: is for a video from a folder of pictures; a video keeps its own times, and pictures have none",
    )
    a.luma, a.codec = a.luma or "film", a.codec or "libx264"
    film = _film(a)
    work = out.with_name(f"{out.name}.parts")
    output, length = None, film.length
    exemplars, names = _exemplars(a.exemplar, length), picture_names(film, length)
    a.scenes = _scenes(a.scenes or "", length)
    for path in [out / name for name in names] if folder else [out]:
        for read in (Path(a.weights), *exemplars.values()):
            require(
                not _same(path, read),
                f"--out: would replace {str(read)!r}, which this command reads; give another name",
            )
    if folder:
        _check_folder(a, possible_folder(out), work, names)
    else:
        require(
            a.overwrite or work.exists() or not out.exists(),
            f"--out: {a.out!r} exists; give --overwrite to replace it, or another name",
        )
        output = planned(film, out, codec=a.codec)
    return colour(a, film, length, output, out, work, exemplars)


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file or folder, now or once it is there."""
    return one.samefile(other) if one.exists() and other.exists() else one.resolve() == other.resolve()


def _film(a: argparse.Namespace) -> Film | PictureFilm:
    from fractions import Fraction

    from lineament.core.checks import InputError, require
    from lineament.load.picture_films import PictureFilm
    from lineament.load.video import Film

    if not Path(a.film).is_dir():
        return Film(Path(a.film))
    try:
        rate = Fraction(a.fps or 25)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"--fps: got {a.fps!r}, expected a number, such as 24 or 24000/1001") from error
    # A video's clock ticks a thousand times a second, and players give up where a picture stays for minutes.
    require(
        Fraction(1, 100) <= rate <= 1000,
        f"--fps: got {a.fps!r}, expected from 0.01 to 1000 pictures a second",
    )
    return PictureFilm(Path(a.film), rate.limit_denominator(1001))


def _check_folder(a: argparse.Namespace, out: Path, work: Path, frames: list[str]) -> None:
    """Whether coloured pictures of these names may go there: a new or empty folder, or one of an earlier run."""
    from lineament.core.checks import require

    twice = next((name for name, times in Counter(frames).items() if times > 1), None)
    require(
        twice is None,
        f"FILM: two of its pictures would both become {twice!r}; rename one, or write a video",
    )
    # What a killed run was writing has a dot before.
    present = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    strange = sorted(present - {*frames} - {"colorize.json"})
    require(
        not strange,
        f"--out: {a.out!r} holds files that are no coloured frames ({strange[:1]} ...); give an empty or new folder",
    )
    require(
        a.overwrite or work.exists() or not present,
        f"--out: {a.out!r} exists; give --overwrite to replace it, or another name",
    )


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


def _scenes(given: str, length: int) -> list[int]:
    from lineament.core.checks import require

    found = [text.strip() for text in given.split(",")] if given else []
    for text in found:
        require(
            text.isdecimal() and 0 < int(text) < length,
            f"--scenes: got {text!r}, expected numbers of frames after the first, from 1 to {length - 1}, such as 120,340",
        )
    return sorted({int(text) for text in found})


def _suggest(a: argparse.Namespace) -> int:
    from lineament.cli.colorize_run import model_of
    from lineament.modules.colormnet.colorize import suggest

    frames = suggest((frame.shown for frame in _film(a).frames()), a.suggest, model_of(a))
    few = f" (the film has only {len(frames)})" if len(frames) < a.suggest else ""
    print(f"colour these frames by hand{few}: {', '.join(map(str, frames))}")
    return 0
