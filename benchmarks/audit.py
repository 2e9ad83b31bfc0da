"""How often is the audit right? Its findings on networks of known truth.

Each network is made so that what there is to find is known without the audit: by what it was trained on and a measurement in plain PyTorch (does the
answer follow another class's cue?), or by construction (labels drawn from known probabilities, a known gap between groups, units that were
silenced, weights put by hand). One half of the networks of every kind chose the thresholds; the rates are those of the other half.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lineament.audit import audit
from lineament.audit.language_run import audit_language
from lineament.bench import Rate, Trial, decided, earlier, quick
from lineament.core.engines import side_by_side
from lineament.core.statistics.shares import wilson
from lineament.data.planted_cues import planted_cues
from lineament.load.prompts import PromptPair, Prompts
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
        "cue place of the object",
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

    model: nn.Module | tuple[nn.Module, Any]
    data: Any
    truth: dict[str, float]
    lenses: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    numbers: Callable[[Any], dict[str, tuple[float, float, float, float]]] = lambda report: {}
    also: Callable[[Any], dict[str, str]] = lambda report: {}


@dataclass(frozen=True)
class Case:
    what: str
    planted: str
    make: Callable[[], Made]


def rows() -> Iterator[Trial | Rate]:
    trials: list[Trial] = []
    every = [
        (case, number % 2 == 0 and not quick(), earlier(SLUG, case.what))
        for number, case in enumerate(cases())
    ]
    made = side_by_side(_tried, [(case, chooses) for case, chooses, known in every if known is None])
    for *_, known in every:
        trial = known or next(made)
        trials.append(trial)
        yield trial
    yield from rates(trials)


def cases() -> list[Case]:
    """All networks, or a dozen of them; neighbours differ in their seed only, so that either half has some of every kind."""
    every = [
        *_cue_cases(),
        *_confidence_cases(),
        *_group_cases(),
        *_broken_cases(),
        *_unit_cases(),
        *_cluster_cases(),
        *_minimum_cases(),
        *_language_cases(),
    ]
    return every[:: max(1, len(every) // 12)][:12] if quick() else every


def _seed(number: int) -> int:
    """Of the half that chooses small seeds, with which thresholds were tried out; of the other half large ones, which were run once."""
    return number if number % 2 == 0 else number + 1000


def _tried(case: Case, chooses: bool) -> Trial:
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        made = case.make()
    with undrawn(), tempfile.TemporaryDirectory() as folder:
        look = audit_language if isinstance(made.data, Prompts) else audit
        model, data = cast(Any, made.model), cast(Any, made.data)
        report = look(model, data, out=f"{folder}/report", lenses=made.lenses, **made.options)
    found = {finding.key: finding.severity for finding in report.findings if finding.key}
    found |= made.also(report)
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
            if strength > 0:
                band = (
                    "from 0.6"
                    if strength >= 0.6
                    else f"{DECIDES} to 0.6"
                    if strength >= DECIDES
                    else f"below {DECIDES}"
                )
                # How many answers follow a cue is measured, whatever share of the images it was planted in.
                kind = "measured strength" if name in SHORTCUTS else "strength"
                detected[f"“{name}” found: {trial.planted}, {kind} {band}"].append((trial.chooses, hit))
            else:
                severity = "note" if name in NOTES else "warning"
                false[name, severity].append((trial.chooses, hit and trial.found[name] != "good"))
        for name, (_, low, high, true) in trial.numbers.items():
            inside[name].append((trial.chooses, low <= true <= high))
    for what, outcomes in detected.items():
        # Marks are to be found from a share of answers on that they decide, other cues where they decide most.
        marked = any(f"“{CUES[cue]}”" in what for cue in ("mark", "moving mark"))
        asked = "from 0.6" in what or (marked and "to 0.6" in what)
        target = DETECTED if asked and "under 4 %" not in what else None
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
    low, high = wilson(hits, count)
    met = decided(low, high, target, at_most=at_most)
    note = f"on the half that chose: {sum(chosen)} of {len(chosen)}" if chosen else ""
    yield Rate(SLUG, what, hits, count, low, high, target, at_most, met, note)


# Findings that are notes; others are warnings.
NOTES = ("class behind", "underconfident", "units idle", "classes overlap", "no minimum", "decoy head named")


class SmallNetwork(nn.Sequential):
    """Two convolutions and a linear head for images of 16 x 16 pixels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def trained(cue: str, seed: int, *, lr: float = 5e-3, **options: Any) -> Any:
    data = planted_cues(cue, seed=seed, **options)
    training = Training(SmallNetwork, epochs=20, lr=lr, select="last")
    return training(data.inputs, data.targets, seed)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1)


