"""How often is the audit right? Its findings on networks of known truth.

Each network is made so that what there is to find is known without the audit: by what it was trained on and a measurement in plain PyTorch (does the
answer follow another class's cue?), or by construction (labels drawn from known probabilities, a known gap between groups, units that were
silenced, weights put by hand). One half of the networks of every kind chose the thresholds; the rates are those of the other half.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit import audit
from lineament.audit.phrases import wilson
from lineament.bench import Rate, Trial, earlier, quick
from lineament.data.planted_cues import planted_cues
from lineament.report.figures import undrawn
from lineament.train.stacked import Training

SLUG = "audit"
WARNING, NOTE, DETECTED, INSIDE = 0.02, 0.05, 0.95, 0.93
# A cue is said to decide from this share of answers on; below, finding it is no target.
DECIDES = 0.3
# What the finding of each planted cue is called, and other findings that the cue brings along by what it is.
CUES = {
    "mark": "place",
    "moving mark": "cue patch that moves",
    "tint": "cue colour",
    "brightness": "cue brightness and contrast",
    "texture": "cue texture and fine frequencies",
    "frequency": "cue texture and fine frequencies",
    "place": "cue place of the object",
}
CARRIED = {
    "mark": (
        "cue patch that moves",
        "cue texture and fine frequencies",
        "cue coarse frequencies",
        "cue brightness and contrast",
    ),
    "moving mark": (
        "cue texture and fine frequencies",
        "cue coarse frequencies",
        "cue brightness and contrast",
    ),
    "texture": ("cue coarse frequencies",),
    "frequency": ("cue coarse frequencies",),
}
SHORTCUTS = ("place", "cue coarse frequencies", *dict.fromkeys(list(CUES.values())[1:]))


@dataclass(frozen=True)
class Made:
    """A network, its data, what there is to find, and what true numbers the report's can be held against."""

    model: nn.Module
    data: Any
    truth: dict[str, float]
    lenses: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    numbers: Callable[[Any], dict[str, tuple[float, float, float, float]]] = lambda report: {}


@dataclass(frozen=True)
class Case:
    what: str
    planted: str
    make: Callable[[], Made]


def rows() -> Iterator[Trial | Rate]:
    trials: list[Trial] = []
    for number, case in enumerate(cases()):
        trial = earlier(SLUG, case.what) or _tried(case, chooses=number % 2 == 0)
        trials.append(trial)
        yield trial
    yield from rates(trials)


