"""What a comparison of two networks shows, section by section, from one pass over the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.phrases import compact, percent, short, spread
from lineament.core.checks import InputError, require
from lineament.core.models import decided, device_of, frozen, logits
from lineament.core.statistics.shares import wilson
from lineament.core.surgery.groups import channel_groups
from lineament.load.model_and_data import ModelAndData
from lineament.measure.alignment.profile import Alignment, AlignmentOptions, SiteAlignment, alignment
from lineament.measure.alignment.reorder import barrier, permuted
from lineament.measure.alignment.sparse import SparseMaps
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

_PENALTIES = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
_FEW = 8  # units that a sparse map may use
_TARGETS = 64  # units that are mapped sparsely at a place
_SHOWN = 5
_UNPREDICTED = 0.4  # half-MSE; 0.5 is what the mean alone gives


@dataclass(frozen=True)
class Maps:
    """Maps at one site: some of b's units from a few of a's, and the held-out half-MSE of each unit of either from all of the other's (NaN: dead)."""

    site: str
    few: SparseMaps
    errors_a: Tensor
    errors_b: Tensor


def sections(
    subjects: Sequence[ModelAndData], found: Alignment, note: Callable[[str], None]
) -> list[Section]:
    """The sections for two classifiers (or regressions) of the same samples."""
    a, b = subjects

    def shown(row: int) -> Any:
        return a.display(row).numpy() if a.images else None

    def named(row: int) -> str:
        return f"sample {int(a.samples.index[row])}"

    made = [_timed("answers", lambda: _answers(a, b), note)]
    made += _units_and_spaces(found, shown if a.images else None, named, note)
    return [*made, _timed("barrier", lambda: _barrier(a, b), note)]


def language_sections(
    models: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    texts: Sequence[str],
    found: Alignment,
    note: Callable[[str], None],
) -> list[Section]:
    """The sections for two language models."""

    def named(row: int) -> str:
        text = printable(texts[row], limit=60)
        return f"“{text}”"

    made = [_timed("answers", lambda: _text_losses(models, tokenizers, texts), note)]
    return made + _units_and_spaces(found, None, named, note)


def _units_and_spaces(
    found: Alignment,
    shown: Callable[[int], Any] | None,
    named: Callable[[int], str],
    note: Callable[[str], None],
) -> list[Section]:
    maps = [
        Maps(
            name,
            site.sparse_maps(_PENALTIES, most=_TARGETS, tolerance=1e-3),
            site.unpredicted(reverse=True)[1],
            site.unpredicted()[1],
        )
        for name, site in found.sites.items()
        if len(site.dead_a) < len(site.semi.values) and len(site.dead_b) < len(site.back.values)
    ]
    return [
        _timed("units", lambda: _units(found, maps), note),
        _timed("pairs", lambda: _pairs(found, shown, named), note),
        _timed("missing", lambda: _missing(found, maps, named), note),
        _timed("spaces", lambda: _spaces(found), note),
        _timed("codes", lambda: _codes(found, maps), note),
    ]


def _timed(name: str, make: Callable[[], Section], note: Callable[[str], None]) -> Section:
    note(name)
    start = time.perf_counter()
    section = make()
    return replace(
        section,
        name=name,
        numbers=plain(section.numbers),
        findings=[replace(finding, section=name) for finding in section.findings],
        seconds=time.perf_counter() - start,
    )


# 1: answers


