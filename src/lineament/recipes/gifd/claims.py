"""Claims of the gifd recipe: predicates from the paper and its reviews, written before the first run. Differences are paired over pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineament.privacy.defences import defence_of
from lineament.recipes.gifd.experiments import Trial
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim


def all_claims(trials: dict[str, list[Trial]], config: Any) -> list[Claim]:
    """Predicates: 1 dB and two standard errors; a rank among layers; no more than the mean picture from another's message."""
    claims: list[Claim] = []
    for domain, each in trials.items():
        for text in config.defences:
            name = str(defence_of(text))
            claims.append(_ahead(each, domain, name))
    first, defences = next(iter(trials.values())), [str(defence_of(text)) for text in config.defences]
    if len(defences) > 1:
        claims.append(_ball(first, defences[1:]))
    if {"in", "out"} <= set(trials):
        claims.append(_further(trials, defences[0]))
    claims.append(_layer(first, defences[0]))
    return [*claims, *_controls(first, defences[0])]


def _all(trials: list[Trial], name: str) -> Tensor:
    return torch.cat([t.psnr[name] for t in trials])


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean difference of pairs and its standard error."""
    return float((a - b).mean()), float((a - b).std() / len(a) ** 0.5)


def _ahead(trials: list[Trial], domain: str, defence: str) -> Claim:
    gain, error = _apart(_all(trials, f"{defence} | gifd"), _all(trials, f"{defence} | latent"))
    where = "" if domain == "in" else ", of pictures unlike those of the prior"
    return judged(
        f"Searching features gives at least 1 dB more than the code alone, with as many gradients (defence: {defence}){where}",
        "GIFD is best in and out of distribution, under every defence",
        f"{gain:+.1f} dB (standard error {error:.1f})",
        gain >= 1 and gain > 2 * error,
        "features fit the noise of the message" if "noise" in defence else "the code alone is as good here",
    )


def _ball(trials: list[Trial], defences: list[str]) -> Claim:
    pairs = {d: _apart(_all(trials, f"{d} | gifd"), _all(trials, f"{d} | no ball")) for d in defences}
    return judged(
        "Under a defence the ball around each layer's start helps",
        "its ablation is worse",
        "; ".join(f"{d}: {gain:+.1f} dB (standard error {error:.1f})" for d, (gain, error) in pairs.items()),
        all(gain > 2 * error for gain, error in pairs.values()),
        "not under " + ", ".join(d for d, (gain, error) in pairs.items() if gain <= 2 * error),
    )


def _further(trials: dict[str, list[Trial]], defence: str) -> Claim:
    gains = {
        domain: _all(each, f"{defence} | gifd") - _all(each, f"{defence} | latent")
        for domain, each in trials.items()
    }
    gain = float(gains["out"].mean() - gains["in"].mean())
    error = float((gains["out"].var() / len(gains["out"]) + gains["in"].var() / len(gains["in"])).sqrt())
    return judged(
        "Searching features gains more on pictures unlike those of the prior",
        "feature search is what helps out of distribution",
        f"{gain:+.1f} dB (standard error {error:.1f})",
        gain > 2 * error,
        "the gain is large on both",
    )


def _layer(trials: list[Trial], defence: str) -> Claim:
    stages = torch.stack([t.stages[f"{defence} | gifd"] for t in trials]).mean(0)
    best = int(stages.argmax())
    return judged(
        "Without a defence the best layer is a middle one",
        "the best layer lies in the middle; too many layers lower the quality",
        ", ".join(f"{v:.1f}" for v in stages.tolist()) + " dB by layer",
        0 < best < len(stages) - 1,
        f"layer {best} of 0 to {len(stages) - 1} is best",
    )


def _controls(trials: list[Trial], defence: str) -> list[Claim]:
    name = f"{defence} | gifd"
    wrong = float(torch.cat([t.wrong[name] for t in trials]).mean())
    mean = float(torch.cat([t.without for t in trials]).mean())
    labels = float(torch.stack([t.labels[name].double() for t in trials]).mean())
    ahead, error = _apart(_all(trials, f"{defence} | gifd"), _all(trials, f"{defence} | ig"))
    return [
        judged(
            "Control: the guess from another's message is no nearer than the mean public picture",
            "not compared",
            f"{wrong:.1f} dB against {mean:.1f}",
            wrong <= mean,
            "the prior alone gives this much",
        ),
        judged(
            "Control: labels are read off the messages",
            "assumed",
            f"{100 * labels:.0f} % right",
            labels >= 0.95,
            "some messages were searched with wrong labels",
        ),
        judged(
            "Control: without a defence the prior is worth something: more than a search of pixels with as many gradients",
            "GIFD is ahead of IG",
            f"{ahead:+.1f} dB (standard error {error:.1f})",
            ahead > 2 * error,
            "a message of one small picture has more numbers than the picture, and pixels need no prior",
        ),
    ]
