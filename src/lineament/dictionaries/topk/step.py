"""The gradients of a TopK step, for the kept latents alone.

A sparse code touches k rows of the encoder and of the decoder. The two weight gradients are sums over the rows of a batch by latent, taken
over the indices sorted by latent: one ``embedding_bag`` each, no [batch, width] gradient, no [batch, k, d] tensor, and no atomic additions, so
that every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.codes import Codes
from lineament.core.shards import totals
from lineament.dictionaries.topk import shards
from lineament.dictionaries.topk.select import dots, kernels, select


def decoded(indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
    """(rows, d): the sum of each row's atoms with its values, differentiable in the values and the atoms.

    >>> decoded(torch.tensor([[1, 0]]), torch.tensor([[2.0, 1.0]]), torch.eye(2)).tolist()
    [[1.0, 2.0]]
    """
    return _Decoded.apply(indices, values, atoms)  # pyright: ignore[reportReturnType]


def picked(h: Tensor, encoder: Tensor, bias: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The known values relu(z) of the kept latents, z = h @ encoder[i] + bias[i], differentiable in h, encoder and bias.

    >>> h, w = torch.tensor([[2.0]]), torch.tensor([[3.0]], requires_grad=True)
    >>> picked(h, w, torch.zeros(1), torch.tensor([[0]]), torch.tensor([[6.0]])).sum().backward()
    >>> w.grad.item()
    2.0
    """
    return _Picked.apply(h, encoder, bias, indices, values)  # pyright: ignore[reportReturnType]


def written(dictionary: Any, indices: Tensor, values: Tensor) -> Tensor:
    """:func:`decoded` with a dictionary's atoms, wherever they lie: what its codes write, without the bias."""
    atoms = dictionary.W_dec
    if not shards.divided(atoms):
        return decoded(indices, values, atoms)
    return totals(decoded(*shards.own(indices, values, dictionary.width), shards.local(atoms)))


