"""Claims of the gifd recipe: predicates from the paper and its reviews, written before the first run. Differences are paired over pictures."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from lineament.privacy.defences import defence_of
from lineament.recipes.gifd.experiments import Trial, attacks_of, pooled
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

_OWN = ("gifd", "no ball", "latent")
FAR = {"out": "on pictures unlike those of the prior", "bangla": "on Bangla digits"}


def all_claims(trials: dict[str, list[Trial]], further: list[Trial], config: Any) -> list[Claim]:
    """Predicates: 1 dB and two standard errors; a rank among layers; no more than the mean picture from another's message."""
    defences = [str(defence_of(text)) for text in config.defences]
    claims: list[Claim] = []
    for domain, each in trials.items():
        claims += [_ahead(each, name, f", {FAR[domain]}" if domain in FAR else "") for name in defences]  # fmt: skip
    claims += [_ahead(further, f"batches of {batch}", "") for batch in config.batches]
    rivals = [a for a in attacks_of(config) if a not in _OWN]
    if rivals:
        for domain, each in trials.items():
            claims += [_first(each, name, rivals, domain) for name in defences]
    first = next(iter(trials.values()))
    if len(defences) > 1:
        claims.append(_ball(first, defences[1:]))
    claims += [
        _further(trials, domain, defences[0]) for domain in trials if domain != "in" and "in" in trials
    ]
    claims.append(_layer(first, defences[0]))
    claims += [_too_deep(first, name) for name in defences if name == defences[0] or name.startswith("noise")]
    return [*claims, *_controls(first, further, defences[0], config)]


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean difference of pairs and its standard error."""
    return float((a - b).mean()), float((a - b).std() / len(a) ** 0.5)


def _told(gain: float, error: float) -> str:
    return f"{gain:+.1f} dB (standard error {error:.1f})"


def _ahead(trials: list[Trial], message: str, where: str) -> Claim:
    gain, error = _apart(pooled(trials, f"{message} | gifd"), pooled(trials, f"{message} | latent"))
    what = message if message.startswith("batches") else f"defence: {message}"
    return judged(
        f"Searching features gives at least 1 dB more than the code alone, with as many passes ({what}){where}",
        "GIFD is best in and out of distribution, under every defence, and at larger batches",
        _told(gain, error),
        gain >= 1 and gain > 2 * error,
        "features fit the noise of the message" if "noise" in message else "the code alone is as good here",
    )


def _first(trials: list[Trial], defence: str, rivals: list[str], domain: str) -> Claim:
    best = max(rivals, key=lambda a: float(pooled(trials, f"{defence} | {a}").mean()))
    gain, error = _apart(pooled(trials, f"{defence} | gifd"), pooled(trials, f"{defence} | {best}"))
    return judged(
        f"GIFD is ahead of every rival at its best step size (defence: {defence}){f', {FAR[domain]}' if domain in FAR else ''}",
        "ahead of IG, GI, GGL and GIAS",
        f"{_told(gain, error)} against the strongest, {best}",
        gain > 2 * error,
        f"{best} is as near or nearer",
    )


def _ball(trials: list[Trial], defences: list[str]) -> Claim:
    pairs = {d: _apart(pooled(trials, f"{d} | gifd"), pooled(trials, f"{d} | no ball")) for d in defences}
    return judged(
        "Under a defence the ball around each layer's start helps",
        "its ablation is worse",
        "; ".join(f"{d}: {_told(gain, error)}" for d, (gain, error) in pairs.items()),
        all(gain > 2 * error for gain, error in pairs.values()),
        "not under " + ", ".join(d for d, (gain, error) in pairs.items() if gain <= 2 * error),
    )


def _further(trials: dict[str, list[Trial]], domain: str, defence: str) -> Claim:
    gains = {d: pooled(trials[d], f"{defence} | gifd") - pooled(trials[d], f"{defence} | latent") for d in ("in", domain)}  # fmt: skip
    gain = float(gains[domain].mean() - gains["in"].mean())
    error = float(sum(g.var() / len(g) for g in gains.values())) ** 0.5
    return judged(
        f"Searching features gains more {FAR[domain]} than on pictures like those of the prior",
        "feature search is what helps out of distribution",
        _told(gain, error),
        gain > 2 * error,
        "it does not gain more there",
    )


def _stages(trials: list[Trial], defence: str) -> Tensor:
    return torch.stack([t.stages[f"{defence} | gifd"] for t in trials]).mean(0)


def _by_layer(stages: Tensor) -> str:
    return ", ".join(f"{v:.1f}" for v in stages.tolist()) + " dB by layer"


def _layer(trials: list[Trial], defence: str) -> Claim:
    stages = _stages(trials, defence)
    best = int(stages.argmax())
    return judged(
        "Without a defence the best layer is a middle one",
        "the best layer lies in the middle; too many layers lower the quality",
        _by_layer(stages),
        0 < best < len(stages) - 1,
        f"layer {best} of 0 to {len(stages) - 1} is best",
    )


def _too_deep(trials: list[Trial], defence: str) -> Claim:
    depths = torch.cat([t.depths[f"{defence} | gifd"] for t in trials])
    best = int(depths.mean(0).argmax())
    loss, error = _apart(depths[:, best], depths[:, -1])
    return judged(
        f"Searching too many layers lowers the quality of what is returned (defence: {defence})",
        "quality drops for too large K",
        f"{_by_layer(depths.mean(0))}, the last one's returned; {_told(-loss, error)} from the best to the last",
        best < depths.shape[1] - 1 and loss > 2 * error,
        "more layers serve as well or better",
    )


def _strangers(trials: list[Trial], name: str, count: int) -> list[Claim]:
    """Of faces: whether guesses from another's message show the person."""
    told = [t.people[name] for t in trials if name in t.people]
    if not told:
        return []
    own, other, chance = torch.stack(told).mean(0).tolist()
    return [
        judged(
            "Control: nobody is recognised in another person's message",
            "not compared",
            f"{100 * other:.0f} % of {count} guesses from the next person's message are nearest to another photograph of the one asked for, by chance {100 * chance:.0f} %, by the own message {100 * own:.0f} %",
            float(binomtest(round(other * count), count, chance, "greater").pvalue) >= 0.01,
            "the prior or the label alone tells people apart",
        )
    ]


