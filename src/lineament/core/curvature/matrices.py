"""Hessian, Gauss-Newton and Fisher of an empirical risk, as operators with ``@``.

The risk is the mean loss over a loader, R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i). A product never forms a matrix: it
differentiates the gradient once more (Pearlmutter 1994), on a graph that is kept between products. A block of vectors
shares one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lineament.core import checks
from lineament.core.curvature.likelihoods import draw, likelihood_of
from lineament.core.curvature.operator import (
    CACHE_BYTES,
    Curvature,
    Vectors,
    Weighed,
    once_only,
    pull,
    sandwich,
    underivable,
)
from lineament.core.curvature.risk import Chunk, Risk
from lineament.core.sites.hooks import tap


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
        loader: a pair ``(inputs, targets)`` of tensors or arrays, a ``Dataset``, a ``DataLoader`` or other batches of pairs; inputs may be a tensor, a
            tuple of arguments or a dict of keyword arguments. Each batch counts by what the loss divides by there (its samples, their
            class weights, the targets that are not ignored), so that no batch size changes the matrix. A loader that augments at random
            makes another matrix of each product that walks it.
        params: names or globs of the parameters to differentiate; those that ask for gradients by default.
        batchnorm: ``"eval"`` (running statistics) or ``"train"`` (the statistics of each batch; the running ones stay).
            Dropout is off in either.
        chunk: splits batches into at most so many samples, which bounds the memory of one graph.
        cache_bytes: graphs are kept between products if all of them take up to about this much memory; 0 keeps none.

    Raises:
        InputError: an empty loader or one that can be walked only once, unknown parameters, NaN in the weights or the
            loss, a loss that is no scalar, an operation without a second derivative.
        NoGradientError: gradients cannot pass through the model.

    A model of half precision is differentiated in float32, on a copy of its parameters.

    Source: Pearlmutter (1994), *Fast exact multiplication by the Hessian*.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
    >>> (hessian(net, nn.functional.mse_loss, data) @ torch.ones(1)).item()
    10.0
    """
    risk = Risk(model, loss_fn, loader, params=params, batchnorm=batchnorm, chunk=chunk)

    def product(chunk: Chunk) -> Weighed | None:
        leaves = list(risk.leaves.values())
        outputs = risk.reached(risk.outputs(chunk))
        weight = risk.weight(chunk, outputs)
        if not weight:
            return None
        loss = risk.scalar(loss_fn(outputs, chunk.targets))
        grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        curved = [index for index, g in enumerate(grads) if g.requires_grad]
        if said := once_only([grads[i] for i in curved]):
            raise no_second_derivative(risk, chunk, said)

        def apply(vectors: Vectors, block: bool) -> Sequence[Tensor]:
            if not curved:
                return [torch.zeros_like(v) for v in vectors]
            try:
                return pull([grads[i] for i in curved], leaves, [vectors[i] for i in curved], block)
            except RuntimeError as error:
                if not underivable(error):
                    raise
                raise no_second_derivative(risk, chunk, str(error)) from error

        return apply, weight

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

    def product(chunk: Chunk) -> Weighed | None:
        outputs = risk.reached(risk.outputs(chunk))
        weight = risk.weight(chunk, outputs)
        if not weight:
            return None
        place = outputs.detach().requires_grad_()
        loss = risk.scalar(loss_fn(place, chunk.targets))
        slope = torch.autograd.grad(loss, place, create_graph=True, materialize_grads=True)[0]
        checks.require(
            not once_only([slope]),
            "loss_fn: it has no second derivative, which Gauss-Newton needs; use fisher(..., kind='empirical'), which does not",
        )

        def curve(u: Tensor, block: bool) -> Tensor:
            return pull([slope], [place], [u], block)[0] if slope.requires_grad else torch.zeros_like(u)

        return sandwich(risk, lambda at: outputs if at is None else risk.outputs(chunk, at), curve), weight

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
    outputs) and the loss is their mean, the true Fisher is that mean too: E[g gᵀ] is taken T times. Targets below zero, such as
    cross-entropy's ignore_index of -100, are none.

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

    def product(chunk: Chunk) -> Weighed | None:
        outputs = risk.reached(risk.outputs(chunk))
        given = chunk.targets
        targets, times = given[None], 1
        labelled = torch.ones_like(given, dtype=torch.bool)
        if not given.is_floating_point() and (family or "categorical") == "categorical":
            labelled = given >= 0
            if kind == "empirical" and given.ndim == 1 and len(given) == len(outputs):
                # What the loss ignores, by whatever number, has no loss of its own.
                with torch.no_grad():
                    labelled = labelled & ~vmap(one)(torch.zeros_like(outputs), given).isnan()
        if kind == "true":
            # Drawn anew for each graph by the samples' places in the data: nothing to store, always the same draws.
            seeds = [(seed * samples + k) * 1_000_003 for k in range(samples)]
            draws = [draw(family, outputs.detach(), given, each, chunk.start) for each in seeds]
            targets = torch.stack([y for y, _ in draws])
            if targets.shape[1:] == given.shape and not bool(labelled.all()):
                targets = torch.where(labelled, targets, given)
            times = draws[0][1]
        checks.require(
            len(outputs) == targets.shape[1],
            f"targets: got {targets.shape[1]} of them for {len(outputs)} rows of outputs, expected as many",
        )
        # A sample counts by its positions that have a target, T² E[g gᵀ] for the mean over T of them.
        parts = labelled.flatten(1).double().mean(1) if labelled.ndim > 1 else labelled.double()
        keep = parts > 0
        if not bool(keep.any()):
            return None
        parts = (times * parts[keep] if kind == "true" else torch.ones_like(parts[keep])).to(outputs.dtype)
        scale = (parts.square() / (parts.sum() * len(targets))).repeat(len(targets))

        def forward(at: Mapping[str, Tensor] | None) -> Tensor:
            z = (outputs if at is None else risk.outputs(chunk, at))[keep]
            repeated = z.expand(len(targets), *z.shape).flatten(0, 1)
            return risk.checked(vmap(one)(repeated, targets[:, keep].flatten(0, 1)))

        return sandwich(risk, forward, lambda u, block: u * scale), float(parts.sum())

    return Curvature(risk, product, cache_bytes)


