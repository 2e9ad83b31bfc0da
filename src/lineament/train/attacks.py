"""Projected gradient descent on the input: the nearest thing to the worst input within reach, to train and to test with.

Madry et al. 2018, arXiv 1706.06083, with the steps, objectives and random starts of Shah, Jain, Netrapalli 2021 (arXiv 2102.12781), whose robust
models it makes. Only the input is differentiated. Where a float32 loss is saturated its gradient is zero and the attack stands still, which
looks like robustness: the share of such inputs is part of the result, and ``loss="margin"`` does not saturate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import answered, class_logits, decided, frozen, logits
from lineament.core.results import Readable

NORMS = ("linf", "l2")
OBJECTIVES = ("untargeted", "targeted", "plus_one", "random_target", "hybrid")
LOSSES = ("ce", "margin")


@dataclass(frozen=True)
class Attack(Readable):
    """What :func:`pgd` found: ``delta`` to add, its ``objective``, whom it ``fooled``, and whose gradient was zero at every step."""

    delta: Float[Tensor, "batch *shape"]
    objective: Float[Tensor, "batch"]
    fooled: Bool[Tensor, "batch"]
    no_gradient: Bool[Tensor, "batch"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "fooled": float(self.fooled.double().mean()),
            "objective": float(self.objective.mean()),
            "no_gradient": float(self.no_gradient.double().mean()),
            "largest_linf": float(self.delta.abs().max()),
            "largest_l2": float(self.delta.flatten(1).norm(dim=1).max()),
        }

    def plot(self, ax: Any = None) -> Any:
        """The sizes of the perturbations, apart for inputs that were fooled and that were not."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        size = self.delta.flatten(1).norm(dim=1).cpu()
        fooled = self.fooled.cpu()
        ax.hist([size[fooled].tolist(), size[~fooled].tolist()], bins=20, label=["fooled", "not fooled"])
        ax.set(xlabel="Euclidean norm of the perturbation", ylabel="inputs")
        ax.legend()
        return ax


@dataclass(frozen=True)
class PGD:
    """The settings of an attack; called as ``attack(model, inputs, targets)`` it is :func:`pgd` with them.

    >>> net = nn.Linear(1, 2); _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])); _ = net.bias.data.zero_()
    >>> PGD(eps=0.1, step=0.1, steps=1)(net, torch.tensor([[0.5]]), torch.tensor([0])).delta.allclose(torch.tensor(-0.1))
    True
    """

    norm: str = "linf"
    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 7
    objective: str = "untargeted"
    loss: str = "ce"
    random_start: float = 0.0
    restarts: int = 1
    minimal: bool = False
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, *, seed: int = 0) -> Attack:
        return pgd(model, inputs, targets, **vars(self), seed=seed)


class Adversarial:
    """A callback of the training loop: every batch is seen as the attack changes it, so that the loss is that of the worst inputs found.

    >>> callbacks = [Adversarial(PGD(eps=0.1, step=0.05, steps=3))]
    """

    def __init__(self, attack: PGD):
        self.attack = attack

    def on_batch(self, run: Any, batch: Any) -> None:
        seed = (run.seed * 1_000_003 + run.epoch * 10_007 + run.batch) % 2**63
        batch.inputs = batch.inputs + self.attack(run.model, batch.inputs, batch.targets, seed=seed).delta