def _controls(trials: list[Trial], further: list[Trial], defence: str, config: Any) -> list[Claim]:
    name = f"{defence} | gifd"
    wrong = float(torch.cat([t.wrong[name] for t in trials]).mean())
    mean = float(torch.cat([t.without for t in trials]).mean())
    labels = float(torch.stack([t.labels[name].double() for t in trials]).mean())
    count = len(trials) * config.pictures
    hits = round(sum(float(t.wrong_named[name]) for t in trials) * config.pictures)
    claims = [
        judged(
            "Control: the guess from another's message is no nearer than the mean public picture",
            "not compared",
            f"{wrong:.1f} dB against {mean:.1f}",
            wrong <= mean,
            "the prior alone gives this much",
        ),
        judged(
            "Control: another's message identifies nobody",
            "not compared",
            f"{hits} of {count} guesses are nearest to the wrong message's picture, by chance {count / config.pictures:.0f}",
            float(binomtest(hits, count, 1 / config.pictures, "greater").pvalue) >= 0.01,
            "the prior or the label alone tells pictures apart",
        ),
        *_strangers(trials, name, count),
        judged(
            "Control: labels are read off the messages",
            "assumed",
            f"{100 * labels:.0f} % right",
            labels >= 0.95,
            "some messages were searched with wrong labels",
        ),
    ]
    for batch in config.batches:
        read, given = f"batches of {batch} | gifd", f"batches of {batch}, labels given | gifd"
        loss, error = _apart(pooled(further, given), pooled(further, read))
        right = float(torch.stack([t.labels[read].double() for t in further]).mean())
        claims.append(
            judged(
                f"Control: in batches of {batch}, labels that are read off serve as well as given ones",
                "labels are inferred",
                f"given ones have {_told(loss, error)}; {100 * right:.0f} % were right",
                loss <= max(2 * error, 0.5),
                "labels that were read wrongly mislead the search",
            )
        )
    gain, error = _apart(pooled(further, "prior knows the audited | latent"), pooled(trials, f"{defence} | latent"))  # fmt: skip
    claims.append(
        judged(
            "Control: a prior that has seen the audited pictures is the upper end of what its code gives",
            "not compared",
            _told(gain, error),
            gain > 2 * error,
            "the code holds no more of pictures that it was trained on",
        )
    )
    return claims
