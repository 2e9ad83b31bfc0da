"""The trace of a symmetric operator that is known by its products only, with a standard error.

Three unbiased estimators, in order of sophistication. The standard errors come from the spread of the estimates; those of Hutch++ and
XTrace are approximate, because their parts share a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.curvature.krylov import (
    Operator,
    at_least_single,
    random_normal,
    random_signs,
    rounding,
    side_length,
)
from lineament.core.results import Readable

_PROBES = 8  # random vectors at a time
_BLOCK_NUMBERS = 2**21  # small operators multiply many vectors faster at once
# A sketch whose singular values reach below so many rounding errors of the largest is not inverted.
_ROUNDING = 100


@dataclass(frozen=True)
class Trace(Readable):
    """An estimate of the trace.

    Attributes:
        value: the estimate.
        standard_error: of ``value``, in its units; 0 only where ``value`` is exact, and NaN where the samples cannot tell (a single one, or
            all of them the same).
        products: how many products with the matrix it took.
        method: ``"xtrace"``, ``"hutch++"`` or ``"hutchinson"``.
    """

    value: float
    standard_error: float
    products: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        # JSON has no NaN.
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {**vars(self), "standard_error": error}

    def plot(self, ax: Any = None) -> Any:
        """The estimate with two standard errors to either side."""
        ax = results.axes(ax)
        error = 0.0 if math.isnan(self.standard_error) else 2 * self.standard_error
        ax.errorbar([self.method], [self.value], yerr=[error], fmt="o", capsize=4)
        ax.set(ylabel="trace")
        return ax


def trace(
    operator: Operator,
    products: int = 30,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    seed: int = 0,
) -> Trace:
    """An unbiased estimate of the trace from a number of products, with its standard error.

    ``"hutchinson"`` averages vᵀ A v over random signs. ``"hutch++"`` (Meyer et al. 2021, arXiv 2010.09649) takes the trace on the range of a
    sketch exactly and samples the rest. ``"xtrace"`` (Epperly, Tropp and Webber 2024, arXiv 2301.07825) does so once for each test vector left out,
    which makes use of every product twice; best where the spectrum decays. Where there are products for every direction, either takes the
    trace itself.

    Args:
        operator: a (P, P) matrix: a tensor, or anything with a shape and ``@``.
        products: products to spend, at least 2 (``xtrace``) or 3 (``hutch++``).

    Raises:
        InputError: an operator that is not square, too few products, an unknown method, NaN in a product.

    >>> abs(trace(torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])), 6).value - 6.0) < 1e-5
    True
    """
    checks.one_of("method", method, ("xtrace", "hutch++", "hutchinson"))
    checks.number(
        "products", products, low={"xtrace": 2, "hutch++": 3, "hutchinson": 1}[method], integer=True
    )
    size = side_length(operator)
    operator = at_least_single(operator)
    generator = torch.Generator().manual_seed(seed)
    if method != "hutchinson" and products >= size:
        every = torch.eye(size, dtype=operator.dtype, device=operator.device)
        return Trace(float(_images(operator, every).double().trace()), 0.0, size, method)
    if method == "hutchinson":
        return _average(operator, _forms(operator, products, generator), 0.0, products, method)
    if method == "hutch++":
        width = products // 3
        sketch = _images(operator, random_signs(operator, (size, width), generator))
        return _hutchpp(operator, torch.linalg.qr(sketch).Q, width, products, generator, method)
    return _xtrace(operator, products // 2, generator)


def _hutchpp(
    operator: Operator, q: Tensor, spent: int, products: int, generator: torch.Generator, method: str
) -> Trace:
    """The trace on the range of q, and that outside it from as many samples as there are products left."""
    known = float((q * _images(operator, q)).sum(dtype=torch.float64))
    signs = random_signs(operator, (side_length(operator), products - spent - q.shape[1]), generator)
    signs = signs - q @ (q.T @ signs)
    samples = (signs * _images(operator, signs)).sum(0, dtype=torch.float64)
    return _average(operator, samples, known, products, method)


def _forms(operator: Operator, count: int, generator: torch.Generator) -> Tensor:
    """vᵀ A v of random signs; a few at a time, so that the memory does not grow with their number."""
    found = []
    for start in progress(range(0, count, _PROBES), "trace"):
        signs = random_signs(operator, (min(_PROBES, count - start), side_length(operator)), generator)
        found.append((signs * (operator @ signs.T).T).sum(1, dtype=torch.float64))
    return torch.cat(found)


def _xtrace(operator: Operator, width: int, generator: torch.Generator) -> Trace:
    size = side_length(operator)
    omega = random_normal(operator, (size, width), generator)
    image = _images(operator, omega).double()
    omega = omega.double()
    left, singular, _ = torch.linalg.svd(image, full_matrices=False)
    if not float(singular[0]):
        return Trace(
            0.0, 0.0, width, "xtrace"
        )  # normal vectors, and nothing left of them: the matrix is zero
    rank = int((singular > _ROUNDING * rounding(operator) * float(singular[0])).sum())
    if 1 < width != rank:
        # Which directions leave with a test vector cannot be told from rounding. New vectors sample what lies outside, if anything does.
        q = left[:, : min(rank, width - 2)].to(operator.dtype)
        return _hutchpp(operator, q, width, 2 * width, generator, "xtrace")
    q, r = torch.linalg.qr(image)
    z = _images(operator, q.to(operator.dtype)).double()
    h = q.T @ z
    # Column i of s is the direction of range(q) that leaves with test vector i.
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    w = q.T @ omega
    x = w - s * (s * w).sum(0)
    outside = omega - q @ x
    quadratic = (omega * image).sum(0) - 2 * (x * (z.T @ omega)).sum(0) + (x * (h @ x)).sum(0)
    sampled = (size - width + 1) * quadratic / outside.square().sum(0)
    estimates = torch.trace(h) - (s * (h @ s)).sum(0) + sampled
    return _average(operator, estimates, 0.0, 2 * width, "xtrace")


def _images(operator: Operator, columns: Tensor) -> Tensor:
    """A times each column, a few at a time."""
    blocks = columns.split(max(_PROBES, _BLOCK_NUMBERS // len(columns)), dim=1)
    return torch.cat([operator @ block for block in progress(blocks, "trace")], 1)


def _average(operator: Operator, samples: Tensor, known: float, products: int, method: str) -> Trace:
    count = samples.numel()
    value = known + float(samples.double().mean())
    spread = float(samples.double().std()) if count > 1 else 0.0
    # What is sampled may be nothing; what the products round stays.
    error = max(spread / math.sqrt(count), rounding(operator) * abs(value)) if spread else math.nan
    return Trace(value, error, products, method)
