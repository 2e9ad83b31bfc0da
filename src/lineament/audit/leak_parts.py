"""What an audit of messages is made of: whose pictures are audited, what the attacker has, in which state the model is, and what all that assumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.load.model_and_data import ModelAndData
from lineament.privacy.identification import Judge
from lineament.privacy.leakage import none_shared, same_as_any
from lineament.privacy.messages import saved_state
from lineament.privacy.search import ATTACKS, ON_PIXELS
from lineament.privacy.statistics import norms

if TYPE_CHECKING:
    from lineament.audit.leak import LeakOptions


def checked(options: LeakOptions, pictures: int, batch_sizes: Sequence[int], defences: Sequence[str]) -> None:
    """Whether the options can be, before anything is read."""
    checks.number("pictures", pictures, low=2, integer=True)
    if not Path(options.prior).is_file():
        checks.one_of("prior", options.prior, PRIORS)
        require(
            options.classifier is None,
            f"classifier: got one beside prior = {options.prior!r}, expected it with a generator in a file only, whose classes it tells",
        )
    checks.one_of("batch_norm", options.batch_norm, ("running", "batch"))
    for attack in options.attacks:
        checks.one_of("attacks", attack, ATTACKS)
        require(
            options.prior != "none" or attack in ON_PIXELS,
            f"attacks: {attack!r} searches a generator, and prior is 'none'; expected one of {', '.join(map(repr, ON_PIXELS))}, or a prior",
        )
    require(len(defences) > 0, "defences: got none, expected at least one")
    if options.minutes is not None:
        checks.number("minutes", options.minutes, low=0, open_low=True)
    if options.update is None:
        require(options.before is None, "before: got weights before an update, expected the update, too")
        for size in batch_sizes:
            checks.number("batch_sizes", size, low=1, integer=True)
            require(
                pictures % size == 0 and pictures > size,
                f"batch_sizes: got {size}, expected a number below pictures = {pictures} that divides it",
            )
        return
    require(
        options.public is not None,
        "public: got none; all data are the pictures behind the update, so that what an attacker knows beside it must be given",
    )
    require(
        len(defences) == 1,
        f"defences: got {len(defences)}, expected the one that was on when the update was made, or none",
    )


PRIORS = ("vae", "dcgan", "stylegan2", "none")


@dataclass(frozen=True)
class Parts:
    """Audited pictures, normalised, and those that the attacker has; with groups, further pictures of the same people."""

    images: Tensor
    targets: Tensor
    public: Tensor
    public_targets: Tensor
    groups: Tensor | None = None
    public_groups: Tensor | None = None
    gallery: tuple[Tensor, Tensor] | None = None

    def judge(self) -> Judge:
        """How guesses are judged."""
        return Judge(groups=self.groups, public_groups=self.public_groups, gallery=self.gallery)


def parts_of(fitted: ModelAndData, public: Samples | None, pictures: int, *, grouped: bool) -> Parts:
    """Who is audited. With groups: one picture of each of so many, whose others are kept from the attacker."""
    whole = torch.arange(len(fitted))
    x, y = fitted.inputs(whole), fitted.targets
    y = y.to(x.device)
    groups = fitted.samples.groups
    if pictures == len(fitted):
        rows = whole
    elif grouped and groups is not None:
        order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(fitted.seed)).tolist()
        counts = torch.bincount(groups)
        first: dict[int, int] = {}
        for row in order:
            if int(counts[groups[row]]) > 1:
                first.setdefault(int(groups[row]), row)
        people = len(counts.nonzero())
        require(
            len(first) >= pictures and (public is not None or people >= 2 * pictures),
            f"groups: {people} in {len(fitted)} samples, of which {len(first)} have two pictures; expected at least {pictures} of two{'' if public is not None else f', and {pictures} more for the attacker'}",
        )
        rows = torch.tensor(sorted(list(first.values())[:pictures]))
    else:
        require(
            public is not None or len(fitted) >= 4 * pictures,
            f"pictures: {pictures} of {len(fitted)} samples leave too few others to know the world from; expected at most {len(fitted) // 4} pictures, or at least {4 * pictures} samples",
        )
        rows = fitted.subset(pictures, salt=11)
    free = ~same_as_any(x, x[rows]).cpu()  # copies of audited pictures would give them away
    gallery, own = None, None
    if grouped and groups is not None:
        own = groups[rows].to(x.device)
        of_them = torch.isin(groups, groups[rows]) & free
        if bool(torch.isin(groups[rows], groups[of_them]).all()):
            shown = free.nonzero()[:, 0] if public is None else of_them.nonzero()[:, 0]
            gallery = x[shown], groups[shown].to(x.device)
        free &= ~of_them
    if public is None:
        require(bool(free.any()), "data: every sample equals one that is audited, so that an attacker knows nothing of the world; expected different samples")  # fmt: skip
        own_public = None if own is None else groups[free].to(x.device)  # pyright: ignore[reportOptionalSubscript]
        return Parts(x[rows], y[rows], x[free], y[free], own, own_public, gallery)
    given: Any = fitted.layout.given(public, fitted.model)
    require(
        isinstance(given, Tensor) and given.shape[1:] == x.shape[1:],
        f"public: its samples go in as {tuple(getattr(given, 'shape', ()))[1:]}, the audited ones as {tuple(x.shape[1:])}; expected data of the same form",
    )
    labels = public.targets.to(x.device)
    require(
        labels.ndim == 1 and not labels.is_floating_point() and int(labels.min()) >= 0 and int(labels.max()) < fitted.outputs.shape[1],
        f"public: its labels go from {labels.min()} to {labels.max()}, expected classes from 0 to {fitted.outputs.shape[1] - 1}",
    )  # fmt: skip
    none_shared(x[rows], given)
    return Parts(x[rows], y[rows], given, labels, own, None, gallery)


@contextmanager
def weights_of(model: nn.Module, before: str | Path) -> Iterator[None]:
    """The model with the weights that an update started from, while the block runs."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(saved_state(model, before, "before"))
    try:
        yield
    finally:
        model.load_state_dict(own)


