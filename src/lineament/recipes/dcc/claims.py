"""Claims of the dcc recipe: predicates from the paper and its reviews, written before the first run. Differences are paired over seeds."""

from __future__ import annotations

from lineament.recipes.dcc.experiments import Trial
from lineament.recipes.kit.claims import Paired, judged
from lineament.report.outcome import Claim


def all_claims(trials: dict[str, list[Trial]]) -> list[Claim]:
    """Predicates: two points of accuracy, and as many as two standard errors where a control says that there is no gain."""
    shared = trials["shared"]
    where = {
        "shared": "under a nuisance that all classes share",
        "faces": "on faces, whose classes differ little",
    }
    claims = [
        _gain(trials[setting], name, told)
        for setting, told in where.items()
        if setting in trials
        for name in ("summed", "summed after warm-up")
    ]
    if "cifar10" in trials:
        claims.append(_ahead(trials["cifar10"]))
    claims += [_below_random(shared), _own_start(shared), _velocity(shared)]
    controls = {
        "none": "Control: without a nuisance summing gains less than 2 points",
        "independent": "Control: with a nuisance that classes do not share summing gains less than 2 points",
    }
    claims += [_no_gain(trials[name], told) for name, told in controls.items() if name in trials]
    if "shuffled" in trials:
        claims.append(_shuffled(trials["shuffled"]))
    claims += [_beats(shared, name) for name in ("herding", "k_means", "class means")]
    return claims


def _each(trials: list[Trial], name: str) -> list[float]:
    return [float(t.accuracy[name].mean()) for t in trials]


def _apart(trials: list[Trial], ours: str, theirs: str) -> Paired:
    return Paired.of(_each(trials, ours), _each(trials, theirs))


def _gain(trials: list[Trial], name: str, told: str) -> Claim:
    gain = _apart(trials, name, "class by class")
    return judged(
        f"Matching {name} gives at least 2 points more than class by class {told}",
        "DCC is ahead of DC on fine-grained sets",
        str(gain),
        gain.mean >= 0.02 and gain.mean > 2 * gain.error,
        "the gain is smaller than that, or than twice its standard error",
    )


def _ahead(trials: list[Trial]) -> Claim:
    gain = _apart(trials, "summed", "class by class")
    return judged(
        "Matching summed is ahead of class by class on CIFAR-10, one picture a class",
        "32.9 against 28.3 %",
        str(gain),
        gain.above,
        "not by twice its standard error",
    )


def _below_random(trials: list[Trial]) -> Claim:
    gain = _apart(trials, "class by class", "random real")
    return judged(
        "Class by class is below random real pictures where the nuisance rules",
        "class-wise matching can be worse than random selection",
        str(gain),
        gain.mean < 0 and -gain.mean > 2 * gain.error,
        "here it is not worse",
    )


def _own_start(trials: list[Trial]) -> Claim:
    pairs = list(zip(_each(trials, "summed"), _each(trials, "own start")))
    ahead = sum(a > b for a, b in pairs)
    return judged(
        "The summed set beats its own start in every seed",
        "not compared",
        f"{ahead} of {len(pairs)} seeds",
        ahead == len(pairs),
        "in some seeds the learning did not help",
    )


def _velocity(trials: list[Trial]) -> Claim:
    first = [float(t.velocity[:5].mean()) for t in trials]
    last = [float(t.velocity[-5:].mean()) for t in trials]
    return judged(
        "The kernel moves more slowly at the end of a training than at its beginning",
        "early training moves the kernel fast and erratically",
        f"{sum(first) / len(first):.2e} an epoch in the first five, {sum(last) / len(last):.2e} in the last five",
        all(a > b for a, b in zip(first, last)),
        "it has not slowed down within 20 epochs",
    )


def _no_gain(trials: list[Trial], told: str) -> Claim:
    gain = _apart(trials, "summed", "class by class")
    return judged(
        told,
        "the theory needs information that classes share",
        str(gain),
        gain.mean < 0.02,
        "it gains all the same",
    )


def _shuffled(trials: list[Trial]) -> Claim:
    best = max(
        sum(_each(trials, name)) / len(trials)
        for name in ("class by class", "summed", "summed after warm-up")
    )
    return judged(
        "Control: with shuffled labels no set teaches more than chance and five points",
        "not compared",
        f"{100 * best:.1f} % at best",
        best < 0.15,
        "there is more in the set than labels",
    )


def _beats(trials: list[Trial], name: str) -> Claim:
    gain = _apart(trials, "summed", name)
    what = {"herding": "herding", "k_means": "k-means", "class means": "the class means"}[name]
    return judged(
        f"Control: the summed set is ahead of {what}",
        "ahead of coresets",
        str(gain),
        gain.mean > 0 and gain.mean > 2 * gain.error,
        "not by twice its standard error",
    )