def _answers(a: ModelAndData, b: ModelAndData) -> Section:
    title = "How often do they agree, and do they err alike?"
    if a.task != "classification" or b.task != "classification" or a.outputs.shape[1] < 2:
        return _other_answers(a, b, title)
    said = [decided(each.outputs) for each in (a, b)]
    right = [answer == each.targets for answer, each in zip(said, (a, b))]
    n = len(a)
    # Where the networks number the classes differently, b's answers are read as a's numbers by the labels that belong together.
    same = dict(zip(b.targets.tolist(), a.targets.tolist()))
    answer_b = torch.tensor([same.get(label, -1) for label in said[1].tolist()])
    agree = said[0] == answer_b
    both = ~right[0] & ~right[1]
    shares = [_share(each) for each in (*right, agree)]
    classes = sorted(set(a.targets.tolist()))
    inside = [a.targets == label for label in classes]
    expected = sum(
        float((~right[0][i]).double().mean() * (~right[1][i]).double().mean()) * int(i.sum()) for i in inside
    )
    rows = [_row(a.class_name(label), i, right, agree) for label, i in zip(classes, inside)]
    tables = [Table("By class", _COLUMNS, rows)]
    if a.samples.groups is not None:
        groups = a.samples.groups
        kinds = sorted(set(groups.tolist()))
        names = a.samples.group_names
        rows = [_row(names[k] if k < len(names) else str(k), groups == k, right, agree) for k in kinds]
        tables.append(Table("By group", _COLUMNS, rows))
    parted = (~agree).nonzero().flatten()
    sure = torch.minimum(*[each.outputs.softmax(1).amax(1) for each in (a, b)])[parted]
    order = parted[sure.argsort(descending=True)][:10]
    tables.append(
        Table(
            "Where they part, the surest first",
            ("sample", "label", "A says", "B says"),
            [
                (
                    int(a.samples.index[row]),
                    a.class_name(int(a.targets[row])),
                    a.class_name(int(said[0][row])),
                    b.class_name(int(said[1][row])),
                )
                for row in order.tolist()
            ],
        )
    )
    text = (
        f"Over {n:,} samples A is right on {_told(shares[0])} and B on {_told(shares[1])}. They give the same answer on {_told(shares[2])}. "
        f"Both are wrong on {int(both.sum()):,} samples; if each erred independently within a class, that would be {compact(expected)}."
    )
    gap = abs(shares[0][0] - shares[1][0])
    pictures = []
    if a.images and len(order):
        pictures.append(_parted(a, b, order[:6], said))
    return Section(
        title=title,
        status="note" if gap > 0.05 else "good",
        number=percent(shares[2][0]),
        unit="of the answers are the same",
        sentence=text,
        pictures=pictures,
        tables=tables,
        method="",
        numbers={
            "count": n,
            "accuracy_a": shares[0],
            "accuracy_b": shares[1],
            "agreement": shares[2],
            "both_wrong": int(both.sum()),
            "both_wrong_expected": expected,
        },
        findings=[Finding("note" if gap > 0.05 else "good", text, key="answers")],
    )


_COLUMNS = ("", "samples", "A right", "B right", "same answer", "both wrong")


def _row(name: str, inside: Tensor, right: Sequence[Tensor], agree: Tensor) -> tuple[Any, ...]:
    both = (~right[0] & ~right[1])[inside]
    values = [percent(float(each[inside].double().mean())) for each in (*right, agree)]
    return (name, int(inside.sum()), *values, int(both.sum()))


def _share(values: Tensor) -> tuple[float, float, float]:
    hits, total = int(values.sum()), len(values)
    return hits / total, *wilson(hits, total)


def _told(share: tuple[float, float, float]) -> str:
    return f"{percent(share[0])} (95 % interval {percent(share[1])} to {percent(share[2])})"


def _other_answers(a: ModelAndData, b: ModelAndData, title: str) -> Section:
    """Several labels, or values: the losses, and how their outputs go together."""
    losses = [each.losses(each.outputs, each.targets) for each in (a, b)]
    means = [(float(v.double().mean()), 1.96 * float(v.double().std()) / len(v) ** 0.5) for v in losses]
    alike = None
    if a.outputs.shape == b.outputs.shape:
        x, y = (v.double() - v.double().mean(0) for v in (a.outputs, b.outputs))
        scale = (x.square().sum() * y.square().sum()).sqrt()
        alike = float((x * y).sum() / scale) if float(scale) > 0 else 0.0
    text = (
        f"Over {len(a):,} samples A's mean loss is {compact(means[0][0])} ± {compact(means[0][1])} and B's {compact(means[1][0])} ± {compact(means[1][1])}"
        + ("." if alike is None else f"; their outputs correlate at {compact(alike)}.")
    )
    return Section(
        title=title,
        status="good",
        number="–" if alike is None else compact(alike),
        unit="correlation of the outputs",
        sentence=text,
        method="",
        numbers={"loss_a": means[0], "loss_b": means[1], "correlation": alike},
        findings=[Finding("good", text, key="answers")],
    )