def kept(dictionary: Any, h: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """:func:`picked` with a dictionary's encoder, wherever it lies."""
    encoder, bias = dictionary.W_enc, dictionary.b_enc
    if not shards.divided(encoder):
        return picked(h, encoder, bias, indices, values)
    first, stop = shards.bounds(dictionary.width)
    mine = (indices >= first) & (indices < stop)
    h, encoder, bias = shards.copied(h), shards.local(encoder), shards.local(bias)
    return totals(picked(h, encoder, bias, (indices - first) * mine, values * mine))


def _mixed(indices: Tensor, weights: Tensor, atoms: Tensor) -> Tensor:
    """:func:`decoded` outside of a graph."""
    weights, atoms = weights.detach(), atoms.detach()
    if not indices.numel():
        return weights.new_zeros(len(indices), atoms.shape[1])
    if fast := kernels(weights, atoms):
        return fast.decode(indices, weights, atoms)
    return F.embedding_bag(indices, atoms, mode="sum", per_sample_weights=weights)


class ByLatent:
    """Sums over the rows of a batch by latent: out[m] = sum over (b, j) with indices[b, j] = m of weights[b, j] * rows[b]."""

    def __init__(self, indices: Tensor, width: int):
        flat = indices.flatten()
        self._latents, self.order = flat.sort(stable=True)
        self._rows = torch.div(self.order, max(indices.shape[-1], 1), rounding_mode="floor")
        steps = torch.arange(width + 1, device=flat.device, dtype=flat.dtype)
        self.starts = torch.searchsorted(self._latents, steps)
        self.width = width

    def sums(self, weights: Tensor, rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """(latents, d), for the latents from ``first`` to ``last``."""
        last = self.width if last is None else last
        if fast := kernels(weights, rows):
            return fast.sums(self.order, self.starts[first : last + 1], weights, rows)
        a, b = (
            (0, len(self.order)) if (first, last) == (0, self.width) else self.starts[[first, last]].tolist()
        )
        part = slice(a, b)
        return F.embedding_bag(
            self._rows[part],
            rows,
            self.starts[first:last] - a,
            mode="sum",
            per_sample_weights=weights.flatten()[self.order[part]],
        )

    def totals(self, weights: Tensor) -> Tensor:
        """(width): the sum of the weights of each latent."""
        return self.sums(weights, weights.new_ones(len(weights), 1)).squeeze(1)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, atoms)
        return _mixed(indices, values, atoms)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        indices, values, atoms = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        to_values = dots(indices, atoms, grad) if ctx.needs_input_grad[1] else None
        to_atoms = ByLatent(indices, len(atoms)).sums(values, grad) if ctx.needs_input_grad[2] else None
        return None, to_values, to_atoms


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, encoder: Tensor, bias: Tensor, indices: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(h, encoder, indices, values)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, encoder, indices, values = ctx.saved_tensors
        grad = grads[0] * (values > 0)
        to_h = to_encoder = to_bias = None
        if ctx.needs_input_grad[0]:
            to_h = _mixed(indices, grad, encoder)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            by_latent = ByLatent(indices, len(encoder))
            to_encoder = by_latent.sums(grad, h) if ctx.needs_input_grad[1] else None
            to_bias = by_latent.totals(grad) if ctx.needs_input_grad[2] else None
        return to_h, to_encoder, to_bias, None, None


@dataclass(frozen=True)
class Losses:
    """What a step measured: numbers as tensors, so that nothing waits for the device.

    Attributes:
        reconstruction: mean |x - x'|^2 over the data's variance (of the batch where none was given).
        auxiliary: how badly the dead latents explain what is left; 0 where none is dead.
    """

    reconstruction: Tensor
    auxiliary: Tensor


def losses(
    dictionary: Any,
    x: Tensor,
    codes: Codes,
    *,
    dead: Tensor | None = None,
    k_aux: int = 256,
    variance: Tensor | float | None = None,
) -> Losses:
    """The loss of a TopK dictionary on rows x, for autograd.

        reconstruction = mean_b |x_b - x'_b|^2 / variance
        auxiliary = mean_b |a_b - e_b|^2 / mean_b |e_b - mean e|^2, with the error e = x - x' held constant (0 where that is 0 / 0)

    a = sum of the k_aux strongest dead latents' relu(z) w_i, without the bias: gradients reach the encoder and the decoder of dead latents, and
    nothing else. The training minimises reconstruction + alpha * auxiliary.

    Args:
        codes: of the same rows, such as ``dictionary.codes(x)``.
        dead: (width) bool. k_aux: at most so many of them a row.
        variance: mean |x - mean x|^2 of the data; ``None``: that of the batch, held constant.
    """
    error = x - dictionary.decode(codes)
    reconstruction = error.square().sum() / len(x) / _variance(x, variance)
    held = error.detach()
    aux = auxiliary_codes(dictionary, dictionary.rows(x), dead, k_aux)
    if aux is None:
        return Losses(reconstruction, torch.zeros_like(reconstruction))
    left = written(dictionary, aux.indices, aux.values) - held
    return Losses(reconstruction, left.square().sum() * _inverse(_spread(held)))


def auxiliary_codes(dictionary: Any, h: Tensor, dead: Tensor | None, k_aux: int) -> Codes | None:
    """The min(k_aux, dead) dead latents of largest z in each row of centred inputs, with relu(z); ``None`` where none is dead."""
    places = dead.nonzero().flatten() if dead is not None and k_aux else None
    if places is None or not len(places):
        return None
    k = min(k_aux, len(places))
    first, stop = (
        shards.bounds(dictionary.width) if shards.divided(dictionary.W_enc) else (0, dictionary.width)
    )
    here = places[(places >= first) & (places < stop)]
    encoder, bias = (
        shards.local(each).detach()[here - first] for each in (dictionary.W_enc, dictionary.b_enc)
    )
    among, values = select(h.detach(), encoder, bias, min(k, len(here)))
    indices = here[among]
    if shards.divided(dictionary.W_enc):
        indices, values = shards.best(indices, values, values, k)
    if torch.is_grad_enabled():
        values = kept(dictionary, h, indices, values)
    return Codes(indices, values, dictionary.width)


@torch.no_grad()
def gradients(
    dictionary: Any,
    x: Tensor,
    codes: Codes,
    *,
    alpha: float = 1 / 32,
    dead: Tensor | None = None,
    k_aux: int = 256,
    variance: Tensor | float | None = None,
) -> tuple[dict[str, Tensor], Losses]:
    """The gradients of ``reconstruction + alpha * auxiliary`` by parameter, as autograd would give them of :func:`losses`, in half of the time.

    Arguments as for :func:`losses`; ``codes`` as found without a graph. Of a divided dictionary they are those of this process's features.
    """
    h = dictionary.rows(x)
    rows, width = len(x), dictionary.width
    var = _variance(x, variance)
    error = x - dictionary.decode(codes)
    scale = -2 / (rows * var)
    parts = [(codes, error * scale)]
    reconstruction = error.square().sum() / rows / var
    auxiliary = torch.zeros_like(reconstruction)
    aux = auxiliary_codes(dictionary, h, dead, k_aux)
    if aux is not None:
        left = written(dictionary, aux.indices, aux.values) - error
        share = _inverse(_spread(error))
        auxiliary = left.square().sum() * share
        parts.append((aux, left.mul_(2 * alpha * share)))
    encoder, atoms = shards.local(dictionary.W_enc), shards.local(dictionary.W_dec)
    divided = shards.divided(dictionary.W_dec)
    found: dict[str, Tensor] = {}
    for each, to_output in parts:
        indices, values = each.indices, each.values
        if divided:
            indices, values = shards.own(indices, values, width)
        to_values = dots(indices, atoms, to_output) * (values > 0)
        by_latent = ByLatent(indices, len(atoms))
        new = {
            "W_dec": by_latent.sums(values, to_output),
            "W_enc": by_latent.sums(to_values, h),
            "b_enc": by_latent.totals(to_values),
        }
        found = {name: found[name].add_(grad) for name, grad in new.items()} if found else new
    found["b_dec"] = parts[0][1].sum(0)
    if dictionary.subtract_bias:
        moved = found["b_enc"] @ encoder
        found["b_dec"] = found["b_dec"] - (totals(moved) if divided else moved)
    return found, Losses(reconstruction, auxiliary)


def _variance(x: Tensor, variance: Tensor | float | None) -> Any:
    return (x - x.mean(0)).square().sum() / len(x) if variance is None else variance


def _spread(error: Tensor) -> Tensor:
    return (error - error.mean(0)).square().sum()


def _inverse(spread: Tensor) -> Tensor:
    """1 / spread; 0 where the error is constant over the batch, so that the term is left out."""
    return torch.where(spread > 0, 1 / spread, 0.0)


@torch.no_grad()
def without_radial_part_(grad: Tensor, atoms: Tensor) -> Tensor:
    """In place, each row's gradient less its component along the row's atom of norm 1: what would only change the norm.

    >>> without_radial_part_(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [[0.0, 2.0]]
    """
    return grad.sub_((grad * atoms).sum(1, keepdim=True) * atoms)


class Adam:
    """Adam over named parameters, a few rows at a time, so that one pass over the memory does projection, step and renormalisation.

    Args:
        parameters: by name; of ``unit`` ones every row is an atom of norm 1, whose gradient is projected and which is renormalised.
        betas, eps: Adam's.

    >>> w = torch.tensor([[1.0, 0.0]])
    >>> Adam({"w": w}, unit=("w",)).step({"w": torch.tensor([[5.0, 1.0]])}, 1.0)
    >>> [round(v, 4) for v in w[0].tolist()]
    [0.7071, -0.7071]
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        unit: Collection[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
    ):
        self.parameters, self.unit, self.betas, self.eps = dict(parameters), set(unit), betas, eps
        self.steps = 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], rate: float, scale: float | Tensor = 1.0) -> None:
        """One step with the gradients times ``scale`` (what clipping leaves of them), which it may overwrite."""
        self.steps += 1
        one, two = self.betas
        size = rate / (1 - one**self.steps)
        root = (1 - two**self.steps) ** 0.5
        factor = torch.as_tensor(
            scale, dtype=torch.float32, device=next(iter(self.parameters.values())).device
        )
        for name, whole in self.parameters.items():
            grad, first, second = grads[name], self.first[name], self.second[name]
            unit = name in self.unit
            fast = kernels(whole, grad, first, second)
            if fast and fast.adam_(
                whole, grad, first, second, factor,
                size=size, root=root, betas=self.betas, eps=self.eps, unit=unit,
            ):  # fmt: skip
                continue
            most = max(1, 2**17 // max(1, whole[0].numel())) if whole.ndim else 1
            for p, g, m, v in zip(*(each.split(most) for each in (whole, grad, first, second))):
                g = g if isinstance(scale, float) and scale == 1 else g.mul_(scale)
                if unit:
                    without_radial_part_(g, p)
                m.lerp_(g, 1 - one)
                v.mul_(two).addcmul_(g, g, value=1 - two)
                p.addcdiv_(m, v.sqrt().div_(root).add_(self.eps), value=-size)
                if unit:
                    p.div_(torch.linalg.vector_norm(p, dim=1, keepdim=True).clamp_min_(1e-12))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "first": self.first, "second": self.second}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        for held, stored in ((self.first, state["first"]), (self.second, state["second"])):
            for name, value in stored.items():
                held[name].copy_(value)
