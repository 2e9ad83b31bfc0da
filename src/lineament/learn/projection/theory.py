"""Why the layer before the head is worth more: how strongly each layer of a linear network weighs each feature.

Xue et al., ICLR 2024, arXiv 2403.11391, with the spectral contrastive loss -2 tr(F M') + tr(F M F M), F = WᵀW, M = E a aᵀ, M' = E a a'ᵀ for two views
a, a' of one sample. Layer l of a balanced network of L layers has the Gram matrix F^(l/L), so the head squares every ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require, show
from lineament.core.results import Readable


@dataclass(frozen=True)
class Views(Readable):
    """Moments of independent features ±phi that a view disrupts with probability alpha and blurs with noise sigma; [features] each.

    ``minimiser`` is F's diagonal, ``after`` the head's weights F^(1/2), ``before`` the encoder's F^(1/4).
    """

    moment: Tensor
    across: Tensor
    minimiser: Tensor
    before: Tensor
    after: Tensor


def feature_weights(
    phi: Tensor, alpha: Tensor, sigma: Tensor, *, disruption: Literal["flip", "copy"] = "flip"
) -> Views:
    """The weights that the loss gives to independent features: after the head c phi / (phi² + sigma²), before it the root of that.

    They are largest at phi = sigma: the weak and the strong features lose.

    Args:
        phi, alpha, sigma: strengths, probabilities and deviations, [features] each.
        disruption: ``"flip"``: a view turns the feature's sign, and c = |1 - 2 alpha|; ``"copy"``: it puts an independent copy in its place, and c = 1 - alpha.

    Raises:
        InputError: shapes that differ, negative strengths or deviations, probabilities outside of 0 to 1, or a feature without strength and noise.

    >>> feature_weights(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])).after.item()
    0.5
    """
    one_of("disruption", disruption, ("flip", "copy"))
    require(
        phi.shape == alpha.shape == sigma.shape,
        f"phi: got {show(phi)}, {show(alpha)} and {show(sigma)}, expected one shape of all three",
    )
    require(bool((alpha >= 0).all() and (alpha <= 1).all()), f"alpha: got {show(alpha)}, expected 0 to 1")
    moment = phi.square() + sigma.square()
    require(
        bool((phi >= 0).all() and (sigma >= 0).all() and (moment > 0).all()),
        "phi, sigma: expected strengths and deviations of at least 0, not both 0",
    )
    kept = 1 - 2 * alpha if disruption == "flip" else 1 - alpha
    across = kept.square() * phi.square()
    minimiser = across / moment.square()
    return Views(moment, across, minimiser, minimiser.pow(0.25), minimiser.sqrt())


def invariance(moment: Tensor, across: Tensor) -> Tensor:
    """Eigenvalues of M^(-1/2) M' M^(-1/2), descending: how much of each direction survives a view.

    >>> invariance(torch.eye(2), torch.diag(torch.tensor([0.5, 1.0]))).tolist()
    [1.0, 0.5]
    """
    return _whitened(moment, across)[0]


def minimiser(moment: Tensor, across: Tensor, rank: int | None = None) -> Tensor:
    """F* = M^(-1) M' M^(-1), or the best of rank p: M^(-1/2) U_p Λ_p U_pᵀ M^(-1/2).

    >>> minimiser(4 * torch.eye(1), 4 * torch.eye(1)).item()
    0.25
    """
    values, vectors, root = _whitened(moment, across)
    keep = len(values) if rank is None else number("rank", rank, low=1, high=len(values), integer=True)
    values, half = values[:keep], root @ vectors[:, :keep]
    return (half * values) @ half.T


def lowest_loss(moment: Tensor, across: Tensor, rank: int | None = None) -> Tensor:
    """-Σ λ² over all eigenvalues of :func:`invariance`, or the p largest."""
    return -invariance(moment, across)[:rank].square().sum()


def layer_gram(F: Tensor, layer: int, depth: int) -> Tensor:
    """F^(l/L): the Gram matrix of layer ``layer`` of ``depth`` balanced ones.

    >>> layer_gram(torch.diag(torch.tensor([16.0])), 1, 2).item()
    4.0
    """
    number("layer", layer, low=1, high=depth, integer=True)
    values, vectors = torch.linalg.eigh(F)
    # What is zero but for rounding stays zero: a root would blow it up.
    floor = values.abs().max() * len(values) * torch.finfo(F.dtype).eps
    return (vectors * torch.where(values > floor, values, 0).pow(layer / depth)) @ vectors.T


def spectral_loss(W: Tensor, moment: Tensor, across: Tensor) -> Tensor:
    """-2 tr(F M') + tr(F M F M); its gradient is 4 W (M F M - M').

    >>> spectral_loss(torch.eye(1), torch.eye(1), torch.eye(1)).item()
    -1.0
    """
    F = W.T @ W
    fm = F @ moment
    return (fm * fm.T).sum() - 2 * (F * across.T).sum()


def spectral_gradient(W: Tensor, moment: Tensor, across: Tensor) -> Tensor:
    """4 W (M F M - M') for symmetric M and M'."""
    return 4 * W @ (moment @ (W.T @ W) @ moment - across)


def decayed_weights(moment: Tensor, across: Tensor, decay: float) -> Tensor:
    """The squared weights s = F^(1/2) >= 0 before the head under weight decay on both layers: they minimise -2 M' s² + M² s⁴ + 2 decay s.

    Weak features are cut to exactly 0.

    Args:
        moment, across: diagonals of M and M', [features].

    >>> decayed_weights(torch.ones(2).double(), torch.tensor([1.0, 0.1]).double(), 0.5).tolist()[1]
    0.0
    """
    require(
        moment.ndim == 1 and moment.shape == across.shape,
        f"across: got {show(across)}, expected the shape of {show(moment)}",
    )
    number("decay", decay, low=0)
    found = []
    for m, t in zip(moment.double().tolist(), across.double().tolist()):
        roots = np.roots([4 * m * m, 0.0, -4 * t, 2 * decay])
        real = [0.0, *(float(r.real) for r in roots if abs(r.imag) < 1e-9 * max(1.0, abs(r)) and r.real > 0)]
        value = [-2 * t * s**2 + m * m * s**4 + 2 * decay * s for s in real]
        best = real[int(np.argmin(value))]
        for _ in range(3 if best else 0):  # polished: a double root loses half of the digits
            slope, bend = 4 * m * m * best**3 - 4 * t * best + 2 * decay, 12 * m * m * best**2 - 4 * t
            best = best - slope / bend if bend > 0 else best
        found.append(best)
    return torch.tensor(found, dtype=torch.float64)


def decay_threshold(moment: Tensor, across: Tensor) -> Tensor:
    """The weight decay (2/3)^(3/2) M'^(3/2) / M of both layers from which on :func:`decayed_weights` cuts a feature to 0.

    Args:
        moment, across: diagonals of M and M', [features].

    >>> round(decay_threshold(torch.ones(1), torch.ones(1)).item(), 4)
    0.5443
    """
    require(
        moment.shape == across.shape,
        f"across: got {show(across)}, expected the shape of {show(moment)}",
    )
    return (2 * across / 3).pow(1.5) / moment


@dataclass(frozen=True)
class HeadCriterion(Readable):
    """How many samples a linear probe for one feature needs before the head and after it, up to one constant."""

    before: float
    after: float

    @property
    def better(self) -> Literal["before", "after"]:
        """The side to export; before the head where both are equal."""
        return "before" if self.before <= self.after else "after"


def head_criterion(views: Views, phi: Tensor, relevant: int) -> HeadCriterion:
    """Is a task that depends on one feature better served before the head or after it? By :func:`relative_complexity`.

    Before, where views disrupt the feature, or where it is too weak or too strong beside the others; after, where it is the most weighted of all.

    Args:
        views: :func:`feature_weights` of all features. phi: their strengths in the task's data, [features]. relevant: the feature's index.

    >>> phi = torch.tensor([0.1, 1.0, 1.0])
    >>> found = feature_weights(phi, torch.zeros(3), torch.full((3,), 0.5))
    >>> head_criterion(found, phi, 0).better, head_criterion(found, phi, 1).better
    ('before', 'after')
    """
    before, after = (relative_complexity(w, phi, relevant) for w in (views.before, views.after))
    return HeadCriterion(before, after)


def relative_complexity(weights: Tensor, phi: Tensor, relevant: int) -> float:
    """Σ w² phi² / (w_j² phi_j²): samples that a linear probe for feature j needs, up to a constant. Compare before and after the head.

    >>> relative_complexity(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), 0)
    5.0
    """
    require(
        weights.shape == phi.shape,
        f"phi: got {show(phi)}, expected a strength of each of {show(weights)}",
    )
    number("relevant", relevant, low=0, high=len(phi) - 1, integer=True)
    energy = (weights * phi).square()
    return float(energy.sum() / energy[relevant])


def _whitened(moment: Tensor, across: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (descending), eigenvectors and M^(-1/2)."""
    values, vectors = torch.linalg.eigh(moment)
    require(
        bool((values > 0).all()),
        f"moment: its smallest eigenvalue is {float(values[0]):g}, expected a positive definite matrix",
    )
    root = (vectors * values.rsqrt()) @ vectors.T
    found, directions = torch.linalg.eigh(root @ across @ root)
    return found.flip(0), directions.flip(1), root
