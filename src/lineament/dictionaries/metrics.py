"""What dictionaries are judged by: each metric is a plain function of tensors; the meters behind them take a data set batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import require, show
from lineament.core.codes import Codes
from lineament.core.statistics.accumulation import Stream
from lineament.dictionaries.topk.shards import whole

_CACHED, _ELEMENTS = 2**17, 2**24  # logits compared at once: on a CPU, elsewhere


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


class CleanRun:
    """The logits that other runs are compared with: what all comparisons need of them is computed once.

    Args:
        logits: (tokens, vocabulary).

    Attributes:
        logits: in single or double precision. total: (tokens), the logarithm of the sum of exponentials. best: (tokens), the best class.

    >>> clean = CleanRun(torch.zeros(1, 2))
    >>> clean.best.tolist(), round(clean.total.item(), 4)
    ([0], 0.6931)
    """

    def __init__(self, logits: Tensor):
        logits = logits.detach()
        self.logits = logits if logits.dtype == torch.float64 else logits.float()
        self.total = self.logits.new_empty(len(logits))
        self.best = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for rows in self.parts():
            self.total[rows] = self.logits[rows].logsumexp(-1)
            self.best[rows] = self.logits[rows].max(-1).indices

    def parts(self) -> Iterator[slice]:
        """The tokens in parts whose logits stay in a processor's cache between passes over them."""
        elements = _CACHED if self.logits.device.type == "cpu" else _ELEMENTS
        most = max(1, elements // max(1, self.logits.shape[-1]))
        return (slice(start, start + most) for start in range(0, len(self.logits), most))


def token_losses(
    logits: Tensor | CleanRun, labels: Tensor | None, other: Tensor | None = None, *, only: str = ""
) -> dict[str, Tensor]:
    """Of each token: ``ce`` of the logits, and where other logits are given ``kl`` (logits || other), ``ce`` being the other's, and ``agree``.

    Args:
        logits: (tokens, vocabulary), or the :class:`CleanRun` of them where several runs are compared with it.
        labels: (tokens); negative ones are left out as NaN.
        other: (tokens, vocabulary), of the run that is compared with the clean one.
        only: ``"ce"`` or ``"kl"``, to compute no more than that: with a large vocabulary each pass over the logits counts.
    """
    clean = logits if isinstance(logits, CleanRun) else CleanRun(logits)
    wants = {
        "ce": labels is not None and only != "kl",
        "kl": other is not None and only != "ce",
        "agree": other is not None and not only,
        "right": labels is not None and not only,
    }
    found = {name: clean.total.new_empty(len(clean.total)) for name, wanted in wants.items() if wanted}
    for rows in clean.parts():
        one, total, best = clean.logits[rows], clean.total[rows], clean.best[rows]
        if other is not None:
            second = other[rows].detach().to(one.dtype)
            other_total = second.logsumexp(-1)
            if wants["kl"]:
                # sum p (a - b) of the logits themselves: equal runs differ by exactly 0.
                shares = (one - total[:, None]).exp_()
                found["kl"][rows] = torch.linalg.vecdot(shares, one - second) + (other_total - total)
            one, total = second, other_total
            if not only:
                best = second.max(-1).indices
                found["agree"][rows] = (clean.best[rows] == best).to(one.dtype)
        if labels is not None:
            told = labels[rows]
            if wants["ce"]:
                taken = total - one.gather(-1, told.clamp_min(0)[:, None]).squeeze(-1)
                found["ce"][rows] = taken.masked_fill(told < 0, float("nan"))
            if wants["right"]:
                found["right"][rows] = (best == told).to(one.dtype).masked_fill(told < 0, float("nan"))
    return found


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
    first = CleanRun(clean.reshape(-1, vocabulary))
    compared = token_losses(first, told, substituted.reshape(-1, vocabulary))
    found = {
        "ce": mean_known(token_losses(first, told)["ce"]),
        "ce_substituted": mean_known(compared["ce"]),
        "kl": mean_known(compared["kl"]),
    }
    if ablated is not None:
        found["ce_ablated"] = mean_known(token_losses(ablated.reshape(-1, vocabulary), told)["ce"])
        found["loss_recovered"] = loss_recovered(found["ce"], found["ce_substituted"], found["ce_ablated"])
    return found


def loss_recovered(ce: float, substituted: float, ablated: float) -> float:
    """(ablated - substituted) / (ablated - ce): 1 for a perfect reconstruction, 0 for one no better than the ablation.

    >>> loss_recovered(1.0, 1.5, 3.0)
    0.75
    """
    return (ablated - substituted) / (ablated - ce) if ablated != ce else float("nan")


def mean_known(values: Tensor) -> float:
    return float(values.double().nanmean())


@torch.no_grad()
def atom_overlap(dictionary: Any, alive: Tensor) -> tuple[float, float]:
    """Two proxies over live features: the mean largest cosine with another atom, and the share that suppresses a similar atom.

    >>> from lineament.dictionaries import Neurons
    >>> atom_overlap(Neurons(3), torch.ones(3, dtype=torch.bool))
    (0.0, 0.0)
    """
    atoms = dictionary.atoms
    atoms = atoms[alive.to(atoms.device)].float()
    if len(atoms) < 2:
        return float("nan"), float("nan")
    unit = F.normalize(atoms, dim=1)
    encoder = getattr(dictionary, "W_enc", None)
    encoder = None if encoder is None else whole(encoder).to(atoms.device)
    encoder = unit if encoder is None else F.normalize(encoder[alive.to(encoder.device)].float(), dim=1)
    best, suppressing = [], 0
    for start in range(0, len(unit), 2048):
        rows = slice(start, start + 2048)
        cosines = unit[rows] @ unit.T
        own = torch.arange(start, start + len(cosines), device=unit.device)
        cosines[torch.arange(len(cosines), device=unit.device), own] = -2
        best.append(cosines.amax(1))
        suppressing += int(((cosines > 0.3) & (encoder[rows] @ unit.T < 0)).any(1).sum())
    return float(torch.cat(best).mean()), suppressing / len(unit)


def standard_error(rest: Tensor, scale: float) -> float:
    """Of a ratio of means over sequences, from what each leaves unexplained."""
    return float(rest.std() / len(rest) ** 0.5) / abs(scale) if len(rest) > 1 and scale else float("nan")
