"""Variable projection of many small networks of equal size as one batched problem, on any device.

The steps are those of :mod:`~lineament.learn.boosting.projected`; each problem has a damping of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.learn.boosting.subnetwork import TORCH, Array, Sub, Training

_SLOPES = {
    "logistic": lambda a: a * (1 - a),
    "tanh": lambda a: 1 - a * a,
    "relu": lambda a: (a > 0).to(a.dtype),
    "identity": torch.ones_like,
}


@dataclass
class _State:
    """Value [B], hidden values [B, J, n], weighted basis [B, J + 1, n], output weights [B, J + 1, K], what they leave [B, K, n], and the inverse of their system."""

    value: Tensor
    a: Tensor
    basis: Tensor
    U: Tensor
    left: Tensor
    inverse: Tensor

    def chosen(self, better: Tensor, other: _State) -> _State:
        """The other one's entries where ``better`` [B]."""
        if bool(better.all()):
            return other
        pick = lambda new, old: torch.where(better.view(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
        return _State(*(pick(getattr(other, k), getattr(self, k)) for k in self.__dataclass_fields__))


def project(
    inputs: Tensor, r: Tensor, root: Tensor, V: Tensor, l2: Tensor, *, activation: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Hidden weights [B, d + 1, J] and output weights [B, J + 1, K] fitted to residuals r [B, n, K].

    Args:
        inputs: [n, d + 1] or [B, n, d + 1], ending in 1. root: of each sample's weight, [B, n]. V: first hidden weights. l2: [B].
        steps: at most so many; fewer where no problem gains 1e-7 of its value any more.
    """
    B, width, J = V.shape
    act = TORCH[activation]
    # Samples come last: a pass over them is then over numbers that lie behind one another.
    root = root[:, None].contiguous()
    inputs = inputs.mT.contiguous()
    target = r.mT * root
    decay = l2[:, None, None].expand(B, width, J).clone()
    decay[:, -1] = 0
    decay = decay.flatten(1)
    ridge = l2[:, None].expand(B, J + 1).clone()
    ridge[:, -1] = 0

    def solved(v: Tensor) -> _State:
        a = act(v.view(B, width, J).mT @ inputs)
        basis = torch.cat([a * root, root], 1)
        gram = basis @ basis.mT
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += ridge + 1e-10 * diagonal.sum(1, keepdim=True) / (J + 1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        inverse = torch.cholesky_inverse(factor)
        U = inverse @ (basis @ target.mT)
        left = torch.baddbmm(target, U.mT, basis, alpha=-1)
        out, flat = U[:, :-1].flatten(1), left.flatten(1)
        value = torch.linalg.vecdot(flat, flat) + l2 * torch.linalg.vecdot(out, out) + (decay * v * v).sum(1)
        value = (value / 2).masked_fill(failed > 0, torch.inf).nan_to_num(nan=torch.inf)
        return _State(value, a, basis, U, left, inverse)

    v = V.flatten(1)
    damping = torch.full((B,), 1e-2, dtype=V.dtype, device=V.device)
    state = solved(v)
    for step in range(steps):
        pace = _SLOPES[activation](state.a) * root
        # [B, width * J, n]: how each hidden weight moves its unit.
        moves = (inputs[..., :, None, :] * pace[:, None]).flatten(1, 2)
        out = state.U[:, :-1]
        undone = state.basis @ moves.mT
        curvature = torch.baddbmm(moves @ moves.mT, undone.mT, state.inverse @ undone, alpha=-1)
        mixing = (out @ out.mT)[:, None, :, None, :]
        curvature = (curvature.view(B, width, J, width, J) * mixing).view(B, width * J, width * J)
        back = (out @ state.left) * pace
        gradient = (inputs @ back.mT).flatten(1) - decay * v
        diagonal = curvature.diagonal(dim1=1, dim2=2) + decay
        floor = 1e-12 * diagonal.amax(1, keepdim=True) + 1e-12
        curvature.diagonal(dim1=1, dim2=2).add_(decay + damping[:, None] * (diagonal + floor))
        factor, failed = torch.linalg.cholesky_ex(curvature)
        trial = v + torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]
        made = solved(trial)
        better = (made.value < state.value) & (failed == 0)
        gained = better & (state.value - made.value > 1e-7 * state.value)
        going = gained | (~better & (damping < 1e8))
        v = torch.where(better[:, None], trial, v)
        state = state.chosen(better, made)
        damping = torch.where(better, damping / 5, damping * 4).clamp(1e-8, 1e8)
        if step + 1 == steps or not bool(going.any()):
            break
    return v.view(B, width, J), state.U


def one(start: Sub, inputs: Tensor, r: Array, weights: Array, training: Training) -> Sub:
    """A single network on the device where ``inputs`` lie."""
    own = lambda v: torch.as_tensor(v).to(inputs)  # noqa: E731
    V, U = project(
        inputs, own(r)[None], own(weights).sqrt()[None], own(start.stacked[0])[None], own([training.l2]),
        activation=start.activation, steps=training.max_iter,
    )  # fmt: skip
    return Sub.unstacked(V[0].cpu().numpy(), U[0].cpu().numpy(), start.activation)
