"""Multinomial logistic read-outs of many targets at once, along a path of penalties, by preconditioned L-BFGS.

The features are rotated once to their principal axes; there a fixed bound on the Hessian (Böhning 1992: half of XᵀX,
plus the penalty) is diagonal, so that every target and every penalty starts L-BFGS from a nearly whitened problem. The logits
are linear in the weights: a line search costs no product with the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.results import Readable

_HISTORY = 12
_LOGITS = 2**20  # logits (samples x targets x classes) held at once


@dataclass(frozen=True)
class Logistic(Readable):
    """Logistic read-outs: the logits of target t are ``x @ weight[t].T + bias[t]``.

    Attributes:
        weight: (targets x classes x features), bias: (targets x classes); the last penalty's fit.
        penalties: the path, in the order in which it was gone.
        path_weight, path_bias: the fits of every penalty.
        losses: summed cross-entropy plus penalty (penalties x targets).
        converged: whether the gradient reached the tolerance (penalties x targets).
        iterations: how many were needed (penalties x targets).
    """

    path_weight: Float[Tensor, "penalties targets classes features"]
    path_bias: Float[Tensor, "penalties targets classes"]
    penalties: Float[Tensor, " penalties"]
    losses: Float[Tensor, "penalties targets"]
    converged: Bool[Tensor, "penalties targets"]
    iterations: Int[Tensor, "penalties targets"]

    @property
    def weight(self) -> Float[Tensor, "targets classes features"]:
        return self.path_weight[-1]

    @property
    def bias(self) -> Float[Tensor, "targets classes"]:
        return self.path_bias[-1]

    def logits(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch targets classes"]:
        """Logits of new features at the last penalty."""
        return torch.einsum("nd,tkd->ntk", x, self.weight) + self.bias

    def predict(self, x: Float[Tensor, "batch features"]) -> Int[Tensor, "batch targets"]:
        """The most probable class of each target."""
        return self.logits(x).argmax(-1)

    def to_dict(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """The norm of each target's weights along the path of penalties."""
        import matplotlib.pyplot as plt

        ax = ax if ax is not None else plt.subplots()[1]
        ax.loglog(self.penalties.cpu(), self.path_weight.flatten(2).norm(dim=2).cpu(), "o-")
        ax.set(xlabel="penalty", ylabel="norm of the weights")
        return ax


