"""What does a dictionary keep of an activation, and what does the model lose when it runs on the reconstruction?

Each metric is a plain function of tensors; the meters behind them take a data set batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.core.checks import one_of, require, show
from lineament.core.codes import Codes
from lineament.core.models import frozen
from lineament.core.results import Readable, axes, plain
from lineament.core.sites.activations import capture
from lineament.core.sites.hooks import replace
from lineament.core.sites.naming import Site
from lineament.core.sites.resuming import FromSite
from lineament.core.statistics.accumulation import Stream
from lineament.dictionaries.harvest import TOKENS_AT_ONCE, seeded
from lineament.dictionaries.sequences import Batch, Gradient, Sequences, checked_gradient, objective
from lineament.dictionaries.splice import features_back, features_last, site_in

_TOKENS = 2**24  # logits compared at once


def error_metrics(x: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """How far reconstructions are from their rows.

    Args:
        x, reconstruction: (..., d).

    Returns:
        ``mse``: mean over all entries of (x - x')^2; ``fvu``: sum |x - x'|^2 / sum |x - mean x|^2; ``nmse``: mean over rows of |x - x'|^2 / |x|^2;
        ``cosine``: mean over rows; ``shrinkage``: the least-squares factor c of x ~ c x' about the means, above 1 where x' is too short.

    >>> error_metrics(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))["nmse"]
    0.05555555555555555
    """
    meter = ErrorMeter()
    meter.update(x, reconstruction)
    return meter.compute()


class ErrorMeter(Stream):
    """:func:`error_metrics` over many batches; meters of several processes are added.

    >>> meter = ErrorMeter()
    >>> for x in torch.eye(2).split(1):
    ...     meter.update(x, 0 * x)
    >>> meter.compute()["fvu"]
    2.0
    """

    _saved = ("count", "d", "mean", "mean_other", "spread", "spread_other", "shared", "sums")

    def __init__(self) -> None:
        self.count = self.d = 0
        self.mean = self.mean_other = torch.zeros(0, dtype=torch.float64)
        self.spread = self.spread_other = self.shared = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(
            4, dtype=torch.float64
        )  # squared error, its share of |x|^2, cosine, rows other than 0

    def update(self, x: Tensor, reconstruction: Tensor) -> None:
        require(
            x.shape == reconstruction.shape and x.ndim > 0,
            f"reconstruction: got {show(reconstruction)}, expected the shape of x {tuple(x.shape)}",
        )
        x, y = (each.detach().reshape(-1, each.shape[-1]).double().cpu() for each in (x, reconstruction))
        if not len(x):
            return
        error, size = (x - y).square().sum(1), x.square().sum(1)
        some = size > 0  # rows of zeros have no relative error and no direction
        cosine = (x * y).sum(1)[some] / (size * y.square().sum(1)).sqrt()[some].clamp_min(1e-300)
        relative = (error[some] / size[some]).sum()
        self.sums = self.sums + torch.stack([error.sum(), relative, cosine.sum(), some.sum().double()])
        other = ErrorMeter()
        other.count, other.d, other.mean, other.mean_other = len(x), x.shape[1], x.mean(0), y.mean(0)
        a, b = x - other.mean, y - other.mean_other
        other.spread, other.spread_other, other.shared = a.square().sum(), b.square().sum(), (a * b).sum()
        self._join(other)

    def _join(self, other: ErrorMeter) -> None:
        if self.count == 0:
            self.count, self.d = other.count, other.d
            self.mean, self.mean_other = other.mean, other.mean_other
            self.spread, self.spread_other, self.shared = other.spread, other.spread_other, other.shared
            return
        n = self.count + other.count
        weight, share = self.count * other.count / n, other.count / n
        one, two = other.mean - self.mean, other.mean_other - self.mean_other
        self.spread = self.spread + other.spread + weight * one.square().sum()
        self.spread_other = self.spread_other + other.spread_other + weight * two.square().sum()
        self.shared = self.shared + other.shared + weight * (one * two).sum()
        self.mean, self.mean_other = self.mean + share * one, self.mean_other + share * two
        self.count = n

    def __add__(self, other: ErrorMeter) -> ErrorMeter:
        self._same(other)
        out = ErrorMeter.from_state_dict(self.state_dict())
        if other.count:
            out._join(other)
            out.sums = out.sums + other.sums
        return out

    def compute(self) -> dict[str, float]:
        self._some()
        error, relative, cosine, rows = self.sums.tolist()
        rows = rows or float("nan")
        spread = float(self.spread)
        return {
            "mse": error / (self.count * self.d),
            "fvu": error / spread if spread > 0 else float("nan"),
            "nmse": relative / rows,
            "cosine": cosine / rows,
            "shrinkage": float(self.shared / self.spread_other) if self.spread_other > 0 else float("nan"),
        }


def usage(codes: Codes) -> dict[str, Any]:
    """How many features are on, and which never.

    Returns:
        ``l0``: the mean number of features a row whose value is not 0; ``density``: (width) how often each is on; ``dead``: the share of features that are
        never on in these rows; ``dense``: the share that is on in more than a tenth of them.

    >>> usage(Codes(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]]), 4))["dead"]
    0.5
    """
    meter = UsageMeter()
    meter.update(codes)
    return meter.compute()


class UsageMeter(Stream):
    """:func:`usage` over many batches."""

    _saved = ("rows", "on")

    def __init__(self) -> None:
        self.rows, self.on = 0, torch.zeros(0, dtype=torch.int64)

    def update(self, codes: Codes) -> None:
        fired = torch.bincount(codes.indices[codes.values != 0], minlength=codes.width).cpu()
        self.on = fired if not self.rows and not len(self.on) else self.on + fired
        self.rows += codes.indices.shape[:-1].numel()

    def __add__(self, other: UsageMeter) -> UsageMeter:
        self._same(other)
        out = UsageMeter()
        out.rows = self.rows + other.rows
        out.on = (
            self.on + other.on if len(self.on) and len(other.on) else (self.on if len(self.on) else other.on)
        )
        return out

    def compute(self) -> dict[str, Any]:
        require(self.rows > 0, "UsageMeter: no rows seen, expected at least one")
        density = self.on.double() / self.rows
        return {
            "l0": float(self.on.sum()) / self.rows,
            "density": density,
            "dead": float((self.on == 0).double().mean()),
            "dense": float((density > 0.1).double().mean()),
            "rows": self.rows,
        }


def token_losses(logits: Tensor, labels: Tensor | None, other: Tensor | None = None) -> dict[str, Tensor]:
    """Of each token: ``ce`` of the logits, and where other logits are given ``kl`` (logits || other), ``ce`` being the other's, and ``agree``.

    Args:
        logits: (tokens, vocabulary). labels: (tokens); negative ones are left out as NaN.
        other: (tokens, vocabulary), of the run that is compared with the clean one.
    """
    found: dict[str, list[Tensor]] = {"ce": [], "kl": [], "agree": [], "right": []}
    most = max(1, _TOKENS // max(1, logits.shape[-1]))
    for start in range(0, max(len(logits), 1), most):
        rows = slice(start, start + most)
        clean = logits[rows].detach()
        clean = clean if clean.dtype == torch.float64 else clean.float()
        log_p = F.log_softmax(clean, -1)
        log_q = log_p
        if other is not None:
            second = other[rows].detach().to(clean.dtype)
            log_q = F.log_softmax(second, -1)
            found["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
            found["agree"].append((clean.argmax(-1) == second.argmax(-1)).to(clean.dtype))
        if labels is not None:
            told = labels[rows]
            taken = -log_q.gather(-1, told.clamp_min(0)[:, None]).squeeze(-1)
            found["ce"].append(taken.masked_fill(told < 0, float("nan")))
            right = (log_q.argmax(-1) == told).to(clean.dtype)
            found["right"].append(right.masked_fill(told < 0, float("nan")))
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def output_metrics(
    clean: Tensor, substituted: Tensor, labels: Tensor, *, ablated: Tensor | None = None
) -> dict[str, float]:
    """What the model loses on the reconstruction, from three runs' logits.

    Args:
        clean, substituted: (..., vocabulary), with the activation and with its reconstruction.
        labels: (...), aligned with the logits; negative ones are left out.
        ablated: with the site at zero or at its mean.

    Returns:
        ``ce``, ``ce_substituted``, ``ce_ablated``: mean cross-entropies (nats); ``kl``: mean KL(clean || substituted); ``loss_recovered``:
        (ce_ablated - ce_substituted) / (ce_ablated - ce).

    >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(output_metrics(a, b, torch.tensor([0]), ablated=0 * a)["loss_recovered"], 4)
    0.6709
    """
    require(
        clean.shape == substituted.shape and clean.shape[:-1] == labels.shape,
        f"labels: got {show(labels)} with logits of shapes {tuple(clean.shape)} and {tuple(substituted.shape)}, expected one label for each",
    )
    told, vocabulary = labels.reshape(-1).long(), clean.shape[-1]
    first = clean.reshape(-1, vocabulary)
    compared = token_losses(first, told, substituted.reshape(-1, vocabulary))
    found = {
        "ce": _mean(token_losses(first, told)["ce"]),
        "ce_substituted": _mean(compared["ce"]),
        "kl": _mean(compared["kl"]),
    }
    if ablated is not None:
        found["ce_ablated"] = _mean(token_losses(ablated.reshape(-1, vocabulary), told)["ce"])
        found["loss_recovered"] = loss_recovered(found["ce"], found["ce_substituted"], found["ce_ablated"])
    return found


def loss_recovered(ce: float, substituted: float, ablated: float) -> float:
    """(ablated - substituted) / (ablated - ce): 1 for a perfect reconstruction, 0 for one no better than the ablation.

    >>> loss_recovered(1.0, 1.5, 3.0)
    0.75
    """
    return (ablated - substituted) / (ablated - ce) if ablated != ce else float("nan")


def _mean(values: Tensor) -> float:
    return float(values.double().nanmean())


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
        self, name: str, clean: Tensor, other: Tensor | None, batch: Batch, scored: Tensor, only: str = ""
    ) -> dict[str, Tensor]:
        """Of each sequence the sums over its tokens that count, by name."""
        size = clean.shape[-1]
        labels = batch.labels
        if labels is not None and labels.shape != clean.shape[:-1]:
            labels = None
        flat = None if labels is None else labels.reshape(-1).long()
        found = token_losses(
            clean.reshape(-1, size), flat, None if other is None else other.reshape(-1, size)
        )
        sums = {}
        for what, values in found.items():
            if only and what != only:
                continue
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
            return _standard_error(rest, float(sums[over].mean()))

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
                errors[f"recovered_{kind}"] = _standard_error(rest, float(gap.mean()))
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


@torch.no_grad()
def atom_overlap(dictionary: Any, alive: Tensor) -> tuple[float, float]:
    """Two proxies over live features: the mean largest cosine with another atom, and the share that suppresses a similar atom.

    >>> from lineament.dictionaries import Neurons
    >>> atom_overlap(Neurons(3), torch.ones(3, dtype=torch.bool))
    (0.0, 0.0)
    """
    atoms = dictionary.atoms[alive.to(dictionary.atoms.device)].float()
    if len(atoms) < 2:
        return float("nan"), float("nan")
    unit = F.normalize(atoms, dim=1)
    encoder = getattr(dictionary, "W_enc", None)
    encoder = (
        unit if encoder is None else F.normalize(encoder.detach()[alive.to(encoder.device)].float(), dim=1)
    )
    best, suppressing = [], 0
    for start in range(0, len(unit), 2048):
        rows = slice(start, start + 2048)
        cosines = unit[rows] @ unit.T
        own = torch.arange(start, start + len(cosines), device=unit.device)
        cosines[torch.arange(len(cosines), device=unit.device), own] = -2
        best.append(cosines.amax(1))
        suppressing += int(((cosines > 0.3) & (encoder[rows] @ unit.T < 0)).any(1).sum())
    return float(torch.cat(best).mean()), suppressing / len(unit)


def _standard_error(rest: Tensor, scale: float) -> float:
    """Of a ratio of means over sequences, from what each leaves unexplained."""
    return float(rest.std() / len(rest) ** 0.5) / abs(scale) if len(rest) > 1 and scale else float("nan")