@torch.inference_mode(False)
def pgd(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    targets: Int[Tensor, "batch"],
    *,
    norm: str,
    eps: float,
    step: float,
    steps: int,
    objective: str = "untargeted",
    loss: str = "ce",
    random_start: float = 0.0,
    restarts: int = 1,
    minimal: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
) -> Attack:
    """Perturbations δ within ‖δ‖ ≤ eps that make the objective large, by steps along its gradient g.

    ``"linf"``: δ ← clip(δ + step · sign g, -eps, eps). ``"l2"``: δ ← δ + step · g / (‖g‖ + 1e-15), then scaled to ‖δ‖ ≤ eps. Then δ is clipped so
    that inputs + δ stay within ``bounds``. The model runs in eval mode.

    Args:
        inputs, targets: a batch and its labels (for ``"targeted"`` the labels it should be taken for).
        eps, step: in units of the inputs; eps = 0 gives δ = 0.
        objective: ascend the loss of the label (``"untargeted"``), descend that of the label (``"targeted"``), of label + 1
            (``"plus_one"``), of a class drawn anew at each step (``"random_target"``); of two classes, descend L(1 - y) - L(y) (``"hybrid"``).
        loss: the cross-entropy ``"ce"``, or ``"margin"``: the largest other logit minus the label's, which does not saturate.
        random_start: size of the start: uniform in ±size (linf), or one random direction each, as long as size times one uniform
            number for the batch (l2).
        restarts: that many starts; of each input the one with the largest objective is kept.
        minimal: no projection to eps: each input walks until it is misclassified (or, targeted, taken for its target), and stops there.
        bounds: (low, high) of valid inputs, or ``None``.

    Returns:
        An :class:`Attack`.

    Raises:
        InputError: settings or inputs that cannot be used, inputs outside the bounds, several restarts of the same start.

    >>> net = nn.Linear(2, 2, bias=False); _ = net.weight.data.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    >>> found = pgd(net, torch.zeros(1, 2), torch.tensor([1]), norm="l2", eps=1.0, step=0.5, steps=4, bounds=None)
    >>> [round(v, 4) for v in found.delta[0].tolist()], found.fooled.item()
    ([-0.6, -0.8], True)
    """
    inputs, targets = _checked(model, inputs, targets, bounds)
    checks.one_of("norm", norm, NORMS)
    checks.one_of("objective", objective, OBJECTIVES)
    checks.one_of("loss", loss, LOSSES)
    for name, value in (("eps", eps), ("step", step), ("random_start", random_start)):
        checks.number(name, value, low=0)
    for name, value, least in (("steps", steps, 0), ("restarts", restarts, 1)):
        checks.number(name, value, low=least, integer=True)
    varied = random_start > 0 or objective == "random_target"
    checks.require(
        restarts == 1 or varied,
        f"restarts: got {restarts} with random_start=0, which would all be the same; pass random_start, say {eps:g}",
    )
    generator = torch.Generator().manual_seed(checks.number("seed", seed, integer=True))
    goal = _Goal(objective, loss, generator)
    walk = _Walk(norm, 0.0 if minimal and eps == 0 else eps, step, steps, minimal, bounds)
    with frozen(model):
        best = None
        for _ in range(restarts):
            start = _start(inputs, norm, random_start, bounds, generator)
            if eps == 0 and not minimal:
                start = torch.zeros_like(inputs)
            found = walk(model, inputs, targets, start, goal)
            best = found if best is None else _better(best, found)
    assert best is not None
    return best


def robust_accuracy(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    targets: Int[Tensor, "batch"],
    attack: PGD,
    *,
    seed: int = 0,
    batch_size: int = 500,
) -> float:
    """The share of inputs that are still answered rightly after an attack.

    >>> net = nn.Linear(1, 2); _ = net.weight.data.copy_(torch.tensor([[-1.0], [1.0]])); _ = net.bias.data.zero_()
    >>> attack = PGD(eps=0.5, step=0.5, steps=1, bounds=None)
    >>> robust_accuracy(net, torch.tensor([[0.2], [0.9]]), torch.tensor([1, 1]), attack)
    0.5
    """
    checks.number("batch_size", batch_size, low=1, integer=True)
    right = 0
    for number, (x, y) in enumerate(zip(inputs.split(batch_size), targets.split(batch_size))):
        found = attack(model, x, y, seed=seed + number)
        with frozen(model), torch.no_grad():
            right += int((decided(logits(model(x + found.delta))) == y.to(x.device)).sum())
    return right / len(inputs)


