"""Which units of the one network has the other, and what do matched units respond to?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.audit.compared.spaces import Maps, top_names
from lineament.audit.phrases import compact, percent, short, spread
from lineament.measure.alignment.profile import Alignment
from lineament.measure.alignment.site import SiteAlignment
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section

_SHOWN = 5


def units(found: Alignment, maps: Sequence[Maps]) -> Section:
    sites = found.sites
    counts = {name: int((site.found & site.living).sum()) for name, site in sites.items()}
    rows = []
    for name, site in sites.items():
        mean_error = site.mean_errors[1] if site.mean_errors else None
        rows.append(
            (
                name,
                site.site_b,
                f"{len(site.semi.values)} / {len(site.back.values)}",
                counts[name],
                _chance(site),
                round(site.semi_mean, 3),
                round(site.match_mean, 3),
                None if mean_error is None else round(mean_error, 3),
                *(round(float(site.nulls[null].match.mean()), 3) for null in ("shuffled", "rotated")),
                round(site.overlap, 2),
                f"{len(site.dead_a)} / {len(site.dead_b)}",
            )
        )
    dead = [sum(len(each) for each in (s.dead_a, s.dead_b)) for s in sites.values()]
    text = _sentence(found, maps, counts)
    share = sum(counts.values()) / max(sum(site.most for site in sites.values()), 1)
    return Section(
        title="Which units of the one has the other, too?",
        status="good",
        number=percent(share, 0),
        unit="of the units have a partner" if not sum(dead) else "of the living units have a partner",
        sentence=text
        + f" A pair counts where its correlation over {found.images:,} samples is above 95 % of those found with the samples of B exchanged among themselves; so 5 % of the units would count by chance."
        + (
            f" Units that hold one value on every sample ({sum(dead):,} of both networks) are not counted."
            if sum(dead)
            else ""
        ),
        pictures=[_curves(sites)],
        tables=[
            Table(
                "By place: correlations of units, and what chance and a random basis of the same space give",
                (
                    "A",
                    "B",
                    "units A / B",
                    "with a partner",
                    "by chance",
                    "best unit",
                    "one to one",
                    "error",
                    "shuffled",
                    "rotated",
                    "same partner",
                    "dead A / B",
                ),
                rows,
            )
        ],
        method="convergent-learning",
        numbers={"sites": {name: site.to_dict() for name, site in sites.items()}, "found": counts},
        findings=[Finding("note" if share < 0.5 else "good", text, key="units")],
    )


def _chance(site: SiteAlignment) -> int:
    return round(0.05 * site.most)


def _sentence(found: Alignment, maps: Sequence[Maps], counts: dict[str, int]) -> str:
    names = list(found.sites)
    parts = []
    for at in spread(len(names), 3):
        site = found.sites[names[at]]
        chance = f" (chance: {_chance(site)})" if not parts else ""
        units = f"{counts[names[at]]} of {site.most}" + (" units" if not parts else "")
        parts.append(
            f"{units} {'of' if not parts else 'in'} {short(names[at], 40)}"
            + (f" have a partner{chance}" if not parts else "")
        )
    text = ", ".join(parts)
    apart = [name for name in names if _space_not_units(found, name, maps, counts)]
    if apart:
        text += f": at {', '.join(short(name, 30) for name in apart[:3])}{' and others' if len(apart) > 3 else ''} they share a space, not units"
    return text + "."


def _space_not_units(found: Alignment, name: str, maps: Sequence[Maps], counts: dict[str, int]) -> bool:
    """Whether most units have no partner of their own, and yet combinations of a's units predict most of b's held-out variance."""
    site = found.sites[name]
    dense = [each.errors_b for each in maps if each.site == name]
    if not dense or 2 * counts[name] >= site.most:
        return False
    return float(dense[0].nanmean()) < 0.25 or float(_cka(found, name)) > 0.7


def _cka(found: Alignment, name: str) -> Tensor:
    at = list(found.sites).index(name)
    return found.cka[at, at]


def _curves(sites: dict[str, SiteAlignment]) -> Picture:
    names = [list(sites)[at] for at in spread(len(sites), 4)]

    def draw(axes: Any) -> None:
        panels = list(axes[0]) if len(names) > 1 else [axes]
        for panel, name in zip(panels, names):
            site = sites[name]
            length = max(len(site.match.values) - 1, 1)
            for null, style in (("shuffled", "--"), ("rotated", ":")):
                values = site.nulls[null].match.sort(descending=True).values.numpy()
                places = [at / max(len(values) - 1, 1) for at in range(len(values))]
                panel.plot(places, values, style, color="C7", label=null)
            semi = site.semi.values.sort(descending=True).values.numpy()
            panel.plot(
                [at / max(len(semi) - 1, 1) for at in range(len(semi))], semi, color="C0", label="best unit"
            )
            match = site.match.values.sort(descending=True).values.numpy()
            panel.plot([at / length for at in range(len(match))], match, color="C1", label="one to one")
            panel.set(title=short(name, 18), xlabel="units, best first", ylim=(-0.1, 1.05), xticks=[])
        panels[0].set_ylabel("correlation")
        panels[0].legend(loc="lower left", fontsize=7)

    return picture(
        draw,
        panels=(1, len(names)),
        size=(2.1 * len(names) + 0.6, 2.7),
        caption="Correlations of A's units with their best unit of B, and one to one, each sorted; dashed with other samples, dotted with B's units turned within their space.",
        alt="Mean correlation one to one by place: "
        + ", ".join(f"{compact(sites[n].match_mean)} at {short(n)}" for n in names)
        + ".",
    )


def pairs(found: Alignment, shown: Callable[[int], Any] | None, named: Callable[[int], str]) -> Section:
    rows: list[tuple[Any, ...]] = []
    chosen: list[tuple[str, int, int, float]] = []
    for name, site in found.sites.items():
        living = site.living
        order = [at for at in site.match.values.argsort(descending=True).tolist() if living[at]]
        for at in dict.fromkeys([*order[:2], *order[-2:]]):
            i, j, value = int(site.match.rows[at]), int(site.match.columns[at]), float(site.match.values[at])
            error = None if site.errors is None else round(float(site.errors[at]), 3)
            rows.append(
                (
                    name,
                    i,
                    j,
                    round(value, 3),
                    error,
                    top_names(found.top_a[site.site_a][:, i], named),
                    top_names(found.top_b[site.site_b][:, j], named),
                )
            )
            if at in order[:1] or at in order[-1:]:
                chosen.append((name, i, j, value))
    values = torch.cat([site.match.values[site.living] for site in found.sites.values()])
    if not len(values):
        values = torch.zeros(1)  # every unit is dead in one of the two
    text = (
        f"The best pair correlates at {compact(float(values.max()))}, the worst at {compact(float(values.min()))}. Beside each pair stand the samples that move either unit most: "
        "units that see the same thing are moved by the same samples."
    )
    return Section(
        title="What do matched units respond to?",
        status="good",
        number=compact(float(values.max())),
        unit="correlation of the best pair",
        sentence=text,
        pictures=[] if shown is None or not chosen else [_gallery(found, chosen[:8], shown)],
        tables=[
            Table(
                "The best and the worst pairs",
                (
                    "place",
                    "unit of A",
                    "unit of B",
                    "correlation",
                    "error",
                    "A's top samples",
                    "B's top samples",
                ),
                rows,
            )
        ],
        method="convergent-learning",
        numbers={"best": float(values.max()), "worst": float(values.min())},
    )


def _gallery(
    found: Alignment, chosen: Sequence[tuple[str, int, int, float]], shown: Callable[[int], Any]
) -> Picture:
    def strip(rows: Tensor) -> Any:
        """The samples side by side, a white line between them."""
        images = [torch.as_tensor(shown(int(row))) for row in rows]
        images = [image[..., None].expand(*image.shape, 3) if image.ndim == 2 else image for image in images]
        line = images[0].new_ones(images[0].shape[0], max(1, images[0].shape[1] // 16), 3)
        return torch.cat([part for image in images for part in (image, line)][:-1], 1).clamp(0, 1).numpy()

    def draw(axes: Any) -> None:
        for panels, (name, i, j, value) in zip(axes, chosen):
            site = found.sites[name]
            tops = found.top_a[site.site_a][:_SHOWN, i], found.top_b[site.site_b][:_SHOWN, j]
            titles = f"{short(name, 14)}: unit {i} of A", f"unit {j} of B: {compact(value)}"
            for panel, rows, title in zip(panels, tops, titles):
                panel.imshow(strip(rows))
                panel.set_axis_off()
                panel.set_title(title, fontsize=8)

    return picture(
        draw,
        panels=(len(chosen), 2),
        size=(7.4, 0.95 * len(chosen) + 0.3),
        kind="png",
        caption="The best and the worst pair of each place: left the samples that move A's unit most, right those that move B's; the number is their correlation.",
        alt="Samples that move matched units most: "
        + ", ".join(f"A {i} with B {j} at {short(n)}, {compact(v)}" for n, i, j, v in chosen)
        + ".",
    )
