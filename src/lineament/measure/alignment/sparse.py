"""How many units of one network does it take to say what a unit of another says? Sparse linear maps over a whole path of penalties.

Li et al. (2015, arXiv 1511.07543) train a mapping layer with an L1 penalty by SGD, which never reaches an exact zero. Here the minimum

    min_W  ½ E[(y_j - W_j·x)²] + λ ‖W_j‖₁        for every unit j of the other network, units of mean 0 and variance 1

is found from the moments alone: accelerated proximal steps for all targets at once, warm from the last penalty, and, where asked for, an
exact solve on the units that are in use. Half the mean squared error is 0 for perfect prediction and 0.5 for none, as long as it is
measured on samples that the map was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable

PENALTIES = (0.0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class SparseMaps(Readable):
    """Maps from the units of network a to each unit of network b, one for each penalty.

    Attributes:
        half_mse: ½ E[(y_j - W_j·x)²] on the images that the maps were not fitted to.
        fitted_half_mse: the same on those that they were.
        nonzeros: the weights that are not zero.
        single_half_mse: of the best single unit of the fit.
        dense_half_mse: of a dense map (:func:`dense_half_mse`).
        targets, sources: which units of b and of a (dead ones are left out).
    """

    penalties: tuple[float, ...]
    weights: Float[Tensor, "penalties targets sources"]
    half_mse: Float[Tensor, "penalties targets"]
    fitted_half_mse: Float[Tensor, "penalties targets"]
    nonzeros: Int[Tensor, "penalties targets"]
    single_half_mse: Float[Tensor, " targets"]
    dense_half_mse: Float[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    sources: Int[Tensor, " sources"]

    def used(self, target: int, penalty: int, threshold: float = 0.0) -> dict[int, float]:
        """The units of a that a map uses for the ``target``-th unit, {unit: weight}, the largest weight first."""
        row = self.weights[penalty, target]
        order = row.abs().argsort(descending=True).tolist()
        return {int(self.sources[i]): float(row[i]) for i in order if abs(float(row[i])) > threshold}

    def best(self, nonzeros: float) -> int:
        """The penalty of lowest mean half-MSE among those whose maps use at most so many units on average, as its index."""
        means = self.half_mse.mean(1)
        allowed = self.nonzeros.double().mean(1) <= nonzeros
        require(
            bool(allowed.any()),
            f"nonzeros: got {nonzeros}, expected at least {float(self.nonzeros.double().mean(1).min()):.3g}, the sparsest of these maps",
        )
        return int(means.masked_fill(~allowed, torch.inf).argmin())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, without the weights."""
        return {name: value for name, value in results.plain(self).items() if name != "weights"}

    def plot(self, ax: Any = None) -> Any:
        """Mean half-MSE against the units in use, between the best single unit and the dense map."""
        ax = results.axes(ax)
        keep = self.nonzeros.double().mean(1) > 0
        ax.semilogx(
            self.nonzeros.double().mean(1)[keep], self.half_mse.mean(1)[keep], "o-", label="sparse map"
        )
        ax.axhline(float(self.single_half_mse.mean()), color="C1", ls="--", label="best single unit")
        ax.axhline(float(self.dense_half_mse.mean()), color="C2", ls=":", label="dense map")
        ax.set(xlabel="units in use", ylabel="half-MSE (0.5: nothing predicted)")
        ax.legend()
        return ax


def lasso_path(
    gram: Float[Tensor, "sources sources"],
    cross: Float[Tensor, "sources targets"],
    penalties: Sequence[float],
    *,
    tolerance: float = 1e-6,
    polish: bool = True,
    most: int = 20_000,
) -> Float[Tensor, "penalties targets sources"]:
    """argmin_W ½ W G Wᵀ - W Q + λ ‖W‖₁ for every target and every penalty, from G = XᵀX/N and Q = XᵀY/N.

    The penalties are walked from the largest down, each warm from the one before, whatever order they are given in; a penalty of 0
    is ordinary least squares (the one of least norm, where units depend on each other).

    Args:
        tolerance: steps end when no target's objective is further than this from its minimum (a duality gap).
        polish: solve exactly on the units in use, and check the conditions of the minimum; else weights are right to about ``tolerance``'s root.
        most: proximal steps for one penalty.

    >>> lasso_path(torch.eye(2), torch.tensor([[0.5], [-0.2]]), [0.3]).tolist()
    [[[0.2, -0.0]]]
    """
    penalties = [
        float(checks.number("penalties", p, low=0))
        for p in checks.listed("penalties", penalties, "numbers of at least 0")
    ]
    checks.tensor("gram", gram, shape=("sources", "sources"), floating=True)
    checks.tensor("cross", cross, shape=(len(gram), "targets"), floating=True)
    gram, cross = (m.detach().double().cpu() for m in (gram, cross))
    found = cross.new_zeros(len(penalties), cross.shape[1], len(gram))
    weights = torch.zeros_like(cross)
    step = 1.0 / max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-300)
    for at in sorted(range(len(penalties)), key=lambda k: -penalties[k]):
        lam = penalties[at]
        if lam == 0:
            found[at] = least_squares(gram, cross).T
            continue
        weights = _proximal(gram, cross, lam, weights, step, tolerance, most)
        if polish:
            weights = _polished(gram, cross, lam, weights, step, most)
        found[at] = weights.T
    return found


