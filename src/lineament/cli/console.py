"""What the commands print: tables for a wide terminal, plain blocks of lines for a narrow one or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lineament.report.text import cell, duration, printable

if TYPE_CHECKING:
    from lineament.bench import AnyRow
    from lineament.cli.train_result import Fitted
    from lineament.papers import Paper
    from lineament.recipes.kit.run import Run
    from lineament.report.gallery import Site
    from lineament.report.token_page import TokenBlock

WIDE = 100


def note(line: str) -> None:
    """A progress line on standard error; work goes on when nobody reads it any more."""
    with suppress(BrokenPipeError):
        print(f"lineament: {printable(line)}", file=sys.stderr, flush=True)


class _Console(Console):
    """rich's, which leaves a reader that has gone (head, less) to the command line instead of ending the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    # Text that a user named is never read as markup, and a pipe gets whole lines.
    console = _Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    return console


def _table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in whole or column in right,
            overflow="fold",
        )
    return table


def _text(value: object, style: str = "") -> Text:
    return Text(printable(value), style=style)


def show_papers(papers: Sequence[Paper], search: str = "") -> None:
    """The catalogue, newest first; what is not there yet says so."""
    console = _console()
    there = sum(paper.there for paper in papers)
    if console.is_terminal and console.width >= WIDE:
        table = _table(
            "slug", "year", "arXiv", "what it is for", "home", "runs", whole=("slug", "year", "arXiv")
        )
        for paper in papers:
            runs = _text(paper.runs, "green") if paper.there else Text("not there yet", style="dim")
            purpose = Text.assemble((printable(paper.title), "bold"), "\n", printable(paper.purpose))
            table.add_row(
                paper.slug,
                str(paper.year),
                paper.arxiv,
                purpose,
                "\n".join(paper.homes),
                runs,
                end_section=True,
            )
        console.print(table)
    else:
        for paper in papers:
            state = "there" if paper.there else "not there yet"
            console.print(Text(f"{paper.slug}  {paper.year}  arXiv {paper.arxiv}  {state}", style="bold"))
            for line in (paper.title, paper.purpose, f"home: {', '.join(paper.homes)}"):
                console.print("  " + printable(line), soft_wrap=not console.is_terminal)
            if paper.runs:
                console.print("  runs: " + paper.runs)
            console.print()
    what = f" match {printable(search)!r}" if search else ""
    console.print(f"{len(papers)} of 29 papers{what}; {there} there, {len(papers) - there} not yet.")


def show_fields(slug: str, fields: Sequence[tuple[str, str, Mapping[str, object]]]) -> None:
    """The options of one recipe, with the value that each preset gives them."""
    console = _console()
    table = _table("option", "takes", *(fields[0][2] if fields else ()), whole=("option",))
    for name, takes, values in fields:
        shown = (", ".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v) for v in values.values())
        table.add_row("--" + name.replace("_", "-"), takes, *(printable(text, limit=60) for text in shown))
    console.print(f"options of {slug}, with the value in each preset:")
    console.print(table)


def show_run(run: Run) -> None:
    """A recipe's claims, the paper's figure beside ours, and where the outcome is."""
    console = _console()
    outcome = run.outcome
    if run.how == "found":
        console.print(
            f"{run.folder} already holds the outcome of this configuration; not run again (--overwrite runs it anew)."
        )
    console.print(Text(printable(outcome.title), style="bold"))
    blocks = not console.is_terminal or console.width < WIDE
    if outcome.claims and blocks:
        for claim in outcome.claims:
            console.print(Text.assemble(_verdict(claim.holds), "  ", printable(claim.name)))
            console.print(f"  paper: {printable(claim.paper)}\n  ours:  {printable(claim.observed)}")
            if not claim.holds and claim.reason:
                console.print(f"  why:   {printable(claim.reason)}")
    elif outcome.claims:
        table = _table("claim", "paper", "ours", "verdict", whole=("verdict",))
        for claim in outcome.claims:
            ours = printable(claim.observed)
            if not claim.holds and claim.reason:
                ours += "\n" + printable(claim.reason)
            table.add_row(_text(claim.name), _text(claim.paper), Text(ours), _verdict(claim.holds))
        console.print(table)
    held = sum(bool(claim.holds) for claim in outcome.claims)
    verdict = f"{held} of {len(outcome.claims)} claims hold"
    if not outcome.claims:
        verdict = "What was run settles no claim"
        for numbers in outcome.tables:
            table = _table(*numbers.columns)
            for row in numbers.rows:
                cells = ("-" if c is None else f"{c:.4g}" if isinstance(c, float) else c for c in row)
                table.add_row(*map(_text, cells))
            console.print(_text(numbers.title), table)
    console.print(f"{verdict} at preset {outcome.preset}; {duration(outcome.seconds)}.")
    console.print(f"Written: {run.folder / 'outcome.json'}", soft_wrap=True)