def cases() -> list[Case]:
    """All networks, or a dozen of them; neighbours differ in their seed only, so that either half has some of every kind."""
    every = [*_cue_cases(), *_confidence_cases(), *_group_cases()]
    return every[:: max(1, len(every) // 12)][:12] if quick() else every


def _tried(case: Case, chooses: bool) -> Trial:
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        made = case.make()
    with undrawn(), tempfile.TemporaryDirectory() as folder:
        report = audit(made.model, made.data, out=f"{folder}/report", lenses=made.lenses, **made.options)
    found = {finding.key: finding.severity for finding in report.findings if finding.key}
    numbers = {name: list(value) for name, value in made.numbers(report).items()}
    return Trial(
        SLUG, case.what, case.planted, made.truth, found, numbers, chooses, time.perf_counter() - start
    )


def rates(trials: list[Trial]) -> Iterator[Rate]:
    """Of every finding how often it was made where it is true, by strength, and where it is not; of every number how often its interval held."""
    detected: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    false: dict[tuple[str, str], list[tuple[bool, bool]]] = defaultdict(list)
    inside: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for trial in trials:
        for name, strength in trial.truth.items():
            hit = name in trial.found
            if strength >= DECIDES:
                band = "from 0.6" if strength >= 0.6 else "0.3 to 0.6"
                detected[f"“{name}” found: {trial.planted}, strength {band}"].append((trial.chooses, hit))
            elif strength > 0:
                detected[f"“{name}” found: {trial.planted}, strength below 0.3"].append((trial.chooses, hit))
            else:
                severity = "note" if NOTES.get(name) else "warning"
                false[name, severity].append((trial.chooses, hit and trial.found[name] != "good"))
        for name, (_, low, high, true) in trial.numbers.items():
            inside[name].append((trial.chooses, low <= true <= high))
    for what, outcomes in detected.items():
        target = None if "below" in what else DETECTED
        yield from _rate(what, outcomes, target, at_most=False)
    for (name, severity), outcomes in false.items():
        yield from _rate(
            f"“{name}” found where it is not ({severity})",
            outcomes,
            WARNING if severity == "warning" else NOTE,
            at_most=True,
        )
    for severity, ceiling in (("warning", WARNING), ("note", NOTE)):
        alls = [outcome for (_, kind), some in false.items() if kind == severity for outcome in some]
        yield from _rate(f"any {severity} where there is nothing to find", alls, ceiling, at_most=True)
    for name, outcomes in inside.items():
        yield from _rate(f"{name}: the true value lies within the interval", outcomes, INSIDE, at_most=False)


def _rate(
    what: str, outcomes: list[tuple[bool, bool]], target: float | None, *, at_most: bool
) -> Iterator[Rate]:
    reported = [hit for chooses, hit in outcomes if not chooses]
    chosen = [hit for chooses, hit in outcomes if chooses]
    if not reported:
        return
    hits, count = sum(reported), len(reported)
    met = None if target is None else hits / count <= target if at_most else hits / count >= target
    note = f"on the half that chose: {sum(chosen)} of {len(chosen)}" if chosen else ""
    yield Rate(SLUG, what, hits, count, *wilson(hits, count), target, at_most, met, note)


# Findings that are notes; others are warnings.
NOTES = {"class behind": True, "underconfident": True}


class SmallNetwork(nn.Sequential):
    """Two convolutions and a linear head for images of 16 x 16 pixels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def trained(cue: str, seed: int, epochs: int = 20, **options: Any) -> nn.Module:
    data = planted_cues(cue, seed=seed, **options)
    training = Training(SmallNetwork, epochs=epochs, lr=5e-3, select="last")
    return training(data.inputs, data.targets, seed)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1)


def followed(model: nn.Module, cue: str, seed: int, **options: Any) -> float:
    """The share of answers that become the class of a cue which is another class's."""
    shown = planted_cues(cue, "test", agrees=False, seed=seed, **{**options, "prevalence": 1.0})
    carries = shown.groups < 10
    return float((answers(model, shown.inputs) == shown.groups)[carries].double().mean())


def _cue_cases() -> list[Case]:
    plans: list[tuple[str, dict[str, Any]]] = [("none", {})] * 14
    for options in (
        {"size": 4},
        {"size": 5, "corner": (11, 0)},
        {"size": 4, "corner": (6, 6), "prevalence": 0.6},
        {"size": 4, "corner": (0, 12), "strength": 0.6},
        {"size": 3, "corner": (12, 12)},
        {"size": 4, "corner": (0, 0), "one": 3},
        {"size": 4, "corner": (12, 5), "one": 7},
        {"size": 3, "corner": (1, 1), "one": 5},
    ):
        plans += [("mark", options)] * 2
    for options in ({"size": 3}, {"size": 4}, {"size": 5}, {"size": 4, "strength": 0.7}):
        plans += [("moving mark", {**options, "one": one}) for one in (3, 6)]
    for cue in ("tint", "brightness", "texture", "frequency", "place"):
        plans += [(cue, {"strength": strength}) for strength in (1.0, 1.0, 0.4, 0.4)]
        plans += [(cue, {"strength": 1.0, "one": one}) for one in (1, 8)]
    return [_cue_case(cue, number, options) for number, (cue, options) in enumerate(plans)]


def _cue_case(cue: str, seed: int, options: dict[str, Any]) -> Case:
    def make() -> Made:
        model = trained(cue, seed, **options)
        truth = {name: 0.0 for name in SHORTCUTS if name not in CARRIED.get(cue, ())}
        if cue != "none":
            truth[CUES[cue]] = max(followed(model, cue, seed, **options), 1e-6)
        test = planted_cues(cue, "test", seed=seed, **options)
        return Made(model, (test.inputs, test.targets), truth, ("gaze",))

    said = ", ".join(f"{name} {value}" for name, value in options.items())
    one = " of one class" if "one" in options else ""
    return Case(
        f"{cue}{f' ({said})' if said else ''}, seed {seed}",
        f"{cue}{one}" if cue != "none" else "no cue",
        make,
    )


def drawn(count: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn with the probabilities that they stand for."""
    draw = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, classes, generator=draw)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]


def scaled(classes: int, temperature: float) -> nn.Module:
    """A network whose outputs are its inputs, divided by a temperature: with 1 it is as sure as it is right."""
    layer = nn.Linear(classes, classes, bias=False)
    layer.weight.data = torch.eye(classes) / temperature
    return nn.Sequential(layer)


def _confidence_cases() -> list[Case]:
    plans = [
        (temperature, count)
        for temperature in (1.0, 1.0, 1.0, 1.0, 0.3, 0.3, 0.5, 0.5, 2.0, 2.0, 4.0, 4.0)
        for count in (300, 300, 2000, 2000)
    ]
    return [_confidence_case(temperature, count, seed) for seed, (temperature, count) in enumerate(plans)]


def _confidence_case(temperature: float, count: int, seed: int) -> Case:
    def make() -> Made:
        logits, labels = drawn(count, 5, 2.0, 10_000 + seed)
        many, _ = drawn(200_000, 5, 2.0, 1)
        right, sure = (
            float(many.softmax(1).amax(1).mean()),
            float((many / temperature).softmax(1).amax(1).mean()),
        )
        gap = sure - right
        # A gap that is smaller than what the finding speaks of is neither there nor not.
        truth = {
            "overconfident": max(gap, 0.0),
            "underconfident": max(-gap, 0.0),
            "no better than the majority": 0.0,
            "class behind": 0.0,
        }
        truth = {name: (0.0 if size < 1e-3 else 1.0 if size > 0.08 else 0.1) for name, size in truth.items()}

        def numbers(report: Any) -> dict[str, tuple[float, float, float, float]]:
            overall = report["accuracy"].numbers["overall"]
            return {"accuracy": (overall["accuracy"], overall["low"], overall["high"], right)}

        return Made(
            scaled(5, temperature), (logits, labels), truth, ("accuracy",), {"samples": count}, numbers
        )

    return Case(f"temperature {temperature}, {count} samples, seed {seed}", "known temperature", make)


def _group_cases() -> list[Case]:
    plans = [
        (gap, groups, each)
        for gap in (0.0, 0.0, 0.1, 0.25)
        for groups in (2, 8)
        for each in (60, 400)
        for _ in range(2)
    ]
    return [_group_case(gap, groups, each, seed) for seed, (gap, groups, each) in enumerate(plans)]


def _group_case(gap: float, groups: int, each: int, seed: int) -> Case:
    """Groups of which the last is right less often, by a known gap: so many of its labels are replaced by wrong ones."""

    def make() -> Made:
        draw = torch.Generator().manual_seed(20_000 + seed)
        count = groups * each
        labels, group = torch.arange(count) % 5, torch.arange(count) // each
        share = torch.where(group == groups - 1, 0.9 - gap, torch.tensor(0.9))
        wrong = torch.rand(count, generator=draw) >= share
        said = torch.where(wrong, (labels + torch.randint(1, 5, (count,), generator=draw)) % 5, labels)
        logits = torch.randn(count, 5, generator=draw) * 0.1 + 3 * torch.eye(5)[said]

        def numbers(report: Any) -> dict[str, tuple[float, float, float, float]]:
            last = next(g for g in report["accuracy"].numbers["groups"] if g["name"] == f"group {groups - 1}")
            return {"accuracy of a group": (last["accuracy"], last["low"], last["high"], 0.9 - gap)}

        names = [f"group {int(g)}" for g in group]
        # With so few samples a small gap is found sometimes only: its strength is beside what the samples can tell.
        seen = gap / (2 * (0.9 * 0.1 / each) ** 0.5 * 2) if gap else 0.0
        truth = {"groups differ": 0.0 if not gap else 1.0 if seen > 2.5 else 0.1, "class behind": 0.0}
        return Made(
            scaled(5, 1.0),
            (logits, labels),
            truth,
            ("accuracy",),
            {"samples": count, "groups": names},
            numbers,
        )

    return Case(f"gap {gap}, {groups} groups of {each}, seed {seed}", "gap between groups", make)
