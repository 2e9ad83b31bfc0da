"""How many directions do its features use, layer by layer?

With λ the eigenvalues of the features' covariance and p = λ/Σλ: the participation ratio (Σλ)²/Σλ², and the effective rank exp(-Σ p ln p)
(Roy and Vetterli 2007; as RankMe in Garrido et al. 2022, arXiv 2210.02885), both between 1 and the number of units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.models import frozen
from lineament.core.sites.activations import capture
from lineament.measure.collapse.profile import pooled
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Section

TITLE = "How many directions do its features use?"
METHOD = "effective-rank"
_MOST = 1000


def applies(subject: Subject) -> str:
    return (
        ""
        if len(subject) >= 8
        else f"A spectrum of {len(subject)} samples says nothing; expected at least 8."
    )


def look(subject: Subject) -> Section:
    rows = subject.subset(_MOST, salt=1)
    gathered: dict[str, list[Tensor]] = {site: [] for site in subject.sites}
    with frozen(subject.model), torch.no_grad():
        for part in progress(list(subject.parts(rows)), "spectrum"):
            with capture(subject.model, subject.sites, stop_early=True) as acts:
                subject.model(subject.inputs(part))
            for site in subject.sites:
                gathered[site].append(pooled(acts[site].float()).cpu())
    layers = [{"site": site, **dimensions(torch.cat(parts))} for site, parts in gathered.items()]
    last = layers[-1]
    share = last["effective_rank"] / max(min(last["units"], last["samples"] - 1), 1)
    classes = subject.outputs.shape[1] if subject.task == "classification" else None
    sentence = (
        f"At the last place ({short(last['site'], 40)}), {last['units']} units behave like {compact(last['effective_rank'])} independent directions; "
        f"{last['dims90']} directions hold 90 % of the variance"
        + (f", for {classes} classes. " if classes else ". ")
    )
    doubled, silent = (sum(layer[k] for layer in layers) for k in ("doubled", "silent"))
    total = sum(layer["units"] for layer in layers)
    sentence += f"Of all {total} units looked at, {percent(silent / total)} never vary and {percent(doubled / total)} almost copy another (correlation above 0.95)."
    narrow = last["effective_rank"] < 2 and last["units"] > 4
    return Section(
        name="spectrum",
        title=TITLE,
        status="note" if narrow or (silent + doubled) / total > 0.25 else "good",
        number=compact(last["effective_rank"]),
        unit=f"effective directions of {last['units']} units, at the last place",
        sentence=sentence,
        pictures=[_figure(layers)],
        tables=[
            Table(
                "Dimension by place, in depth order",
                (
                    "place",
                    "units",
                    "effective rank",
                    "participation ratio",
                    "directions for 90\u00a0%",
                    "never vary",
                    "copies",
                ),
                [
                    (
                        layer["site"],
                        layer["units"],
                        layer["effective_rank"],
                        layer["participation_ratio"],
                        layer["dims90"],
                        layer["silent"],
                        layer["doubled"],
                    )
                    for layer in layers
                ],
            )
        ],
        method=METHOD,
        numbers={"sites": layers, "samples": len(rows), "used_share": share},
    )


def dimensions(features: Tensor) -> dict[str, Any]:
    """Effective dimensions of features (sample, unit), and how many units never vary or nearly copy another.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 6)
    >>> found = dimensions(x)
    >>> round(found["participation_ratio"]), found["silent"], found["units"]
    (3, 3, 6)
    """
    x = features.double()
    n, d = x.shape
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    # The smaller Gram matrix has the same eigenvalues.
    gram = (x.T @ x if d <= n else x @ x.T) / max(n - 1, 1)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = float(values.sum())
    alive = scale > 1e-6 * max(float(scale.max()), 1e-30)
    if total <= 1e-20:
        return {
            "units": d, "samples": n, "effective_rank": 0.0, "participation_ratio": 0.0, "dims90": 0,
            "silent": d, "doubled": 0, "eigenvalues": [],
        }  # fmt: skip
    p = values / total
    entropy = -float((p * p.clamp_min(1e-300).log()).sum())
    units = (x / scale.clamp_min(1e-30))[:, alive][:, :4096]
    close = (units.T @ units / n).abs() > 0.95
    # A unit is a copy when one before it says the same; so a pair counts once.
    doubled = int(close.tril(-1).any(1).sum())
    return {
        "units": d,
        "samples": n,
        "effective_rank": math.exp(entropy),
        "participation_ratio": total**2 / float(values.square().sum()),
        "dims90": int((p.cumsum(0) < 0.9).sum()) + 1,
        "silent": int((~alive).sum()),
        "doubled": doubled,
        "eigenvalues": p[:200].tolist(),
    }


def _figure(layers: list[dict[str, Any]]) -> Any:
    def draw(axes: Any) -> None:
        left, right = axes[0]
        places = list(range(len(layers)))
        left.barh(
            places, [layer["units"] for layer in layers], color="C7", alpha=0.35, height=0.7, label="units"
        )
        left.barh(
            places,
            [layer["effective_rank"] for layer in layers],
            color="C0",
            height=0.45,
            label="effective directions",
        )
        left.set_yticks(places, [short(layer["site"]) for layer in layers])
        left.set_ylim(len(layers) - 0.5, -0.5)
        left.set_xscale("log")
        left.set_xlim(left=0.8)
        left.set(xlabel="number (logarithmic)")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for number, layer in enumerate(layers):
            if layer["eigenvalues"]:
                shade = 0.25 + 0.75 * number / max(len(layers) - 1, 1)
                last = number == len(layers) - 1
                ranks = range(1, len(layer["eigenvalues"]) + 1)
                right.loglog(
                    ranks,
                    [max(v, 1e-9) for v in layer["eigenvalues"]],
                    color="C1" if last else "C0",
                    alpha=1 if last else shade,
                )
        right.set_ylim(bottom=1e-6)
        right.set(
            xlabel="direction, strongest first",
            ylabel="share of variance",
            title="Spectra (last place in orange)",
        )
        right.grid(True)

    return picture(
        draw,
        panels=(1, 2),
        size=(7.4, 1.9 + 0.3 * len(layers)),
        caption="Left: units and the directions they really use. Right: how the variance falls from direction to direction, one line a place; steep means few directions.",
        alt="Effective directions by place: "
        + ", ".join(
            f"{compact(layer['effective_rank'])} of {layer['units']} at {short(layer['site'])}"
            for layer in layers
        )
        + ".",
    )
