"""The method as a ``torch.optim.Optimizer``: a step is one search, over a closure that returns the full-batch loss.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710). What is not obvious: the closure must not call ``backward()``. The optimizer differentiates the loss
itself, twice for the exact Hessian, and leaves every ``.grad`` alone. The objective must be the same at each call of one step:
deterministic, full batch. Parameter groups are one problem: the step couples all parameters, so no option can be a group's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lineament.core import checks
from lineament.core.gradients import flatten, unflatten
from lineament.core.models import made_trainable
from lineament.optim.gns.algorithm import Counts, Search, measured
from lineament.optim.gns.linear_algebra import Metric, blas_threads
from lineament.optim.gns.rules import Smoothness
from lineament.optim.gns.solvers import (
    USUAL,
    Form,
    Operator,
    Products,
    StepOptions,
    as_form,
    finite,
    reduced,
    system,
)
from lineament.optim.sam import running_statistics_kept

_JOINT = ("gamma", "rule", "step", "dense", "nonfinite")
_RULE = Smoothness()
_COUNTERS = ("steps", "solves", "products", "evaluations", "hessians", "skipped", "failed")


class GNS(Optimizer):
    """Gradient-regularised Newton steps with adaptive gradient-normalised smoothness.

    θ ← θ - (H + (‖g‖_*/γ) B)⁻¹ g, with γ doubled after a step and halved until the loss falls by ‖g_new‖_*²/(8λ).

    Args:
        params: tensors, (name, tensor) pairs or groups, on one device. The groups' parameters are concatenated.
        curvature: ``"exact"`` (the Hessian of the closure's loss), ``None`` (normalised gradient), an operator over the same parameters that
            follows their weights (:func:`~lineament.core.curvature.matrices.gauss_newton`, :func:`~lineament.core.curvature.matrices.fisher`), or a function without
            arguments that returns a matrix, a diagonal, an operator or a form.
        gamma: γ_0. rule: how γ grows and when a probe is accepted; its ``start`` does not count.
        metric: B, ``None``, (n,) or (n, n) over the flat parameters.
        step: what is kept of H and how a step is solved for.
        dense: up to so many parameters the exact Hessian is a matrix; beyond, conjugate gradients.
        nonfinite: what a loss, gradient or curvature that is NaN or infinite at the present weights does: ``"raise"`` or ``"skip"`` the step.
        model: its batch-norm layers then gather their running statistics at the weights that a step begins with only: those of the probes, of
            which some are rejected, belong to no network that is kept.

    ``optimizer.state_dict()`` holds γ and the counts of oracle calls (:attr:`counters`), one for all, in the first parameter's state. There is
    no ``lr``, and so nothing for a learning-rate scheduler: γ finds itself.

    Raises:
        InputError: options out of range, a group with other options than the first, complex parameters; from :meth:`step`, a closure that
            returns no scalar tensor with a graph, sparse gradients.

    >>> w = torch.nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    >>> optimizer = GNS([w])
    >>> for _ in range(51):
    ...     _ = optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    >>> [round(v, 3) for v in w.tolist()]
    [1.0, 1.0]
    """

    needs_closure = True  # for those who wrap optimizers, such as SAM

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Any = "exact",
        gamma: float = 1.0,
        metric: Any = None,
        rule: Smoothness = _RULE,
        step: StepOptions = USUAL,
        dense: int = 1000,
        nonfinite: str = "raise",
        model: nn.Module | None = None,
    ):
        checks.require(
            model is None or isinstance(model, nn.Module),
            f"model: got {checks.show(model)}, expected a torch.nn.Module or None",
        )
        self.curvature, self._metric, self.model = curvature, metric, model
        self._B: Metric | None = None
        options = _checked({k: v for k, v in locals().items() if k in _JOINT})
        if isinstance(curvature, str):
            checks.one_of("curvature", curvature, ("exact",))
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters join the one problem; it may repeat the options, not differ in them."""
        if isinstance(param_group, dict):
            for name in sorted(set(param_group) - {"params"}):
                near = checks.suggest(name, _JOINT, most=1)
                checks.require(
                    name in _JOINT or not near.startswith("; nearest"),
                    f"param group: unknown option {name!r}{near}",
                )
            given = _checked({**self.defaults, **param_group})
            held = self.param_groups[0] if self.param_groups else given
            for name in _JOINT:
                checks.require(
                    given[name] == held[name] or name not in param_group,
                    f"{name}: got {given[name]!r} for one group and {held[name]!r} for the first, expected one: the step is joint",
                )
                param_group[name] = held[name]
        super().add_param_group(param_group)
        group = self.param_groups[-1]["params"]
        made_trainable(group)
        problem = ""
        for p in group:
            if not p.is_floating_point():
                problem = f"params: got {checks.show(p)}, expected real floating-point parameters"
            elif p.device != self.param_groups[0]["params"][0].device:
                problem = f"params: got some on {self.param_groups[0]['params'][0].device} and some on {p.device}, expected one device"
        if problem:
            self.param_groups.pop()
            raise checks.InputError(problem)
        self._B = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class.

        Raises:
            InputError: another optimizer's state, or options out of range. Nothing was changed then.
        """
        for group in state_dict["param_groups"]:
            missing = [name for name in _JOINT if name not in group]
            checks.require(
                not missing,
                f"state_dict: got one without {', '.join(missing)}, expected one of {type(self).__name__}'s own",
            )
            _checked(group)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"curvature": self.curvature, "_metric": self._metric, "model": self.model, "_B": None}
        return {**super().__getstate__(), **kept}

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def _kept(self) -> dict[str, Any]:
        """γ and the counters: a copy, which :meth:`_keep` stores."""
        group = self.param_groups[0]
        fresh = {"gamma": group["gamma"], **dict.fromkeys(_COUNTERS, 0)}
        return {**fresh, **self.state.get(group["params"][0], {})}

    def _keep(self, kept: dict[str, Any]) -> None:
        self.state[self.param_groups[0]["params"][0]] = kept

    @property
    def counters(self) -> dict[str, int]:
        """Steps, linear solves, products with H, evaluations of the closure, Hessians; steps skipped and searches failed."""
        return {name: int(self._kept[name]) for name in _COUNTERS}

    @property
    def skipped_steps(self) -> int:
        """Steps left out because the loss, its gradient or the curvature was NaN or infinite."""
        return int(self._kept["skipped"])

    @property
    def gamma(self) -> float:
        """γ for the next step."""
        return float(self._kept["gamma"])

    @torch.inference_mode(False)
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
        options = StepOptions(**group["step"])
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
            self._keep(kept)
            return result
        if self._B is None:
            self._B = Metric(self._metric, x)
        here = measured(x, float(result), g, self._B)
        if here.norm == 0:
            kept["steps"] += 1
            self._keep(kept)
            return result
        counts.hessians += 1
        eps = max(torch.finfo(p.dtype).eps for p in params)

        def evaluate(at: Tensor) -> tuple[float, Tensor]:
            _write(params, at)
            try:
                with nullcontext() if self.model is None else running_statistics_kept(self.model):
                    value, found = _differentiated(closure, params, second=False)
            finally:
                # The curvature may be asked for more products, which belong to the old weights.
                _restore(params, before)
            return float(value.detach()), flatten([grad.detach().double() for grad in found])

        try:
            with blas_threads(len(x)):
                form = finite(self._form(x, params, grads, group["dense"]))
                equations = system(reduced(form, x, options), self._B, here.g, here.z, options)
                rule = Smoothness(**group["rule"])
                search = Search(evaluate, self._B, rule, options.max_probes, eps, counts)
                step = search.run(here, equations, kept["gamma"])
        except checks.NotFiniteError as error:
            if group["nonfinite"] == "raise":
                raise checks.InputError(
                    f"curvature: it is not finite at these weights, which are as before ({error}); nonfinite='skip' leaves such steps out"
                ) from error
            kept.update(asdict(counts))
            kept["skipped"] += 1
            self._keep(kept)
            return result
        counts.products += equations.products
        kept.update(asdict(counts))
        kept["steps"] += 1
        if step.trial is None:
            kept["failed"] += 1
            self._keep(kept)
            return result
        kept["gamma"] = step.number
        self._keep(kept)
        _write(params, step.trial.new.x)
        return result

    def _form(self, x: Tensor, params: list[Tensor], grads: list[Tensor], dense: int) -> Form:
        if not isinstance(self.curvature, str):
            found = self.curvature() if callable(self.curvature) else self.curvature
            return as_form(found, x, symmetric=True)
        operator = Products(_hessian(params, grads), x, by_column=True)
        if len(x) > dense:
            return Operator(operator)
        matrix = operator @ torch.eye(len(x), dtype=x.dtype, device=x.device)
        return as_form((matrix + matrix.T) / 2, x)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the one problem, its records as plain dicts, which a stored state can hold."""
    made = dict(options)
    checks.number("gamma", made["gamma"], low=0, open_low=True)
    checks.number("dense", made["dense"], low=0, integer=True)
    checks.one_of("nonfinite", made["nonfinite"], ("raise", "skip"))
    for name, kind in (("rule", Smoothness), ("step", StepOptions)):
        value = kind(**made[name]) if isinstance(made[name], dict) else made[name]
        checks.require(
            isinstance(value, kind), f"{name}: got {checks.show(value)}, expected a {kind.__name__}"
        )
        made[name] = asdict(value)
    return made


def _write(params: list[Tensor], x: Tensor) -> None:
    for parameter, part in zip(params, unflatten(x, params)):
        parameter.copy_(part)


def _restore(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(params, values):
        parameter.copy_(value)


def _differentiated(
    closure: Callable[[], Any], params: list[Tensor], second: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss that a closure returns, and its gradients; with their graph for ``second`` derivatives.

    Raises:
        InputError: no tensor, more than one element, no graph, a graph that was freed, sparse gradients.
    """
    with torch.enable_grad():
        loss = closure()
        checks.require(
            isinstance(loss, Tensor) and loss.numel() == 1,
            f"closure: returned {checks.show(loss)} ({type(loss).__name__}), expected the loss, a tensor of one element",
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
    checks.require(
        not any(grad.is_sparse for grad in grads),
        "closure: a gradient of its loss is sparse, but the step needs every coordinate; use dense gradients "
        "(nn.Embedding(sparse=False))",
    )
    return loss, list(grads)


def _hessian(params: list[Tensor], grads: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Products with the Hessian through the graph of the gradient."""
    curved = [k for k, grad in enumerate(grads) if grad.requires_grad]

    def product(v: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(v)
        parts = unflatten(v, params)
        found = torch.autograd.grad(
            [grads[k] for k in curved],
            params,
            [parts[k].to(grads[k].dtype) for k in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return flatten(found).to(v)

    return product
