"""What a recipe returns and `outcome.json` holds: the paper's claims beside ours, tables, figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError
from lineament.core.files import write_json
from lineament.report.surface_plot import SurfacePlot


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes:
        name: what is claimed, in a sentence with its predicate.
        paper, observed: the paper's figures and ours, as text.
        holds: what the predicate says, which was written before the run.
        reason: why not, where it does not hold.
    """

    name: str
    paper: str
    observed: str
    holds: bool
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """A table: column names, and rows of strings or numbers, one for each column; ``None`` is shown as a dash.

    >>> Table("Errors", ("group", "error"), [("north", 0.25), ("south", None)]).rows[0]
    ('north', 0.25)
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]

    @classmethod
    def of(cls, title: str, columns: Mapping[str, str], records: Iterable[Any]) -> Table:
        """A row for each record; ``columns`` names the attribute that each column shows."""
        rows = [[getattr(record, attribute) for attribute in columns.values()] for record in records]
        return cls(title, list(columns), rows)


@dataclass(frozen=True)
class Figure:
    """A picture beside `outcome.json`: its file name, its caption and its alt text.

    ``surfaces`` are the values of a landscape in it, which the gallery lets the reader turn and read.
    """

    file: str
    caption: str
    alt: str
    surfaces: Sequence[SurfacePlot] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of ``lineament reproduce SLUG``; the form of `outcome.json`.

    Attributes:
        slug, title: of the paper.
        preset, config: what was run; ``config`` holds plain values.
        claims, tables, figures: what came out; figures are files beside `outcome.json`.
        seconds: how long it took.
        versions: of the packages that a reader needs to repeat it.

    >>> import tempfile
    >>> found = Outcome("normgrad", "A title", "quick", {"seed": 0}, [Claim("It holds", "1", "1.02", True)])
    >>> Outcome.read(found.write(tempfile.mkdtemp())).claims[0].observed
    '1.02'
    """

    slug: str
    title: str
    preset: str
    config: dict[str, Any]
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: str | Path) -> Path:
        """Write ``outcome.json`` into ``folder`` atomically; returns its path."""
        path = Path(folder) / "outcome.json"
        write_json(path, self.to_dict())
        return path

    @classmethod
    def read(cls, path: str | Path) -> Outcome:
        """Read ``outcome.json`` (untrusted: only the documented fields are taken).

        Raises:
            InputError: a file that cannot be read or is no such outcome.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                slug=str(raw["slug"]),
                title=str(raw["title"]),
                preset=str(raw["preset"]),
                config=dict(raw["config"]),
                claims=[
                    Claim(
                        **{k: c[k] for k in ("name", "paper", "observed", "holds")},
                        reason=c.get("reason", ""),
                    )
                    for c in raw["claims"]
                ],
                tables=[Table(t["title"], t["columns"], t["rows"]) for t in raw["tables"]],
                figures=[
                    Figure(
                        f["file"],
                        f["caption"],
                        f["alt"],
                        [SurfacePlot.from_dict(r) for r in f.get("surfaces", ())],
                    )
                    for f in raw["figures"]
                ],
                seconds=float(raw["seconds"]),
                versions={str(k): str(v) for k, v in raw["versions"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not an outcome.json of lineament ({type(error).__name__}: {error})"
            ) from error


def versions() -> dict[str, str]:
    """The versions that a reader needs to repeat a run.

    >>> sorted(versions())
    ['lineament', 'numpy', 'python', 'torch']
    """
    import numpy
    import torch

    import lineament

    return {
        "lineament": lineament.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