@dataclass(frozen=True)
class _Goal:
    """The objective that is ascended, one number an input."""

    kind: str
    loss: str
    generator: torch.Generator

    def label(self, y: Tensor, classes: int) -> Tensor:
        if self.kind == "plus_one":
            return (y + 1) % classes
        if self.kind == "random_target":
            return torch.randint(classes, y.shape, generator=self.generator).to(y.device)
        return y

    def of(self, z: Tensor, y: Tensor, label: Tensor) -> Tensor:
        if self.kind == "untargeted":
            return self._loss(z, y)
        if self.kind == "hybrid":
            return self._loss(z, y) - self._loss(z, 1 - y)
        return -self._loss(z, label)

    def reached(self, z: Tensor, y: Tensor, label: Tensor) -> Tensor:
        """Whether the attack has what it wants: another answer, or the answer it aims at."""
        if self.kind in ("untargeted", "hybrid"):
            return z.argmax(1) != y
        return z.argmax(1) == label

    def _loss(self, z: Tensor, label: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(z, label, reduction="none")
        own = F.one_hot(label, z.shape[1]).bool()
        return z.masked_fill(own, -torch.inf).amax(1) - z.gather(1, label[:, None])[:, 0]


@dataclass(frozen=True)
class _Walk:
    norm: str
    eps: float
    step: float
    steps: int
    minimal: bool
    bounds: tuple[float, float] | None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, goal: _Goal) -> Attack:
        silent = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.steps):
            at = (x + delta).requires_grad_()
            with torch.enable_grad():
                z = _scores(model, at, y, goal)
                label = goal.label(y, z.shape[1])
                g = torch.autograd.grad(goal.of(z, y, label).sum(), at)[0]
            if bool(silent.any()):
                silent &= ~g.flatten(1).any(1)
            moved = self._project(_direction(g, self.norm).mul_(self.step).add_(delta), x)
            if self.minimal:
                stay = goal.reached(z.detach(), y, label)
                moved = torch.where(stay.reshape(-1, *[1] * (x.ndim - 1)), delta, moved)
            delta = moved
        with torch.no_grad():
            z = _scores(model, x + delta, y, goal)
            label = goal.label(y, z.shape[1])
            return Attack(delta, goal.of(z, y, label), goal.reached(z, y, label), silent & (self.steps > 0))

    def _project(self, delta: Tensor, x: Tensor) -> Tensor:
        """``delta``, a tensor of this step's own, brought back within eps and the bounds."""
        if not self.minimal:
            if self.norm == "linf":
                delta.clamp_(-self.eps, self.eps)
            else:
                length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(self.eps)
                scale = torch.where(length > 0, self.eps / length, 0.0)
                delta.mul_(scale.reshape(-1, *[1] * (x.ndim - 1)))
        return delta if self.bounds is None else delta.add_(x).clamp_(*self.bounds).sub_(x)


def _direction(g: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return g.sign()
    length = torch.linalg.vector_norm(g.flatten(1), dim=1).reshape(-1, *[1] * (g.ndim - 1))
    # Half precision has no 1e-15 to divide by.
    return torch.where(length > 0, g / (length + 1e-15), 0.0)


def _inside(delta: Tensor, x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return delta if bounds is None else (x + delta).clamp(*bounds) - x


def _start(x: Tensor, norm: str, size: float, bounds: Any, generator: torch.Generator) -> Tensor:
    if size == 0:
        return torch.zeros_like(x)
    if norm == "linf":
        delta = size * (2 * torch.rand(x.shape, generator=generator) - 1)
    else:
        direction = torch.randn(x.shape, generator=generator)
        length = direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        delta = direction / length * size * torch.rand((), generator=generator)
    return _inside(delta.to(x), x, bounds)


def _better(a: Attack, b: Attack) -> Attack:
    take = b.objective > a.objective
    wide = take.reshape(-1, *[1] * (a.delta.ndim - 1))
    return Attack(
        torch.where(wide, b.delta, a.delta),
        torch.where(take, b.objective, a.objective),
        torch.where(take, b.fooled, a.fooled),
        a.no_gradient & b.no_gradient,
    )


def _scores(model: nn.Module, x: Tensor, y: Tensor, goal: _Goal) -> Tensor:
    z = answered(model, x, "inputs")
    good = z.ndim == 2 and len(z) == len(x)
    checks.require(good, f"model: its logits are {checks.show(z)}, expected shape (batch, classes)")
    z = class_logits(z)
    if int(y.max()) >= z.shape[1]:
        checks.labels("targets", y, classes=z.shape[1])
    if goal.kind == "hybrid" and z.shape[1] != 2:
        raise checks.InputError(f"objective: 'hybrid' is for two classes, the model has {z.shape[1]}")
    return z


def _checked(model: Any, inputs: Any, targets: Any, bounds: Any) -> tuple[Tensor, Tensor]:
    checks.require(
        isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
    )
    checks.tensor("inputs", inputs, floating=True)
    targets = checks.labels("targets", targets, count=len(inputs)).to(inputs.device)
    targets = targets.clone() if targets.is_inference() else targets
    if bounds is not None:
        low, high = bounds
        checks.require(low < high, f"bounds: got {bounds}, expected (low, high) or None")
        least, most = float(inputs.min()), float(inputs.max())
        checks.require(
            low <= least and most <= high,
            f"bounds: the inputs lie in [{least:.4g}, {most:.4g}], outside [{low:g}, {high:g}]; pass the range that valid inputs have, or None",
        )
    return (inputs.clone() if inputs.is_inference() else inputs.detach()), targets
