"""A curvature matrix as an operator: ``@`` runs the products of the data's chunks and keeps their graphs.

What is not obvious: the graph of the first gradient depends on the data only, so it is kept as long as memory allows, and each
further product costs one pass through it: a Lanczos run pays for the forward and the first backward once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.func import vmap

from lineament.core import checks
from lineament.core.curvature.risk import Chunk, Risk
from lineament.core.gradients import unflatten

CACHE_BYTES = 2 * 1024**3
# A block of vectors goes through the graph at once up to this size, and from so many vectors on. On the CPU that pays only for
# many vectors through a small graph (measured: 32 to 128 up to 1.4 times faster, for a perceptron of 26,000 weights as fast; eight
# up to 1.7 times slower); on a GPU up to graphs that fill it (measured on an H200 for eight: 1.8 to 5 times faster where one product is bound by its calls, and
# 2.7 times slower through convolutions that keep 768 MiB, whose blocks become grouped convolutions); elsewhere while it fits.
_BLOCK_BYTES = {"cpu": 32 * 1024**2, "cuda": 640 * 1024**2}
_LEAST_BLOCK = {"cpu": 24}
Vectors = list[Tensor]
# Takes vectors in the parameters' shapes, with an axis of vectors in front when the flag says so.
Product = Callable[[Vectors, bool], Sequence[Tensor]]


class Curvature:
    """A symmetric (P, P) matrix known by its products: ``C @ v`` for v of shape (P,), ``C @ V`` for V of shape (P, k).

    ``names`` lists the parameters in the order of the flat vector; :meth:`split` cuts a vector into their shapes.
    Products follow the weights: when they change, graphs kept for the old ones are dropped.
    """

    def __init__(self, risk: Risk, product: Callable[[Chunk], Product], cache_bytes: float = CACHE_BYTES):
        self._risk = risk
        self._product = product
        self._limit = checks.number("cache_bytes", cache_bytes, low=0)
        self._kept: list[_Kept] = []
        self._complete = False
        self._streams = False
        self._blocks = True
        self._state: Any = (risk.refresh(), risk.plain)
        self.names = list(risk.names)
        leaves = list(risk.leaves.values())
        _keep_memory()
        total = sum(leaf.numel() for leaf in leaves)
        self.shape = (total, total)
        self.dtype, self.device = leaves[0].dtype, leaves[0].device

    def __matmul__(self, other: Tensor) -> Tensor:
        checks.tensor("vector", other, floating=True, finite=False)
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[0]:
            raise checks.InputError(
                f"vector: got {checks.show(other)}, expected shape ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        other = other.detach().to(device=self.device, dtype=self.dtype)
        # Column by column: a transposed copy of a tall matrix misses the cache at every entry.
        turned = other.ndim == 2 and not other.T.is_contiguous()
        rows = torch.stack([*other.T]) if turned else other.t().contiguous()
        result = self._risk.either(lambda: self._mean(rows))
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

    def _mean(self, rows: Tensor) -> Tensor:
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
        return result

    def _apply(self, kept: _Kept, rows: Tensor) -> Tensor:
        """One chunk's product with a vector (P,) or with the rows of (k, P)."""
        if rows.ndim == 1:
            return self._apply(kept, rows[None])[0]
        leaves = list(self._risk.leaves.values())
        # Each vector of a block brings tensors of its own through the graph, about as many as the graph holds, and ends as one.
        ceiling = _BLOCK_BYTES.get(self.device.type, CACHE_BYTES)
        own = kept.bytes + rows.element_size() * rows.shape[1]
        width = max(1, int(ceiling // own)) if self._blocks else 1
        least = _LEAST_BLOCK.get(self.device.type, 2)
        result = torch.empty_like(rows)
        start = 0
        while start < len(rows):
            block = rows[start : start + (width if min(width, len(rows) - start) >= least else 1)]
            single = len(block) == 1
            parts = unflatten(block[0] if single else block, leaves)
            parts = [v if v.dtype == leaf.dtype else v.to(leaf.dtype) for v, leaf in zip(parts, leaves)]
            try:
                found = kept.product(parts, not single)
            except RuntimeError:
                if single:
                    raise
                # An operation of the model's own that does not know of blocks; if it is another error, it comes again.
                self._blocks = False
                return self._apply(kept, rows)
            for at, row in enumerate(result[start : start + len(block)]):
                ours = [(g if single else g[at]).reshape(-1) for g in found]
                torch.cat([g if g.dtype == self.dtype else g.to(self.dtype) for g in ours], out=row)
            start += len(block)
        return result

    def _products(self) -> Iterator[_Kept]:
        """Each chunk with its product; all graphs are kept for the next call if they fit, else none."""
        state = (self._risk.refresh(), self._risk.plain)
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


@functools.cache
def _keep_memory() -> None:
    """Keep what small products free from going back to the system at once, from where it returns page by page.

    glibc gives the end of its heap back when it is free, above a threshold that follows the largest block freed so far, up to one of 32 MiB:
    a block that nothing is written to sets it. Measured for a perceptron: 200 page faults a product, a fifth of its time, before.
    """
    torch.empty(31 * 1024**2, dtype=torch.uint8)


@dataclass(frozen=True)
class _Kept:
    product: Product
    count: int
    bytes: float


def pull(
    outputs: Tensor | Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Tensor | Sequence[Tensor],
    block: bool,
) -> tuple[Tensor, ...]:
    """uᵀ ∂outputs/∂leaves on a graph that stays; with ``block``, for each of the vectors along the first axis."""

    def one(u: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, leaves, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    # Not by ``is_grads_batched``, which ignores the vmap rules of the fast convolutions.
    return vmap(one)(vectors) if block else one(vectors)


def sandwich(outputs: Tensor, leaves: list[Tensor], middle: Callable[[Tensor, bool], Tensor]) -> Product:
    """v -> Jᵀ middle(J v) for J = ∂outputs/∂leaves; J v is the derivative of uᵀJ with respect to u."""
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, leaves, dummy, create_graph=True, allow_unused=True, materialize_grads=True
    )
    live = [index for index, g in enumerate(pulled) if g.requires_grad]

    def apply(vectors: Vectors, block: bool) -> Sequence[Tensor]:
        if not live:
            return [torch.zeros_like(v) for v in vectors]
        pushed = pull([pulled[i] for i in live], [dummy], [vectors[i] for i in live], block)[0]
        return pull(outputs, leaves, middle(pushed, block), block)

    return apply
