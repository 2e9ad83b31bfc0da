"""A network grown unit by unit: the additive model, its stages, and the one plain network that it is.

arXiv 1909.12098, sections 1.1 and 1.3: F = F_0 + Σ step_t h_t(x). Hidden layers side by side make one hidden layer, output weights are scaled by
their steps, so that the first m parts are the first m J units and the output bias of these parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lineament.core.checks import number
from lineament.core.results import Readable
from lineament.learn.boosting.losses import Array, Loss, step_size
from lineament.learn.boosting.subnetwork import Sub, Training, fitted, initial


@dataclass(frozen=True)
class Additive(Readable):
    """F_0 [K] and T parts: W1 [T, d, J], b1 [T, J], W2 [T, J, K], b2 [T, K], steps [T]."""

    F0: Array
    W1: Array
    b1: Array
    W2: Array
    b2: Array
    steps: Array
    activation: str

    @property
    def parts(self) -> int:
        return len(self.steps)

    @property
    def units(self) -> int:
        return self.parts * self.b1.shape[1]

    def part(self, t: int) -> Sub:
        return Sub(self.W1[t], self.b1[t], self.W2[t], self.b2[t], self.activation)

    def truncated(self, units: int) -> Additive:
        """The first ``units`` units, whole parts only."""
        size = self.b1.shape[1]
        number("units", units, low=0, high=self.units, integer=True)
        t = units // size
        return Additive(
            self.F0, self.W1[:t], self.b1[:t], self.W2[:t], self.b2[:t], self.steps[:t], self.activation
        )

    def merged(self, factor: float = 1.0) -> Sub:
        """One network equal to ``factor`` times the additive model."""
        W1 = self.W1.transpose(1, 0, 2).reshape(self.W1.shape[1], -1)
        W2 = (self.steps[:, None, None] * self.W2).reshape(-1, self.W2.shape[2])
        b2 = self.F0 + self.steps @ self.b2
        return Sub(W1, self.b1.ravel(), factor * W2, factor * b2, self.activation)

    def scores(self, X: Array) -> Array:
        """F of each row, [n, K]."""
        return self.merged()(X)

    def stages(self, X: Array) -> Iterator[Array]:
        """F after each part; the hidden layer is computed once."""
        hidden = self.merged().hidden(X)
        F = np.repeat(self.F0[None], len(X), 0)
        size = self.b1.shape[1]
        # A part's units beside ones, so that one product adds its output bias, too.
        own = np.ones((len(X), size + 1))
        weights = self.steps[:, None, None] * np.concatenate([self.W2, self.b2[:, None]], 1)
        for t in range(self.parts):
            own[:, :-1] = hidden[:, t * size : (t + 1) * size]
            after = own @ weights[t]
            after += F
            F = after
            yield F

    def to_torch(self, factor: float = 1.0) -> torch.nn.Sequential:
        """The merged network as ``Sequential(Linear, activation, Linear)``, float64."""
        net = self.merged(factor)
        kinds = {
            "logistic": torch.nn.Sigmoid,
            "tanh": torch.nn.Tanh,
            "relu": torch.nn.ReLU,
            "identity": torch.nn.Identity,
        }
        first = torch.nn.Linear(*net.W1.shape, dtype=torch.float64)
        last = torch.nn.Linear(*net.W2.shape, dtype=torch.float64)
        with torch.no_grad():
            for layer, W, b in ((first, net.W1, net.b1), (last, net.W2, net.b2)):
                layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(W.T)))
                layer.bias.copy_(torch.from_numpy(b.copy()))
        return torch.nn.Sequential(first, kinds[self.activation](), last)


@dataclass(frozen=True)
class Growth:
    """How a network is grown; see :class:`~lineament.learn.boosting.estimators.GBNNClassifier`."""

    total_units: int
    units_per_step: int
    learning_rate: float
    subsample: float
    activation: str
    line_search: str
    backtrack: bool
    training: Training
    device: torch.device


@dataclass
class Grown:
    """A model as it grows: its parts, scores of the training samples, the loss after each part, and what was left out."""

    subs: list[Sub]
    steps: list[float]
    F: Array
    losses: list[float]
    rejected: int = 0

    def model(self, F0: Array, d: int, growth: Growth) -> Additive:
        J, K = growth.units_per_step, len(F0)
        stack = lambda name, shape: (  # noqa: E731
            np.stack([getattr(s, name) for s in self.subs]) if self.subs else np.zeros((0, *shape))
        )
        return Additive(
            F0, stack("W1", (d, J)), stack("b1", (J,)), stack("W2", (J, K)), stack("b2", (K,)),
            np.array(self.steps, dtype=float), growth.activation,
        )  # fmt: skip


def grow(
    loss: Loss,
    X: Array,
    y: Array,
    F0: Array,
    growth: Growth,
    rng: np.random.RandomState,
    *,
    weights: Array | None = None,
    before: Grown | None = None,
    stop: Any = None,
) -> Grown:
    """Add parts until there are ``total_units``, the residuals vanish, or ``stop(grown)`` is true.

    Args:
        y: coded targets [n, K]. before: a model to go on from.
    """
    n, d = X.shape
    share: Array = np.ones(n) if weights is None else weights
    grown = before or Grown([], [], np.repeat(F0[None], n, 0), [])
    size = int(growth.subsample * n)
    inputs: Any = np.hstack([X, np.ones((n, 1))])
    if growth.device.type != "cpu":
        inputs = torch.from_numpy(inputs).to(growth.device)
    while (len(grown.subs) + grown.rejected + 1) * growth.units_per_step <= growth.total_units:
        r = loss.residual(y, grown.F)
        if np.abs(r).max() <= 1e-10 * max(1.0, float(np.abs(y).max())):
            break
        rows = slice(None) if size == n else rng.choice(n, size, replace=False)
        start = initial(d, growth.units_per_step, len(F0), growth.activation, rng)
        with np.errstate(over="ignore", invalid="ignore"):
            sub = fitted(start, inputs[rows], r[rows], share[rows], growth.training, rng)
            h = sub.of(inputs)
        now = grown.losses[-1] if grown.losses else loss.mean(y, grown.F, share)
        rho = step_size(loss, y, grown.F, h, share, growth.line_search) if np.isfinite(h).all() else 0.0
        step = growth.learning_rate * rho
        after = loss.mean(y, grown.F + step * h, share) if rho else now
        halvings = 0
        while growth.backtrack and rho and not after <= now and halvings < 30:
            step, halvings = step / 2, halvings + 1
            after = loss.mean(y, grown.F + step * h, share)
        if not rho or not np.isfinite(after) or (growth.backtrack and after > now):
            if not grown.rejected:
                warnings.warn(
                    f"part {len(grown.subs) + 1} of the network does not lower the loss and is left out",
                    stacklevel=3,
                )
            grown.rejected += 1
            continue
        grown.subs.append(sub)
        grown.steps.append(step)
        grown.F = grown.F + step * h
        grown.losses.append(after)
        if stop is not None and stop(grown):
            break
    return grown
