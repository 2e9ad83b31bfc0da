"""What could a curious server see of one's pictures in one update? Messages are made from one's own pictures, searched, and scored."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lineament.audit.leak_budget import Budget, Plan, told_left_out
from lineament.audit.leak_parts import (
    PRIORS,
    Parts,
    assumptions,
    checked,
    norms_in_training,
    parts_of,
    weights_of,
)
from lineament.audit.leak_section import SEARCH, bounds_of, prior_of, section_of
from lineament.audit.phrases import sentence
from lineament.audit.stages import STAGES, Report, command, fresh, opened, threads
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require
from lineament.load.data import Data, load_data
from lineament.load.model_and_data import ModelAndData, bring_together
from lineament.load.models import load_model
from lineament.load.weights import digest
from lineament.papers import search as papers
from lineament.privacy.defences import Defence, defence_of
from lineament.privacy.generators import load_prior
from lineament.privacy.identification import fisher_features
from lineament.privacy.labels import guessed_targets
from lineament.privacy.leakage import Leakage, LeakageOptions, leakage
from lineament.privacy.local import Local
from lineament.privacy.messages import Message, moved_norms, saved_state
from lineament.privacy.priors import Mapped
from lineament.privacy.rivals import closed_form
from lineament.privacy.search import Search
from lineament.report import page
from lineament.report.outcome import versions

_NAME = "leak"


@dataclass(frozen=True)
class LeakOptions:
    """What an audit of messages rarely needs to be told.

    Attributes:
        weights, inputs, targets, classes, split, image_size, normalize: as for an audit.
        attacks: of :data:`lineament.privacy.reconstruction.ATTACKS`; the strongest is reported. By default GIFD, the code alone, and pixels by IG; without a prior IG and GI.
        prior: ``"vae"``, ``"dcgan"`` or ``"stylegan2"``, trained on the public pictures; a file with a trained StyleGAN2, see
            :func:`lineament.privacy.load_prior`; or ``"none"``: pixels only.
        classifier: of the classes of a generator in a file, where they are not the model's: pictures in [0, 1] to logits, resized by itself; see :class:`lineament.privacy.Mapped`.
        prior_steps: of its training. search: how attackers look.
        known_labels: give attackers the labels, which they read off the messages otherwise.
        public: other data of the kind, which the attacker has; by default the samples of the data that are not audited.
        groups: the array that names each sample's group, for instance the person, as for an audit. No public picture is then of a group that is audited, and
            guesses are looked for among other pictures of their person.
        local: what clients do before they send the change of their weights, see :class:`lineament.privacy.Local`; None where they send a gradient.
        batch_norm: ``"running"``: clients keep batch norms in evaluation mode; ``"batch"``: in training mode, and send their buffers along.
        update: a saved update of which the data are the pictures behind it; before: the weights that it started from, by default the model's.
        minutes: all of the audit in about so many, in place of a given number of steps; what does not fit is left out, and the report says so.

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
    attacks: tuple[str, ...] = ()
    prior: str = "vae"
    classifier: nn.Module | str | None = None
    prior_steps: int = 600
    search: Search = SEARCH
    known_labels: bool = False
    public: Data | None = None
    groups: str | None = None
    local: Local | None = None
    batch_norm: str = "running"
    update: str | Path | None = None
    before: str | Path | None = None
    minutes: float | None = None


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

    A saved update is audited as a whole: then every sample of ``data`` is behind it, ``pictures`` and ``batch_sizes`` are its number, and
    ``options.public`` is needed.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    >>> found = leak(net, "digits", out=tempfile.mkdtemp(), defences=["none"], pictures=2, samples=40,
    ...     options=LeakOptions(attacks=("ig",), prior="none", search=Search(steps=2, restarts=1)))
    >>> [section.name for section in found.sections]
    ['batch-1']
    """
    started = time.monotonic()
    checks.seed("seed", seed)
    checked(options, pictures, batch_sizes, defences)
    usual = ("ig", "gi") if options.prior == "none" else ("gifd", "latent", "ig")
    options = replace(options, attacks=options.attacks or usual)
    chosen = [defence_of(text) for text in defences]
    folder = fresh(out, overwrite, _NAME)
    note("reading the model and the data")
    loaded = load_model(model, weights=options.weights)
    reading: dict[str, Any] = {
        "inputs": options.inputs,
        "targets": options.targets,
        "split": options.split,
        "groups": options.groups,
    }
    reading |= {"classes": options.classes, "image_size": loaded.size if options.image_size is None else options.image_size}  # fmt: skip
    held = load_data(data, samples=samples, seed=seed, **reading)
    public = None
    if options.public is not None:
        try:
            public = load_data(options.public, samples=samples, seed=seed, **{**reading, "groups": None})
        except InputError as error:
            raise InputError(str(error).replace("data:", "public:", 1)) from None
    if options.update is not None:
        require(
            len(held) == held.total,
            f"data: {held.total} samples, of which {len(held)} were read; all are behind the update: expected samples of at least {held.total}",
        )
        pictures, batch_sizes = len(held), (len(held),)
    with ExitStack() as stack:
        if options.before is not None:
            stack.enter_context(weights_of(loaded.model, options.before))
        fitted = stack.enter_context(
            bring_together(
                loaded,
                held,
                normalize=options.normalize,
                device=device,
                seed=seed,
                fewest_classes=2 if options.update is None else 1,  # one picture may be behind an update
            )
        )
        require(
            fitted.task == "classification" and fitted.images,
            f"data: {fitted.task} of samples {tuple(fitted.inputs(torch.tensor([0])).shape[1:])}; expected a classifier of images (channels, height, width)",
        )
        for line in fitted.notes:
            note(line)
        parts = parts_of(fitted, public, pictures, grouped=options.groups is not None)
        key = {
            "model": digest(loaded.model),
            "data": [_digest(some.inputs) for some in (held, public) if some is not None],
            "update": None if options.update is None else _digest(torch.from_numpy(np.fromfile(options.update, dtype=np.uint8))),
            "options": [str(replace(options, weights=None, public=None, classifier=None if options.classifier is None else str(options.classifier))), pictures, seed, str(fitted.layout)],
            "versions": versions(),
        }  # fmt: skip
        sent = None
        moved = []
        if options.update is not None:
            moved = moved_norms(loaded.model, loaded.model.state_dict(), saved_state(loaded.model, options.update, "after"))  # fmt: skip
            if moved:
                note(
                    f"the update moved the buffers of {len(moved)} batch norms: the client was in training mode"
                )
        stack.enter_context(norms_in_training(fitted.model, options.batch_norm == "batch", moved))
        if options.update is not None:
            read = Message.read(loaded.model, options.update, count=pictures, local=options.local)
            sent = [replace(read, defence=chosen[0])]
        checkpoint = Checkpoint(opened(folder, _NAME) / STAGES / "searches", key)
        if checkpoint.resumed:
            note("an earlier run of the same audit was cut off; going on where it stopped")
        with threads(fitted.flops * pictures):
            found = _searched(
                fitted, parts, chosen, batch_sizes, seed, note, options, sent, checkpoint, started
            )
        options = replace(options, search=found.search)
    sections = [
        section_of(each, options.search.steps, took, update=sent is not None) for each, took in found.found
    ]
    findings = [finding for section in sections for finding in section.findings]
    paper = next(paper for paper in papers() if paper.slug == "gifd")
    numbers = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    unknowns = max(each.batch for each, _ in found.found) * parts.images[0].numel()
    facts = [
        (
            "Model",
            f"{type(loaded.model).__name__}, {sum(p.numel() for p in loaded.model.parameters()):,} weights",
        ),
        ("Data", held.source),
        ("Pictures audited", pictures),
        ("Other pictures, known to the attacker", len(parts.public)),
        (
            "Prior",
            "none: pixels"
            if options.prior == "none"
            else f"{options.prior}, trained on the other pictures"
            if options.prior in PRIORS
            else options.prior,
        ),
    ]
    html, json = page.write(
        folder, loaded.source, "What could a curious server see of these pictures in one update?", facts, findings, sections,
        command=command("lineament.audit.leak.leak(model, data, out=...)"),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}},
        versions=versions(), notes=[*map(sentence, fitted.notes), *assumptions(options, found.found[0][0].buffers, numbers, unknowns), *found.notes], extra={}, name=_NAME, kicker="Lineament leakage audit",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(loaded.source, findings, sections, html, json)


@dataclass(frozen=True)
class _Searched:
    """How attackers looked; for each size of message what it gave away, with the seconds that this run took to find out; and what there was no time for."""

    search: Search
    found: list[tuple[Leakage, float]]
    notes: list[str]


def _searched(
    fitted: ModelAndData,
    parts: Parts,
    defences: Sequence[Defence],
    batch_sizes: Sequence[int],
    seed: int,
    note: Callable[[str], None],
    options: LeakOptions,
    sent: list[Message] | None,
    checkpoint: Checkpoint,
    started: float,
) -> _Searched:
    bounds = bounds_of(fitted, parts.images.shape[1])
    _can_be_read(fitted.model, parts, defences, batch_sizes, options, sent, seed)
    budget = None if options.minutes is None else Budget(options.minutes, started)
    prior, notes = None, []
    if options.prior not in PRIORS:
        prior = load_prior(options.prior, parts.images.shape[1:], bounds)
        if options.classifier is not None:
            prior = Mapped(prior, load_model(options.classifier).model.to(parts.images.device).eval())
    elif options.prior != "none":
        train = lambda steps: prior_of(parts.public, options.prior, steps=steps, seed=seed)  # noqa: E731
        steps = options.prior_steps
        if budget is not None:
            steps = checkpoint.stage("prior steps", lambda: budget.prior_steps(train, steps))
        if steps < options.prior_steps:
            notes.append(f"The prior was trained for {steps} of {options.prior_steps} steps, which is what there was time for; a better one may show more.")  # fmt: skip
        note(
            f"training a prior on {len(parts.public):,} pictures that are not audited, {steps} step{'s' if steps > 1 else ''}"
        )
        prior = train(steps)
    judge = parts.judge()
    judge = replace(judge, encoder=fisher_features(parts.public, judge.public_groups))

    def look(defence: Defence, size: int, search: Search) -> Leakage:
        attacks = list(options.attacks)
        first = sent[0] if sent else Message.of(fitted.model, parts.images[:1], parts.targets[:1])
        if size == 1 and "closed form" not in attacks and closed_form(fitted.model, first) is not None:
            attacks.append("closed form")
        local = None if sent else options.local
        how = LeakageOptions(
            [defence], attacks, search, size, local, known_labels=options.known_labels, judge=judge
        )
        return leakage(
            fitted.model, parts.images, parts.targets, public=parts.public, prior=prior, options=how, sent=sent,
            held_out=(parts.public, parts.public_targets), bounds=bounds, seed=seed,
        )  # fmt: skip

    search, looks = options.search, [(size, defence) for size in batch_sizes for defence in defences]
    kept = looks
    if budget is not None:
        size, defence = looks[0]
        plan = checkpoint.stage(
            "plan", lambda: budget.plan(lambda steps: look(defence, size, replace(search, steps=steps)), looks), Plan
        )  # fmt: skip
        search, kept = replace(search, steps=plan.steps), looks[: plan.looks]
        note(
            f"{plan.steps} step{'s' if plan.steps > 1 else ''} of each layer fit in {budget.minutes:g} minute{'s' if budget.minutes != 1 else ''}"
        )
    done: list[tuple[int, Leakage, float]] = []
    for size, defence in kept:
        if budget is not None and done and not budget.fits(max(took for *_, took in done)):
            break
        note(f"searching messages of {size} picture{'s' if size > 1 else ''}, defence: {defence}")
        begun = time.monotonic()
        told = checkpoint.stage(f"{size} {defence}", lambda d=defence, s=size: look(d, s, search), Leakage)
        done.append((size, told, time.monotonic() - begun))
    if budget is not None:
        notes += told_left_out(looks[len(done) :], budget.minutes)
        for line in notes:
            note(line)
    found = []
    for size in dict.fromkeys(size for size, *_ in done):
        each = [(told, took) for own, told, took in done if own == size]
        every = replace(
            each[0][0],
            attacked=tuple(a for told, _ in each for a in told.attacked),
            prices=tuple(a for told, _ in each for a in told.prices),
        )
        found.append((every, sum(took for _, took in each)))
    return _Searched(search, found, notes)


def _can_be_read(
    model: nn.Module,
    parts: Parts,
    defences: Sequence[Defence],
    batch_sizes: Sequence[int],
    options: LeakOptions,
    sent: list[Message] | None,
    seed: int,
) -> None:
    """Whether each kind of message can be made, and has labels to read, before a prior is trained."""
    for size in batch_sizes:
        for defence in defences:
            first = sent[0] if sent else Message.of(
                model, parts.images[:size], parts.targets[:size], defence=defence, local=options.local, others=(parts.public, parts.public_targets), seed=seed
            )  # fmt: skip
            if not options.known_labels and set(options.attacks) != {"dlg"}:
                guessed_targets(model, first, parts.images[:1], parts.public)


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
