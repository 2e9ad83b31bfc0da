"""Heads to train with and throw away: linear, perceptrons, and a fixed one that only weighs.

Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", ICLR 2024, arXiv 2403.11391.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require, show


class SymmetricReLU(nn.Module):
    """relu(x - b) - relu(-x - b): what lies within b of zero is lost.

    >>> SymmetricReLU(0.5)(torch.tensor([-1.0, 0.2, 1.0])).tolist()
    [-0.5, 0.0, 0.5]
    """

    def __init__(self, bias: float = 0.0, *, learnable: bool = False):
        super().__init__()
        number("bias", bias, low=0)
        self.bias = nn.Parameter(torch.tensor(float(bias))) if learnable else float(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.bias) - torch.relu(-x - self.bias)


class Reweighting(nn.Module):
    """The fixed head z_i = x_i / kappa^i, i = 0, 1, ...: a buffer, never trained.

    The weights are made in float64. ``effective_dim`` counts those above 1e-6 of the first: the others get hardly any gradient, so that the head
    is a bottleneck, too; a warning says so.

    >>> Reweighting(3, 2.0)(torch.ones(1, 3)).tolist()
    [[1.0, 0.5, 0.25]]
    """

    weights: Tensor

    def __init__(self, dim: int, kappa: float = 1.05):
        super().__init__()
        number("dim", dim, low=1, integer=True)
        self.kappa = number("kappa", kappa, low=0, open_low=True)
        exact = self.kappa ** -torch.arange(dim, dtype=torch.float64)
        self.register_buffer("weights", exact.float())
        self.exact = exact
        self.effective_dim = int((exact >= 1e-6 * exact.max()).sum())
        if kappa == 1:
            warnings.warn("kappa = 1 is the identity", stacklevel=2)
        elif self.effective_dim < dim:
            warnings.warn(
                f"only {self.effective_dim} of {dim} coordinates have a weight above 1e-6 of the largest at kappa = {kappa:g}; the others hardly train",
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        require(
            x.shape[-1] == len(self.weights),
            f"x: got {show(x)}, expected {len(self.weights)} coordinates",
        )
        weights = self.exact.to(x.device) if x.dtype == torch.float64 else self.weights.to(x.dtype)
        return x * weights


class Diagonal(nn.Module):
    """A trainable weight of each coordinate, w_i x_i, all ``start`` at first.

    >>> Diagonal(3, start=0.5)(torch.ones(1, 3)).tolist()
    [[0.5, 0.5, 0.5]]
    """

    def __init__(self, dim: int, *, start: float = 1.0):
        super().__init__()
        number("dim", dim, low=1, integer=True)
        self.weight = nn.Parameter(torch.full((dim,), number("start", start)))

    def forward(self, x: Tensor) -> Tensor:
        require(
            x.shape[-1] == len(self.weight),
            f"x: got {show(x)}, expected {len(self.weight)} coordinates",
        )
        return x * self.weight


class DiagonalNetwork(nn.Sequential):
    """The paper's non-linear network: layers h_l = s_b(w_l h_{l-1}) of diagonal weights and symmetric ReLUs with threshold b.

    A feature whose weighted amplitude stays below b in a layer is absent from there on, and present below; no gradient brings it back.

    Args:
        layers: their number, which are the sites ``"0"``, ``"1"``, ...; the last is the head of the others.
        start: of all weights; equal layers are balanced.

    >>> DiagonalNetwork(2, bias=0.125, start=0.75)(torch.tensor([1.0, 0.25])).tolist()
    [0.34375, 0.0]
    """

    def __init__(self, dim: int, *, layers: int = 2, bias: float = 0.0, start: float = 0.5):
        number("layers", layers, low=1, integer=True)
        super().__init__(
            *(nn.Sequential(Diagonal(dim, start=start), SymmetricReLU(bias)) for _ in range(layers))
        )


HEADS = ("none", "linear", "mlp", "mlp2", "identity", "diagonal", "fixed")


def projection_head(
    kind: Literal["none", "linear", "mlp", "mlp2", "identity", "diagonal", "fixed"],
    dim: int,
    *,
    hidden: int | None = None,
    out: int | None = None,
    kappa: float = 1.05,
) -> nn.Module:
    """A head by its name.

    Args:
        kind: ``"mlp"`` has one hidden layer, ``"mlp2"`` two; ``"identity"`` two linear layers that start as the identity around a
            symmetric ReLU; ``"diagonal"`` is :class:`Diagonal`, ``"fixed"`` :class:`Reweighting`.
        dim: of the encoder's output. hidden, out: widths, ``dim`` by default.

    >>> projection_head("mlp", 8)(torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """
    one_of("kind", kind, HEADS)
    hidden, out = dim if hidden is None else hidden, dim if out is None else out
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, out)
    if kind == "diagonal":
        return Diagonal(dim)
    if kind == "fixed":
        return Reweighting(dim, kappa)
    if kind == "identity":
        layers = [nn.Linear(dim, dim), nn.Linear(dim, dim)]
        for layer in layers:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], SymmetricReLU(0.0), layers[1])
    middle = [] if kind == "mlp" else [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), *middle, nn.Linear(hidden, out))


class WithHead(nn.Module):
    """An encoder and the head it is trained with; :meth:`export` gives the encoder back.

    >>> net = WithHead(nn.Linear(4, 8), projection_head("mlp", 8))
    >>> net(torch.randn(2, 4)).shape, net(torch.randn(2, 4), use_head=False).shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor, *, use_head: bool = True) -> Tensor:
        features = self.encoder(x)
        if not use_head:
            return features
        first = next((m for m in self.head.modules() if isinstance(m, nn.Linear)), None)
        require(
            first is None or features.shape[-1] == first.in_features,
            f"head: it takes {first.in_features if first else 0} coordinates, and the encoder gives {show(features)}",
        )
        return self.head(features)

    def export(self) -> nn.Module:
        """The encoder alone, as a plain module."""
        return self.encoder
