"""Hessian, Gauss-Newton and Fisher of an empirical risk, as operators with ``@``.

The risk is the mean loss over a loader, R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i). A product never forms a matrix: it
differentiates the gradient once more (Pearlmutter 1994). What is not obvious: the graph of the first gradient depends on the
data only, so it is kept, chunk by chunk, up to a ceiling of memory, and each further product costs one pass
through it: a Lanczos run pays for the forward and the first backward once. Attention runs on its unfused kernel, since the
fused ones cannot be differentiated twice. The model is never changed: products use detached leaves that share its memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core import checks
from lineament.core.gradients import flatten, unflatten
from lineament.core.models import frozen, logits
from lineament.core.spectra import (
    Density,
    Eigenpairs,
    Trace,
    lanczos,
    spectral_density,
    top_eigenpairs,
    trace,
)

__all__ = [
    "Curvature",
    "Density",
    "Eigenpairs",
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
Product = Callable[[list[Tensor]], list[Tensor]]


class Curvature:
    """A symmetric (P, P) matrix known by its products: ``C @ v`` for v of shape (P,), ``C @ V`` for V of shape (P, k).

    ``names`` lists the parameters in the order of the flat vector; :meth:`split` cuts a vector into their shapes.
    """

    def __init__(self, risk: _Risk, product: Callable[[_Chunk], Product], cache_bytes: float):
        self._risk = risk
        self._product = product
        self._cache_bytes = cache_bytes
        self._kept: dict[int, Product] = {}
        self._versions: tuple[int, ...] = ()
        self.names = list(risk.leaves)
        total = sum(leaf.numel() for leaf in risk.leaves.values())
        self.shape = (total, total)
        first = next(iter(risk.leaves.values()))
        self.dtype, self.device = first.dtype, first.device

    def __matmul__(self, other: Tensor) -> Tensor:
        checks.tensor("vector", other, floating=True)
        checks.require(
            other.ndim in (1, 2) and other.shape[0] == self.shape[0],
            f"vector: got {checks.show(other)}, expected shape ({self.shape[0]},) or ({self.shape[0]}, k)",
        )
        leaves = list(self._risk.leaves.values())
        columns = other.detach().to(self.dtype).to(self.device).reshape(self.shape[0], -1).T.contiguous()
        result = torch.zeros_like(columns)
        for chunk, product in self._products():
            for row, column in enumerate(columns):
                result[row].add_(flatten(product(unflatten(column, leaves))), alpha=chunk.weight)
        return result.T.reshape(other.shape)

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

    def _products(self) -> Iterator[tuple[_Chunk, Product]]:
        """Each chunk of the data with its product; graphs are kept for the next call while memory lasts."""
        versions = self._risk.versions()
        if versions != self._versions:
            # The weights were changed in place since: the kept graphs belong to other weights.
            self._kept.clear()
            self._versions = versions
        for index, chunk in enumerate(self._risk.chunks()):
            product = self._kept.get(index)
            if product is None:
                with self._risk.ready():
                    product = self._product(chunk)
                if self._risk.graph_bytes(chunk) * (len(self._kept) + 1) <= self._cache_bytes:
                    self._kept[index] = product
            yield chunk, product


def hessian(
    model: nn.Module, loss_fn: Callable[..., Tensor], loader: Iterable[Any], **options: Any
) -> Curvature:
    """The Hessian ∂²R/∂θ² of the mean loss over a loader.

    Args:
        model: any module whose output is its logits (or holds them, as Hugging Face models' do).
        loss_fn: ``loss_fn(logits, targets)``, the mean over a batch.
        loader: any iterable that can be walked more than once and yields ``(inputs, targets)``; inputs may be a tensor, a
            tuple of arguments or a dict of keyword arguments. An uneven last batch counts by its samples.
        params: names or globs of the parameters to differentiate; those that ask for gradients by default.
        batchnorm: ``"eval"`` (running statistics) or ``"train"`` (the statistics of each batch; the running ones stay).
        chunk: splits batches into at most so many samples, which bounds the memory of one graph.
        cache_bytes: graphs are kept between products up to about this much memory; 0 keeps none.

    Raises:
        InputError: an empty loader or one that can be walked only once, unknown parameters, a loss that is no finite scalar.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (hessian(net, F.mse_loss, data) @ torch.ones(1)).item()
    10.0
    """
    risk = _Risk(model, loss_fn, loader, **_risk_options(options))

    def product(chunk: _Chunk) -> Product:
        leaves = list(risk.leaves.values())
        grads = torch.autograd.grad(
            risk.loss(chunk), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        curved = [(index, g) for index, g in enumerate(grads) if g.requires_grad]

        def apply(vectors: list[Tensor]) -> list[Tensor]:
            if not curved:
                return [torch.zeros_like(v) for v in vectors]
            return list(
                torch.autograd.grad(
                    [g for _, g in curved],
                    leaves,
                    [vectors[index] for index, _ in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

        return apply

    return Curvature(risk, product, options.get("cache_bytes", _CACHE_BYTES))


def gauss_newton(
    model: nn.Module, loss_fn: Callable[..., Tensor], loader: Iterable[Any], **options: Any
) -> Curvature:
    """The generalised Gauss-Newton matrix (1/N) Σ_i J_iᵀ (∂²ℓ/∂z²) J_i, with J_i = ∂z_i/∂θ (Schraudolph 2002).

    It is the Hessian without the curvature of the network itself, and positive semi-definite for a loss that is convex in the logits z.
    The arguments are those of :func:`hessian`.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (gauss_newton(net, F.mse_loss, data) @ torch.ones(1)).item()
    10.0
    """
    risk = _Risk(model, loss_fn, loader, **_risk_options(options))

    def product(chunk: _Chunk) -> Product:
        outputs = risk.outputs(chunk)
        place = outputs.detach().requires_grad_()
        slope = torch.autograd.grad(risk.checked(loss_fn(place, chunk.targets)), place, create_graph=True)[0]

        def curve(u: Tensor) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(u)
            return torch.autograd.grad(slope, place, u, retain_graph=True)[0]

        return _sandwich(outputs, list(risk.leaves.values()), curve)

    return Curvature(risk, product, options.get("cache_bytes", _CACHE_BYTES))


def fisher(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    kind: str = "true",
    likelihood: str | None = None,
    samples: int = 1,
    seed: int = 0,
    **options: Any,
) -> Curvature:
    """The Fisher information matrix (1/N) Σ_i E[g_i g_iᵀ] of per-sample gradients g_i.

    ``kind="true"`` draws the targets from the model's own prediction (fixed by ``seed``, so that the operator is one matrix);
    ``"exact"`` takes that expectation in closed form, which is the Gauss-Newton matrix for the likelihoods here; ``"empirical"`` keeps the data's
    targets, which is another matrix (Kunstner et al. 2019, arXiv 1905.12558).

    Args:
        likelihood: ``"categorical"`` (cross-entropy), ``"gaussian"`` (mean squared error) or ``"bernoulli"`` (binary cross-entropy on logits); known from
            PyTorch's own losses, else to be given for ``kind="true"``.
        samples: draws per sample of the data, for ``kind="true"``.
        options: as for :func:`hessian`.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(net.weight)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (fisher(net, F.mse_loss, data, kind="empirical") @ torch.ones(1)).item()
    164.0
    """
    checks.one_of("kind", kind, ("true", "exact", "empirical"))
    checks.number("samples", samples, low=1, integer=True)
    if kind == "exact":
        _likelihood(loss_fn, likelihood)
        return gauss_newton(model, loss_fn, loader, **options)
    family = _likelihood(loss_fn, likelihood) if kind == "true" else ""
    risk = _Risk(model, loss_fn, loader, **_risk_options(options))
    drawn: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def product(chunk: _Chunk) -> Product:
        outputs = risk.outputs(chunk)
        if kind == "true" and chunk.index not in drawn:
            drawn[chunk.index] = torch.stack(
                [_draw(family, outputs.detach(), generator) for _ in range(samples)]
            )
        targets = drawn[chunk.index] if kind == "true" else chunk.targets[None]

        def one(z: Tensor, y: Tensor) -> Tensor:
            return loss_fn(z[None], y[None])

        losses = risk.checked(vmap(vmap(one), in_dims=(None, 0))(outputs, targets))
        return _sandwich(losses, list(risk.leaves.values()), lambda u: u / losses.numel())

    return Curvature(risk, product, options.get("cache_bytes", _CACHE_BYTES))


@dataclass
class _Chunk:
    index: int
    inputs: Any
    targets: Tensor
    weight: float


class _Risk:
    """The mean loss over a loader, as a function of detached leaves that share the model's memory."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        loader: Iterable[Any],
        *,
        params: str | list[str] | None = None,
        batchnorm: str = "eval",
        chunk: int | None = None,
    ):
        checks.require(
            isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
        )
        checks.require(
            not isinstance(loader, Iterator),
            "loader: got an iterator, which can be walked only once; expected a DataLoader or a list of (inputs, targets)",
        )
        self.batchnorm = checks.one_of("batchnorm", batchnorm, ("eval", "train"))
        self.chunk = None if chunk is None else checks.number("chunk", chunk, low=1, integer=True)
        self.model, self.loss_fn, self.loader = model, loss_fn, loader
        self.sources = _chosen(model, params)
        self.leaves = {name: p.detach().requires_grad_() for name, p in self.sources.items()}
        bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        checks.require(not bad, f"model: the weights hold NaN or infinite values, first in {bad[:1]}")
        self.count = sum(_length(inputs) for inputs, _ in self._batches())
        checks.require(self.count > 0, "loader: it is empty; expected at least one (inputs, targets) batch")
        self._bytes_per_sample: float | None = None

    def versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.sources.values())

    def chunks(self) -> Iterator[_Chunk]:
        index = 0
        for inputs, targets in self._batches():
            total = _length(inputs)
            step = self.chunk or total
            for start in range(0, total, step):
                part = slice(start, start + step)
                x, y = (inputs, targets) if step >= total else (_sliced(inputs, part), targets[part])
                yield _Chunk(index, x, y, _length(x) / self.count)
                index += 1

    def outputs(self, chunk: _Chunk) -> Tensor:
        # Batch norm in train mode writes its running statistics into these copies, never into the model.
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        inputs = chunk.inputs
        args = (
            ()
            if isinstance(inputs, Mapping)
            else tuple(inputs)
            if isinstance(inputs, (tuple, list))
            else (inputs,)
        )
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        return logits(functional_call(self.model, {**self.leaves, **buffers}, args, kwargs))

    def loss(self, chunk: _Chunk) -> Tensor:
        value = self.checked(self.loss_fn(self.outputs(chunk), chunk.targets))
        checks.require(
            value.numel() == 1,
            f"loss_fn: it returned {checks.show(value)}, expected a scalar, the mean over the batch",
        )
        return value

    def checked(self, value: Tensor) -> Tensor:
        finite = isinstance(value, Tensor) and bool(torch.isfinite(value).all())
        checks.require(
            finite, f"loss_fn: it returned {checks.show(value)} with NaN or infinite values, or no tensor"
        )
        return value

    def graph_bytes(self, chunk: _Chunk) -> float:
        """About what a kept graph of this chunk holds: what the forward saves, three times over for the first backward."""
        if self._bytes_per_sample is None:
            seen: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor.detach()

            with self.ready(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.loss_fn(self.outputs(chunk), chunk.targets)
            self._bytes_per_sample = 3 * sum(seen.values()) / _length(chunk.inputs)
        return self._bytes_per_sample * _length(chunk.inputs)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with frozen(self.model, requires_grad=None), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            if self.batchnorm == "train":
                for module in self.model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train()
            yield

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        device = next(iter(self.leaves.values())).device
        for batch in self.loader:
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            checks.require(pair, f"loader: it yields {checks.show(batch)}, expected (inputs, targets) pairs")
            yield _moved(batch[0], device), _moved(batch[1], device)


def _sandwich(outputs: Tensor, leaves: list[Tensor], middle: Callable[[Tensor], Tensor]) -> Product:
    """v -> Jᵀ middle(J v) for J = ∂outputs/∂leaves; J v is the derivative of uᵀJ with respect to u."""
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, leaves, dummy, create_graph=True, allow_unused=True, materialize_grads=True
    )
    live = [(index, g) for index, g in enumerate(pulled) if g.requires_grad]

    def apply(vectors: list[Tensor]) -> list[Tensor]:
        if not live:
            return [torch.zeros_like(v) for v in vectors]
        pushed = torch.autograd.grad(
            [g for _, g in live], dummy, [vectors[index] for index, _ in live], retain_graph=True
        )[0]
        return list(
            torch.autograd.grad(
                outputs, leaves, middle(pushed), retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    return apply


def _risk_options(options: Mapping[str, Any]) -> dict[str, Any]:
    known = ("params", "batchnorm", "chunk", "cache_bytes")
    for name in options:
        checks.one_of("option", name, known)
    return {name: value for name, value in options.items() if name != "cache_bytes"}


def _chosen(model: nn.Module, params: str | list[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    if params is None:
        found = {name: p for name, p in known.items() if p.requires_grad}
    else:
        patterns = [params] if isinstance(params, str) else list(params)
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                raise checks.InputError(
                    f"params: {pattern!r} names no parameter{checks.suggest(pattern, known)}"
                )
        found = {
            n: p for n, p in known.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)
        }
    checks.require(len(found) > 0, "params: the model has no parameter that asks for gradients")
    return found


def _likelihood(loss_fn: Any, given: str | None) -> str:
    if given is not None:
        return checks.one_of("likelihood", given, ("categorical", "gaussian", "bernoulli"))
    known = {
        "categorical": (F.cross_entropy, nn.CrossEntropyLoss),
        "gaussian": (F.mse_loss, nn.MSELoss),
        "bernoulli": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    }
    for name, (function, module) in known.items():
        if loss_fn is function or isinstance(loss_fn, module):
            return name
    raise checks.InputError(
        f"likelihood: it cannot be known from the loss {checks.show(loss_fn)}; give 'categorical', 'gaussian' or 'bernoulli'"
    )


def _draw(family: str, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Targets drawn from the model's own prediction; on the CPU, so that a seed means the same on every device."""
    z = outputs.cpu()
    if family == "categorical":
        flat = z.movedim(1, -1)
        drawn = torch.multinomial(flat.reshape(-1, z.shape[1]).softmax(-1), 1, generator=generator)
        drawn = drawn.reshape(flat.shape[:-1])
    elif family == "bernoulli":
        drawn = torch.bernoulli(z.sigmoid(), generator=generator)
    else:
        # The mean over d entries of (z - y)² is the negative log-likelihood of a Gaussian with variance d / 2.
        spread = (z[0].numel() / 2) ** 0.5
        drawn = z + spread * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return drawn.to(outputs.device)


def _length(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        return len(next(iter(inputs.values())))
    return len(inputs[0]) if isinstance(inputs, (tuple, list)) else len(inputs)


def _sliced(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value[part] for key, value in inputs.items()}
    return type(inputs)(x[part] for x in inputs) if isinstance(inputs, (tuple, list)) else inputs[part]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, (tuple, list)) else value