@contextmanager
def norms_in_training(model: nn.Module, every: bool, moved: Sequence[str] = ()) -> Iterator[None]:
    """Batch norms in training mode while the block runs: every one, or those whose buffers an update moved."""
    found = [module for name, module in norms(model) if (every or name in moved) and not module.training]
    if every and not list(norms(model)):
        raise InputError(
            "batch_norm: got 'batch', but this model has no batch norm with running statistics; expected 'running'"
        )
    for module in found:
        module.train()
    try:
        yield
    finally:
        for module in found:
            module.eval()


def assumptions(options: LeakOptions, buffers: int, numbers: int, unknowns: int) -> list[str]:
    """What the numbers of a report rest on; ``numbers`` are in one message, and ``unknowns`` in the largest batch of pictures."""
    what = (
        "gradients of the mean loss over one batch"
        if options.local is None
        else f"changes of weights after {options.local}"
    )
    if options.update is not None:
        what = f"one saved change of weights, read as made by {options.local or 'one step on all pictures at once'}"
    told = [
        "The attacker knows the model, its weights, how many pictures stand behind a message, and which defence is on; where a defence can be repeated in several ways, each is tried.",
        "Labels are given to the attacker." if options.known_labels else "Labels are read off each message.",
        f"Messages are {what}; batch norms {'use the statistics of the batch' if options.batch_norm == 'batch' or buffers else 'have their running statistics'}.",
        f"Each attack computes as many gradients of a guess (CMA-ES as many rounds); restarts: {options.search.restarts}. A stronger attacker than those tried may see more.",
    ]  # fmt: skip
    if unknowns > numbers:
        told.append(
            f"A message has {numbers:,} numbers and the pictures behind it {unknowns:,}: without knowledge of such pictures it does not determine them."
        )
    if buffers:
        told.insert(
            3,
            f"The buffers of {buffers} batch norm{'s' if buffers > 1 else ''} were sent along: the batch's means and variances follow from them, no defence touches them, and the searches match them.",
        )
    if options.prior != "none":
        told.insert(
            1,
            "The attacker has other pictures of the same kind, none of those audited, and a generator "
            + (
                "trained on them."
                if options.prior in PRIORS
                else f"from {options.prior!r}, whatever that was trained on."
            ),
        )
    if options.groups is not None:
        told.insert(2, "None of the attacker's pictures shows a person (or other group) that is audited.")
    return told
