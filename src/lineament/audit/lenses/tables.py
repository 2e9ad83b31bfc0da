"""What of its embedding tables do these data read, and would one shared table do?

The ids that arrive at each ``nn.Embedding``, ``nn.EmbeddingBag`` or view of a shared table are counted. How often a further id will be one not read so far is Good's estimate (1953):
the share of the reads whose row was read once. Readers are the gradients of random sums of the outputs at what a table gives. Values are hashed as a shared table
(Coleman et al., NeurIPS 2023, arXiv 2305.12102) would hash them, and those that could not be told apart any more are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.phrases import compact, percent, percent_interval, short
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.models import called, frozen, logits
from lineament.core.sites.activations import capture
from lineament.core.statistics.shares import wilson
from lineament.modules.unified_embedding.collisions import Collided, collision_report
from lineament.modules.unified_embedding.table import UnifiedEmbedding
from lineament.modules.unified_embedding.views import EmbeddingView
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "What of its tables do these data read?"
HELP = "which rows of its embedding tables are read, how hot, and what one shared table would mix up"
ORDER = 29
METHOD = "unified-embedding"
OPTIONAL = True
DENSE = True
EMBEDDING = True
_FRACTIONS, _LOOKUPS = (0.5, 0.25, 0.1), 2
_READERS, _SHOWN = 256, 12
# A row with at least this share of a table's reads is worth one of its own.
_HOT = 0.1


@dataclass(frozen=True)
class Read:
    """One table: its rows, how many were read by how many reads, the hottest row and its share of them, how few rows have half of the reads.

    ``unseen``: the share of further reads that will be of a row not read so far, with its interval.
    """

    name: str
    rows: int
    width: int
    reads: int
    seen: int
    hottest: int
    hot: float
    half: int
    unseen: tuple[float, float, float]


@dataclass(frozen=True)
class Tables:
    """All tables that were read; ``shared``: (rows, what a shared table of so many mixes up); ``overlaps``: (table, table, overlap of their readers)."""

    tables: Sequence[Read]
    unread: Sequence[str]
    samples: int
    shared: Sequence[tuple[float, int, Collided]]
    overlaps: Sequence[tuple[str, str, float]]
    views: bool

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def seen(self) -> int:
        return sum(table.seen for table in self.tables)


def applies(subject: Subject) -> str:
    if subject.tokenizer is not None:
        return "Its ids are the words of texts, and no values of features."
    if not _tables(subject.model):
        return "It has no nn.Embedding or nn.EmbeddingBag."
    # What a network makes ids of itself, places or codes of pictures say, are no values of features.
    if not any(not x.is_floating_point() or x.ndim == 2 for x in _tensors(subject.inputs(torch.tensor([0])))):
        return "None of its inputs are ids."
    if subject.sealed or any(map(len, _ids(subject, list(_tables(subject.model)), subject.example).values())):
        return subject.sealed
    return "Its tables are not read by these data."


def look(subject: Subject) -> Section:
    modules = _tables(subject.model)
    ids = _ids(subject, list(modules), torch.arange(len(subject)))
    read = [_read(name, modules[name], found) for name, found in ids.items() if len(found)]
    found = Tables(
        read,
        [name for name in modules if not len(ids[name])],
        len(subject),
        _shared(modules, {table.name: ids[table.name] for table in read}),
        _overlaps(subject, [table.name for table in read]),
        any(isinstance(module, EmbeddingView) for module in modules.values()),
    )
    findings = _findings(found)
    left = f" Not read at all: {', '.join(found.unread)}." if found.unread else ""
    quarter = found.shared[1]
    return Section(
        status=findings[0].severity,
        number=percent(1 - found.seen / found.rows),
        unit="of its tables' rows are not read by these data",
        sentence=(
            f"{len(subject):,} samples read {found.seen:,} of the {found.rows:,} rows of {_count(len(read), 'table')}. In one shared table of {quarter[1]:,} rows "
            f"({percent(quarter[0])} of the numbers, {_LOOKUPS} look-ups or more a value), {percent(quarter[2].merged)} of these reads would be of a value that nothing tells apart from "
            f"another one of its feature ({percent(quarter[2].expected.merged if quarter[2].expected else 0.0)} expected).{left} Rows that other data read are not counted here."
        ),
        pictures=[_figure(found.tables)],
        tables=_shown(found),
        numbers=plain(found),
        findings=findings,
    )


def _tables(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.Embedding, nn.EmbeddingBag, EmbeddingView)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, dict) else x)


def _ids(subject: Subject, names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
    """Every id that arrived at each table for these samples, as often as it did, but for those that stand for nothing."""

    def seen(part: Tensor) -> list[Tensor]:
        with capture(subject.model, [f"{name}:in" for name in names]) as acts:
            called(subject.model, subject.inputs(part))
            calls = [acts.calls(f"{name}:in") if f"{name}:in" in acts.reached() else [] for name in names]
        return [
            torch.cat([c.flatten().cpu() for c in own]) if own else torch.zeros(0).long() for own in calls
        ]

    with frozen(subject.model), torch.no_grad():
        parts = shards.each(subject.parts(rows), seen, "reads of tables")
    modules = dict(subject.model.named_modules())
    found = {name: torch.cat(own) for name, own in zip(names, zip(*parts))}
    return {name: own[own != _padding(modules[name])] for name, own in found.items()}


def _padding(module: Any) -> int:
    return -1 if module.padding_idx is None else module.padding_idx


def _read(name: str, module: Any, ids: Tensor) -> Read:
    values, counts = ids.unique(return_counts=True)
    counts, order = counts.sort(descending=True)
    n, once = len(ids), int((counts == 1).sum())
    half = int((counts.cumsum(0) * 2 < n).sum()) + 1
    return Read(
        name, module.num_embeddings, module.embedding_dim, n, len(values), int(values[order[0]]), int(counts[0]) / n, half,
        (once / n, *wilson(once, n)),
    )  # fmt: skip


def _shared(modules: dict[str, Any], ids: dict[str, Tensor]) -> list[tuple[float, int, Collided]]:
    """What :func:`lineament.modules.multiplex` would make of these tables: the same rows, look-ups and hashes."""
    width = max(1, min(m.embedding_dim for m in modules.values()) // _LOOKUPS)
    numbers = sum(m.num_embeddings * m.embedding_dim for m in modules.values())
    found = []
    for fraction in _FRACTIONS:
        table = UnifiedEmbedding(max(1, round(fraction * numbers / width)), 1)
        for name in ids:
            table.add(name, -(-modules[name].embedding_dim // width))
        found.append((fraction, table.rows, collision_report(table, ids)))
    return found


def _overlaps(subject: Subject, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """||A Bᵀ|| / (||A|| ||B||) of the readers A and B of tables of one width, by their second moments."""
    generator = torch.Generator().manual_seed(subject.seed)
    moments: dict[str, Tensor] = {}
    rows = subject.subset(_READERS, salt=27)
    with frozen(subject.model):
        for part in subject.parts(rows):
            with capture(subject.model, names, gradients=True) as acts:
                z = logits(called(subject.model, subject.inputs(part)))
                calls = [
                    (name, call) for name in names if name in acts.reached() for call in acts.calls(name)
                ]
            signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
            grads = torch.autograd.grad((z * signs).sum(), [c for _, c in calls], materialize_grads=True)
            for (name, _), grad in zip(calls, grads):
                g = grad.reshape(-1, grad.shape[-1]).double().cpu()
                moments[name] = moments.get(name, 0) + g.T @ g
    kept = [name for name in names if name in moments and float(moments[name].trace()) > 0]
    found = []
    for i, first in enumerate(kept):
        for second in kept[i + 1 :]:
            a, b = moments[first], moments[second]
            if a.shape == b.shape:
                overlap = float(((a * b).sum() / (a.trace() * b.trace())).clamp(min=0).sqrt())
                found.append((first, second, overlap))
    return sorted(found, key=lambda pair: -pair[2])


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _findings(found: Tables) -> list[Finding]:
    quarter = found.shared[1]
    told = []
    idle = 1 - found.seen / found.rows
    if idle > 0.5:
        worst = max(found.tables, key=lambda t: t.rows - t.seen)
        told.append(
            Finding(
                "note",
                f"{found.samples:,} samples read {percent(1 - idle)} of the rows of its tables; {worst.seen:,} of the {worst.rows:,} of {worst.name}, where a further read is of "
                f"another row {percent_interval(worst.unseen)} of the time.",
                advice="Where it serves data like these, a smaller table holds them: lineament.modules.multiplex(model, fraction=0.25), or lineament train --multiplex 0.25.",
                key="rows not read",
            )
        )
    hot = max(found.tables, key=lambda t: t.hot if t.seen > 10 else 0.0)
    if hot.seen > 10 and hot.hot >= _HOT:
        told.append(
            Finding(
                "note", f"Row {hot.hottest} of {hot.name} has {percent(hot.hot)} of its {hot.reads:,} reads, and {_count(hot.half, 'row')} half of them.",
                advice="In a shared table give it rows of its own: UnifiedEmbedding.add(..., reserve=[...]).", key="hot row",
            )
        )  # fmt: skip
    if not told:
        told.append(Finding("good", f"{found.samples:,} samples read {percent(1 - idle)} of the rows of its tables; in a shared table of a quarter of them {percent(quarter[2].merged)} of the reads could not be told apart.", key="rows are read"))  # fmt: skip
    return told


def _shown(found: Tables) -> list[Table]:
    tables = sorted(found.tables, key=lambda t: -t.rows)
    made = [
        Table(
            "Tables by their size; ids that stand for nothing (padding) are no reads",
            ("table", "rows", "width", "reads", "rows read", "hottest row", "its share of reads", "rows with half of the reads", "further reads of other rows"),
            [
                (t.name, t.rows, t.width, t.reads, t.seen, t.hottest, percent(t.hot), t.half, percent_interval(t.unseen))
                for t in tables
            ],
        ),
        Table(
            "One shared table for the values that were read, as multiplex() makes it; expected from independent hashes in brackets",
            ("numbers it holds, of now", "rows", "reads with a row shared within the feature", "reads of values not told apart", "pairs within a feature", "pairs of two features"),
            [
                (percent(fraction), rows, _both(c, "touched"), _both(c, "merged"), _pairs(c, "within"), _pairs(c, "between"))
                for fraction, rows, c in found.shared
            ],
        ),
    ]  # fmt: skip
    if found.overlaps:
        what = "share rows now" if found.views else "would share rows"
        made.append(
            Table(
                f"Overlap of readers, for tables of one width, that {what} (0: told apart by their directions; 1: read alike; random ones near one over the root of the width)",
                ("table", "table", "overlap"),
                [(first, second, round(value, 2)) for first, second, value in found.overlaps[:_SHOWN]],
            )
        )
    return made


def _both(c: Collided, field: str) -> str:
    return f"{percent(getattr(c, field))} ({percent(getattr(c.expected, field))})"


def _pairs(c: Collided, field: str) -> str:
    return f"{compact(getattr(c, field))} ({compact(getattr(c.expected, field))})"


def _figure(tables: Sequence[Read]) -> Any:
    shown = sorted(tables, key=lambda t: -t.rows)[:_SHOWN]

    def draw(ax: Any) -> None:
        places = list(range(len(shown)))
        ax.barh(places, [t.rows for t in shown], color="C7", alpha=0.4, label="rows")
        ax.barh(places, [t.seen for t in shown], color="C0", label="read")
        ax.barh(places, [t.half for t in shown], color="C1", label="half of the reads")
        ax.set_yticks(places, [short(t.name) for t in shown])
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel="rows")
        ax.legend()

    return picture(
        draw, size=(6.0, 1.2 + 0.32 * len(shown)),
        caption="Rows of each table, those that were read, and the fewest that have half of its reads (logarithmic).",
        alt="; ".join(f"{t.name}: {t.seen} of {t.rows} rows read" for t in shown),
    )  # fmt: skip
