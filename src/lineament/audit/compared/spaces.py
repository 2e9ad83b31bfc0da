"""What has the one network that the other lacks: spaces, and how many units it takes to say one of the other's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, percent, short
from lineament.measure.alignment.profile import Alignment
from lineament.measure.alignment.sparse import SparseMaps
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section

_PENALTIES = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
_FEW = 8  # units that a sparse map may use
_TARGETS = 64  # units that are mapped sparsely at a place
_UNPREDICTED = 0.4  # half-MSE; 0.5 is what the mean alone gives


@dataclass(frozen=True)
class Maps:
    """Maps at one site: some of b's units from a few of a's, and the held-out half-MSE of each unit of either from all of the other's (NaN: dead)."""

    site: str
    few: SparseMaps
    errors_a: Tensor
    errors_b: Tensor


def maps_of(found: Alignment) -> list[Maps]:
    """The maps at every site where either network has a living unit."""
    return [
        Maps(
            name,
            site.sparse_maps(_PENALTIES, most=_TARGETS, tolerance=1e-3),
            site.unpredicted(reverse=True)[1],
            site.unpredicted()[1],
        )
        for name, site in found.sites.items()
        if len(site.dead_a) < len(site.semi.values) and len(site.dead_b) < len(site.back.values)
    ]


def missing(found: Alignment, maps: Sequence[Maps], named: Callable[[int], str]) -> Section:
    counted, tops, few = [], [], []
    whole = [0, 0, 0, 0]
    for each in maps:
        units = max(len(each.errors_a), len(each.errors_b))
        if found.sites[each.site].samples < 4 * units:  # half of them are for the fit
            few.append(f"{short(each.site, 30)} ({units} units, {found.sites[each.site].samples:,} samples)")
            continue
        site = found.sites[each.site]
        parts = []
        for way, (errors, top) in enumerate(
            ((each.errors_a, found.top_a[site.site_a]), (each.errors_b, found.top_b[site.site_b]))
        ):
            live = int((~errors.isnan()).sum())
            alone = errors > _UNPREDICTED
            parts += [f"{int(alone.sum())} of {live}", round(float(errors.nanmean()), 3)]
            whole[2 * way] += int(alone.sum())
            whole[2 * way + 1] += live
            unit = int(errors.nan_to_num(0).argmax())
            if bool(alone[unit]):
                error = round(float(errors[unit]), 3)
                tops.append((each.site, "AB"[way], unit, error, top_names(top[:, unit], named)))
        counted.append((each.site, *parts))
    text = (
        f"{whole[0]} of {whole[1]} units of A are in no linear combination of B's units at the same place, and {whole[2]} of {whole[3]} of B's in none of A's "
        f"(on held-out samples a map leaves more than {percent(2 * _UNPREDICTED, 0)} of their variance)."
        + (f" Too few samples to say at {', '.join(few)}." if few else "")
    )
    share = (whole[0] + whole[2]) / max(whole[1] + whole[3], 1)
    return Section(
        title="What has the one that the other lacks?",
        status="note" if share > 0.25 else "good",
        number=percent(share, 0),
        unit="of the units are not predicted by the other network",
        sentence=text,
        tables=[
            Table(
                "Units that the other network's do not predict, and the mean half-MSE (0.5: nothing predicted)",
                ("place", "A's, from B", "half-MSE", "B's, from A", "half-MSE "),
                counted,
            ),
            *(
                [
                    Table(
                        "The least predicted units",
                        ("place", "network", "unit", "half-MSE", "its top samples"),
                        tops,
                    )
                ]
                if tops
                else []
            ),
        ],
        method="convergent-learning",
        numbers={"a_alone": whole[0], "a_units": whole[1], "b_alone": whole[2], "b_units": whole[3]},
        findings=[Finding("note" if share > 0.25 else "good", text, key="missing")],
    )