def followed(model: nn.Module, cue: str, seed: int, **options: Any) -> float:
    """The share of answers that become the class of a cue which is another class's."""
    shown = planted_cues(cue, "test", agrees=False, seed=seed, **{**options, "prevalence": 1.0})
    cues = cast(Tensor, shown.groups)
    return float((answers(model, shown.inputs) == cues)[cues < 10].double().mean())


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
    for options in (
        {"size": 4, "strength": 0.85},
        {"size": 5, "strength": 0.8},
        {"size": 5, "strength": 0.85},
    ):
        plans += [("moving mark", {**options, "one": one}) for one in (3, 6)]
    return [_cue_case(cue, _seed(number), options) for number, (cue, options) in enumerate(plans)]


def _cue_case(cue: str, seed: int, options: dict[str, Any]) -> Case:
    def make() -> Made:
        model = trained(cue, seed, **options)
        truth = {name: 0.0 for name in SHORTCUTS if name not in CARRIED.get(cue, ())}
        if cue != "none":
            truth[CUES[cue]] = max(followed(model, cue, seed, **options), 1e-6)
        test = planted_cues(cue, "test", seed=seed, **options)
        return Made(model, (test.inputs, test.targets), {**truth, "preprocessing": 0.0}, ("gaze", "accuracy"))

    names = {"strength": "planted strength"}
    said = ", ".join(f"{names.get(name, name)} {value}" for name, value in options.items())
    one = " of one class" if "one" in options else ""
    one += " under 4 % of the image" if options.get("size") == 3 else ""
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
    return [_confidence_case(*plan, _seed(number)) for number, plan in enumerate(plans)]


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
    return [_group_case(*plan, _seed(number)) for number, plan in enumerate(plans)]


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


def _broken_cases() -> list[Case]:
    """Networks that do not work on these data, and why: each is told by its accuracy on other images, in plain PyTorch."""
    kinds = (
        "untrained",
        "one epoch",
        "noise labels",
        "scaled inputs",
        "inverted inputs",
        "channels in the wrong order",
        "works",
    )
    return [_broken_case(kind, seed) for kind in kinds for seed in (2, 1001)]


def _broken_case(kind: str, seed: int) -> Case:
    def make() -> Made:
        cue = "tint" if kind == "channels in the wrong order" else "none"
        train, test = (planted_cues(cue, split, seed=seed) for split in ("train", "test"))
        targets = train.targets
        if kind == "noise labels":
            targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))]
        training = Training(SmallNetwork, epochs=1 if kind == "one epoch" else 20, lr=5e-3, select="last")
        model = training.fresh(seed).eval() if kind == "untrained" else training(train.inputs, targets, seed)

        def fed(x: Tensor) -> Tensor:
            if kind == "scaled inputs":
                return 255 * x
            if kind == "inverted inputs":
                return 1 - x
            return x.flip(1) if kind == "channels in the wrong order" else x

        # Neither the labels that it learned nor those that it is audited on.
        other = planted_cues(cue, seed=seed + 100)
        right = float((answers(model, fed(other.inputs)) == other.targets).double().mean())
        most = float(other.targets.bincount().max()) / len(other)
        # Whether inputs are known to go in otherwise than in training; other changes than a scale are not what is asked.
        fit = 1.0 if kind == "scaled inputs" else 0.1 if cue == "tint" or kind == "inverted inputs" else 0.0
        poor = 1.0 if right < most + 0.02 else 0.0 if right > most + 0.1 else 0.1
        return Made(
            model,
            (fed(test.inputs), test.targets),
            {"no better than the majority": poor, "preprocessing": fit},
            ("accuracy",),
        )

    return Case(f"{kind}, seed {seed}", f"a network that does not work ({kind})", make)


