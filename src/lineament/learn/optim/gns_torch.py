"""The method as a ``torch.optim.Optimizer``: a step is one search, over a closure that returns the full-batch loss.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710). What is not obvious: the closure must not call ``backward()``. The optimizer differentiates the loss
itself, twice for the exact Hessian, and leaves every ``.grad`` alone. The objective must be the same at each call of one step:
deterministic, full batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lineament.core import checks
from lineament.core.gradients import flatten, unflatten
from lineament.learn.optim.gns import Counts, measured, search
from lineament.learn.optim.gns_forms import FORMS, Dense, Form, Operator, as_form, reduced
from lineament.learn.optim.gns_metric import Metric
from lineament.learn.optim.gns_rules import Smoothness
from lineament.learn.optim.gns_solvers import INDEFINITE, SOLVERS, system

_COUNTERS = ("steps", "solves", "products", "evaluations", "hessians", "skipped", "failed")


class GNS(Optimizer):
    """Gradient-regularised Newton steps with adaptive gradient-normalised smoothness.

    θ ← θ - (H + (‖g‖_*/γ) B)⁻¹ g, with γ doubled after a step and halved until the loss falls by ‖g_new‖_*²/(8λ).

    Args:
        params: the parameters, one group.
        curvature: ``"exact"`` (the Hessian of the closure's loss), ``None`` (normalised gradient), an operator over the same parameters that
            follows their weights (:func:`~lineament.core.curvature.gauss_newton`, :func:`~lineament.core.curvature.fisher`), or a function without
            arguments that returns a matrix, a diagonal, an operator or a form.
        gamma: γ_0. test, constant, aggressive: see :class:`Smoothness`.
        metric: B, ``None``, (n,) or (n, n) over the flat parameters.
        form, rank, solver, indefinite, max_probes, cg_tol, cg_steps, seed: see :func:`minimize`.
        dense: up to so many parameters the exact Hessian is a matrix; beyond, conjugate gradients.
        nonfinite: what a loss or gradient that is NaN or infinite at the present weights does: ``"raise"`` or ``"skip"`` the step.

    ``optimizer.state_dict()`` holds γ and the counts of oracle calls (:attr:`counters`).

    Raises:
        InputError: options out of range, several groups, complex parameters; from :meth:`step`, a closure that returns no
            scalar tensor with a graph.

    >>> w = torch.nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    >>> optimizer = GNS([w])
    >>> for _ in range(51):
    ...     _ = optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    >>> [round(v, 3) for v in w.tolist()]
    [1.0, 1.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Any = "exact",
        gamma: float = 1.0,
        test: str = "decrease",
        constant: float = 2.0,
        aggressive: bool = False,
        metric: Any = None,
        form: str = "as is",
        rank: int = 10,
        solver: str = "auto",
        indefinite: str = "reject",
        max_probes: int = 60,
        cg_tol: float = 0.1,
        cg_steps: int = 250,
        dense: int = 1000,
        nonfinite: str = "raise",
        seed: int = 0,
    ):
        self.rule = Smoothness(start=gamma, test=test, constant=constant, aggressive=aggressive)
        if isinstance(curvature, str):
            checks.one_of("curvature", curvature, ("exact",))
        checks.one_of("form", form, FORMS)
        checks.one_of("nonfinite", nonfinite, ("raise", "skip"))
        checks.number("max_probes", max_probes, low=1, integer=True)
        checks.number("dense", dense, low=0, integer=True)
        self._solve = {
            "solver": checks.one_of("solver", solver, SOLVERS),
            "indefinite": checks.one_of("indefinite", indefinite, INDEFINITE),
            "cg_tol": checks.number("cg_tol", cg_tol, low=0, open_low=True),
            "cg_steps": checks.number("cg_steps", cg_steps, low=1, integer=True),
        }
        self.curvature, self._metric, self._B = curvature, metric, None
        self._reduce: dict[str, Any] = {"kind": form, "rank": rank, "seed": seed}
        super().__init__(
            params, {"gamma": gamma, "max_probes": max_probes, "dense": dense, "nonfinite": nonfinite}
        )
        checks.require(
            len(self.param_groups) == 1,
            f"params: got {len(self.param_groups)} groups, expected one: the step is joint",
        )
        bad = [p for p in self._params if not p.is_floating_point()]
        checks.require(
            not bad,
            f"params: got {checks.show(bad[0]) if bad else ''}, expected real floating-point parameters",
        )

    @property
    def _params(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]

    @property
    def _kept(self) -> dict[str, Any]:
        kept = self.state[self.param_groups[0]["params"][0]]
        if not kept:
            kept.update({"gamma": self.param_groups[0]["gamma"], **dict.fromkeys(_COUNTERS, 0)})
        return kept

    @property
    def counters(self) -> dict[str, int]:
        """Steps, linear solves, products with H, evaluations of the closure, Hessians; steps skipped and searches failed."""
        return {name: int(self._kept[name]) for name in _COUNTERS}

    @property
    def gamma(self) -> float:
        """γ for the next step."""
        return float(self._kept["gamma"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One search. Returns the loss before the step; where no probe is accepted the weights stay as they were.

        Args:
            closure: returns the scalar loss, with its graph, without calling ``backward()``.
        """
        if closure is None or not callable(closure):
            raise checks.InputError(
                f"closure: got {checks.show(closure)}, expected a function that returns the loss"
            )
        group, params, kept = self.param_groups[0], self._params, self._kept
        checks.require(len(params) > 0, "params: none of them asks for gradients")
        before = [p.detach().clone() for p in params]
        counts = Counts(**{k: int(kept[k]) for k in ("solves", "products", "evaluations", "hessians")})
        counts.evaluations += 1
        exact = isinstance(self.curvature, str)
        loss, grads = _differentiated(closure, params, second=exact)
        x = flatten([b.double() for b in before])
        g = flatten([grad.detach().double() for grad in grads])
        result = loss.detach()
        kept["evaluations"] = counts.evaluations
        if not math.isfinite(float(result)) or not bool(torch.isfinite(g).all()):
            checks.require(
                group["nonfinite"] == "skip",
                f"closure: the loss is {float(result):g} and {int((~torch.isfinite(g)).sum())} of {len(g)} entries of its gradient are "
                "not finite; look for them in the data, or pass nonfinite='skip'",
            )
            kept["skipped"] += 1
            return result
        if self._B is None:
            self._B = Metric(self._metric, x)
        here = measured(x, float(result), g, self._B)
        if here.norm == 0:
            kept["steps"] += 1
            return result
        counts.hessians += 1
        form = reduced(self._form(x, params, grads, group["dense"]), like=x, **self._reduce)
        equations = system(form, self._B, here.g, here.z, **self._solve)
        eps = max(torch.finfo(p.dtype).eps for p in params)

        def evaluate(at: Tensor) -> tuple[float, Tensor]:
            _write(params, at)
            try:
                value, found = _differentiated(closure, params, second=False)
            finally:
                # The curvature may be asked for more products, which belong to the old weights.
                _restore(params, before)
            return float(value.detach()), flatten([grad.detach().double() for grad in found])

        step = search(
            evaluate, here, equations, self._B, self.rule, kept["gamma"], group["max_probes"], counts, eps
        )
        counts.products += equations.products
        kept.update(asdict(counts))
        kept["steps"] += 1
        if step.trial is None:
            kept["failed"] += 1
            return result
        kept["gamma"] = step.number
        _write(params, step.trial.new.x)
        return result

    def _form(self, x: Tensor, params: list[Tensor], grads: list[Tensor], dense: int) -> Form:
        if not isinstance(self.curvature, str):
            found = self.curvature() if callable(self.curvature) else self.curvature
            return as_form(found, x, symmetric=True)
        operator = _Hessian(params, grads, x)
        if len(x) > dense:
            return Operator(operator)
        matrix = operator @ torch.eye(len(x), dtype=x.dtype, device=x.device)
        return Dense((matrix + matrix.T) / 2)


class _Hessian:
    """Products with the Hessian through the graph of the gradient."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], like: Tensor):
        self.params = params
        self.curved = [k for k, grad in enumerate(grads) if grad.requires_grad]
        self.grads = [grads[k] for k in self.curved]
        self.shape, self.dtype, self.device = (len(like),) * 2, like.dtype, like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim == 2:
            return torch.stack([self @ column for column in v.T], 1)
        if not self.curved:
            return torch.zeros_like(v)
        parts = unflatten(v, self.params)
        found = torch.autograd.grad(
            self.grads,
            self.params,
            [parts[k].to(grad.dtype) for k, grad in zip(self.curved, self.grads)],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return flatten(found).to(v)


def _differentiated(
    closure: Callable[[], Any], params: list[Tensor], second: bool
) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        loss = closure()
        checks.require(
            isinstance(loss, Tensor) and loss.numel() == 1,
            f"closure: it returned {checks.show(loss)} ({type(loss).__name__}), expected the loss, a tensor of one element",
        )
        checks.require(
            loss.requires_grad,
            "closure: its loss has no graph; expected one computed from the parameters, with gradients",
        )
        try:
            grads = torch.autograd.grad(
                loss.reshape(()), params, create_graph=second, allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise checks.InputError(
                "closure: its graph was freed, by backward(); expected a closure that only computes and returns the loss"
            ) from error
    return loss, list(grads)


def _write(params: list[Tensor], x: Tensor) -> None:
    for parameter, part in zip(params, unflatten(x, params)):
        parameter.copy_(part)


def _restore(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(params, values):
        parameter.copy_(value)