def _verdict(holds: bool) -> Text:
    return Text("holds", style="green") if holds else Text("does not hold", style="yellow")


def show_tokens(block: TokenBlock) -> None:
    """The context in colours by score on a terminal, and one line a token, most important first, in a pipe."""
    console = _console()
    shown = block.shown()
    console.print(Text(printable(block.line), style="bold"))
    if console.is_terminal:
        text = Text()
        # Tokens of whole words carry no spaces of their own.
        apart = not any(t["text"] != t["text"].strip() for t in shown)
        for t in shown:
            red, green, blue = (226, 120, 20) if t["sign"] == "for" else (30, 120, 190)
            # The strongest get the full colour with black letters; weak ones would be unreadable on it.
            strong = t["share"] >= 0.5
            r, g, b = (round(40 + (c - 40) * t["share"]) for c in (red, green, blue))
            style = f"{'black' if strong else 'white'} on rgb({r},{g},{b})" if t["rank"] else "dim"
            text.append(t["text"], style=style + (" underline" if t["marked"] else ""))
            text.append(" " if apart else "")
        console.print(text)
    # The position tells apart tokens that occur twice.
    ranked = sorted(((k, t) for k, t in enumerate(shown) if t["rank"]), key=lambda pair: pair[1]["rank"])
    for k, t in ranked[:5] if console.is_terminal else ranked:
        mark = "  (rationale)" if t["marked"] else ""
        console.print(Text(f"  {t['value']:>10}  {f'[{k}]':>5} {t['text']!r}{mark}"))


def show_trainings(runs: Mapping[str, Fitted]) -> None:
    """Several trainings side by side, the best last validation accuracy first."""
    console = _console()
    rows = sorted(runs.items(), key=lambda run: -(run[1].last if run[1].last is not None else -1.0))
    names = ("TAR at 1e-3", "R@1") if any(run.options.embedding for run in runs.values()) else ()
    rows = sorted(rows, key=lambda run: -(run[1].recognised[0] or 0.0))
    table = _table(
        *("run", "optimizer", "options", "best", "last", *names, "seconds"),
        right=("best", "last", *names, "seconds"),
    )
    for name, run in rows:
        accuracies = (
            "–" if value is None else f"{value:.2%}"
            for value in (run.best, run.last, *run.recognised[: len(names)])
        )
        table.add_row(
            _text(name), run.options.optimizer, _text(run.words()), *accuracies, f"{run.seconds:.1f}"
        )
    console.print(table)
    console.print(
        "best and last: validation accuracy of the best epoch (optimistic: chosen on the data it is measured on) and of the weights that were kept.",
        soft_wrap=True,
    )
    if names:
        console.print(
            "TAR at FAR 1e-3 and R@1: on the classes held out, of the weights that were kept; with fewer than 1,000 pairs of two classes no false accept is allowed.",
            soft_wrap=True,
        )
    others = {(run.validation_samples, run.options.seed) for run in runs.values()}
    if len(others) > 1:
        console.print(
            "These runs differ in seed or in what they held out: their accuracies are of different samples.",
            soft_wrap=True,
        )