def _unit_cases() -> list[Case]:
    plans = [
        (dead, copied, seed)
        for dead, copied in ((0, 0), (2, 0), (0, 2), (8, 0), (0, 8), (5, 5))
        for seed in (2, 1001)
    ]
    return [_unit_case(*plan) for plan in [*plans, (0, 0, 4), (0, 0, 1003)]]


def _unit_case(dead: int, copied: int, seed: int) -> Case:
    """Of the second convolution's channels some are silenced, and others are made copies of the first."""

    def make() -> Made:
        model = trained("none", seed, lr=1e-3)
        layer: Any = model[1][0]
        with torch.no_grad():
            for channel in range(1, 1 + dead):
                layer.weight[channel], layer.bias[channel] = 0, -1
            for channel in range(1 + dead, 1 + dead + copied):
                layer.weight[channel], layer.bias[channel] = layer.weight[0], layer.bias[0]
        test = planted_cues("none", "test", seed=seed)
        # Training leaves dead channels of its own: what idles is counted in all places, by hand.
        with torch.no_grad():
            maps = [model[0](test.inputs), model[1](model[0](test.inputs))]
        places = [maps[0].mean((2, 3)), maps[1].mean((2, 3)), maps[1].flatten(1)]
        silent, idle = zip(*(_idle(place.double()) for place in places))
        share = sum(idle) / (8 + 16 + 256)
        truth = {"units idle": 1.0 if share > 0.3 else 0.0 if share < 0.2 else 0.1}

        def numbers(report: Any) -> dict[str, tuple[float, float, float, float]]:
            site = next(s for s in report["spectrum"].numbers["sites"] if s["units"] == 16)
            return {"units that never vary": (site["silent"], site["silent"], site["silent"], silent[1])}

        return Made(model, (test.inputs, test.targets), truth, ("spectrum",), numbers=numbers)

    return Case(f"{dead} of 16 channels silenced, {copied} copied, seed {seed}", "dead or copied units", make)


def _idle(features: Tensor) -> tuple[int, int]:
    """How many units never vary, and how many of these or copies of one before."""
    spread = features.std(0)
    alive = features[:, spread > 1e-6 * spread.max()]
    silent = features.shape[1] - alive.shape[1]
    alike = torch.corrcoef(alive.T).abs() > 0.95
    return silent, silent + int(alike.tril(-1).any(1).sum())


def _cluster_cases() -> list[Case]:
    return [
        _cluster_case(ratio, seed)
        for ratio in (0.02, 0.3, 0.5, 1.2, 3.0)
        for seed in (2, 1001, 4, 1003, 6, 1005, 8, 1007)
    ]


def _cluster_case(ratio: float, seed: int) -> Case:
    """Features around five class means, whose variance within classes is known beside that between them, and so their spectrum."""

    def make() -> Made:
        # Each ratio with noise of its own: rates are of independent networks.
        draw = torch.Generator().manual_seed(30_000 + seed + round(10_000 * ratio))
        classes, width, count = 5, 16, 500
        means, labels = torch.eye(classes, width), torch.arange(count) % classes
        between = 1 - 1 / classes
        own = ratio * between / width
        features = means[labels] + own**0.5 * torch.randn(count, width, generator=draw)
        # The means of five classes, each as frequent, vary by a fifth in four directions.
        share = torch.full((width,), own, dtype=torch.double)
        share[: classes - 1] += 1 / classes
        share /= share.sum()
        rank = float(torch.special.entr(share).sum().exp())
        head = nn.Linear(width, classes, bias=False)
        head.weight.data = 4 * means
        truth = {"classes overlap": 1.0 if ratio > 1 else 0.0}

        def numbers(report: Any) -> dict[str, tuple[float, float, float, float]]:
            last = report["collapse"].numbers["sites"][-1]
            dims = report["spectrum"].numbers["sites"][-1]
            return {
                "variance within classes over that between": _inside(last["nc1_tilde"], last["error"], ratio),
                "effective rank": _inside(dims["effective_rank"], dims["error"], rank),
            }

        lenses = ("collapse", "spectrum")
        return Made(nn.Sequential(head), (features, labels), truth, lenses, numbers=numbers)

    return Case(f"classes of variance ratio {ratio}, seed {seed}", "classes that overlap", make)