def logistic(
    x: Float[Tensor, "samples features"],
    y: Int[Tensor, "samples *targets"],
    penalties: float | Sequence[float] | Float[Tensor, " penalties"] = 1.0,
    *,
    classes: int | None = None,
    intercept: bool = True,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Logistic:
    """Multinomial logistic regression min Σ_i CE(W x_i + b, y_i) + (λ/2)‖W‖² for every target, along a path of λ.

    λ is scikit-learn's 1/C. For two classes it penalises the one weight vector w_1 - w_0 (as scikit-learn does), which the
    two rows share as ∓w/2.

    Args:
        x: features, shared by all targets.
        y: class labels, (samples, targets), or (samples,) for one.
        penalties: λ > 0, one or several; each starts from the one before (go from large to small).
        classes: K, the same for all targets; ``None`` takes the largest label plus one.
        intercept: fit b, not penalised.
        tolerance: on the gradient of the mean loss (largest entry); by default 1e-10 in float64, 1e-6 in float32.
        max_iterations: a penalty.

    Returns:
        :class:`Logistic`; a fit that stopped before the tolerance has ``converged`` False.

    Raises:
        InputError: shapes that do not match, NaN, labels out of range, fewer than two classes, a penalty that is not positive.

    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    >>> fit = logistic(x, torch.tensor([0, 0, 1, 1]), 1.0)
    >>> fit.predict(x).flatten().tolist(), round((fit.weight[0, 1] - fit.weight[0, 0]).item(), 4)
    ([0, 0, 1, 1], 1.0066)
    """
    x = checks.tensor("x", x, shape=("samples", "features"), floating=True).detach()
    y = checks.tensor("y", y, floating=False)
    y = (y[:, None] if y.ndim == 1 else y).to(x.device)
    checks.tensor("y", y, shape=(len(x), "targets"))
    flat = checks.labels("y", y.flatten(), classes=classes)
    y = flat.view(y.shape)
    known = classes or int(y.max()) + 1
    require(known >= 2, f"y: got {known} class, expected at least 2")
    grid = torch.as_tensor(penalties, dtype=torch.float64, device=x.device).flatten()
    checks.tensor("penalties", grid)
    require(bool((grid > 0).all()), f"penalties: got {grid.min():g}, expected more than 0")
    checks.number("max_iterations", max_iterations, low=1, integer=True)
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if tolerance is None:
        tolerance = 1e-10 if work.dtype == torch.float64 else 1e-6

    mean = work.mean(0) if intercept else work.new_zeros(work.shape[1])
    centred = work - mean
    # On the principal axes (of the row space, where the minimiser lies) XᵀX is diagonal; rotations keep ‖W‖.
    if work.shape[0] >= work.shape[1]:
        values, axes = torch.linalg.eigh((centred.T @ centred).double())
        squares, axes = values.clamp(min=0), axes.to(work.dtype)
    else:
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        squares, axes = s.double().square(), vh.T
    rotated = centred @ axes
    # Targets do not touch each other: groups of them keep the logits small enough for the caches.
    width = max(1, _LOGITS // (len(x) * known))
    groups = [
        _Solver(rotated, squares.to(work.dtype), part, known, intercept, tolerance)
        for part in y.split(width, dim=1)
    ]
    fits, losses, converged, iterations = [], [], [], []
    states = [work.new_zeros(g.y.shape[1], known, axes.shape[1] + 1) for g in groups]
    for penalty in grid.tolist():
        effective = penalty * (2 if known == 2 else 1)
        outcomes = [g.run(v, effective, max_iterations) for g, v in zip(groups, states)]
        states = [outcome[0] for outcome in outcomes]
        fit, loss, done, count = (torch.cat(parts) for parts in zip(*outcomes))
        fits.append(fit)
        losses.append(loss)
        converged.append(done)
        iterations.append(count)
    found = torch.stack(fits)
    weight = found[..., :-1] @ axes.T
    # Only differences of the intercepts count; the centred choice is unique. The mean of x moves into them.
    shift = found[..., -1] - found[..., -1].mean(-1, keepdim=True) if intercept else found[..., -1]
    bias = shift - weight @ mean
    if intercept:
        bias = bias - bias.mean(-1, keepdim=True)
    back = x.dtype
    return Logistic(
        weight.to(back),
        bias.to(back),
        grid.to(back),
        torch.stack(losses).to(back),
        torch.stack(converged),
        torch.stack(iterations),
    )


class _Solver:
    """L-BFGS for all targets at once. A variable is (targets, classes, features + 1), the intercept last."""

    def __init__(
        self, x: Tensor, squares: Tensor, y: Tensor, classes: int, intercept: bool, tolerance: float
    ) -> None:
        ones = x.new_ones(len(x), 1) if intercept else x.new_zeros(len(x), 1)
        self.x = torch.cat([x, ones], 1)
        self.y = y
        self.classes = classes
        self.tolerance = tolerance
        self.mask = torch.ones_like(self.x[0])
        self.mask[-1] = 0
        # Half of XᵀX bounds the Hessian; a quarter of that is nearer to what it is at an uncertain fit.
        self.curvature = torch.cat([squares, squares.new_full((1,), float(len(x)))]) / (2 * classes)

    def scores(self, v: Tensor) -> Tensor:
        """(samples, classes, targets): the softmax over the middle runs along contiguous targets."""
        rows = v.transpose(0, 1).reshape(self.classes * len(v), -1)
        return (self.x @ rows.T).view(-1, self.classes, len(v))

    def loss(self, scores: Tensor, v: Tensor, y: Tensor, penalty: float) -> Tensor:
        """Summed cross-entropy and penalty of each target."""
        picked = scores.gather(1, y[:, None]).squeeze(1)
        held = v * self.mask
        return (scores.logsumexp(1) - picked).sum(0) + penalty / 2 * held.square().sum((1, 2))

    def gradient(self, share: Tensor, v: Tensor, y: Tensor, penalty: float) -> Tensor:
        """From the probabilities, which are used up."""
        share.scatter_add_(1, y[:, None], share.new_full((1, 1, 1), -1.0).expand_as(y[:, None]))
        pulled = (share.flatten(1).T @ self.x).view(self.classes, len(v), -1)
        return pulled.transpose(0, 1) + penalty * v * self.mask

    def run(self, start: Tensor, penalty: float, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The minimisers, their losses, whether the tolerance was reached, and after how many steps."""
        result = start.clone()
        targets = len(start)
        final = start.new_zeros(targets)
        done = torch.zeros(targets, dtype=torch.bool, device=start.device)
        count = torch.zeros(targets, dtype=torch.int64, device=start.device)
        active = torch.arange(targets, device=start.device)
        v, y = start, self.y
        inverse = 1 / (self.curvature + penalty * self.mask).clamp(min=torch.finfo(start.dtype).tiny)
        scores = self.scores(v)
        gradient = self.gradient(torch.softmax(scores, 1), v, y, penalty)
        past: list[tuple[Tensor, Tensor, Tensor]] = []
        stuck = torch.zeros_like(done)
        for step in range(steps + 1):
            small = gradient.abs().amax((1, 2)) <= self.tolerance * len(self.x)
            end = small | stuck | (step == steps)
            if bool(end.any()):
                out, keep = active[end], ~end
                result[out], done[out], count[out] = v[end], small[end], step
                final[out] = self.loss(scores[..., end], v[end], y[:, end], penalty)
                if not bool(keep.any()):
                    break
                # Finished targets leave, so that the last slow ones do not pay for all.
                active, v, y, gradient = active[keep], v[keep], y[:, keep], gradient[keep]
                scores = scores[..., keep]
                past = [(s[keep], g[keep], r[keep]) for s, g, r in past]
            direction = -_two_loops(gradient, past, inverse)
            descent = (direction * gradient).sum((1, 2))
            scale, scores, share = self._search(scores, v, direction, y, descent, penalty)
            # Below the resolution of the numbers no direction descends: this is as far as the dtype goes.
            stuck = descent >= 0
            move = scale[:, None, None] * direction
            v = v + move
            if step % 20 == 19:
                # Sums of updates drift; the product itself now and then keeps them honest.
                scores = self.scores(v)
                share = torch.softmax(scores, 1)
            fresh = self.gradient(share, v, y, penalty)
            change = fresh - gradient
            gradient = fresh
            inner = (move * change).sum((1, 2))
            rate = torch.where(inner > 0, 1 / inner.clamp(min=torch.finfo(v.dtype).tiny), 0)
            past = [*past[-_HISTORY + 1 :], (move, change, rate)]
        return result, final, done, count

    def _search(
        self, scores: Tensor, v: Tensor, direction: Tensor, y: Tensor, descent: Tensor, penalty: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each target's step along its direction, by Newton's method on the loss there, which is convex in the step.

        Returns the steps, and the scores and probabilities that they lead to.
        """
        along = self.scores(direction)
        picked = along.gather(1, y[:, None]).squeeze(1).sum(0)
        held, moved = v * self.mask, direction * self.mask
        first, second = penalty * (held * moved).sum((1, 2)), penalty * moved.square().sum((1, 2))
        scale = torch.ones_like(descent)
        low, high = torch.zeros_like(scale), torch.full_like(scale, float("inf"))
        for trial in range(20):
            reached = torch.addcmul(scores, scale, along)
            share = torch.softmax(reached, 1)
            weighted = share * along
            slope = weighted.sum((0, 1)) - picked + first + scale * second
            # Good once the slope is a third of what it was: the next direction matters more than this step.
            settled = slope.abs() <= 0.3 * descent.abs()
            if bool(settled.all()) or trial == 19:
                break
            mean = weighted.sum(1)
            bend = (weighted.mul_(along).sum(1) - mean.square()).sum(0) + second
            low, high = torch.where(slope < 0, scale, low), torch.where(slope >= 0, scale, high)
            newton = scale - slope / bend.clamp(min=torch.finfo(v.dtype).tiny)
            inside = (newton > low) & (newton < high) & newton.isfinite()
            middle = torch.where(high.isfinite(), (low + high) / 2, 2 * scale)
            scale = torch.where(settled, scale, torch.where(inside, newton, middle))
        return scale, reached, share


def _two_loops(gradient: Tensor, past: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """L-BFGS's product with the inverse Hessian, each target with its own history and a diagonal start."""
    q = gradient
    factors = []
    for move, change, rate in reversed(past):
        factor = rate * (move * q).sum((1, 2))
        q = q - factor[:, None, None] * change
        factors.append(factor)
    if past:
        move, change, rate = past[-1]
        top = (move * change).sum((1, 2))
        bottom = (change.square() * inverse).sum((1, 2))
        gamma = torch.where((top > 0) & (bottom > 0), top / bottom.clamp(min=torch.finfo(q.dtype).tiny), 1.0)
        q = q * inverse * gamma[:, None, None]
    else:
        q = q * inverse
    for (move, change, rate), factor in zip(past, reversed(factors)):
        back = rate * (change * q).sum((1, 2))
        q = q + (factor - back)[:, None, None] * move
    return q