def _text_losses(models: Sequence[nn.Module], tokenizers: Sequence[Any], texts: Sequence[str]) -> Section:
    """How well each predicts the texts, in bits a character, which tokenizers have in common."""
    title = "How well does each predict the texts?"
    bits = [_bits(model, tokenizer, texts) for model, tokenizer in zip(models, tokenizers)]
    length = torch.tensor([len(text) for text in texts]).double()
    means, errors = [], []
    for each in bits:
        rate = float(each.sum() / length.sum())
        means.append(rate)
        errors.append(1.96 * float((each - rate * length).std() / length.mean()) / len(texts) ** 0.5)
    x, y = bits[0] / length, bits[1] / length
    alike = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if len(texts) > 2 else 0.0
    text = (
        f"Over {len(texts):,} texts A needs {compact(means[0])} ± {compact(errors[0])} bits a character (first tokens left out) and B "
        f"{compact(means[1])} ± {compact(errors[1])}; from text to text these correlate at {compact(alike)}."
    )
    return Section(
        title=title,
        status="good",
        number=f"{compact(means[0])} / {compact(means[1])}",
        unit="bits a character, A / B",
        sentence=text,
        method="",
        numbers={"bits_a": means[0], "bits_b": means[1], "errors": errors, "correlation": alike},
        findings=[Finding("good", text, key="answers")],
    )


def _bits(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    found = []
    with frozen(model), torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=device_of(model))
            if ids.shape[1] < 2:
                found.append(0.0)
                continue
            scores = logits(model(ids))[0, :-1].double().log_softmax(-1)
            found.append(-float(scores.gather(1, ids[0, 1:, None]).sum()) / 0.6931471805599453)
    return torch.tensor(found, dtype=torch.float64)


def _parted(a: ModelAndData, b: ModelAndData, rows: Tensor, said: Sequence[Tensor]) -> Picture:
    shown = rows.tolist()

    def words(row: int) -> str:
        names = (each.class_name(int(answer[row])) for each, answer in zip((a, b), said))
        return " / ".join(printable(name, limit=12) for name in names)

    def draw(axes: Any) -> None:
        for panel, row in zip(list(axes[0]) if len(shown) > 1 else [axes], shown):
            image = a.display(row).numpy()
            panel.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
            panel.set_axis_off()
            panel.set_title(words(row), fontsize=8)

    return picture(
        draw,
        panels=(1, len(shown)),
        size=(1.25 * len(shown), 1.6),
        kind="png",
        caption="Samples on which the answers part, the surest first: what A says / what B says.",
        alt="Samples with the answers of A and B: " + "; ".join(words(row) for row in shown) + ".",
    )


# 7: averaging


def _barrier(a: ModelAndData, b: ModelAndData) -> Section:
    """Whether the two can be averaged, as they are and with b's units in the order of a's."""
    title = "Can the two be averaged, once their units are in one order?"
    rows = a.subset(max(64, min(512, int(2e11 / max(a.flops, 1.0)))), salt=7)
    data = list(a.batches(rows))
    example = a.inputs(rows[:2])
    try:
        require(
            a.layout == b.layout and torch.equal(a.targets, b.targets),
            "they take their inputs or number their classes differently.",
        )
        straight = barrier(a.model, b.model, data, points=3, loss=a.loss)
        groups = channel_groups(b.model, example)
        makers = [g.name for g in groups.groups.values() if not g.heads]
        at = [name for name in makers if name in dict(a.model.named_modules())]
        bare = AlignmentOptions(keep=0)
        units = alignment(a.model, b.model, data, sites=at, nulls=(), blocks=2, options=bare) if at else None
        by = "weights" if units is None else "activations"
        turned = permuted(b.model, units, example, model_a=a.model, by=by)
        matched = barrier(a.model, turned, data, points=3, loss=a.loss)
    except InputError as error:
        return Section(title=title, status="skipped", sentence=f"The two are not averaged: {error}")
    ends = straight.losses[[0, -1]].mean()
    words = [f"{compact(each.height)}" for each in (straight, matched)]
    text = (
        f"Halfway between A and B the loss lies {words[0]} above the mean of the two ({compact(float(ends))}), and {words[1]} once B's units are in the order of A's "
        f"({len(groups.groups)} groups of channels matched, {len(rows)} samples, batch norms estimated anew)."
    )
    table = Table(
        "Halfway between the two networks",
        ("", "loss", "above the mean of the ends", "accuracy"),
        [
            (
                name,
                round(float(each.losses[1]), 4),
                round(each.height, 4),
                None if each.accuracies is None else percent(float(each.accuracies[1])),
            )
            for name, each in (("as they are", straight), ("B reordered", matched))
        ],
    )
    return Section(
        title=title,
        status="good",
        number=words[1],
        unit=f"loss above the ends halfway, after reordering ({words[0]} before)",
        sentence=text,
        tables=[table],
        method="convergent-learning",
        numbers={"before": straight.to_dict(), "after": matched.to_dict(), "groups": len(groups.groups)},
        findings=[Finding("note", text, key="barrier")],
    )


