"""The empirical risk of a user's ``nn.Module`` as a problem for :func:`minimize`: full batch, every curvature of the ground floor.

For Semenov, Jaggi, Doikov (2025, arXiv 2506.13710). Values and products are taken on a copy of the model, so that the user's own is as it was until
:meth:`Network.load`; and weights are written only when the point changes, so that the graphs behind the products are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.curvature.operator import Curvature
from lineament.core.curvature.risk import Risk
from lineament.core.gradients import flatten, per_sample_gradients, unflatten
from lineament.core.models import unwrapped, widened
from lineament.core.redrawing import copied
from lineament.optim.gns.linear_algebra import gram
from lineament.optim.gns.solvers import Dense, Form, LowRank, Operator

# Per-sample gradients are kept as a low-rank factor up to this size.
_FACTOR_BYTES = 512 * 1024**2


class Network:
    """R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i) over a loader, as a function of the flat vector θ.

    Kinds: ``"exact"``, the Hessian; ``"gauss_newton"``; ``"fisher"``, the empirical one of the data's labels (per-sample gradients as a low-rank
    factor where there are fewer samples than parameters, summed over chunks where there are more); ``"true_fisher"``, of the model's own labels, in closed form.

    Args:
        model, loss_fn, loader, params, batchnorm, chunk: as for :func:`lineament.core.curvature.matrices.hessian`.
        dense: up to so many parameters H is a matrix; beyond, an operator for conjugate gradients.

    Raises:
        InputError: as :func:`~lineament.core.curvature.matrices.hessian` does.

    >>> from lineament.optim.gns.algorithm import minimize
    >>> net = nn.Linear(1, 1, bias=False).double()
    >>> data = [(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [6.0]]).double())]
    >>> problem = Network(net, nn.functional.mse_loss, data)
    >>> found = minimize(problem, problem.x0, hess="gauss_newton")
    >>> problem.load(found.x); round(net.weight.item(), 6)
    3.0
    """

    kinds = ("exact", "gauss_newton", "fisher", "true_fisher")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        loader: Iterable[Any],
        *,
        params: str | Sequence[str] | None = None,
        batchnorm: str = "eval",
        chunk: int | None = None,
        dense: int = 1000,
    ):
        checks.require(
            isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
        )
        self.dense = checks.number("dense", dense, low=0, integer=True)
        self.model: nn.Module = unwrapped(model)
        self._copy = copied(self.model)
        for tensor in (*self._copy.parameters(), *self._copy.buffers()):
            tensor.data = widened(tensor.data)
        self._options: dict[str, Any] = {"params": params, "batchnorm": batchnorm, "chunk": chunk}
        self._loss_fn, self._loader = loss_fn, loader
        self.risk = Risk(self._copy, loss_fn, loader, **self._options)
        self.names = list(self.risk.names)
        self.size = len(self.x0)
        self._operators: dict[str, Curvature] = {}
        self._now: Tensor | None = None

    @property
    def x0(self) -> Float[Tensor, "n"]:
        """The user's model's weights now, flat, in float64."""
        known = dict(self.model.named_parameters())
        return flatten([known[name].detach() for name in self.names]).double()

    @property
    def eps(self) -> float:
        """The rounding of one value of the risk."""
        return torch.finfo(next(iter(self.risk.leaves.values())).dtype).eps

    def load(self, x: Float[Tensor, "n"]) -> None:
        """Write x into the user's model."""
        _write(self.model, self.names, checks.tensor("x", torch.as_tensor(x), shape=(self.size,)))

    def value_and_grad(self, x: Float[Tensor, "n"]) -> tuple[float, Tensor]:
        self._move(x)
        return self.risk.either(lambda: self._value_and_grad(x))

    def _value_and_grad(self, x: Tensor) -> tuple[float, Tensor]:
        value, total, seen = 0.0, torch.zeros_like(x), 0.0
        with self.risk.ready():
            leaves = list(self.risk.leaves.values())
            for chunk in self.risk.chunks():
                outputs = self.risk.outputs(chunk)
                weight = self.risk.weight(chunk, outputs)
                if not weight:
                    continue
                loss = self._loss_fn(outputs, chunk.targets)
                checks.require(
                    isinstance(loss, Tensor) and loss.numel() == 1,
                    f"loss_fn: it returned {checks.show(loss)} ({type(loss).__name__}), expected a scalar, the mean over the batch",
                )
                found = torch.autograd.grad(
                    loss.reshape(()), leaves, allow_unused=True, materialize_grads=True
                )
                seen += weight
                share = weight / seen
                value += (float(loss.detach()) - value) * share
                total.lerp_(flatten(found).to(total), share)
        return value, total

    def curvature(self, x: Float[Tensor, "n"], kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        self._move(x)
        if kind == "fisher":
            found = self._outer_products(x)
            if found is not None:
                return found
        operator = self._operator(kind)
        if len(x) <= self.dense:
            matrix = operator.dense().to(x)
            return Dense((matrix + matrix.T) / 2)
        return Operator(_AtPoint(self, operator, x.clone()))

    def _operator(self, kind: str) -> Curvature:
        if kind not in self._operators:
            arguments = (self._copy, self._loss_fn, self._loader)
            if kind == "exact":
                made = hessian(*arguments, **self._options)
            elif kind == "gauss_newton":
                made = gauss_newton(*arguments, **self._options)
            else:
                made = fisher(*arguments, kind="empirical" if kind == "fisher" else "exact", **self._options)
            self._operators[kind] = made
        return self._operators[kind]

    def _outer_products(self, x: Tensor) -> Form | None:
        """Σ g_i g_iᵀ / N of per-sample gradients, where the inputs are plain tensors: as the factor where samples are fewer than parameters,
        summed up chunk by chunk where the matrix is small; ``None`` where products of an operator are the cheaper way."""
        counts, plain = 0, self.risk.batchnorm == "eval"
        for chunk in self.risk.chunks():
            counts += chunk.count
            plain = plain and isinstance(chunk.inputs, Tensor) and isinstance(chunk.targets, Tensor)
        few = counts < len(x) and counts * len(x) * x.element_size() <= _FACTOR_BYTES
        if not plain or not (few or len(x) <= self.dense):
            return None
        rows: list[Tensor] = []
        total: Tensor | None = None
        for chunk in self.risk.chunks():
            # So many samples that their gradients stay within the bound.
            size = max(1, _FACTOR_BYTES // (len(x) * x.element_size()))
            for inputs, targets in zip(chunk.inputs.split(size), chunk.targets.split(size)):
                each = per_sample_gradients(self._copy, self._loss_fn, inputs, targets, params=self.names)
                part = torch.cat([each[name].flatten(1) for name in self.names], 1).to(x)
                if few:
                    rows.append(part)
                else:
                    total = gram(part) if total is None else total + gram(part)
        return LowRank(torch.cat(rows) / counts**0.5) if total is None else Dense(total / counts)

    def _move(self, x: Tensor) -> None:
        if self._now is None or not torch.equal(self._now, x):
            _write(self._copy, self.names, x)
            self._now = x.clone()
            self.risk.refresh()


class _AtPoint:
    """An operator that follows the weights, held at one point."""

    def __init__(self, network: Network, operator: Curvature, x: Tensor):
        self.network, self.operator, self.x = network, operator, x
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def __matmul__(self, v: Tensor) -> Tensor:
        self.network._move(self.x)
        return self.operator @ v


def _write(model: nn.Module, names: Sequence[str], x: Tensor) -> None:
    known = dict(model.named_parameters())
    chosen = [known[name] for name in names]
    with torch.no_grad():
        for parameter, part in zip(chosen, unflatten(x, chosen)):
            parameter.copy_(part)
