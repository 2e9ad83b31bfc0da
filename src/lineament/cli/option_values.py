"""What the options of `lineament audit` and `lineament train` say, read from text; imported when a command runs."""

from __future__ import annotations

from pathlib import Path

from lineament.core.checks import InputError, require
from lineament.core.files import like_files


def words(text: str) -> list[str]:
    """The parts of a list with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def classes(text: str | None) -> list[str] | None:
    """Names of classes: with commas between them, or a text file with one a line."""
    if text is None:
        return None
    path = Path(text)
    if path.suffix == ".txt":
        require(path.is_file(), f"--classes: file {text!r} does not exist{like_files(text)}")
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--classes: file {text!r} cannot be read as UTF-8 text ({error})") from error
        require(bool(names), f"--classes: file {text!r} is empty, expected one name a line")
        return names
    return [name.strip() for name in text.split(",")]


def numbers(what: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise InputError(f"{what}: got {text!r}, expected numbers with commas between them") from None


def pairs(what: str, given: list[str] | None) -> dict[str, str] | None:
    """The values by name of an option that is given as ``NAME=VALUE``, several times."""
    if given is None:
        return None
    found = [text.partition("=") for text in given]
    for text, (name, sign, value) in zip(given, found):
        require(bool(name and sign and value), f"{what}: got {text!r}, expected NAME=VALUE")
    return {name: value for name, _, value in found}


def image_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from ``HEIGHT,WIDTH`` or one side."""
    if text is None:
        return None
    sides = words(text)
    require(
        len(sides) in (1, 2) and all(side.isdecimal() and int(side) > 0 for side in sides),
        f"--image-size: got {text!r}, expected HEIGHT,WIDTH in pixels, such as 32,32, or one side of a square",
    )
    return int(sides[0]), int(sides[-1])


def normalize(text: str | None) -> tuple[list[float], list[float]] | None:
    """Means and deviations, one of each for every channel."""
    if text is None:
        return None
    values = numbers("--normalize", text)
    require(
        len(values) >= 2 and len(values) % 2 == 0,
        f"--normalize: got {len(values)} numbers, expected one mean and one deviation for each channel",
    )
    half = len(values) // 2
    return values[:half], values[half:]