# 2 to 6: units, pairs, what is missing, spaces, codes


def _units(found: Alignment, maps: Sequence[Maps]) -> Section:
    sites = found.sites
    counts = {name: int(site.found.sum()) for name, site in sites.items()}
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
    text = _sentence(found, maps, counts)
    share = sum(counts.values()) / max(sum(len(site.match.values) for site in sites.values()), 1)
    return Section(
        title="Which units of the one has the other, too?",
        status="good",
        number=percent(share, 0),
        unit="of the units have a partner",
        sentence=text
        + f" A pair counts where its correlation over {found.images:,} samples is above 95 % of those found with the images of B exchanged among themselves; so 5 % of the units would count by chance.",
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
    return round(0.05 * len(site.match.values))


def _sentence(found: Alignment, maps: Sequence[Maps], counts: dict[str, int]) -> str:
    names = list(found.sites)
    parts = []
    for at in spread(len(names), 3):
        site = found.sites[names[at]]
        chance = f" (chance: {_chance(site)})" if not parts else ""
        units = f"{counts[names[at]]} of {len(site.match.values)}" + (" units" if not parts else "")
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
    if not dense or 2 * counts[name] >= len(site.match.values):
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
        caption="Correlations of A's units with their best unit of B, and one to one, each sorted; dashed with other images, dotted with B's units turned within their space.",
        alt="Mean correlation one to one by place: "
        + ", ".join(f"{compact(sites[n].match_mean)} at {short(n)}" for n in names)
        + ".",
    )


def _pairs(found: Alignment, shown: Callable[[int], Any] | None, named: Callable[[int], str]) -> Section:
    rows: list[tuple[Any, ...]] = []
    chosen: list[tuple[str, int, int, float]] = []
    for name, site in found.sites.items():
        order = site.match.values.argsort(descending=True).tolist()
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
                    _names(found.top_a[site.site_a][:, i], named),
                    _names(found.top_b[site.site_b][:, j], named),
                )
            )
            if at in order[:1] or at in order[-1:]:
                chosen.append((name, i, j, value))
    values = torch.cat([site.match.values for site in found.sites.values()])
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
        pictures=[] if shown is None else [_gallery(found, chosen[:8], shown)],
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


def _names(rows: Tensor, named: Callable[[int], str]) -> str:
    found = [named(int(row)) for row in rows[:3].tolist()]
    if all(text.startswith("sample ") for text in found):
        return ", ".join(text.removeprefix("sample ") for text in found)
    return "; ".join(found[:2])


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


def _missing(found: Alignment, maps: Sequence[Maps], named: Callable[[int], str]) -> Section:
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
                tops.append((each.site, "AB"[way], unit, error, _names(top[:, unit], named)))
        counted.append((each.site, *parts))
    text = (
        f"{whole[0]} of {whole[1]} units of A are in no linear combination of B's units at the same place, and {whole[2]} of {whole[3]} of B's in none of A's "
        f"(on held-out images a map leaves more than {percent(2 * _UNPREDICTED, 0)} of their variance)."
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


def _spaces(found: Alignment) -> Section:
    names_a, names_b = list(found.sites), [site.site_b for site in found.sites.values()]
    diagonal = found.cka.diagonal()
    best = found.cka.argmax(1)
    own = int((best == torch.arange(len(best))).sum())
    errors = None if found.cka_errors is None else found.cka_errors.diagonal()
    text = (
        f"Debiased CKA between the same places runs from {compact(float(diagonal.min()))} to {compact(float(diagonal.max()))}"
        + ("" if errors is None else f" (errors up to {compact(float(errors.max()))}, by leaving out images)")
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


def _codes(found: Alignment, maps: Sequence[Maps]) -> Section:
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
        ax.set(ylabel="half-MSE on held-out images", ylim=(0, 0.62))
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
