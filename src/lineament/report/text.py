"""Strings and numbers as a page shows them: nothing invisible, nothing that reorders the line, nothing cut in half.

Class names, file names and error messages come from users. HTML escaping is Jinja's work; this file takes care of
what escaping leaves alone: control characters, bidirectional marks, lone surrogates, and NaN in JSON.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# Cc control, Cf format (bidi marks, zero width), Cs lone surrogates, Co private use, Zl/Zp line separators.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0"}


def printable(name: Any, *, keep: str = "", limit: int | None = None) -> str:
    r"""``name`` with control characters, bidirectional marks and lone surrogates written as escapes.

    Args:
        name: any object; what is not a string is shown by ``str``.
        keep: characters to leave as they are (``"\n"`` for text of several lines).
        limit: clip to this many characters, the last one an ellipsis.

    Returns:
        Text that can be printed, encoded as UTF-8, drawn in a figure and put into XML (after escaping).

    >>> printable("cat\u202egod\x1b[31m")
    'cat\\u202egod\\x1b[31m'
    >>> printable("a very long name", limit=7)
    'a very…'
    """

    def visible(char: str) -> str:
        if char in keep:
            return char
        if unicodedata.category(char) not in _INVISIBLE and char not in "\ufffe\uffff":
            return char
        code = ord(char)
        return _SHORT.get(char) or (
            f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        )

    text = "".join(visible(char) for char in str(name))
    return text if limit is None or len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def cell(value: Any, digits: int = 4) -> str:
    """A table's cell as text: numbers to ``digits`` significant digits, ``None`` as a dash, truth as yes or no.

    >>> [cell(v) for v in (0.123456, 1234567.0, 3, None, True, float("nan"), "<b>")]
    ['0.1235', '1.235e+06', '3', '–', 'yes', 'NaN', '<b>']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value).replace("-", "−")
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if value.is_integer() and abs(value) < 1e5:
            return str(int(value)).replace("-", "−")
        text = f"{value:.{digits}g}"
        # Only the sign of the number becomes a minus; the exponent stays as a reader can paste it.
        return "−" + text[1:] if text.startswith("-") else text
    return printable(value, keep="\n")


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    >>> duration(0.42), duration(75), duration(7325)
    ('0.4 s', '1 min 15 s', '2 h 2 min')
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plain(value: Any) -> Any:
    """``value`` as strict JSON allows it: NaN and infinities become ``None``, tensors and arrays nested lists, dataclasses dicts.

    >>> plain({"a": float("inf"), "b": (1, 2.5)})
    {'a': None, 'b': [1, 2.5]}
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        # A file name that is no UTF-8 reaches Python with lone surrogates, which cannot be written.
        return value.encode("utf-8", "backslashreplace").decode()
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.detach().tolist() if hasattr(value, "detach") else value.tolist())
    return plain(str(value))
