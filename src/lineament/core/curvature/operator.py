"""A curvature matrix as an operator: ``@`` runs the products of the data's chunks and keeps their graphs.

What is not obvious: the graph of the first gradient depends on the data only, so it is kept as long as memory allows, and each
further product costs one pass through it: a Lanczos run pays for the forward and the first backward once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.func import vmap

from lineament.core import checks, shards
from lineament.core.curvature.risk import Chunk, Risk, refuse_quantised
from lineament.core.gradients import unflatten
from lineament.core.models import ordinary

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
# A chunk's product, and what it weighs in the mean; none of a chunk that weighs nothing.
Weighed = tuple[Product, float]


class Curvature:
    """A symmetric (P, P) matrix known by its products: ``C @ v`` for v of shape (P,), ``C @ V`` for V of shape (P, k).

    ``names`` lists the parameters in the order of the flat vector; :meth:`split` cuts a vector into their shapes.
    Products follow the weights: when they change, graphs kept for the old ones are dropped.
    """

    @torch.inference_mode(False)
    def __init__(
        self, risk: Risk, product: Callable[[Chunk], Weighed | None], cache_bytes: float = CACHE_BYTES
    ):
        refuse_quantised(risk.model)
        self._risk = risk
        self._product = product
        self._limit = checks.number("cache_bytes", cache_bytes, low=0)
        self._kept: list[_Kept] = []
        self._complete = False
        self._streams = False
        self._blocks = True
        self._state = self._present()
        self.names = list(risk.names)
        leaves = list(risk.leaves.values())
        _keep_memory()
        total = sum(leaf.numel() for leaf in leaves)
        self.shape = (total, total)
        self.dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
        self.device = leaves[0].device

    @torch.inference_mode(False)
    def __matmul__(self, other: Tensor) -> Tensor:
        checks.tensor("vector", other, floating=True, finite=False)
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[0]:
            raise checks.InputError(
                f"vector: got {checks.show(other)}, expected shape ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        other = ordinary(other).detach().to(device=self.device, dtype=self.dtype)
        # Column by column: a transposed copy of a tall matrix misses the cache at every entry.
        turned = other.ndim == 2 and not other.T.is_contiguous()
        rows = torch.stack([*other.T]) if turned else other.t().contiguous()
        with torch.autocast(self.device.type, enabled=False):
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

    def _present(self) -> Any:
        """What kept graphs belong to."""
        return self._risk.refresh(), self._risk.plain, shards.count()

    def _mean(self, rows: Tensor) -> Tensor:
        if shards.count() == 1:
            result, seen = self._own_mean(rows)
        else:

            def weighed() -> Tensor:
                mean, weight = self._own_mean(rows)
                mean = torch.zeros_like(rows) if mean is None else mean * weight
                return torch.cat([mean.reshape(-1), mean.new_tensor([weight])])

            total = shards.summed("a product with the curvature", weighed)
            seen = float(total[-1])
            result = (total[:-1] / seen).reshape(rows.shape)
        if result is None or seen == 0:
            raise checks.InputError(
                "loss_fn: it ignores every target of the loader, so that there is nothing to average"
            )
        return result

    def _own_mean(self, rows: Tensor) -> tuple[Tensor | None, float]:
        """The mean over the chunks of this process, and what they weigh together."""
        result: Tensor | None = None
        seen = 0.0
        for kept in self._products():
            found = self._apply(kept, rows)
            seen += kept.weight
            if result is None:
                result = found
            else:
                share = kept.weight / seen
                result.mul_(1 - share).add_(found, alpha=share)
        return result, seen

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
        state = self._present()
        if state != self._state:
            self._kept, self._complete, self._streams, self._state = [], False, False, state
        if self._complete:
            yield from self._kept
            return
        self._kept = []
        held = 0.0
        for chunk in shards.mine(self._risk.chunks()):
            with self._risk.ready() as seen:
                weighed = self._product(chunk)
                if weighed is None:
                    continue
                # The first backward keeps about twice what the forward does.
                kept = _Kept(*weighed, 3 * seen.bytes)
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
    weight: float
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


def sandwich(
    risk: Risk,
    forward: Callable[[Mapping[str, Tensor] | None], Tensor],
    middle: Callable[[Tensor, bool], Tensor],
) -> Product:
    """v -> Jᵀ middle(J v) for J = ∂forward/∂leaves; J v is the derivative of uᵀJ with respect to u.

    That differentiates the backward. Where the model has an operation whose backward has no derivative, J v comes by forward mode; where the operation does
    not know that either, row by row from Jᵀ.
    """
    leaves = list(risk.leaves.values())
    outputs = forward(None)
    ways = [_by_backward(outputs, leaves), _by_forward(risk, forward), _by_rows(outputs, leaves)]

    def apply(vectors: Vectors, block: bool) -> Sequence[Tensor]:
        while True:
            try:
                pushed = ways[0](vectors, block)
                break
            except RuntimeError as error:
                if len(ways) == 1 or not underivable(error):
                    raise
                ways.pop(0)
        return pull(outputs, leaves, middle(pushed, block), block)

    return apply


def _by_backward(outputs: Tensor, leaves: list[Tensor]) -> Callable[[Vectors, bool], Tensor]:
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, leaves, dummy, create_graph=True, allow_unused=True, materialize_grads=True
    )
    live = [index for index, g in enumerate(pulled) if g.requires_grad]
    cut = once_only([pulled[i] for i in live])

    def push(vectors: Vectors, block: bool) -> Tensor:
        if cut:
            raise NotImplementedError(cut)
        if not live:
            front = vectors[0].shape[:1] if block else ()
            return outputs.new_zeros((*front, *outputs.shape))
        return pull([pulled[i] for i in live], [dummy], [vectors[i] for i in live], block)[0]

    return push


def _by_forward(
    risk: Risk, forward: Callable[[Mapping[str, Tensor] | None], Tensor]
) -> Callable[[Vectors, bool], Tensor]:
    def push(vectors: Vectors, block: bool) -> Tensor:
        if block:
            return torch.stack([push([v[k] for v in vectors], False) for k in range(len(vectors[0]))])
        with risk.ready(), torch.no_grad(), forward_ad.dual_level():
            pairs = zip(risk.leaves.items(), vectors)
            duals = {name: forward_ad.make_dual(leaf.detach(), v) for (name, leaf), v in pairs}
            value, tangent = forward_ad.unpack_dual(forward(duals))
            return torch.zeros_like(value) if tangent is None else tangent.clone()

    return push


def _by_rows(outputs: Tensor, leaves: list[Tensor]) -> Callable[[Vectors, bool], Tensor]:
    def push(vectors: Vectors, block: bool) -> Tensor:
        rows = []
        for unit in torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device):
            found = pull(outputs, leaves, unit.view_as(outputs), False)
            rows.append(sum((g * v).flatten(int(block)).sum(-1) for g, v in zip(found, vectors)))
        return torch.stack(rows, -1).reshape(*(vectors[0].shape[:1] if block else ()), *outputs.shape)

    return push


def once_only(tensors: Sequence[Tensor]) -> str:
    """The name of an operation in the graph of some gradients that cannot be differentiated once more, or ``""``.

    Autograd raises only where such an operation lies on the way to what is asked for; a backward marked ``once_differentiable`` does not,
    and its part would be zero without a word.
    """
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node).__name__ in ("Error", "NotImplemented"):
            return f"a derivative is not implemented ({node.name()})"
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return ""


def underivable(error: RuntimeError) -> bool:
    """Whether PyTorch says that it cannot differentiate an operation in the way asked for."""
    return (
        re.search(r"derivative .*not implemented|differentiate twice|forward AD|jvp function", str(error))
        is not None
    )
