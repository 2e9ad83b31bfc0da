"""Numbers as sentences need them: shares, intervals, names of sites that fit on an axis."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lineament.core.statistics.shares import wilson as wilson
from lineament.report.text import printable


def percent(share: float, digits: int = 1) -> str:
    r"""A share as a reader says it; the space does not break. Only all is 100 %, and only none 0 %.

    >>> percent(0.1234), percent(1.0), percent(0.9996), percent(0.99996), percent(0.0001)
    ('12.3\xa0%', '100\xa0%', '99.96\xa0%', '99.996\xa0%', '0.01\xa0%')
    """
    if not math.isfinite(share):
        return "–"
    while digits < 6 and any(
        abs(share - end) > 1e-8 and round(abs(share - end), digits + 2) == 0 for end in (0, 1)
    ):
        digits += 1
    text = f"{100 * share:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−") + "\u00a0%"


def points(difference: float) -> str:
    """A difference of shares, in points.

    >>> points(-0.1234)
    '12.3 points'
    """
    return percent(abs(difference)).replace("\u00a0%", " points")


def percent_interval(x: tuple[float, float, float]) -> str:
    r"""A share with its interval, where it has one.

    >>> percent_interval((0.5, 0.25, 0.75))
    '50\xa0% (25\xa0% to 75\xa0%)'
    """
    return f"{percent(x[0])} ({percent(x[1])} to {percent(x[2])})" if math.isfinite(x[1]) else percent(x[0])


def mean_interval(values: Tensor, z: float = 1.96) -> tuple[float, float, float]:
    """The mean of some values with its 95 % interval.

    >>> mean_interval(torch.tensor([1.0, 1.0, 1.0]))
    (1.0, 1.0, 1.0)
    """
    values = values.double()
    mean = float(values.mean())
    half = z * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean, mean - half, mean + half


def compact(value: float) -> str:
    """A number in at most four significant places, as text.

    >>> compact(12345.678), compact(0.00012)
    ('12,346', '0.00012')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def short(site: str, limit: int = 24) -> str:
    """A site's name for an axis: its end, which tells sites apart.

    >>> short("resnet.encoder.stages.2.layers.0", 20)
    '….stages.2.layers.0'
    """
    text = printable(site)
    if len(text) <= limit:
        return text
    tail = text[-(limit - 1) :]
    dot = tail.find(".")
    return "…" + (tail[dot:] if 0 <= dot < len(tail) - 6 else tail)


def within(tokens: float) -> str:
    """Where something lies that begins so many tokens before the end.

    >>> within(1), within(4)
    ('in the last token', 'within the last 4 tokens')
    """
    return "in the last token" if tokens == 1 else f"within the last {compact(tokens)} tokens"


def sentence(text: str) -> str:
    """A remark as a sentence.

    >>> sentence("colour as grey"), sentence("Done.")
    ('Colour as grey.', 'Done.')
    """
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def places(sites: Sequence[str]) -> list[str]:
    """How the places that the sections speak of are named.

    >>> places(["layer1", "fc:in"])
    ["Places in the network have its modules' names, counted from 0 where they have none: 'layer1' is what that module gives, 'fc:in' what goes into 'fc'."]
    """
    given = next((repr(site) for site in sites if not site.endswith(":in")), "")
    taken = next((site for site in sites if site.endswith(":in")), "")
    parts = [f"{given} is what that module gives"] if given else []
    parts += [f"{taken!r} what goes into {taken.removesuffix(':in')!r}"] if taken else []
    return (
        [
            "Places in the network have its modules' names, counted from 0 where they have none: "
            + ", ".join(parts)
            + "."
        ]
        if parts
        else []
    )


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` positions, evenly spread, first and last included."""
    if count <= most:
        return list(range(count))
    return sorted(set(torch.linspace(0, count - 1, most).round().long().tolist()))


def several(reasons: Sequence[str], most: int = 3) -> str:
    """Reasons in one line, alike ones once, and how many more there are.

    >>> several(["a is short", "b is short", "b is short", "c is empty"], most=2)
    'a is short; b is short (2 times); 1 more'
    """
    counts = Counter(reasons)
    shown = [reason + (f" ({n} times)" if n > 1 else "") for reason, n in list(counts.items())[:most]]
    rest = sum(list(counts.values())[most:])
    return "; ".join([*shown, *([f"{rest:,} more"] if rest else [])])
