"""The numbers of a sentence, beside those that were measured again: each must be there, in order, and no other."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Digits inside names (layer2, 0.conv1) and the level of intervals are no measurements.
_NUMBER = re.compile(r"(?<![\w.])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?!\w|\.[A-Za-z_\d])")


@dataclass(frozen=True)
class Percent:
    """A share, said with so many decimals, or more where it nears none or all."""

    share: float
    decimals: int = 1

    def fits(self, text: str) -> bool:
        shown = max(len(text.partition(".")[2]), self.decimals)
        return abs(_value(text) - 100 * self.share) <= 0.505 * 10**-shown + 1e-6


@dataclass(frozen=True)
class Compact:
    """Another number, said with three significant digits; ``rough`` where it is an error of two."""

    value: float
    rough: bool = False

    def fits(self, text: str) -> bool:
        return abs(_value(text) - self.value) <= (0.052 if self.rough else 0.0052) * abs(self.value) + 1e-9


def numbers(text: str) -> list[str]:
    text = re.sub(r"“[^”]*”|\([a-z_]+\)", "", text.replace("\u00a0", " ").replace("95 % interval", ""))
    return _NUMBER.findall(text)


def says(text: str, *expected: int | Percent | Compact) -> None:
    found = numbers(text)
    assert len(found) == len(expected), f"{text}\n{found}\n{expected}"
    for shown, wanted in zip(found, expected):
        right = _value(shown) == wanted if isinstance(wanted, int) else wanted.fits(shown)
        assert right, f"{shown} for {wanted} in: {text}"


def _value(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))
