"""The Hessian's ends, density and trace from one set of products, and the mean gradient beside its own sampling noise.

Stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv 1901.10159) already holds the rest: a Rayleigh-Ritz step on the extreme Ritz
vectors of all probes gives the eigenpairs, and each probe's Krylov space the sketch of a trace estimate whose remainder the other probes
sample, without a further product (Chen and Hallman 2023, arXiv 2205.01736). What is not obvious: the curvature of fewer samples reads higher, so
compare it on the same number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, shards
from lineament.core.curvature.density import Density, density_of
from lineament.core.curvature.krylov import (
    Lanczos,
    Operator,
    apply,
    at_least_single,
    lanczos_runs,
    random_signs,
    rounding,
    side_length,
)
from lineament.core.curvature.risk import Risk

# The bases of the probes that run in step take at most so much memory, and one alone has as many steps as fit.
_BASES_BYTES = 2 * 1024**3
_FEWEST_STEPS = 8
_ENDS = 2
# Parts of Ritz vectors below this size, of what the others have not, are left out: they would refine an eigenvalue by its square.
_DEPENDENT = 1e-2


@dataclass(frozen=True)
class Spectrum:
    """What one Lanczos run a probe says of a symmetric matrix.

    Attributes:
        values: (k,) the two largest and the two smallest eigenvalues, largest first; fewer of a smaller matrix.
        vectors: (size, k), of unit length.
        residuals: (k,), ‖A v - λ v‖ of each.
        density: nodes and weights of each probe.
        traces: one estimate of the trace a probe.
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "size k"]
    residuals: Float[Tensor, "k"]
    density: Density
    traces: tuple[float, ...]

    @property
    def trace(self) -> float:
        """The mean of the probes' estimates."""
        return sum(self.traces) / len(self.traces)

    @property
    def trace_error(self) -> float:
        """The standard deviation of the probes' estimates (NaN of a single one)."""
        return (
            float(torch.tensor(self.traces, dtype=torch.float64).std()) if len(self.traces) > 1 else math.nan
        )

    @property
    def top(self) -> float:
        """The largest value seen: no estimate reaches beyond the spectrum, so of two the farther is the nearer to its end."""
        return max(float(self.values[0]), float(self.density.nodes.max()))

    @property
    def bottom(self) -> float:
        return min(float(self.values[-1]), float(self.density.nodes.min()))

    def flat_shares(self, share: float = 0.01) -> Float[Tensor, "probes"]:
        """Of each probe, which share of all directions has a curvature below ``share`` of the largest."""
        weights = self.density.weights.double()
        size = max(abs(self.top), abs(self.bottom))
        flat = self.density.nodes.double().abs() < share * size if size > 0 else torch.ones_like(weights) > 0
        return (weights * flat).sum(-1) / weights.sum(-1)


