"""Which directions of its last maps are features, and what do they keep of what it does?

A small TopK dictionary (Gao et al. 2024, arXiv 2406.04093) is trained on what passes at one place for two thirds of the samples, and judged on the others,
beside principal components and the strongest units with as many features each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.audit.feature_cards import feature_cards
from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core.sites.activations import capture
from lineament.dictionaries.autoencoders import Neurons, TopK
from lineament.dictionaries.evaluation import Evaluation, evaluate
from lineament.dictionaries.examples import Examples, max_examples
from lineament.dictionaries.factorisations import pca
from lineament.dictionaries.harvest import Harvest
from lineament.dictionaries.training import train_dictionary
from lineament.report import dashboard
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain

TITLE = "Which directions are features?"
HELP = "a small dictionary of features at one place, what it keeps, and what its most important features are"
ORDER = 47
ON_REQUEST = True
METHOD = "topk-dictionary"
SOURCE = ("Scaling and evaluating sparse autoencoders", 2024, "2406.04093")
_SAMPLES, _ROWS, _WORK, _FORWARDS = 900, 200_000, 2.5e11, 4e11
_SHOWN = 12


@dataclass(frozen=True)
class Quality:
    """One way of writing the activations with k features a row, judged on held-out samples."""

    name: str
    k: float
    fvu: float
    kl: float
    kl_error: float
    kl_random: float
    recovered: float
    accuracy: float
    dead: float


@dataclass(frozen=True)
class Features:
    """The dictionary's site and size, its quality and that of the baselines, and its most important features."""

    site: str
    width: int
    k: int
    trained_on: int
    judged_on: int
    judged_rows: int
    quality: Sequence[Quality]
    important: Sequence[int]
    importance: Sequence[float]


def applies(subject: Subject) -> str:
    if len(subject) < 30:
        return (
            f"A dictionary needs samples to train on and others to be judged on; {len(subject)} are too few."
        )
    if subject.task == "regression":
        return "It judges features by what a classifier answers."
    if not isinstance(subject.inputs(torch.tensor([0])), Tensor):
        return "It takes networks with one input."
    return subject.sealed