def least_squares(
    gram: Float[Tensor, "sources sources"], cross: Float[Tensor, "sources targets"], ridge: float = 0.0
) -> Float[Tensor, "sources targets"]:
    """(G + ridge)⁻¹ Q by the eigenpairs of G; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    scale = torch.where(kept, 1 / (values + ridge).clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (scale[:, None] * (vectors.T @ cross))


def half_mse(
    weights: Float[Tensor, "*penalties targets sources"],
    gram: Float[Tensor, "sources sources"],
    cross: Float[Tensor, "sources targets"],
    variances: Float[Tensor, " targets"],
) -> Float[Tensor, "*penalties targets"]:
    """½ E[(y_j - W_j·x)²] from second moments: G = E[x xᵀ], Q = E[x y], E[y²]."""
    bilinear = ((weights @ gram) * weights).sum(-1) - 2 * (weights * cross.T).sum(-1)
    return (variances + bilinear) / 2


def dense_half_mse(
    fit: tuple[Tensor, Tensor, Tensor], judge: tuple[Tensor, Tensor, Tensor]
) -> Float[Tensor, " targets"]:
    """Held-out half-MSE of a dense map: of the ridge that leaves the least on average, of five from none to the variance of a unit.

    ``fit`` and ``judge`` are (E[x xᵀ], E[x y], E[y²]) of either half. With as many units as samples least squares alone predicts nothing.
    """
    found = [half_mse(least_squares(*fit[:2], r).T, *judge) for r in (0.0, 1e-3, 1e-2, 0.1, 1.0)]
    return min(found, key=lambda each: float(each.mean()))


def _proximal(
    gram: Tensor, cross: Tensor, lam: float, start: Tensor, step: float, tolerance: float, most: int
) -> Tensor:
    """FISTA with restarts (O'Donoghue and Candès 2015); a target that is done keeps still, and the others go on without it."""
    found = start.clone()
    open_ = torch.arange(cross.shape[1])
    w, ahead = start, start.clone()
    q, t = cross, torch.ones(cross.shape[1], dtype=cross.dtype)
    pull = step * q
    for turn in range(most):
        # Each pass over all weights costs as much as a tenth of the product.
        new = F.softshrink(torch.addmm(ahead + pull, gram, ahead, alpha=-step), step * lam)
        move = new - w
        # Momentum that points uphill is dropped, target by target.
        restart = ahead.sub_(new).mul_(move).sum(0) > 0
        t = torch.where(restart, torch.ones_like(t), t)
        next_t = (1 + (1 + 4 * t * t).sqrt()) / 2
        ahead = torch.addcmul(new, (t - 1) / next_t, move)
        w, t = new, next_t
        if turn % 10 == 9 or turn == most - 1:
            gap = _gap(gram, q, lam, w)
            done = gap <= tolerance
            if bool(done.any()):
                found[:, open_[done]] = w[:, done]
                left = ~done
                open_, w, ahead, q, t = open_[left], w[:, left], ahead[:, left], q[:, left], t[left]
                pull = step * q
                if not len(open_):
                    return found
    found[:, open_] = w
    return found


def _gap(gram: Tensor, cross: Tensor, lam: float, w: Tensor) -> Tensor:
    """The duality gap of each target, without y: the residual r = y - Xw, scaled into |Xᵀr|/N <= λ, is a point of the dual."""
    product = gram @ w
    slope = cross - product
    scale = (lam / slope.abs().amax(0).clamp_min(1e-300)).clamp_max(1.0)
    energy = (w * product).sum(0)
    inner = (w * cross).sum(0)
    # With v = E[y²]: primal ½(v - 2 wq + wGw) + λ|w|, dual s E[y r] - ½ s² E[r²]; v is unknown and cancels where s = 1.
    residual = energy - 2 * inner  # E[r²] - v
    rest = (1 - scale).square() / 2  # what multiplies v, at most 1 for standardised units
    return residual / 2 * (1 + scale.square()) + scale * inner + lam * w.abs().sum(0) + rest


def _polished(gram: Tensor, cross: Tensor, lam: float, weights: Tensor, step: float, most: int) -> Tensor:
    """The exact minimum from one near by: solve on the units in use, exchange those that break the conditions, until none does."""
    weights = weights.clone()
    slack = 1e-12 * max(float(cross.abs().max()), lam)
    for j in range(cross.shape[1]):
        q = cross[:, j]
        w = weights[:, j].clone()
        for _ in range(50):
            used = (w != 0).nonzero().flatten()
            sign = w[used].sign()
            if len(used):
                inner = gram[used][:, used]
                exact, bad = torch.linalg.solve_ex(inner, q[used] - lam * sign)
                if int(bad) or not bool(torch.isfinite(exact).all()):
                    break
                # As far towards the solution as no weight changes its sign; one that reaches zero leaves.
                ratio = torch.where(exact * sign <= 0, w[used] / (w[used] - exact), torch.ones_like(exact))
                reach, first = ratio.min(0)
                w[used] = w[used] + float(reach) * (exact - w[used])
                if float(reach) < 1:
                    w[used[first]] = 0.0
                    continue
                w[used] = exact
            slope = q - gram @ w
            slope[used] = 0
            worst = int(slope.abs().argmax())
            if abs(float(slope[worst])) <= lam + slack:
                weights[:, j] = w
                break
            # The unit that breaks its condition most enters, with an infinitesimal weight of the right sign.
            w[worst] = slope[worst].sign() * 1e-300
        else:
            weights[:, j] = _proximal(gram, q[:, None], lam, w[:, None], step, 1e-15, most)[:, 0]
    return weights
