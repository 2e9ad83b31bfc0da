"""Hessian, Gauss-Newton and Fisher of an empirical risk, as operators with ``@``.

The risk is the mean loss over a loader, R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i). A product never forms a matrix: it
differentiates the gradient once more (Pearlmutter 1994). What is not obvious: the graph of the first gradient depends on the
data only, so it is kept as long as memory allows, and each further product costs one pass through it: a Lanczos
run pays for the forward and the first backward once. A block of vectors shares one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import vmap

from lineament.core import checks
from lineament.core.gradients import unflatten
from lineament.core.likelihoods import draw, likelihood_of
from lineament.core.risk import Chunk, Risk
from lineament.core.spectra import Density, Eigenpairs, Lanczos, lanczos, spectral_density, top_eigenpairs
from lineament.core.traces import Trace, trace

__all__ = [
    "Curvature",
    "Density",
    "Eigenpairs",
    "Lanczos",
    "Trace",
    "fisher",
    "gauss_newton",
    "hessian",
    "lanczos",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]

_CACHE_BYTES = 2 * 1024**3
# A block of vectors goes through the graph at once up to this size. On the CPU that pays only while it stays in the
# caches (measured: 1.3 to 2.7 times faster there, up to 1.6 times slower beyond); elsewhere while it fits.
_BLOCK_BYTES = {"cpu": 32 * 1024**2}
Vectors = list[Tensor]
# Takes vectors in the parameters' shapes, with an axis of vectors in front when the flag says so.
Product = Callable[[Vectors, bool], Sequence[Tensor]]


class Curvature:
    """A symmetric (P, P) matrix known by its products: ``C @ v`` for v of shape (P,), ``C @ V`` for V of shape (P, k).

    ``names`` lists the parameters in the order of the flat vector; :meth:`split` cuts a vector into their shapes.
    Products follow the weights: when they change, graphs kept for the old ones are dropped.
    """

    def __init__(self, risk: Risk, product: Callable[[Chunk], Product], cache_bytes: float = _CACHE_BYTES):
        self._risk = risk
        self._product = product
        self._limit = checks.number("cache_bytes", cache_bytes, low=0)
        self._kept: list[_Kept] = []
        self._complete = False
        self._streams = False
        self._blocks = True
        self._state = risk.refresh()
        self.names = list(risk.names)
        leaves = list(risk.leaves.values())
        total = sum(leaf.numel() for leaf in leaves)
        self.shape = (total, total)
        self.dtype, self.device = leaves[0].dtype, leaves[0].device

    def __matmul__(self, other: Tensor) -> Tensor:
        checks.tensor("vector", other, floating=True, finite=False)
        checks.require(
            other.ndim in (1, 2) and other.shape[0] == self.shape[0],
            f"vector: got {checks.show(other)}, expected shape ({self.shape[0]},) or ({self.shape[0]}, k)",
        )
        other = other.detach().to(device=self.device, dtype=self.dtype)
        # Column by column: a transposed copy of a tall matrix misses the cache at every entry.
        rows = torch.stack([*other.T]) if other.ndim == 2 else other.contiguous()
        result: Tensor | None = None
        seen = 0
        for kept in self._products():
            found = self._apply(kept, rows)
            seen += kept.count
            if result is None:
                result = found
            else:
                share = kept.count / seen
                result.mul_(1 - share).add_(found, alpha=share)
        assert result is not None  # Risk.chunks raises when there is no data
        return result.T if other.ndim == 2 else result

    def split(self, vector: Float[Tensor, "total"]) -> dict[str, Tensor]:
        """The parts of a flat vector, by parameter name and in the parameters' shapes."""
        return dict(zip(self.names, unflatten(vector, list(self._risk.leaves.values()))))

    def to_scipy(self) -> LinearOperator:
        """The same operator for SciPy (``scipy.sparse.linalg.eigsh`` and its relatives), in float64 on the CPU."""

        def product(x: Any) -> Any:
            return (self @ torch.as_tensor(x.copy(), dtype=self.dtype)).double().cpu().numpy()

        return LinearOperator(self.shape, matvec=product, matmat=product, dtype="float64")  # pyright: ignore

    def dense(self, limit: int = 5000) -> Float[Tensor, "total total"]:
        """The matrix itself; refused above ``limit`` parameters."""
        checks.require(
            self.shape[0] <= limit,
            f"dense: {self.shape[0]} parameters make a matrix of that side; the limit is {limit}",
        )
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _apply(self, kept: _Kept, rows: Tensor) -> Tensor:
        """One chunk's product with a vector (P,) or with the rows of (k, P)."""
        if rows.ndim == 1:
            return self._apply(kept, rows[None])[0]
        leaves = list(self._risk.leaves.values())
        # Each vector of a block brings tensors of its own through the graph, about as many as the graph holds.
        ceiling = _BLOCK_BYTES.get(self.device.type, _CACHE_BYTES)
        width = max(1, int(ceiling // max(kept.bytes, 1))) if self._blocks else 1
        result = torch.empty_like(rows)
        for start in range(0, len(rows), width):
            block = rows[start : start + width]
            single = len(block) == 1
            parts = [
                v.to(leaf.dtype) for v, leaf in zip(unflatten(block[0] if single else block, leaves), leaves)
            ]
            try:
                found = kept.product(parts, not single)
            except RuntimeError:
                if single:
                    raise
                # An operation of the model's own that does not know of blocks; if it is another error, it comes again.
                self._blocks = False
                return self._apply(kept, rows)
            for at, row in enumerate(result[start : start + width]):
                torch.cat([(g if single else g[at]).reshape(-1).to(self.dtype) for g in found], out=row)
        return result

    def _products(self) -> Iterator[_Kept]:
        """Each chunk with its product; all graphs are kept for the next call if they fit, else none."""
        state = self._risk.refresh()
        if state != self._state:
            self._kept, self._complete, self._streams, self._state = [], False, False, state
        if self._complete:
            yield from self._kept
            return
        self._kept = []
        held = 0.0
        for chunk in self._risk.chunks():
            with self._risk.ready() as seen:
                product = self._product(chunk)
                # The first backward keeps about twice what the forward does.
                kept = _Kept(product, chunk.count, 3 * seen.bytes)
            held += kept.bytes
            self._streams = self._streams or held > self._limit
            if self._streams:
                self._kept = []
            else:
                self._kept.append(kept)
            yield kept
        self._complete = not self._streams


@dataclass(frozen=True)
class _Kept:
    product: Product
    count: int
    bytes: float


def hessian(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    params: str | Sequence[str] | None = None,
    batchnorm: str = "eval",
    chunk: int | None = None,
    cache_bytes: float = _CACHE_BYTES,
) -> Curvature:
    """The Hessian ∂²R/∂θ² of the mean loss over a loader.

    Args:
        model: any module whose output is its logits (or holds them, as Hugging Face models' do).
        loss_fn: ``loss_fn(logits, targets)``, the mean over a batch.
        loader: any iterable that can be walked more than once and yields ``(inputs, targets)``; inputs may be a tensor, a
            tuple of arguments or a dict of keyword arguments. An uneven last batch counts by its samples. A loader
            that augments at random makes another matrix of each product that walks it.
        params: names or globs of the parameters to differentiate; those that ask for gradients by default.
        batchnorm: ``"eval"`` (running statistics) or ``"train"`` (the statistics of each batch; the running ones stay).
            Dropout is off in either.
        chunk: splits batches into at most so many samples, which bounds the memory of one graph.
        cache_bytes: graphs are kept between products if all of them take up to about this much memory; 0 keeps none.

    Raises:
        InputError: an empty loader or one that can be walked only once, unknown parameters, NaN in the weights or the
            loss, a loss that is no scalar.

    Source: Pearlmutter (1994), *Fast exact multiplication by the Hessian*.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (hessian(net, nn.functional.mse_loss, data) @ torch.ones(1)).item()
    10.0
    """
    risk = Risk(model, loss_fn, loader, params=params, batchnorm=batchnorm, chunk=chunk)

    def product(chunk: Chunk) -> Product:
        leaves = list(risk.leaves.values())
        grads = torch.autograd.grad(risk.loss(chunk), leaves, create_graph=True, materialize_grads=True)
        curved = [index for index, g in enumerate(grads) if g.requires_grad]

        def apply(vectors: Vectors, block: bool) -> Sequence[Tensor]:
            if not curved:
                return [torch.zeros_like(v) for v in vectors]
            return _pull([grads[i] for i in curved], leaves, [vectors[i] for i in curved], block)

        return apply

    return Curvature(risk, product, cache_bytes)


def gauss_newton(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    params: str | Sequence[str] | None = None,
    batchnorm: str = "eval",
    chunk: int | None = None,
    cache_bytes: float = _CACHE_BYTES,
) -> Curvature:
    """The generalised Gauss-Newton matrix (1/N) Σ_i J_iᵀ (∂²ℓ/∂z²) J_i, with J_i = ∂z_i/∂θ.

    It is the Hessian without the curvature of the network itself, and positive semi-definite for a loss that is convex in
    the logits z. Arguments and errors are those of :func:`hessian`.

    Source: Schraudolph (2002), *Fast curvature matrix-vector products for second-order gradient descent*.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (gauss_newton(net, nn.functional.mse_loss, data) @ torch.ones(1)).item()
    10.0
    """
    risk = Risk(model, loss_fn, loader, params=params, batchnorm=batchnorm, chunk=chunk)

    def product(chunk: Chunk) -> Product:
        outputs = risk.outputs(chunk)
        place = outputs.detach().requires_grad_()
        loss = risk.scalar(loss_fn(place, chunk.targets))
        slope = torch.autograd.grad(loss, place, create_graph=True, materialize_grads=True)[0]

        def curve(u: Tensor, block: bool) -> Tensor:
            return _pull([slope], [place], [u], block)[0] if slope.requires_grad else torch.zeros_like(u)

        return _sandwich(outputs, list(risk.leaves.values()), curve)

    return Curvature(risk, product, cache_bytes)


def fisher(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    kind: str = "true",
    likelihood: str | None = None,
    samples: int = 1,
    seed: int = 0,
    params: str | Sequence[str] | None = None,
    batchnorm: str = "eval",
    chunk: int | None = None,
    cache_bytes: float = _CACHE_BYTES,
) -> Curvature:
    """The Fisher information matrix (1/N) Σ_i E[g_i g_iᵀ] of per-sample gradients g_i.

    ``kind="true"`` draws the targets from the model's own prediction (fixed by ``seed``, so that the operator is one
    matrix); ``"exact"`` takes that expectation in closed form, which is the Gauss-Newton matrix for the likelihoods here;
    ``"empirical"`` keeps the data's targets, which is another matrix. Where a sample has T positions (tokens, pixels,
    outputs) and the loss is their mean, the true Fisher is that mean too: E[g gᵀ] is taken T times.

    Args:
        kind: ``"true"``, ``"exact"`` or ``"empirical"``.
        likelihood: ``"categorical"`` (cross-entropy), ``"gaussian"`` (mean squared error) or ``"bernoulli"`` (binary
            cross-entropy on logits); known from PyTorch's own losses, else to be given unless ``kind="empirical"``.
        samples: draws per sample of the data, for ``kind="true"``.
        params, batchnorm, chunk, cache_bytes: as for :func:`hessian`.

    Raises:
        InputError: as :func:`hessian`, and a loss whose likelihood cannot be known.

    Source: Kunstner, Balles and Hennig (2019), arXiv 1905.12558.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(net.weight)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (fisher(net, nn.functional.mse_loss, data, kind="empirical") @ torch.ones(1)).item()
    164.0
    """
    checks.one_of("kind", kind, ("true", "exact", "empirical"))
    checks.number("samples", samples, low=1, integer=True)
    checks.number("seed", seed, low=0, integer=True)
    family = "" if kind == "empirical" else likelihood_of(loss_fn, likelihood)
    if kind == "exact":
        return gauss_newton(
            model, loss_fn, loader, params=params, batchnorm=batchnorm, chunk=chunk, cache_bytes=cache_bytes
        )
    risk = Risk(model, loss_fn, loader, params=params, batchnorm=batchnorm, chunk=chunk)

    def one(z: Tensor, y: Tensor) -> Tensor:
        return loss_fn(z[None], y[None])

    def product(chunk: Chunk) -> Product:
        outputs = risk.outputs(chunk)
        targets, times = chunk.targets[None], 1
        if kind == "true":
            # Drawn anew for each graph from a generator of the chunk's own: nothing to store, always the same draws.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk.index)
            draws = [draw(family, outputs.detach(), chunk.targets, generator) for _ in range(samples)]
            targets = torch.stack([y for y, _ in draws])
            times = draws[0][1]
        checks.require(
            len(outputs) == targets.shape[1],
            f"targets: got {targets.shape[1]} of them for {len(outputs)} rows of outputs, expected as many",
        )
        repeated = outputs.expand(len(targets), *outputs.shape).flatten(0, 1)
        losses = risk.checked(vmap(one)(repeated, targets.flatten(0, 1)))
        scale = times / losses.numel()
        return _sandwich(losses, list(risk.leaves.values()), lambda u, block: u * scale)

    return Curvature(risk, product, cache_bytes)


def _pull(
    outputs: Tensor | Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Tensor | Sequence[Tensor],
    block: bool,
) -> tuple[Tensor, ...]:
    """uᵀ ∂outputs/∂leaves on a graph that stays; with ``block``, for each of the vectors along the first axis."""

    def pull(u: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, leaves, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    # Not by ``is_grads_batched``, which passes over the rules for blocks that core.twice brings along.
    return vmap(pull)(vectors) if block else pull(vectors)


def _sandwich(outputs: Tensor, leaves: list[Tensor], middle: Callable[[Tensor, bool], Tensor]) -> Product:
    """v -> Jᵀ middle(J v) for J = ∂outputs/∂leaves; J v is the derivative of uᵀJ with respect to u."""
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, leaves, dummy, create_graph=True, allow_unused=True, materialize_grads=True
    )
    live = [index for index, g in enumerate(pulled) if g.requires_grad]

    def apply(vectors: Vectors, block: bool) -> Sequence[Tensor]:
        if not live:
            return [torch.zeros_like(v) for v in vectors]
        pushed = _pull([pulled[i] for i in live], [dummy], [vectors[i] for i in live], block)[0]
        return _pull(outputs, leaves, middle(pushed, block), block)

    return apply