def look(subject: Subject) -> Section:
    rows = subject.subset(subject.affordable(_FORWARDS, 20, _SAMPLES, least=60), salt=7)
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(subject.seed))]
    cut = 2 * len(order) // 3
    known, held = _data(subject, order[:cut]), _data(subject, order[cut:])
    site = _site(subject)
    d = Harvest(subject.model, known, site=site).width
    width = min(4 * d, 1024)
    k = max(2, min(8, d // 4))
    batch = 1024
    tokens = int(max(batch * 20, min(_ROWS, _WORK / (10 * d * width))))
    found = train_dictionary(
        subject.model, known, site=site, dictionary=TopK(d, width, k=k), tokens=tokens, batch_size=batch, learning_rate=2e-3, seed=subject.seed,
    )  # fmt: skip
    sae = found.dictionary
    x = next(Harvest(subject.model, known, site=site).batches(8192)).x.float()
    neurons = Neurons(d, k=k, site=site)
    neurons.mean.copy_(x.mean(0))
    components = pca(x, min(k, *x.shape), site=site)
    judged = evaluate(subject.model, [sae, components, neurons], held, mode="activation", seed=subject.seed)
    names = ("dictionary", "principal components", "strongest units")
    quality = [_quality(name, each) for name, each in zip(names, judged)]
    gradient = "labels" if subject.task == "classification" else "max_logit"
    examples = max_examples(subject.model, sae, held, top=_SHOWN, gradient=gradient, seed=subject.seed)
    assert examples.importance is not None
    best = examples.importance.argsort(descending=True)[:_SHOWN].tolist()
    best = [feature for feature in best if examples.maxima[feature] > 0]
    measured = Features(
        site,
        width,
        k,
        cut,
        len(order) - cut,
        judged[0].tokens,
        quality,
        best,
        [float(examples.importance[f]) for f in best],
    )
    links = _pages(subject, sae, held, examples, measured)
    ours, others = quality[0], quality[1:]
    better = all(ours.kl < other.kl for other in others)
    comparison = " and ".join(f"{compact(o.kl)} on that of {o.name}" for o in others)
    sentence = (
        f"{width} features were trained at {short(site, 40)} on {cut:,} samples, {k} of them on at once. On {len(order) - cut:,} other samples they leave "
        f"{percent(ours.fvu)} of the variance; the network's answer moves by {compact(ours.kl)} nats (standard error {compact(ours.kl_error)}) on their reconstruction, "
        f"by {comparison}, and by {compact(ours.kl_random)} under random errors as large as the dictionary's. {percent(ours.dead)} of the features were never on. "
        "Importance is a first-order estimate, |f w·g|, with g the loss's gradient."
    )
    text = (
        f"At {short(site, 40)}, {k} of {width} trained features keep {'more' if better else 'no more'} of its answers than as many principal components or units "
        f"({compact(ours.kl)} nats against {' and '.join(compact(o.kl) for o in others)})"
    )
    return Section(
        status="good" if better else "note",
        number=compact(ours.kl),
        unit="nats that its answer moves when only the dictionary's features are kept",
        sentence=sentence,
        pictures=[_figure(quality)],
        tables=[_judgement(quality, measured), _table(subject, examples, held, measured)],
        numbers=plain(measured),
        links=links,
        findings=[
            Finding("good" if better else "note", f"{text}.", key="features" if better else "features weak")
        ],
    )


def _data(subject: Subject, rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([subject.inputs(part) for part in subject.parts(rows)]), torch.cat(
        [subject.targets[part] for part in subject.parts(rows)]
    )


def _site(subject: Subject) -> str:
    """The last place with positions, where a feature can be small and here or there; else the last place."""
    example = subject.inputs(subject.parts(torch.arange(min(2, len(subject))))[0])
    with torch.no_grad(), capture(subject.model, subject.sites) as acts:
        subject.model(example)
    shapes = {site: acts[site] for site in subject.sites}
    maps = [site for site, x in shapes.items() if x.is_floating_point() and x.ndim >= 3 and x.shape[1] > 1]
    return maps[-1] if maps else subject.sites[-1]


def _quality(name: str, each: Evaluation) -> Quality:
    return Quality(
        name,
        each.l0,
        each.fvu,
        each.kl,
        each.errors["kl"],
        each.kl_random,
        each.recovered_mean,
        each.accuracy_substituted,
        each.dead,
    )


def _pages(
    subject: Subject, sae: Any, data: Any, examples: Examples, measured: Features
) -> list[tuple[str, str]]:
    """The dashboard beside the report."""
    if not subject.folder:
        return []
    cards = feature_cards(
        subject.model,
        sae,
        data,
        examples,
        name=str,
        outputs=[subject.class_name(i) for i in range(subject.outputs.shape[1])],
        ablated=64,
    )
    facts = [
        ("Site", measured.site),
        ("Features", measured.width),
        ("Activations", f"{examples.rows:,}"),
        ("Samples", f"{measured.judged_on:,}"),
    ]
    dashboard.write(
        Path(subject.folder) / "dictionary",
        cards,
        title=f"Features at {measured.site}",
        facts=facts,
        notes=["From samples that the dictionary was not trained on."],
    )
    return [("Every feature, with its examples", "dictionary/index.html")]


def _judgement(quality: Sequence[Quality], measured: Features) -> Table:
    columns = {
        "features": "name", "on at once": "k", "variance left": "fvu", "KL (nats)": "kl", "error": "kl_error", "loss recovered": "recovered",
        "right on it": "accuracy", "never on": "dead",
    }  # fmt: skip
    title = f"What is kept, on {measured.judged_on:,} samples of {measured.judged_rows:,} positions (loss recovered against the mean)"
    return Table.of(title, columns, quality)


def _table(subject: Subject, examples: Examples, held: Any, measured: Features) -> Table:
    """The most important features and the classes of their strongest samples."""
    rows = []
    for feature in measured.important:
        places = examples.places(feature)
        classes = Counter(_class(subject, held[1][place[0]]) for place in places)
        most = ", ".join(f"{name} ({count})" for name, count in classes.most_common(3))
        rows.append(
            [
                feature,
                float(examples.importance[feature]) if examples.importance is not None else None,
                float(examples.density[feature]),
                most,
            ]
        )
    return Table(
        f"The {len(rows)} most important features, with the classes of their {_SHOWN} strongest samples",
        ("feature", "importance", "share of positions it is on in", "classes"),
        rows,
    )


def _class(subject: Subject, target: Tensor) -> str:
    if target.ndim == 0:
        return subject.class_name(int(target))
    return " + ".join(subject.class_name(i) for i in target.nonzero()[:, 0].tolist()) or "none"


def _figure(quality: Sequence[Quality]) -> Picture:
    def draw(axes: Any) -> None:
        for ax, name, label in ((axes[0][0], "fvu", "variance left"), (axes[0][1], "kl", "KL (nats)")):
            values = [getattr(each, name) for each in quality]
            ax.barh(range(len(quality)), values, color=["C0", "C7", "C7"], height=0.6)
            ax.set_yticks(range(len(quality)), [each.name for each in quality])
            ax.set_ylim(len(quality) - 0.5, -0.5)
            ax.set(xlabel=label)
        axes[0][1].set_yticks([])

    return picture(
        draw,
        alt="; ".join(f"{q.name}: {q.fvu:.3g} of the variance left, KL {q.kl:.3g} nats" for q in quality),
        caption=f"With about {compact(quality[0].k)} features at once: what is left of the variance, and how far the answer moves. Shorter is better.",
        size=(6.8, 1.9),
        panels=(1, 2),
    )