def show_tables(columns: Sequence[Any], plan: Any, smaller: Mapping[str, Any]) -> None:
    """Columns of ids, the plan of one table for them, and what smaller tables would collide."""
    console = _console()
    table = _table("column", "values", "cells", "most frequent", "look-ups", "worth rows of their own", right=("values", "cells", "most frequent", "look-ups"))  # fmt: skip
    for c in columns:
        about = f"about {c.distinct:,} (±{196 * c.error:.0f} %)" if c.error else f"{c.distinct:,}"
        table.add_row(_text(c.name), about, f"{c.count:,}", f"{c.hottest:.1%}", str(plan.lookups[c.name]), _text(", ".join(c.reserve)))  # fmt: skip
    console.print(table)
    values, pairs = sum(c.distinct for c in columns), plan.collisions
    console.print(
        f"One table of {plan.rows:,} row{'s' if plan.rows > 1 else ''} of {plan.chunk} numbers, {plan.bytes / 2**20:.3g} MiB in float32, for {values:,} values. Of one look-up each, {_pairs(pairs.intra)} pairs of values of one column "
        f"are expected to share a row, and {_pairs(pairs.inter)} pairs of values of different ones, which the layers that read them tell apart.",
        soft_wrap=True,
    )
    rows = _table("rows", "pairs of one column in one table", "in tables split by values", "pairs of different columns", right=("rows", "pairs of one column in one table", "in tables split by values", "pairs of different columns"))  # fmt: skip
    for name, found in smaller.items():
        rows.add_row(f"{name} of the values", *(_pairs(v) for v in (found.intra, found.proportional, found.inter)))  # fmt: skip
    console.print(rows)
    call = ", ".join(f'"{name}": {count}' for name, count in list(plan.lookups.items())[:4])
    console.print(f"lineament.modules.UnifiedEmbedding({plan.rows}, {plan.chunk}) with look-ups {{{call}{', ...' if len(columns) > 4 else ''}}}", soft_wrap=True)  # fmt: skip


def _pairs(expected: float) -> str:
    """How many pairs are expected: with a fraction only where there are few."""
    return f"{expected:,.0f}" if expected >= 100 else f"{expected:.3g}"


def show_site(site: Site) -> None:
    """Where the gallery is; what could not be shown goes to standard error."""
    for problem in site.problems:
        print(f"lineament: {printable(problem)}", file=sys.stderr)
    runs = f"{site.outcomes} outcome{'' if site.outcomes == 1 else 's'}"
    _console().print(f"{runs} on {site.pages} pages. Open {site.index}", soft_wrap=True)


def show_row(row: AnyRow) -> None:
    """One row of a benchmark, as soon as it is measured."""
    from lineament.bench import Rate, Trial

    console = _console()
    if isinstance(row, Trial):
        found = ", ".join(f"{name} ({severity})" for name, severity in row.found.items())
        console.print(
            Text.assemble(
                (row.slug, "bold"),
                f"  {printable(row.what)}: {printable(found) or 'nothing found'}; {_seconds(row.ours_s)}",
            ),
            soft_wrap=True,
        )
        return
    met = {True: ("met", "green"), False: ("missed", "yellow"), None: ("", "")}[row.met]
    line = Text.assemble((row.slug, "bold"), "  ", printable(row.what), ": ")
    if isinstance(row, Rate):
        line.append(
            f"{row.hits} of {row.count}, {_share(row.share)} ({_share(row.low)} to {_share(row.high)})"
        )
        if row.target is not None:
            bound = f"{'at most' if row.at_most else 'at least'} {_share(row.target)}"
            said = ("too few to tell", "dim") if row.met is None else met
            line.append_text(Text.assemble(f" (target {bound}, ", said, ")"))
        console.print(line, soft_wrap=True)
        return
    line.append(_seconds(row.ours_s))
    if row.peer_s is None:
        line.append(f"; {printable(row.peer)} is not installed")
    else:
        line.append(f" against {_seconds(row.peer_s)} of {printable(row.peer)}, ratio {cell(row.ratio, 3)}")
    if row.target is not None and row.ratio is not None:
        line.append_text(Text.assemble(f" (target {cell(row.target, 3)}, ", met, ")"))
    console.print(line, soft_wrap=True)
    if row.note:
        console.print(Text(f"    {printable(row.note)}", "dim"), soft_wrap=True)


def show_total(rows: Sequence[AnyRow]) -> None:
    """How many targets the rows meet, of how many nothing follows, and what was missed though no target asks for it."""
    from lineament.bench import Rate

    compared = [row for row in rows if row.met is not None]
    rates = [row for row in rows if isinstance(row, Rate)]
    few = sum(row.target is not None and row.met is None for row in rates)
    free = [row for row in rates if row.target is None]
    missed = sum(row.hits < row.count for row in free)
    said = [f"{sum(bool(row.met) for row in compared)} of {len(compared)} targets met"]
    said += [f"{few} with too few trials to tell"] if few else []
    said += [f"{len(free)} without a target, of which {missed} missed something"] if free else []
    _console().print(f"{'; '.join(said)}; {len(rows)} rows.", soft_wrap=True)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"
