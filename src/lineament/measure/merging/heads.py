"""Which attention heads do the same? By what their factors multiply to: a head's queries and keys can be turned together without changing it.

Head h attends by A_h = W_qᵀ W_k and writes by B_h = W_o W_v (biases as one more column). The distance of two heads is |A_i - A_j|² + |B_i - B_j|², from
the factors. Heads merge into the mean of their A and the sum of their B, each brought back to the size of a head by its truncated singular value
decomposition. With rotary positions the two rows of each frequency form a complex row, and A is taken by frequency. Query heads that share a key and a
value merge among themselves: mean and sum then have that key and value as a factor, so that nothing has to be cut off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament.core.sites.heads import head_view
from lineament.core.surgery.groups import ChannelGroup
from lineament.measure.merging.distance import Channels, Weights

_OTHER_PAIRS = (
    "gptj",
    "codegen",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "ernie4_5",
)  # rotary pairs of neighbours, not of halves


@dataclass(frozen=True)
class Factor:
    """One projection of the heads of a block: a weight, its bias, and the rows of each head."""

    weight: str
    bias: str | None
    rows: Tensor  # heads x size
    axis: int


def factors_of(group: ChannelGroup, model: nn.Module) -> dict[str, Factor] | str:
    """The projections of a group of heads, or why it cannot be merged."""
    config: Any = getattr(model, "config", None)
    names = {module: name for name, module in model.named_modules()}
    attention = model.get_submodule(group.entries[0].parameter.rsplit(".", 2)[0])
    if getattr(config, "clip_qkv", None) is not None:
        return "its queries, keys and values are clipped"
    found: dict[str, Factor] = {}
    parameters = dict(model.named_parameters())
    views = {part: head_view(attention, part, config) if config is not None else None for part in "qkvz"}
    for part, view in views.items():
        if view is None:
            return "its heads are not laid out as queries, keys and values of a known block"
        rows = view.columns(torch.device("cpu")).view(view.heads, view.size)
        if group.keys:
            own = _of_one_key(group, rows, view.heads // group.keys)
            if own is None:
                return "its heads are not laid out by the keys that they share"
            rows = own
        elif view.heads != group.size:
            return "its heads share keys and values"
        weight = f"{names[view.module]}.weight"
        linear = hasattr(view.module, "out_features")
        axis = (0 if linear else 1) if view.side == "out" else (1 if linear else 0)
        bias = f"{names[view.module]}.bias"
        found[part] = Factor(weight, bias if part != "z" and bias in parameters else None, rows, axis)
    known = {f.weight for f in found.values()} | {f.bias for f in found.values()}
    other = next((e.parameter for e in group.entries if e.parameter not in known), None)
    if other is not None:
        return f"its heads also have {other}"
    if rotary(model) and (
        getattr(config, "model_type", "") in _OTHER_PAIRS
        or getattr(config, "partial_rotary_factor", 1.0) != 1.0
    ):
        return "its rotary positions are not laid out in halves"
    return found


def read_by(group: ChannelGroup, model: nn.Module) -> set[str]:
    """The parameters that the distances of a group of heads are computed from."""
    found = factors_of(group, model)
    assert not isinstance(found, str)
    return {name for factor in found.values() for name in (factor.weight, factor.bias) if name is not None}


def _of_one_key(group: ChannelGroup, rows: Tensor, times: int) -> Tensor | None:
    """The rows of the heads of a group that shares a key, in a projection with ``times`` heads for each key."""
    key = int(group.name.rpartition("[")[2].rstrip("]"))
    own = rows.view(group.keys, times, -1)[key]
    if times == 1:
        return own.expand(group.size, -1)
    there = torch.cat([e.slots for e in group.entries]).tolist()
    return own if all(row in there for row in own.tolist()) else None


def rotary(model: nn.Module) -> bool:
    """Whether queries and keys are rotated by position."""
    return any("rotary" in type(module).__name__.lower() for module in model.modules())


class HeadChannels(Channels):
    """The heads of one block while they merge, by their factors."""

    def __init__(
        self, group: ChannelGroup, weights: Weights, rule: str, distance: str, model: nn.Module
    ) -> None:
        found = factors_of(group, model)
        assert not isinstance(found, str)
        self.parts, self.rotary = found, rotary(model)
        self.group, self.weights, self.rule, self.distance = (
            group,
            weights,
            "mean_sum",
            distance if distance in ("in", "out") else "all",
        )
        n = group.size
        self.first, self.stamp, self.count = np.arange(n), np.arange(n), np.ones(n)
        self.members = [[i] for i in range(n)]
        self.makes, self.reads = [], []
        self.factors: dict[str, Tensor] = {part: self._factor(f) for part, f in found.items()}
        if self.rotary:
            for part in "qk":
                self.factors[part] = _complex(self.factors[part])
        self.inside = self._product("q", "k").numpy() if distance != "out" else None
        self.outside = self._product("z", "v").numpy() if distance != "in" else None
        self.squares = self._squares()
        self.stale, self.linked = True, False
        self.near, self.far = np.zeros(n), np.zeros(n)
        self.near_at, self.far_at = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.gone = np.zeros((2, n), dtype=bool)

    def _factor(self, factor: Factor) -> Tensor:
        """(heads, size, width + 1): rows with their bias as one more column."""
        weight = self.weights.tensors[factor.weight].movedim(factor.axis, 0)
        rows = weight[factor.rows.reshape(-1)].view(*factor.rows.shape, -1)
        bias = torch.zeros(factor.rows.shape, dtype=torch.float64)
        if factor.bias is not None:
            bias = self.weights.tensors[factor.bias][factor.rows]
        return torch.cat([rows, bias[..., None]], -1)

    def _product(self, left: str, right: str, rows: Sequence[int] | None = None) -> Tensor:
        """<A_i, A_j> from the factors: the sum over the entries of (L_i L_jᵀ) * (R_i R_jᵀ)."""
        n = len(self)
        a, b = self.factors[left], self.factors[right]
        at = torch.from_numpy(self.first[:n].copy())
        some = at if rows is None else at[list(rows)]
        if a.is_complex():  # each frequency is a product of rank one
            first = torch.einsum("ifw,jfw->ijf", a[some], a[at].conj())
            second = torch.einsum("ifw,jfw->ijf", b[some].conj(), b[at])
            return (first * second).real.sum(-1)
        found = torch.empty(len(some), n, dtype=torch.float64)
        for row, i in enumerate(some.tolist()):
            found[row] = (
                torch.einsum("dw,jew->jde", a[i], a[at]) * torch.einsum("dw,jew->jde", b[i], b[at])
            ).sum((1, 2))
        return found

    def exactly(self, i: int, j: int) -> float:
        """From the factors of the difference."""
        total = 0.0
        first, second = int(self.first[i]), int(self.first[j])
        for gram, left, right in ((self.inside, "q", "k"), (self.outside, "z", "v")):
            if gram is None:
                continue
            a, b = self.factors[left], self.factors[right]
            if torch.equal(a[first], a[second]) and torch.equal(b[first], b[second]):
                continue
            if a.is_complex():
                matrix = (
                    a[first, :, :, None] * b[first, :, None].conj()
                    - a[second, :, :, None] * b[second, :, None].conj()
                )
            else:
                matrix = a[first].T @ b[first] - a[second].T @ b[second]
            total += float(matrix.abs().square().sum())
        return total

    def merge(self, i: int, j: int) -> None:
        """The mean of how they attend, the sum of what they write, each of the size of a head."""
        n, last = len(self), len(self) - 1
        (a, b), _ = self.coefficients(i, j)
        first, second = int(self.first[i]), int(self.first[j])
        self._merged("q", "k", first, second, a, b)
        self._merged("z", "v", first, second, 1.0, 1.0)
        self.count[i] += self.count[j]
        self.members[i] = self.members[i] + self.members[j]
        self.stamp[i] = self.stamp[:n].max() + 1
        for array in (self.first, self.count, self.stamp):
            array[j] = array[last]
        self.members[j] = self.members[last]
        self.members.pop()
        m = len(self)
        self.inside = None if self.inside is None else self._product("q", "k").numpy()
        self.outside = None if self.outside is None else self._product("z", "v").numpy()
        self.squares = self._squares()
        self.near, self.far = np.zeros(m), np.zeros(m)
        self.near_at, self.far_at = np.zeros(m, dtype=np.int64), np.zeros(m, dtype=np.int64)
        self.gone = np.zeros((2, m), dtype=bool)
        self.stale = True

    def _merged(self, left: str, right: str, first: int, second: int, a: float, b: float) -> None:
        """The best product of the size of a head for a times one head and b times the other."""
        x, y = self.factors[left], self.factors[right]
        if self.group.keys:  # both have the same y
            x[first] = a * x[first] + b * x[second]
            return
        if x.is_complex():
            for f in range(x.shape[1]):
                new, other = _truncated(
                    x[[first, second], f].clone() * torch.tensor([[a], [b]]), y[[first, second], f].conj(), 1
                )
                x[first, f], y[first, f] = new[0], other[0].conj()
            return
        size = x.shape[1]
        new, other = _truncated(
            torch.cat([a * x[first], b * x[second]]), torch.cat([y[first], y[second]]), size
        )
        x[first], y[first] = new, other

    def written(self, model: nn.Module) -> nn.Module:
        """A copy of the model with each merged head in the place of its first member."""
        new = copy.deepcopy(model)
        parameters = dict(new.named_parameters())
        with torch.no_grad():
            for p, inside in enumerate(self.members):
                if len(inside) == 1:
                    continue
                slot, target = int(self.first[p]), min(inside)
                for part in "qz" if self.group.keys else "qkvz":
                    factor = self.parts[part]
                    rows = self.factors[part][slot]
                    rows = torch.cat([rows.real, rows.imag]) if rows.is_complex() else rows
                    weight = parameters[factor.weight].movedim(factor.axis, 0)
                    weight[factor.rows[target]] = rows[:, :-1].to(weight)
                    if factor.bias is not None:
                        parameters[factor.bias][factor.rows[target]] = rows[:, -1].to(weight)
        return new


def _complex(rows: Tensor) -> Tensor:
    half = rows.shape[1] // 2
    return torch.complex(rows[:, :half].contiguous(), rows[:, half:].contiguous())


def _truncated(left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Factors of ``size`` rows whose product is the best approximation of leftᵀ right."""
    q1, r1 = torch.linalg.qr(left.T)
    q2, r2 = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    root = s[:size].sqrt()
    return (q1 @ (u[:, :size] * root)).T, (q2 @ (vh[:size].T * root)).T
