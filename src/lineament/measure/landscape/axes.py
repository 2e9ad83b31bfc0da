"""Along which directions should one look at a loss? Random ones, curvature's, the optimizer's, the trajectory's, another network's.

Gabdullin 2024, arXiv 2412.10146; filter normalisation and trajectory planes are Li et al. 2018, arXiv 1712.09913. An axis is one flat
vector over the chosen parameters, in the order of ``model.named_parameters()``. What is not obvious: of two random axes the second is
made orthogonal before it is normalised, so that the norms of its slices are exactly those of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.operator import Curvature
from lineament.core.curvature.risk import chosen_parameters
from lineament.core.gradients import flatten, unflatten
from lineament.core.models import unwrapped
from lineament.core.results import Readable

NORMALISATIONS: tuple[str | None, ...] = ("filter", "layer", "model", "weight", None)
ONE_DIM = ("ignore", "scale", "copy")
_TINY = 1e-10  # the official code's, in the denominators: a slice of zeros stays one
Weights = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Axis(Readable):
    """A direction in the space of some parameters.

    Attributes:
        vector: (total,), all chosen parameters as one.
        names: these parameters, in the order of the vector.
        kind: ``"random"``, ``"hessian"``, ``"optimizer"``, ``"trajectory"``, ``"between"`` or ``"given"``.
        label: what a figure writes along it.
        buffers: what moves along with it besides parameters: the running statistics between two networks.
        info: how it was made (seed, eigenvalue, share of variance, normalisation), for records.
    """

    vector: Float[Tensor, "total"]
    names: tuple[str, ...]
    kind: str = "given"
    label: str = "axis"
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.tensor("axis", self.vector, shape=("total",), floating=True)

    def frozen(self, model: nn.Module, count: int) -> Axis:
        """The axis with some parameter tensors left where they are: from number ``count`` on, or for a negative one the first ``-count``.

        >>> net = nn.Linear(2, 1)
        >>> given(net, torch.ones(3)).frozen(net, 1).vector.tolist()
        [1.0, 1.0, 0.0]
        """
        checks.number("freeze", count, integer=True)
        if count == 0:
            return self
        parts = [part.clone() for part in self.split(model).values()]
        for index, part in enumerate(parts):
            if (index >= count) if count > 0 else (index < -count):
                part.zero_()
        return replace(self, vector=flatten(parts), info={**self.info, "freeze": count})

    def split(self, model: nn.Module) -> dict[str, Tensor]:
        """The parts of the axis by parameter."""
        known = dict(unwrapped(model).named_parameters())
        return dict(zip(self.names, unflatten(self.vector, [known[name] for name in self.names])))

    def to_dict(self) -> dict[str, Any]:
        """How it was made; the vector itself is left out."""
        return {
            "kind": self.kind,
            "label": self.label,
            "norm": float(self.vector.norm()),
            "parameters": list(self.names),
            **self.info,
        }


def flat_weights(model: Weights, names: Sequence[str]) -> Float[Tensor, "total"]:
    """The chosen parameters as one vector, in float32 at least; a copy.

    >>> flat_weights({"a": torch.ones(2), "b": torch.zeros(1)}, ["b", "a"]).tolist()
    [0.0, 1.0, 1.0]
    """
    known = dict(unwrapped(model).named_parameters()) if isinstance(model, nn.Module) else model
    parts = [known[name].detach() for name in names]
    wide = max((part.dtype for part in parts), key=lambda d: torch.finfo(d).bits)
    wide = torch.float32 if torch.finfo(wide).bits < 32 else wide
    return torch.cat([part.reshape(-1).to(wide) for part in parts])


def normalised(
    model: nn.Module,
    axis: Axis,
    how: str | None = "filter",
    *,
    order: int = 2,
    one_dim: str = "ignore",
) -> Axis:
    """An axis d scaled against the weights θ, so that a step of 1 means as much in every network.

    ``"filter"``: every slice along a tensor's first dimension, d_f ← d_f ‖θ_f‖ / ‖d_f‖; ``"layer"``: every tensor; ``"model"``: the
    whole vector; ``"weight"``: entry by entry, d ← d θ; ``None``: as it is.

    Args:
        order: 1 or 2, which norm (true absolute values: the official code's first norm lacks them).
        one_dim: for ``"filter"`` and ``"layer"``, what becomes of biases and of batch norm's scales: ``"ignore"`` leaves them where they
            are (Li et al.'s advice), ``"scale"`` scales the whole vector (the official code), ``"copy"`` takes the weights themselves.

    Raises:
        InputError: an unknown normalisation or order, an axis of other parameters.

    >>> net = nn.Linear(2, 2, bias=False); net.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> normalised(net, given(net, torch.ones(4))).vector.view(2, 2).norm(dim=1).round(decimals=4).tolist()
    [5.0, 1.0]
    """
    if how is not None:
        checks.one_of("normalise", how, [name for name in NORMALISATIONS if name])
    checks.number("order", order, low=1, high=2, integer=True)
    checks.one_of("one_dim", one_dim, ONE_DIM)
    if how is None:
        return axis
    weights = flat_weights(model, axis.names).to(axis.vector)
    if how == "weight":
        vector = axis.vector * weights
    elif how == "model":
        vector = axis.vector * (_norm(weights, order) / (_norm(axis.vector, order) + _TINY))
    else:
        shapes = [dict(unwrapped(model).named_parameters())[name] for name in axis.names]
        parts = []
        for d, w in zip(unflatten(axis.vector, shapes), unflatten(weights, shapes)):
            if d.ndim < 2 and one_dim != "scale":
                parts.append(torch.zeros_like(d) if one_dim == "ignore" else w)
            elif d.ndim >= 2 and how == "filter":
                ratio = _norm(w.flatten(1), order, 1) / (_norm(d.flatten(1), order, 1) + _TINY)
                parts.append(d * ratio.reshape(-1, *[1] * (d.ndim - 1)))
            else:
                parts.append(d * (_norm(w.reshape(-1), order) / (_norm(d.reshape(-1), order) + _TINY)))
        vector = flatten(parts)
    return replace(
        axis, vector=vector, info={**axis.info, "normalise": how, "order": order, "one_dim": one_dim}
    )


def random_axes(
    model: nn.Module,
    count: int = 2,
    *,
    normalise: str | None = "filter",
    order: int = 2,
    one_dim: str = "ignore",
    distribution: str = "normal",
    orthogonal: bool = True,
    params: str | Sequence[str] | None = None,
    freeze: int = 0,
    seed: int = 0,
) -> list[Axis]:
    """Random axes, each orthogonal to those before it.

    Args:
        normalise, order, one_dim: as for :func:`normalised`.
        distribution: ``"normal"`` (Li et al. 2018) or ``"uniform"`` on [0, 1] (the official code's).
        params: names or globs of the parameters that move.
        freeze: leaves parameter tensors where they are (:meth:`Axis.frozen`).

    >>> a, b = random_axes(nn.Linear(3, 2), normalise=None)
    >>> abs(float(a.vector @ b.vector)) < 1e-5
    True
    """
    checks.number("count", count, low=1, integer=True)
    checks.number("seed", seed, low=0, integer=True)
    checks.one_of("distribution", distribution, ("normal", "uniform"))
    names = tuple(chosen_parameters(model, params))
    weights = flat_weights(model, names)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn if distribution == "normal" else torch.rand
    axes: list[Axis] = []
    basis: list[Tensor] = []
    for number in range(count):
        # Drawn on the CPU in float64, so that a seed means the same axis on every device and in every precision.
        vector = draw(weights.shape, generator=generator, dtype=torch.float64)
        for other in basis if orthogonal else []:
            vector = vector - (vector @ other) / (other @ other) * other
        basis.append(vector)
        info = {"seed": seed, "number": number, "distribution": distribution}
        axis = Axis(vector.to(weights), names, "random", f"random direction {number + 1}", info=info)
        axes.append(normalised(model, axis, normalise, order=order, one_dim=one_dim).frozen(model, freeze))
    return axes


def hessian_axes(
    operator: Curvature,
    *,
    which: str = "magnitude",
    indices: Sequence[int] = (0, 1),
    tol: float = 1e-3,
    max_products: int = 500,
    seed: int = 0,
) -> list[Axis]:
    """Unit eigenvectors of a curvature matrix; the entry of largest magnitude is positive.

    Args:
        operator: of :mod:`lineament.core.curvature.matrices`, which has chosen the loss, the data and the parameters.
        which: ``"magnitude"`` (largest |λ|, the official choice), ``"largest"`` or ``"smallest"`` (algebraic), or ``"ends"``: the largest
            and the smallest eigenvalue.
        indices: which of that order, counted from 0; for ``"ends"`` not used.

    Returns:
        The axes; ``axis.info`` holds ``eigenvalue``, ``residual`` ‖H v - λ v‖ and whether they ``converged``.

    >>> from lineament.core.curvature.matrices import hessian
    >>> net = nn.Linear(2, 1, bias=False)
    >>> data = [(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
    >>> [round(axis.info["eigenvalue"], 3) for axis in hessian_axes(hessian(net, nn.functional.mse_loss, data))]
    [4.0, 1.0]
    """
    checks.require(
        isinstance(operator, Curvature),
        f"operator: got {checks.show(operator)}, expected a curvature such as hessian(model, loss_fn, loader)",
    )
    checks.one_of("which", which, ("magnitude", "largest", "smallest", "ends"))
    size = operator.shape[0]
    chosen = [0, 1] if which == "ends" else list(indices)
    checks.require(len(chosen) > 0, "indices: got none, expected at least one")
    checks.require(
        size > 1 or len(chosen) == 1,
        f"operator: it is of one parameter, {operator.names[0]!r}, which has one eigenvector; give indices=[0]",
    )
    for index in chosen:
        checks.number("indices", index, low=0, high=size - 1, integer=True)
    options: dict[str, Any] = {"tol": tol, "max_products": max_products, "seed": seed}
    if which == "ends":
        pairs = top_eigenpairs(operator, 1, which="both", **options)
    else:
        kind: Any = which
        pairs = top_eigenpairs(operator, max(chosen) + 1, which=kind, **options)
    axes = []
    for index in chosen[: pairs.vectors.shape[1]]:
        vector = signed(pairs.vectors[:, index])
        value = float(pairs.values[index])
        info = {
            "eigenvalue": value,
            "residual": float(pairs.residuals[index]),
            "converged": pairs.converged,
            "seed": seed,
        }
        label = f"eigenvector of curvature {value:.3g}"
        axes.append(Axis(vector, tuple(operator.names), "hessian", label, info=info))
    return axes


def given(model: nn.Module, vector: Tensor | Mapping[str, Tensor], *, label: str = "given") -> Axis:
    """An axis of one's own: a flat vector over the parameters that ask for gradients, or tensors by parameter name.

    Raises:
        InputError: unknown names, or entries of another shape than the parameters.
    """
    if isinstance(vector, Tensor):
        names = chosen_parameters(model, None)
        total = sum(dict(unwrapped(model).named_parameters())[name].numel() for name in names)
        checks.tensor("vector", vector, shape=(total,), floating=True)
        return Axis(vector.detach().to(flat_weights(model, names)), tuple(names), "given", label)
    checks.require(len(vector) > 0, "vector: got an empty mapping, expected tensors by parameter name")
    names = chosen_parameters(model, list(vector))
    for name in names:
        checks.tensor(
            f"vector[{name!r}]",
            vector[name],
            shape=tuple(dict(unwrapped(model).named_parameters())[name].shape),
        )
    return Axis(flat_weights(vector, names).to(flat_weights(model, names)), tuple(names), "given", label)


def completed(
    model: nn.Module, axis: Axis, *, normalise: str | None = None, seed: int = 0, **options: Any
) -> list[Axis]:
    """An axis and a random one orthogonal to it, of the same norm unless normalised otherwise.

    >>> net = nn.Linear(3, 1)
    >>> a, b = completed(net, given(net, torch.ones(4)))
    >>> abs(float(a.vector @ b.vector)) < 1e-5, round(float(b.vector.norm()), 4)
    (True, 2.0)
    """
    other = random_axes(model, 1, normalise=None, params=list(axis.names), seed=seed)[0]
    d, v = axis.vector, other.vector.to(axis.vector)
    square = float(d @ d)
    checks.require(square > 0, "axis: it is zero everywhere, so that nothing is orthogonal to it")
    v = v - (v @ d) / square * d
    other = replace(other, vector=v * (d.norm() / v.norm()))
    return [axis, normalised(model, other, normalise, **options)]


def _norm(x: Tensor, order: int, dim: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(x, order, dim=dim)


def signed(vector: Tensor) -> Tensor:
    return vector * (1 if float(vector[vector.abs().argmax()]) >= 0 else -1)
