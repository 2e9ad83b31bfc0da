"""What could a curious server see of one's pictures in one update? Messages are made from one's own pictures, searched, and scored."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lineament.audit.leak_section import SEARCH, bounds_of, prior_of, section_of
from lineament.audit.phrases import sentence
from lineament.audit.stages import STAGES, Report, command, fresh, opened, threads
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.load.data import Data, load_data
from lineament.load.model_and_data import ModelAndData, bring_together
from lineament.load.models import load_model
from lineament.load.weights import digest
from lineament.papers import search as papers
from lineament.privacy.defences import Defence, defence_of
from lineament.privacy.leakage import Leakage, leakage
from lineament.privacy.search import ATTACKS, Search
from lineament.report import page
from lineament.report.outcome import versions

_NAME = "leak"


@dataclass(frozen=True)
class LeakOptions:
    """What an audit of messages rarely needs to be told.

    Attributes:
        weights, inputs, targets, classes, split, image_size, normalize: as for an audit.
        attacks: of :data:`lineament.privacy.reconstruction.ATTACKS`; the strongest is reported.
        prior: ``"vae"`` or ``"dcgan"``, trained on the samples that are not audited, or ``"none"``: pixels only.
        prior_steps: of its training. search: how attackers look.
        known_labels: give attackers the labels, which they read off the messages otherwise.

    >>> LeakOptions().prior
    'vae'
    """

    weights: str | Path | None = None
    inputs: str | None = None
    targets: str | None = None
    classes: Sequence[str] | None = None
    split: str | None = None
    image_size: int | tuple[int, int] | None = None
    normalize: tuple[Sequence[float], Sequence[float]] | None = None
    attacks: tuple[str, ...] = ("gifd", "latent", "ig")
    prior: str = "vae"
    prior_steps: int = 600
    search: Search = SEARCH
    known_labels: bool = False


def leak(
    model: nn.Module | str,
    data: Data,
    *,
    out: str | Path,
    defences: Sequence[str] = ("none", "clip=4,noise=0.01"),
    pictures: int = 8,
    batch_sizes: Sequence[int] = (1,),
    samples: int = 1000,
    device: str | torch.device | None = None,
    seed: int = 0,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda line: None,
    options: LeakOptions = LeakOptions(),
) -> Report:
    """How much of a picture can be rebuilt from the update that a client would send, plain and defended?

    Args:
        model, data: as for :func:`lineament.audit.run.audit`; a classifier of images. Of the samples ``pictures`` are audited, the others are what the
            attacker knows of the world.
        out: the folder for `leak.html` and `leak.json`.
        defences: each as :func:`lineament.privacy.defence_of` reads it.
        batch_sizes: pictures behind one message; each divides ``pictures``.

    Raises:
        InputError: whatever cannot be used, before the first search.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    >>> found = leak(net, "digits", out=tempfile.mkdtemp(), defences=["none"], pictures=2, samples=40,
    ...     options=LeakOptions(attacks=("ig",), prior="none", search=Search(steps=2, restarts=1)))
    >>> [section.name for section in found.sections]
    ['batch-1']
    """
    checks.number("pictures", pictures, low=2, integer=True)
    checks.seed("seed", seed)
    checks.one_of("prior", options.prior, ("vae", "dcgan", "none"))
    for attack in options.attacks:
        checks.one_of("attacks", attack, ATTACKS)
    require(
        len(defences) > 0 and len(options.attacks) > 0,
        "defences: got none, or no attacks; expected at least one of each",
    )
    for size in batch_sizes:
        checks.number("batch_sizes", size, low=1, integer=True)
        require(
            pictures % size == 0 and pictures > size,
            f"batch_sizes: got {size}, expected a number below pictures = {pictures} that divides it",
        )
    chosen = [defence_of(text) for text in defences]
    folder = fresh(out, overwrite, _NAME)
    note("reading the model and the data")
    loaded = load_model(model, weights=options.weights)
    held = load_data(
        data, samples=samples, seed=seed, inputs=options.inputs, targets=options.targets, classes=options.classes, split=options.split,
        image_size=loaded.size if options.image_size is None else options.image_size,
    )  # fmt: skip
    with bring_together(loaded, held, normalize=options.normalize, device=device, seed=seed) as fitted:
        require(
            fitted.task == "classification" and fitted.images,
            f"data: {fitted.task} of samples {tuple(fitted.inputs(torch.tensor([0])).shape[1:])}; expected a classifier of images (channels, height, width)",
        )
        require(
            len(fitted) >= 4 * pictures,
            f"pictures: {pictures} of {len(fitted)} samples leave too few others to know the world from; expected at most {len(fitted) // 4} pictures, or at least {4 * pictures} samples",
        )
        for line in fitted.notes:
            note(line)
        key = {
            "model": digest(loaded.model),
            "data": hashlib.sha256(held.inputs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
            "options": [str(replace(options, weights=None)), pictures, seed, str(fitted.layout)],
            "versions": versions(),
        }  # fmt: skip
        checkpoint = Checkpoint(opened(folder, _NAME) / STAGES / "searches", key)
        if checkpoint.resumed:
            note("an earlier run of the same audit was cut off; going on where it stopped")
        with threads(fitted.flops * pictures):
            found = _searched(fitted, chosen, pictures, batch_sizes, seed, note, options, checkpoint)
    sections = [section_of(each, options.search.steps, took) for each, took in found]
    findings = [finding for section in sections for finding in section.findings]
    paper = next(paper for paper in papers() if paper.slug == "gifd")
    facts = [
        (
            "Model",
            f"{type(loaded.model).__name__}, {sum(p.numel() for p in loaded.model.parameters()):,} weights",
        ),
        ("Data", held.source),
        ("Pictures audited", pictures),
        ("Other pictures, known to the attacker", len(fitted) - pictures),
        (
            "Prior",
            "none: pixels" if options.prior == "none" else f"{options.prior}, trained on the other pictures",
        ),
    ]
    html, json = page.write(
        folder, loaded.source, "What could a curious server see of these pictures in one update?", facts, findings, sections,
        command=command("lineament.audit.leak.leak(model, data, out=...)"),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}},
        versions=versions(), notes=[*map(sentence, fitted.notes), *_assumptions(options)], extra={}, name=_NAME, kicker="Lineament leakage audit",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(loaded.source, findings, sections, html, json)


def _searched(
    fitted: ModelAndData,
    defences: Sequence[Defence],
    pictures: int,
    batch_sizes: Sequence[int],
    seed: int,
    note: Callable[[str], None],
    options: LeakOptions,
    checkpoint: Checkpoint,
) -> list[tuple[Leakage, float]]:
    """For each size of message what it gave away, and the seconds that this run took to find out."""
    rows = fitted.subset(pictures, salt=11)
    others = torch.tensor(sorted(set(range(len(fitted))) - set(rows.tolist())))
    x = fitted.inputs(torch.arange(len(fitted)))
    y = fitted.targets.to(x.device)
    bounds = bounds_of(fitted, x.shape[1])
    prior = None
    if options.prior != "none":
        note(f"training a prior on {len(others):,} pictures that are not audited")
        prior = prior_of(x[others], options.prior, steps=options.prior_steps, seed=seed)
    found = []
    for size in batch_sizes:
        parts, begun = [], time.monotonic()
        for defence in defences:
            note(f"searching messages of {size} picture{'s' if size > 1 else ''}, defence: {defence}")
            parts.append(
                checkpoint.stage(
                    f"{size} {defence}",
                    lambda defence=defence, size=size: leakage(
                        fitted.model,
                        x[rows],
                        y[rows],
                        public=x[others],
                        prior=prior,
                        defences=[defence],
                        attacks=options.attacks,
                        batch=size,
                        search=options.search,
                        known_labels=options.known_labels,
                        held_out=(x[others], y[others]),
                        bounds=bounds,
                        seed=seed,
                    ),
                    Leakage,
                )
            )
        every = replace(
            parts[0],
            attacked=tuple(a for p in parts for a in p.attacked),
            prices=tuple(a for p in parts for a in p.prices),
        )
        found.append((every, time.monotonic() - begun))
    return found


def _assumptions(options: LeakOptions) -> list[str]:
    told = [
        "The attacker knows the model, its weights, how many pictures stand behind a message, and which defence is on.",
        "Labels are given to the attacker." if options.known_labels else "Labels are read off each message.",
        "Messages are gradients of the mean loss over one batch, with the model as it was loaded (batch norms with their running statistics).",
        f"Each attack computes as many gradients of a guess; restarts: {options.search.restarts}. A stronger attacker than those tried may see more.",
    ]
    if options.prior != "none":
        told.insert(
            1,
            "The attacker has other pictures of the same source, none of those audited, and a generator trained on them.",
        )
    return told