def _inside(value: float, error: float, true: float) -> tuple[float, float, float, float]:
    return value, value - error, value + error, true


def _minimum_cases() -> list[Case]:
    kinds = (
        "convex minimum",
        "minimum of ReLU",
        "the same, rescaled",
        "saddle",
        "untrained",
        "scaled inputs",
    )
    more = [_minimum_case("untrained", seed) for seed in (4, 1003, 6, 1005, 8, 1007, 10, 1009)]
    return [*(_minimum_case(kind, seed) for kind in kinds for seed in (2, 1001)), *more]


def _minimum_case(kind: str, seed: int) -> Case:
    """Small networks whose whole Hessian is at hand: trained to the end with noisy labels, at a saddle, or not trained."""

    def make() -> Made:
        draw = torch.Generator().manual_seed(40_000 + seed)

        def samples(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, 6, generator=draw)
            return x, (2 * x[:, :3] + 1.5 * torch.randn(count, 3, generator=draw)).argmax(1)

        x, labels = samples(400)
        torch.manual_seed(seed)
        model = (
            nn.Sequential(nn.Linear(6, 3))
            if kind == "convex minimum"
            else nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        )
        if kind == "saddle":
            last = nn.Linear(4, 3)
            model = nn.Sequential(nn.Linear(6, 4), last)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
                last.bias.copy_((labels.bincount() / 400).log())
        elif kind != "untrained":
            _settle(model, x, labels)
        if kind == "the same, rescaled":
            with torch.no_grad():
                for parameter, factor in zip(model.parameters(), (4, 4, 0.25, 1)):
                    parameter.mul_(factor)
        if kind == "scaled inputs":
            x = 3 * x
        values = torch.linalg.eigvalsh(_hessian(model, x, labels))
        # What training would still gain; a gradient's size would change with the weights' scale, of which the function knows nothing.
        further = copy.deepcopy(model)
        _settle(further, x, labels)
        steep = _loss(model, x, labels) - _loss(further, x, labels) > 1e-2
        downwards = float(values[0]) < -0.1 * float(values[-1])
        truth = {"no minimum": 1.0 if steep or downwards else 0.0}

        def numbers(report: Any) -> dict[str, tuple[float, float, float, float]]:
            found = report["landscape"].numbers
            top, errors = found["top"], found["errors"]
            if kind != "untrained":
                return {"largest curvature": _inside(top, errors["top"], float(values[-1]))}
            # Weights that know none of the samples have the curvature of all such samples, too.
            many = torch.linalg.eigvalsh(_hessian(model, *samples(20_000)))
            return {
                "largest curvature of all such samples": _inside(top, errors["top"], float(many[-1])),
                "trace of the Hessian of all such samples": _inside(
                    found["trace"], errors["trace"], float(many.sum())
                ),
            }

        return Made(model, (x, labels), truth, ("landscape",), numbers=numbers)

    return Case(
        f"{kind}, {'6-3' if kind == 'convex minimum' else '6-4-3'}, seed {seed}", f"no minimum ({kind})", make
    )


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), labels))


