"""Which channels can be silenced, and at what cost?

The channels of each place are taken in up to eight groups of neighbours; each group is set to zero and, separately, to its mean, and the loss of
accuracy and the rise of the loss are measured (ablation; Meyes et al. 2019, arXiv 1901.08644). The mean takes away what the channels
say about a sample; zero also takes away what they always add.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.models import frozen
from lineament.core.sites.activations import capture, patch
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Section

TITLE = "Which parts can it do without?"
METHOD = "ablation"
_GROUPS = 8
_WORK = 1.5e12


def applies(subject: Subject) -> str:
    return ""


def look(subject: Subject) -> Section:
    tries = 2 * _GROUPS * len(subject.sites) + 2
    rows = subject.subset(subject.affordable(_WORK, tries, most=512, least=32), salt=3)
    targets = subject.targets[rows]
    means, widths = _means(subject, rows)
    before = subject.answer(rows)
    base = subject.losses(before, targets)
    classify = subject.task == "classification"
    right = before.argmax(1) == targets if classify else None
    work = [(site, group) for site in subject.sites for group in _split(widths[site])]
    found: list[dict[str, Any]] = []
    for site, (start, stop) in progress(work, "silencing channels"):
        row: dict[str, Any] = {"site": site, "from": start, "to": stop - 1, "channels": stop - start}
        for how, value in (("mean", means[site][start:stop]), ("zero", torch.zeros(stop - start))):
            with patch(subject.model, {site: _silence(start, stop, value)}):
                after = subject.answer(rows)
            cost = (subject.losses(after, targets) - base).double()
            row[f"{how}_cost"] = float(cost.mean())
            row[f"{how}_error"] = float(cost.std() / len(cost) ** 0.5) if len(cost) > 1 else 0.0
            row[f"{how}_changed"] = _changed(before, after, classify)
            if right is not None:
                row[f"{how}_accuracy_lost"] = float(
                    (right.float() - (after.argmax(1) == targets).float()).mean()
                )
        found.append(row)
    loss = float(base.mean())
    ranked = sorted(found, key=lambda r: -r["mean_changed"])
    free = [r for r in found if r["mean_changed"] < 0.01]
    top = ranked[0]
    effect = (
        f"changes {percent(top['mean_changed'])} of answers"
        if classify
        else f"moves the answers by {percent(top['mean_changed'])} of their spread"
    )
    direction = "raises" if top["mean_cost"] >= 0 else "lowers"
    sentence = (
        f"Silencing {_channels(top)} at {short(top['site'], 40)} {effect}, the most of {len(found)} groups tried, and {direction} the loss "
        f"from {compact(loss)} to {compact(loss + top['mean_cost'])}. "
        if top["mean_changed"] > 0
        else f"Silencing any one of {len(found)} groups of channels changes no answer. "
    )
    little = (
        "fewer than 1 % of answers changing"
        if classify
        else "the answers moving by less than 1 % of their spread"
    )
    told = (
        f"{len(free)} groups ({percent(len(free) / len(found), 0)}) can each be silenced with {little}."
        if 0 < len(free) < len(found)
        else f"Each of the {len(found)} groups can be silenced alone with {little}."
        if free
        else f"No group can be silenced with {little}."
    )
    sentence += told if top["mean_changed"] > 0 else ""
    helped = min(found, key=lambda r: r["mean_cost"])
    if helped["mean_cost"] < -3 * max(helped["mean_error"], 1e-12) and helped is not top:
        sentence += (
            f" Silencing {_channels(helped)} at {short(helped['site'], 40)} even lowers the loss, to {compact(loss + helped['mean_cost'])}: "
            "on these data, what they say misleads."
        )
    columns = ("place", "channels", "answers changed" if classify else "answers moved", "loss + (mean)", "± s.e.", "loss + (zero)",
               *(("accuracy lost",) if classify else ()))  # fmt: skip
    return Section(
        name="parts",
        title=TITLE,
        status="note" if len(free) > 0.5 * len(found) else "good",
        number=percent(len(free) / len(found), 0),
        unit="of channel groups are dispensable, one at a time",
        sentence=sentence,
        pictures=[_figure(subject, found, classify)],
        tables=[
            Table(
                f"The weightiest of {len(found)} groups",
                columns,
                [
                    (
                        r["site"],
                        _channels(r).partition(" ")[2],
                        percent(r["mean_changed"]),
                        r["mean_cost"],
                        r["mean_error"],
                        r["zero_cost"],
                        *((percent(r["mean_accuracy_lost"]),) if classify else ()),
                    )
                    for r in ranked[:12]
                ],
            )
        ],
        method=METHOD,
        numbers={
            "loss": loss,
            "samples": len(rows),
            "groups": found,
            "free": len(free),
            "task": subject.task,
        },
    )


def _axis(x: Tensor) -> int:
    """Channels come second in maps, last in token sequences and vectors."""
    return 1 if x.ndim != 3 else 2


def _means(subject: Subject, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with frozen(subject.model), torch.no_grad():
        for part in subject.parts(rows):
            with capture(subject.model, subject.sites, stop_early=True) as acts:
                subject.model(subject.inputs(part))
            for site in subject.sites:
                x = acts[site].movedim(_axis(acts[site]), -1).flatten(0, -2).double()
                sums[site] = sums.get(
                    site, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
                ) + x.sum(0)
                counts[site] = counts.get(site, 0) + len(x)
    return {site: (sums[site] / counts[site]).float() for site in sums}, {
        site: len(s) for site, s in sums.items()
    }


def _split(width: int) -> list[tuple[int, int]]:
    """Neighbouring channels in at most eight groups of nearly equal size.

    >>> _split(20)[:3], len(_split(20)), _split(2)
    ([(0, 2), (2, 5), (5, 7)], 8, [(0, 1), (1, 2)])
    """
    count = min(_GROUPS, width)
    edges = [int(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))


def _silence(start: int, stop: int, value: Tensor) -> Any:
    def change(x: Tensor) -> Tensor:
        moved = x.movedim(_axis(x), -1)
        moved[..., start:stop] = value.to(moved)
        return x

    return change


def _channels(row: dict[str, Any]) -> str:
    """The channels of a group, counted from 0 as the network counts them.

    >>> _channels({"from": 3, "to": 3}), _channels({"from": 4, "to": 7})
    ('channel 3', 'channels 4 to 7')
    """
    alone = row["from"] == row["to"]
    return f"channel {row['from']}" if alone else f"channels {row['from']} to {row['to']}"


def _changed(before: Tensor, after: Tensor, classify: bool) -> float:
    """The share of answers that change; for values, how far they move in units of their spread."""
    if classify:
        return float((before.argmax(1) != after.argmax(1)).double().mean())
    spread = float(before.double().std())
    return float((after - before).double().square().mean().sqrt()) / spread if spread > 0 else 0.0


def _figure(subject: Subject, found: list[dict[str, Any]], classify: bool) -> Any:
    sites = list(subject.sites)
    rows = [[r["mean_changed"] for r in found if r["site"] == site] for site in sites]
    width = max(len(r) for r in rows)
    grid = [[*r, *([float("nan")] * (width - len(r)))] for r in rows]

    def draw(ax: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap, to_rgb

        shade = LinearSegmentedColormap.from_list("cost", [ax.get_facecolor(), to_rgb("C1")])
        top = max(max((v for v in row if v == v), default=0.0) for row in grid)
        # Where nothing changes, the bar still wants an end that its labels tell from zero.
        image = ax.imshow(grid, cmap=shade, vmin=0, vmax=max(top, 0.05), aspect="auto")
        ax.set_yticks(range(len(sites)), [short(site) for site in sites])
        ax.set_xticks(range(width), [str(i + 1) for i in range(width)])
        ax.set(xlabel="group of neighbouring channels")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if value == value:
                    text = f"{100 * value:.0f}"
                    ax.text(j, i, text, ha="center", va="center", fontsize=7.5)
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
        bar.outline.set_visible(False)
        bar.set_label("answers changed" if classify else "answers moved")
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")

    worst = max(found, key=lambda r: r["mean_changed"])
    return picture(
        draw,
        size=(6.8, 1.5 + 0.36 * len(sites)),
        caption="How much hangs on each group of channels: "
        + (
            "percent of answers that change"
            if classify
            else "how far answers move, in percent of their spread,"
        )
        + " when it is held at its mean, places in depth order. Fields without colour are parts it can do without.",
        alt=f"Grid of {len(sites)} places by up to {width} channel groups; the weightiest is group {worst['from']} to {worst['to']} at {short(worst['site'])}.",
    )
