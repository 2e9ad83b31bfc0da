"""What could a curious server see of one picture in one update?

A client of federated learning sends the gradient of its loss. Eight of the audited samples are sent so, one a message, plain and as deployers defend it
(clipped to a norm of 4, with noise of deviation 0.01), and each message is searched: by GIFD, through a prior trained on the other samples, and pixel by pixel
(Fang et al. 2023, arXiv 2308.04699). Who shares no updates need not ask, and undefended ones of single pictures mostly show them: so the lens is asked for by name.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from lineament.audit.leak_section import SEARCH, bounds_of, prior_of, section_of
from lineament.audit.subject import Subject
from lineament.privacy.defences import defence_of
from lineament.privacy.leakage import LeakageOptions, leakage, same_as_any
from lineament.report.section import Section

TITLE = "What could a curious server see in one update?"
HELP = "of a network trained by many who send updates: what one update shows of a picture"
ORDER = 58
METHOD = "gifd"
ON_REQUEST = True
PICTURES, LARGEST = 8, 64
_DEFENCES, _ATTACKS = ("none", "clip=4,noise=0.01"), ("gifd", "ig")
_PRIOR_STEPS, _PASSES, _WORK, _WEIGHTS = 400, 8, 3e12, 5_000_000
_COMMAND = "lineament leak MODEL DATA --out leaked"


def applies(subject: Subject) -> str:
    if subject.task != "classification" or not subject.images:
        return "It rebuilds pictures from a classifier's gradients, and this is no classifier of images."
    if not any(p.requires_grad for p in subject.model.parameters()):
        return f"No weight of this network can be trained, so that nobody sends updates of it{'; ' + subject.sealed[0].lower() + subject.sealed[1:] if subject.sealed else '.'}"
    if len(subject) < 4 * PICTURES:
        return f"{len(subject)} samples are too few: {PICTURES} are audited, and {3 * PICTURES} others at least are what an attacker knows of the world."
    sides = subject.inputs(torch.tensor([0])).shape[2:]
    if max(sides) > LARGEST:
        return f"Its images have {sides[0]} x {sides[1]} pixels, and the search of more than {LARGEST} x {LARGEST} takes too long for a report; run {_COMMAND} --steps 60."
    weights = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    work = _work(subject, max(sides))
    if work > _WORK or weights > _WEIGHTS:
        what = (
            f"about {work:.1g} operations, where a report has {_WORK:.0g}"
            if work > _WORK
            else f"{PICTURES} gradients of {weights:,} weights at once"
        )
        return f"The search would take {what}; run {_COMMAND} --pictures 4 --attack ig."
    return ""


def look(subject: Subject) -> Section:
    begun = time.monotonic()
    rows = subject.subset(PICTURES, salt=11)
    others = torch.ones(len(subject), dtype=torch.bool)
    others[rows] = False
    x = subject.inputs(torch.arange(len(subject)))
    others &= ~same_as_any(x, x[rows]).cpu()
    y = subject.targets.to(x.device)
    found = leakage(
        subject.model, x[rows], y[rows], public=x[others], held_out=(x[others], y[others]),
        prior=prior_of(x[others], "vae", steps=_PRIOR_STEPS, width=32, seed=subject.seed),
        options=LeakageOptions([defence_of(text) for text in _DEFENCES], _ATTACKS, SEARCH), bounds=bounds_of(subject, x.shape[1]), seed=subject.seed,
    )  # fmt: skip
    section = section_of(found, SEARCH.steps, time.monotonic() - begun)
    return replace(
        section,
        sentence=f"{section.sentence} The attacker knows the network, the defence, and a prior trained on the {int(others.sum()):,} other samples; labels are read off the update.",
    )


def _work(subject: Subject, side: int) -> float:
    """Floating-point operations of all searches: forward passes, and about seven more for the gradient of a gradient."""
    layers = 2
    while side > 4:
        side, layers = -(-side // 2), layers + 1
    return (
        PICTURES * len(_DEFENCES) * len(_ATTACKS) * SEARCH.steps * layers * _PASSES * max(subject.flops, 1.0)
    )