def _settle(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Train until the gradient is gone."""
    model.double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-7
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.double()), labels)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    model.float().zero_grad()


def _hessian(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).double()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x.double(),)), labels)

    return torch.func.hessian(loss)(flat)


WORDS = tuple(f"w{number}" for number in range(12))
_LENGTH, _KEY = 7, 2


def _language_cases() -> list[Case]:
    try:
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return []
    plans = [
        (kind, layer, head, seed)
        for kind in ("copy", "induction")
        for seed, (layer, head) in enumerate(((0, 1), (1, 3), (1, 0), (0, 2)))
    ]
    return [_language_case(*plan) for plan in plans]


def _language_case(kind: str, layer: int, head: int, seed: int) -> Case:
    layer = 1 if kind == "induction" else layer

    def make() -> Made:
        decoy = (head + 1) % 4
        model = written_by_hand(kind, layer, head, decoy)
        prompts = _pairs(kind, seed)

        def also(report: Any) -> dict[str, str]:
            top = report["components"].numbers["top_head"]
            named = (top["layer"], top["head"])
            found = {"known head named": "good"} if named == (layer, head) else {}
            if named == (layer, decoy):
                found["decoy head named"] = "note"
            said = report["tokens"].numbers["prompts"]
            first = [max(range(len(a["scores"])), key=lambda k, a=a: a["scores"][k]) for a in said]
            if sum(k == _KEY for k in first) >= 0.9 * len(first):
                found["known key word named"] = "good"
            return found

        truth = {
            "known head named": 1.0,
            "decoy head named": 0.0,
            "no behaviour": 0.0,
            "attribution fails": 0.0,
        }
        if kind == "copy":
            truth["known key word named"] = 1.0
        return Made((model, tokenizer()), prompts, truth, ("tokens", "components"), also=also)

    return Case(
        f"{kind} by head {head} of layer {layer}, seed {seed}",
        f"a language model that answers by {kind}",
        make,
    )


def _pairs(kind: str, seed: int) -> Prompts:
    """Six words and a seventh; the third word is the answer: by its place, or, for induction, since the word before it comes again at the end."""
    draw = torch.Generator().manual_seed(50_000 + seed)
    pairs = []
    for _ in range(12):
        answer, wrong = torch.randperm(5, generator=draw)[:2].tolist()
        words = (5 + torch.randperm(7, generator=draw)[:_LENGTH]).tolist()
        if kind == "induction":
            words[-1] = words[_KEY - 1]
        clean, corrupt = ([*words[:_KEY], name, *words[_KEY + 1 :]] for name in (answer, wrong))
        texts = [" ".join(WORDS[word] for word in each) for each in (clean, corrupt)]
        pairs.append(PromptPair(texts[0], texts[1], f" {WORDS[answer]}", f" {WORDS[wrong]}"))
    return Prompts(tuple(pair.clean for pair in pairs), tuple(pairs), "made by hand", len(pairs))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*WORDS, "<unk>"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")


def written_by_hand(kind: str, layer: int, head: int, decoy: int) -> nn.Module:
    """A GPT-2 of two layers and four heads whose weights are put so that one head answers.

    A residual stream of 64 holds the word (12 directions and one), the position (24), the word before (13) and a rest that nothing reads. ``copy``: the head attends to
    the third position and writes its word. ``induction``: the first layer's head 0 writes the word before; the known head attends to where that
    is the present word, and writes the word that it finds there. The decoy attends as the known head does, and writes into the rest.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    count, width, each, sharp = 13, 64, 16, 6.0
    config = GPT2Config(
        vocab_size=count, n_positions=24, n_embd=width, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=12, eos_token_id=12
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    place, before, rest = count, count + 24, 2 * count + 24
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, :count] = torch.eye(count)
        model.transformer.wpe.weight[:, place : place + 24] = torch.eye(24)

        def put(layer: int, head: int, target: int, *, fixed: bool, previous: bool = False) -> None:
            attention = model.transformer.h[layer].attn
            query, key, value = (
                slice(part * width + head * each, part * width + (head + 1) * each) for part in range(3)
            )
            if previous:
                # Position p asks for position p - 1.
                for p in range(1, 8):
                    attention.c_attn.weight[place + p, query.start + p] = sharp
                    attention.c_attn.weight[place + p - 1, key.start + p] = 1
            elif fixed:
                attention.c_attn.bias[query.start] = 4 * sharp
                attention.c_attn.weight[place + _KEY, key.start] = 1
            else:
                for word in range(count):
                    attention.c_attn.weight[word, query.start + word] = sharp
                    attention.c_attn.weight[before + word, key.start + word] = 1
            for word in range(count):
                attention.c_attn.weight[word, value.start + word] = 1
                attention.c_proj.weight[head * each + word, target + word] = 1

        if kind == "induction":
            put(0, 0, before, fixed=False, previous=True)
        put(layer, head, 0, fixed=kind == "copy")
        put(layer, decoy, rest, fixed=kind == "copy")
    return model
