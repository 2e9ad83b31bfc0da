"""What does a dictionary keep of an activation, and what does the model lose when it runs on the reconstruction?

The metrics are in :mod:`lineament.dictionaries.metrics`; here the model runs on the reconstruction, and on what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.core.checks import one_of, require, show
from lineament.core.models import frozen
from lineament.core.results import Readable, axes, plain
from lineament.core.sites.activations import capture
from lineament.core.sites.hooks import replace
from lineament.core.sites.naming import Site
from lineament.core.sites.resuming import FromSite
from lineament.dictionaries.harvest import TOKENS_AT_ONCE, seeded
from lineament.dictionaries.metrics import (
    CleanRun,
    ErrorMeter,
    UsageMeter,
    atom_overlap,
    loss_recovered,
    standard_error,
    token_losses,
)
from lineament.dictionaries.sequences import Batch, Gradient, Sequences, checked_gradient, objective
from lineament.dictionaries.splice import features_back, features_last, site_in


@dataclass(frozen=True, repr=False)
class Evaluation(Readable):
    """What :func:`evaluate` found; all means over tokens (images: over positions of the site, and over images for what concerns outputs).

    Attributes:
        mode: ``"activation"`` or ``"gradient"``, how latents were selected; ``gradient`` says whose gradient.
        tokens, sequences: over how many.
        fvu, nmse, mse, cosine, shrinkage: see :func:`error_metrics`. l0, dead, dense, density: see :func:`usage`, over these tokens.
        ce, ce_substituted, ce_mean, ce_zero: cross-entropy of the model, with the reconstruction, with the site at its mean and at zero.
        recovered_mean, recovered_zero: the loss recovered against either ablation.
        kl: KL(model || with the reconstruction). kl_random: the same with a random error of each row's norm.
        agreement: how often the best class stays. accuracy, accuracy_substituted: how often it is right.
        nearest_atom: the mean over live features of the largest cosine with another (high where features split).
        suppressing: the share of live features whose encoder points away from an atom that theirs resembles (cosine above 0.3), a sign of absorption.
        errors: standard errors over sequences of ``ce``, ``ce_substituted``, ``kl``, ``kl_random``, ``recovered_mean``, ``recovered_zero``.
    """

    mode: str
    gradient: str | None
    tokens: int
    sequences: int
    fvu: float
    nmse: float
    mse: float
    cosine: float
    shrinkage: float
    l0: float
    dead: float
    dense: float
    density: Tensor
    ce: float
    ce_substituted: float
    ce_mean: float
    ce_zero: float
    recovered_mean: float
    recovered_zero: float
    kl: float
    kl_random: float
    agreement: float
    accuracy: float
    accuracy_substituted: float
    nearest_atom: float
    suppressing: float
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return plain(self)

    def plot(self, ax: Any = None) -> Any:
        """How often features are on: a histogram of log10 density."""
        ax = axes(ax, figsize=(5, 3.2), layout="constrained")
        alive = self.density[self.density > 0]
        ax.hist(alive.log10().tolist(), bins=40)
        ax.set(xlabel="log10 of how often a feature is on", ylabel="features")
        ax.set_title(
            f"{self.dead:.1%} of {len(self.density):,} never in {self.tokens:,} tokens", fontsize="medium"
        )
        return ax


def evaluate(
    model: nn.Module,
    dictionary: Any,
    data: Any,
    *,
    mode: str,
    site: str | None = None,
    gradient: Gradient = "sampled",
    exclude: Any = "special",
    tokens: int | None = None,
    seed: int = 0,
) -> Any:
    """What a dictionary keeps of a site, and what the model loses when it runs on the reconstruction; the layers below the site run once.

    Args:
        dictionary: any, or a list of several for the same site, which share the model's own runs.
        data: as for :func:`lineament.dictionaries.harvest`.
        mode: ``"activation"``: codes of x alone. ``"gradient"``: TopK kinds select with the loss's gradient too, as they were trained; that selection
            sees the label where ``gradient="labels"``, so that cross-entropies are then flattering.
        site: by default ``dictionary.site``.
        gradient: for ``mode="gradient"``; the default leaks no label.
        exclude: tokens that keep their activation and count nowhere.
        tokens: about how many to use; ``None``: all.

    Returns:
        An :class:`Evaluation`, or a list.

    Raises:
        InputError: another width than the site's, a kind without gradient mode, no finite output.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = evaluate(net, Neurons(8), (torch.randn(64, 4), torch.zeros(64).long()), mode="activation", site="1")
    >>> round(found.recovered_mean, 6), round(found.kl, 6), found.tokens
    (1.0, 0.0, 64)
    """
    one_of("mode", mode, ("activation", "gradient"))
    checked_gradient(gradient)
    several = isinstance(dictionary, (list, tuple))
    members = list(dictionary) if several else [dictionary]
    require(len(members) > 0, "dictionary: got none, expected at least one")
    place = site_in(model, members[0], site)
    for each in members:
        require(
            mode == "activation" or hasattr(each, "selection"),
            f"mode: {type(each).__name__} does not select by gradient; expected mode='activation', or a TopK kind",
        )
    sequences = Sequences(model, data, exclude=exclude)
    run = _Evaluation(model, members, place, sequences, mode, gradient, seed)
    with frozen(model):
        run.over(tokens)
    found = [run.result(i) for i in range(len(members))]
    return found if several else found[0]


class _Evaluation:
    """The runs that :func:`evaluate` makes, and the sums."""

    def __init__(
        self,
        model: nn.Module,
        members: list[Any],
        site: Site,
        sequences: Sequences,
        mode: str,
        gradient: Any,
        seed: int,
    ):
        self.model, self.members, self.site, self.sequences = model, members, site, sequences
        self.mode, self.gradient, self.seed = mode, gradient, seed
        self.errors = [ErrorMeter() for _ in members]
        self.usages = [UsageMeter() for _ in members]
        # Of each sequence: the number of tokens with an output and with a label, and sums over them, by name.
        self.sums: dict[str, list[Tensor]] = {}
        self.rows = self.count = 0
        self.mean: Tensor | None = None

    def over(self, tokens: int | None) -> None:
        first = self._value(next(iter(self.sequences.walk(1)))) if self.sequences.indexed else None
        size = 1 if first is None else max(1, first.shape[:-1].numel())
        for batch in progress(self.sequences.walk(max(1, TOKENS_AT_ONCE // size)), "evaluating"):
            self._batch(batch)
            if tokens is not None and self.rows >= tokens:
                break
        require(self.rows > 0, "data: no token counts; expected some besides special ones and padding")

    def _value(self, batch: Batch) -> Tensor:
        with torch.no_grad(), capture(self.model, self.site.name, stop_early=True) as acts:
            batch.call(self.model)
        return features_last(acts[self.site.name], self.site)

    def _batch(self, batch: Batch) -> None:
        seen: list[Tensor] = []

        def call(batch: Batch) -> Any:
            with capture(self.model, self.site.name) as acts:
                output = batch.call(self.model)
            seen.append(acts[self.site.name])
            return output

        start = FromSite(self.model, self.site, batch, call)
        clean = batch.logits(start.output)
        x = features_last(seen[0], self.site)
        require(
            x.is_floating_point(),
            f"site {self.site.name!r}: {show(x)} passes there, expected floating-point numbers",
        )
        keep = (
            batch.mask
            if batch.mask is not None and batch.mask.shape == x.shape[:-1]
            else torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        )
        if self.mean is None:
            # Of the first tokens: an ablation needs no better one.
            self.mean = x[keep].double().mean(0).to(x.dtype)
        g = self._slope(start, batch) if self.mode == "gradient" else None
        rows = x[keep]
        self.rows += len(rows)
        self.count += len(batch)
        scored = (
            batch.mask
            if batch.mask is not None and batch.mask.shape == clean.shape[:-1]
            else torch.ones(clean.shape[:-1], dtype=torch.bool, device=clean.device)
        )

        def run(values: Tensor) -> Tensor:
            new = x.clone()
            new[keep] = values.to(x.dtype)
            put = {self.site: lambda value: features_back(new, value, self.site)}
            with torch.no_grad(), start.replayed(1), replace(self.model, put):
                return batch.logits(batch.call(self.model))

        clean = CleanRun(clean.reshape(-1, clean.shape[-1]))
        self._add(self._compared("", clean, None, batch, scored))
        for name, value in (("mean", self.mean.expand_as(rows)), ("zero", torch.zeros_like(rows))):
            self._add(self._compared(name, clean, run(value), batch, scored, only="ce"))
        for i, member in enumerate(self.members):
            with torch.no_grad():
                codes = member.codes(rows) if g is None else member.codes(rows, gradient=g[keep])
                again = member.decode(codes).to(rows.dtype)
            self.errors[i].update(rows, again)
            self.usages[i].update(codes)
            self._add(self._compared(f"{i}", clean, run(again), batch, scored))
            off = again - rows
            drawn = torch.randn(off.shape, generator=seeded(self.seed, self.rows)).to(off)
            drawn *= (off.norm(dim=1) / drawn.norm(dim=1))[:, None]
            self._add(self._compared(f"{i} random", clean, run(rows + drawn), batch, scored, only="kl"))

    def _slope(self, start: FromSite, batch: Batch) -> Tensor:
        name = self.site.name
        with start.replayed(1), capture(self.model, name, gradients=True) as acts:
            output = batch.call(self.model)
        found = acts.gradients(objective(self.gradient, output, batch, self.seed))[name]
        return features_last(found, self.site)

    def _compared(
        self, name: str, clean: CleanRun, other: Tensor | None, batch: Batch, scored: Tensor, only: str = ""
    ) -> dict[str, Tensor]:
        """Of each sequence the sums over its tokens that count, by name."""
        labels = batch.labels
        if labels is not None and labels.shape != scored.shape:
            labels = None
        flat = None if labels is None else labels.reshape(-1).long()
        told = None if other is None else other.reshape(len(clean.best), -1)
        found = token_losses(clean, flat, told, only=only)
        sums = {}
        for what, values in found.items():
            kept = (
                values.double()
                .reshape(scored.shape)
                .masked_fill(~scored, float("nan"))
                .reshape(len(batch), -1)
            )
            sums[f"{what} {name}".strip()] = kept.nansum(1).cpu()
        if other is None:
            labelled = scored if labels is None else scored & (labels >= 0)
            sums["outputs"] = scored.reshape(len(batch), -1).sum(1).double().cpu()
            sums["labelled"] = (
                (labelled if labels is not None else torch.zeros_like(scored))
                .reshape(len(batch), -1)
                .sum(1)
                .double()
                .cpu()
            )
        return sums

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, values in sums.items():
            self.sums.setdefault(name, []).append(values)

    def result(self, i: int) -> Evaluation:
        sums = {name: torch.cat(parts) for name, parts in self.sums.items()}
        nothing = torch.zeros_like(sums["outputs"])

        def mean(name: str, over: str) -> float:
            total = float(sums[over].sum())
            return float(sums.get(name, nothing).sum()) / total if total and name in sums else float("nan")

        def error(name: str, over: str) -> float:
            centre = mean(name, over)
            rest = sums.get(name, nothing) - centre * sums[over]
            return standard_error(rest, float(sums[over].mean()))

        ce, other = mean("ce", "labelled"), mean(f"ce {i}", "labelled")
        ablated = {kind: mean(f"ce {kind}", "labelled") for kind in ("mean", "zero")}
        recovered = {kind: loss_recovered(ce, other, value) for kind, value in ablated.items()}
        errors = {
            "ce": error("ce", "labelled"),
            "ce_substituted": error(f"ce {i}", "labelled"),
            "kl": error(f"kl {i}", "outputs"),
            "kl_random": error(f"kl {i} random", "outputs"),
        }
        if "ce" in sums:
            for kind, share in recovered.items():
                gap = sums[f"ce {kind}"] - sums["ce"]
                rest = sums[f"ce {kind}"] - sums[f"ce {i}"] - share * gap
                errors[f"recovered_{kind}"] = standard_error(rest, float(gap.mean()))
        used = self.usages[i].compute()
        rows = used.pop("rows")
        alike, suppressing = atom_overlap(self.members[i], used["density"] > 0)
        return Evaluation(
            mode=self.mode,
            gradient=None
            if self.mode == "activation"
            else self.gradient
            if isinstance(self.gradient, str)
            else "function",
            tokens=rows,
            sequences=self.count,
            **self.errors[i].compute(),
            **used,
            ce=ce,
            ce_substituted=other,
            ce_mean=ablated["mean"],
            ce_zero=ablated["zero"],
            recovered_mean=recovered["mean"],
            recovered_zero=recovered["zero"],
            kl=mean(f"kl {i}", "outputs"),
            kl_random=mean(f"kl {i} random", "outputs"),
            agreement=mean(f"agree {i}", "outputs"),
            accuracy=mean("right", "labelled"),
            accuracy_substituted=mean(f"right {i}", "labelled"),
            nearest_atom=alike,
            suppressing=suppressing,
            errors=errors,
        )