def spectrum(operator: Operator, *, steps: int = 24, probes: int = 3, seed: int = 0) -> Spectrum:
    """Extreme eigenpairs, density and trace of a symmetric operator, from ``probes`` Lanczos runs of ``steps`` products each.

    Args:
        operator: a (P, P) matrix: a tensor, or anything with a shape and ``@``.
        steps: products a probe; fewer where a basis of so many vectors takes more than 2 GiB, but at least 8.
        probes: random sign vectors.

    Raises:
        InputError: an operator that is not square, no step or probe, NaN in a product.

    >>> found = spectrum(torch.diag(torch.tensor([5.0, 1.0, 1.0, -2.0])))
    >>> found.values.round(decimals=3).tolist(), round(found.trace, 3)
    ([5.0, 1.0, 1.0, -2.0], 5.0)
    """
    size = side_length(operator)
    operator = at_least_single(operator)
    checks.number("steps", steps, low=1, integer=True)
    checks.number("probes", probes, low=1, integer=True)
    row = size * torch.finfo(operator.dtype).bits // 8
    steps = min(size, steps, max(_FEWEST_STEPS, _BASES_BYTES // row))
    together = max(1, _BASES_BYTES // (steps * row))
    generator = torch.Generator().manual_seed(seed)
    starts = [random_signs(operator, (size,), generator) for _ in range(probes)]
    images = apply(operator, torch.stack(starts), "spectrum: first products").double()
    runs, candidates, traces = [], [], []
    for first in range(0, probes, together):
        part = range(first, min(first + together, probes))
        others = [torch.Generator().manual_seed(seed + probe + 1) for probe in part]
        for probe, run in zip(part, lanczos_runs(operator, steps, [starts[p] for p in part], others)):
            values, ritz = run.ritz()
            ends = sorted({*range(min(_ENDS, len(values))), *range(max(len(values) - _ENDS, 0), len(values))})
            candidates.append(run.basis @ ritz[:, ends].to(run.basis))
            traces.append(_trace(run, [p for p in range(probes) if p != probe], starts, images))
            # The bases themselves are let go.
            runs.append(Lanczos(run.diagonal, run.off_diagonal, run.basis[:, :0]))
    values, vectors, residuals = _rayleigh_ritz(operator, torch.cat(candidates, 1))
    return Spectrum(
        values,
        vectors,
        residuals,
        density_of(operator, runs, seed),
        tuple(traces),
    )


def _trace(run: Lanczos, others: Sequence[int], starts: Sequence[Tensor], images: Tensor) -> float:
    """tr(VᵀAV) of a probe's Krylov space V, and what the other probes z say of the rest: zᵀ(1 - VVᵀ) A (1 - VVᵀ) z."""
    known = float(run.diagonal.double().sum())
    t = torch.diag(run.diagonal.double())
    inside = run.off_diagonal[:-1].double()
    t += torch.diag(inside, 1) + torch.diag(inside, -1)
    rests = []
    for other in others:
        inner = (run.basis.T @ starts[other]).double().cpu()
        crossed = (run.basis.T @ images[other].to(run.basis)).double().cpu()
        whole = float(starts[other].double() @ images[other])
        rests.append(whole - 2 * float(inner @ crossed) + float(inner @ t @ inner))
    return known + sum(rests) / max(len(rests), 1)


def _rayleigh_ritz(operator: Operator, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best eigenpairs in the span of some unit vectors, at both ends, with their residuals."""
    gram, turn = torch.linalg.eigh((candidates.T @ candidates).double())
    kept = gram > _DEPENDENT**2
    q = torch.linalg.qr(candidates @ (turn[:, kept] / gram[kept].sqrt()).to(candidates)).Q
    images = apply(operator, q.T.contiguous(), "spectrum: last products").T
    inner = (q.T @ images).double()
    values, ritz = torch.linalg.eigh(0.5 * (inner + inner.T))
    count = len(values)
    order = [*range(count - 1, max(count - 1 - _ENDS, -1), -1)]
    order += [at for at in range(min(_ENDS, count) - 1, -1, -1) if at not in order]
    vectors = q @ ritz[:, order].to(q)
    residuals = (images @ ritz[:, order].to(q) - vectors * values[order].to(q)).norm(dim=0)
    # No product is known better than to its own rounding.
    least = rounding(operator) * float(values.abs().max())
    return values[order].cpu(), vectors, residuals.double().cpu().clamp_min(least)


class Pooled:
    """The curvature of all samples from those of its parts: Σ_i n_i A_i / n, whose products cost no graph of their own.

    >>> (Pooled([torch.eye(2), 3 * torch.eye(2)], [1, 1]) @ torch.ones(2)).tolist()
    [2.0, 2.0]
    """

    def __init__(self, parts: Sequence[Operator], counts: Sequence[int]):
        self._parts, self._shares = list(parts), [count / sum(counts) for count in counts]
        self.shape, self.dtype, self.device = parts[0].shape, parts[0].dtype, parts[0].device

    def __matmul__(self, other: Tensor) -> Tensor:
        found = self._parts[0] @ other * self._shares[0]
        for part, share in zip(self._parts[1:], self._shares[1:]):
            found += (part @ other) * share
        return found


@dataclass(frozen=True)
class MeanGradient:
    """The gradient of the mean loss over some samples, and how large sampling alone would make one that is zero.

    Attributes:
        norm: of the mean ḡ of the parts' gradients g_i.
        noise: √(Σ |g_i - ḡ|² / (k (k - 1))), the standard error of ḡ over k parts of the samples.
        parts: k.
        loss: the mean loss.
    """

    norm: float
    noise: float
    parts: int
    loss: float

    @property
    def ratio(self) -> float:
        """``norm`` in units of ``noise``: about 1 where the gradient is nothing but sampling noise."""
        return self.norm / self.noise if self.noise > 0 else (0.0 if self.norm == 0 else math.inf)


def mean_gradient(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    parts: Sequence[Iterable[Any]],
    *,
    params: str | Sequence[str] | None = None,
) -> MeanGradient:
    """The gradient over disjoint parts of some samples, each a loader, and what their differences say of its error.

    Args:
        parts: at least two loaders, of about as many samples each, batches ``(inputs, targets)``.
        params: names or globs; the parameters that ask for gradients by default.

    Raises:
        InputError: fewer than two parts, and as :func:`~lineament.core.curvature.matrices.hessian`.

    >>> net = nn.Linear(1, 1, bias=False); _ = net.weight.data.fill_(1.0)
    >>> data = [[(torch.ones(1, 1), torch.full((1, 1), y))] for y in (0.0, 1.0)]
    >>> found = mean_gradient(net, nn.functional.mse_loss, data)
    >>> found.norm, found.noise, found.loss
    (1.0, 1.0, 0.5)
    """
    checks.require(
        len(parts) >= 2, f"parts: got {len(parts)}, expected at least two, whose differences tell the noise"
    )
    total: Tensor | None = None
    squares = loss = seen = 0.0
    for loader in parts:
        risk = Risk(model, loss_fn, loader, params=params)
        mean, value, count = _gradient(risk)
        squares += float(mean.square().sum())
        total = mean if total is None else total + mean
        loss, seen = loss + value * count, seen + count
    assert total is not None
    k = len(parts)
    mean = total / k
    norm = float(mean.norm())
    spread = max(squares - k * norm**2, 0.0)
    return MeanGradient(norm, math.sqrt(spread / (k * (k - 1))), k, loss / seen)


def _gradient(risk: Risk) -> tuple[Tensor, float, int]:
    """The gradient of a loader's mean loss as one vector in float64, the loss, and the number of samples."""
    leaves = list(risk.leaves.values())

    def summed() -> Tensor:
        # The gradient, the loss and the count, each over all samples of this process.
        total = torch.zeros(
            sum(leaf.numel() for leaf in leaves) + 2, dtype=torch.float64, device=leaves[0].device
        )
        for chunk in shards.mine(risk.chunks()):
            with risk.ready():
                value = risk.loss(chunk)
                grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            parts = [*(g.reshape(-1).double() for g in grads), total.new_tensor([value.item(), 1.0])]
            total += torch.cat(parts) * chunk.count
        return total

    total = shards.summed("a gradient", summed)
    seen = int(total[-1])
    return total[:-2] / seen, float(total[-2]) / seen, seen