def no_second_derivative(risk: Risk, chunk: Chunk, said: str) -> checks.InputError:
    """The error that names the module whose operation cannot be differentiated twice, and what can be done without."""
    names = [name for name, _ in risk.model.named_modules()]
    entered: dict[str, Tensor] = {}
    found: list[str] = []

    def leave(name: str, y: Tensor) -> None:
        x = entered[name]
        own = [*risk.leaves.values(), *([x] if x.requires_grad else [])]
        if found or not y.requires_grad or not own:
            return
        grads = torch.autograd.grad(
            y.square().sum(), own, create_graph=True, allow_unused=True, materialize_grads=True
        )
        curved = [g for g in grads if g.requires_grad]
        bad = bool(once_only(curved))
        try:
            if curved and not bad:
                pull(curved, own, [torch.ones_like(g) for g in curved], False)
        except RuntimeError:
            bad = True
        if bad:
            found.append(name)

    before = {f"{name}:in": functools.partial(entered.__setitem__, name) for name in names}
    behind = {f"{name}:out": functools.partial(leave, name) for name in names}
    with risk.ready(), tap(risk.model, before), tap(risk.model, behind):
        risk.outputs(chunk)
    kind = {name: type(module).__name__ for name, module in risk.model.named_modules()}
    where = (
        f"model: {found[0] or 'the model'!r} ({kind[found[0]]})"
        if found
        else "model or loss_fn: an operation"
    )
    return checks.InputError(
        f"{where} has no second derivative ({said.splitlines()[0].rstrip('.')}); use gauss_newton or fisher, which need first derivatives of the "
        "model only, or params that do not lie before it"
    )
