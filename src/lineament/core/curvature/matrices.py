"""Hessian, Gauss-Newton and Fisher of an empirical risk, as operators with ``@``.

The risk is the mean loss over a loader, R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i). A product never forms a matrix: it
differentiates the gradient once more (Pearlmutter 1994), on a graph that is kept between products. A block of vectors
shares one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lineament.core import checks
from lineament.core.curvature.likelihoods import draw, likelihood_of
from lineament.core.curvature.operator import CACHE_BYTES, Curvature, Product, Vectors, pull, sandwich
from lineament.core.curvature.risk import Chunk, Risk


def hessian(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    params: str | Sequence[str] | None = None,
    batchnorm: str = "eval",
    chunk: int | None = None,
    cache_bytes: float = CACHE_BYTES,
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
            return pull([grads[i] for i in curved], leaves, [vectors[i] for i in curved], block)

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
    cache_bytes: float = CACHE_BYTES,
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
            return pull([slope], [place], [u], block)[0] if slope.requires_grad else torch.zeros_like(u)

        return sandwich(outputs, list(risk.leaves.values()), curve)

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
    cache_bytes: float = CACHE_BYTES,
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
            generator = torch.Generator().manual_seed((seed * 1_000_003 + chunk.index) % 2**63)
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
        return sandwich(losses, list(risk.leaves.values()), lambda u, block: u * scale)

    return Curvature(risk, product, cache_bytes)