def spaces(found: Alignment) -> Section:
    names_a, names_b = list(found.sites), [site.site_b for site in found.sites.values()]
    diagonal = found.cka.diagonal()
    best = found.cka.argmax(1)
    own = int((best == torch.arange(len(best))).sum())
    errors = None if found.cka_errors is None else found.cka_errors.diagonal()
    text = (
        f"Debiased CKA between the same places runs from {compact(float(diagonal.min()))} to {compact(float(diagonal.max()))}"
        + (
            ""
            if errors is None
            else f" (errors up to {compact(float(errors.max()))}, by leaving out samples)"
        )
        + f"; {own} of {len(best)} places of A are most like the same place of B. It ignores in which basis features are held, and 0 is what independent features give."
    )

    def draw(ax: Any) -> None:
        image = ax.imshow(found.cka.numpy(), vmin=0, vmax=1, cmap=shades(ax, "C0"))
        ax.set_xticks(range(len(names_b)), [short(n, 16) for n in names_b], rotation=40, ha="right")
        ax.set_yticks(range(len(names_a)), [short(n, 16) for n in names_a])
        ax.set(xlabel="B", ylabel="A")
        ax.figure.colorbar(image, ax=ax)

    shown = picture(
        draw,
        size=(4.6, 3.8),
        caption="Debiased linear CKA between all places of A and of B, maps averaged over their positions.",
        alt="Debiased CKA between the same places: "
        + ", ".join(f"{compact(float(v))} at {short(n)}" for n, v in zip(names_a, diagonal))
        + ".",
    )
    rows = [(name, *(round(float(v), 3) for v in row)) for name, row in zip(names_a, found.cka)]
    return Section(
        title="How alike are the spaces, whatever their units?",
        status="good",
        number=compact(float(diagonal.mean())),
        unit="mean debiased CKA of the same places",
        sentence=text,
        pictures=[shown],
        tables=[Table("Debiased CKA, A down, B across", ("A", *names_b), rows)],
        method="convergent-learning",
        numbers={"cka": found.cka, "errors": found.cka_errors},
        findings=[Finding("good", text, key="spaces")],
    )


def codes(found: Alignment, maps: Sequence[Maps]) -> Section:
    rows, ladders = [], {}
    for each in maps:
        site, m = found.sites[each.site], each.few
        used = m.nonzeros.double().mean(1)
        allowed = (used <= _FEW).nonzero().flatten().tolist()
        at = min(allowed, key=lambda k: float(m.half_mse[k].mean())) if allowed else 0
        ladder = float(m.single_half_mse.mean()), float(m.half_mse[at].mean()), float(m.dense_half_mse.mean())
        ladders[each.site] = ladder
        k = max(2, min(len(site.semi.values), len(site.back.values)) // 2)
        groups = site.clusters(k, method="hierarchical")
        shared = [cluster for cluster in groups.clusters if cluster.shared]
        inside = sum(len(part) for cluster in shared for part in cluster.members) / len(groups.labels)
        rows.append(
            (
                each.site,
                *(round(v, 3) for v in ladder),
                round(float(used[at]), 1),
                f"{len(shared)} of {k}",
                percent(inside, 0),
            )
        )
    gains = {name: 1 - sparse / single for name, (single, sparse, _) in ladders.items() if single > 0}
    best = max(gains, key=lambda name: gains[name]) if gains else ""
    text = (
        (
            f"A few units of A (at most {_FEW} on average) leave {percent(max(gains[best], 0.0), 0)} less of B's held-out error than the best single unit at {short(best, 30)}, where they help most: "
            if best
            else ""
        )
        + "where one unit does as well as many, both hold features unit by unit; where many are needed, they hold the same space in other bases."
    )

    def draw(ax: Any) -> None:
        places = range(len(ladders))
        for number, label in enumerate(("best single unit", f"at most {_FEW} units", "best map")):
            ax.plot(places, [v[number] for v in ladders.values()], "o-", color=f"C{number}", label=label)
        ax.axhline(0.5, color="C7", ls="--")
        ax.set_xticks(list(places), [short(n, 16) for n in ladders], rotation=30, ha="right")
        ax.set(ylabel="half-MSE on held-out samples", ylim=(0, 0.62))
        ax.legend(fontsize=7)

    pictures = (
        [
            picture(
                draw,
                caption="How well A's units predict each unit of B: the best single one, a few, and as many as help; 0.5 (dashed) is nothing predicted.",
                alt="Half-MSE of single, sparse and best map by place: "
                + "; ".join(f"{short(n)}: {', '.join(compact(v) for v in t)}" for n, t in ladders.items())
                + ".",
            )
        ]
        if ladders
        else []
    )
    return Section(
        title="One unit, a few, or a whole subspace?",
        status="good",
        number=percent(max(gains.values(), default=0.0), 0),
        unit="less error by a few units than by the best one",
        sentence=text,
        pictures=pictures,
        tables=[
            Table(
                "Held-out half-MSE of B's units from A's, and groups of units that correlate (average linkage)",
                (
                    "place",
                    "best single unit",
                    f"at most {_FEW}",
                    "best map",
                    "units used",
                    "groups with both",
                    "units in these",
                ),
                rows,
            )
        ],
        method="convergent-learning",
        numbers={"ladder": ladders},
    )


def top_names(rows: Tensor, named: Callable[[int], str]) -> str:
    """Some samples in words, by their numbers where they have no other name."""
    found = [named(int(row)) for row in rows[:3].tolist()]
    if all(text.startswith("sample ") for text in found):
        return ", ".join(text.removeprefix("sample ") for text in found)
    return "; ".join(found[:2])
