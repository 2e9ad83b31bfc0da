"""How alike are two representations as a whole? The measures in use, each saying whether it grows or falls, its range and what leaves it as it is.

All but debiased CKA come from the joint moments, without another pass over the data. Debiased CKA (Kornblith et al. 2019, with the
unbiased HSIC of Song et al. 2012) needs no N x N matrix either: with centred features, kᵢ = |xᵢ|² and lᵢ = |yᵢ|²,

    HSIC = [ ‖XᵀY‖² - Σ kᵢlᵢ (1 + 2/(N-2)) + Σkᵢ Σlᵢ / ((N-1)(N-2)) ] / (N (N-3))

and sums over the samples give all of it. Its samples must be independent, so a map is averaged over its positions first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.core.statistics.accumulation import Stream, working
from lineament.core.statistics.moments import Covariance
from lineament.measure.alignment.clusters import principal_cosines
from lineament.measure.alignment.joint import Second
from lineament.measure.alignment.matching import matching, semi_matching
from lineament.measure.alignment.sparse import least_squares

_ANY, _ROTATION, _ORDER = (
    "any invertible linear map",
    "rotation and one scale",
    "order and scale of the units",
)


@dataclass(frozen=True)
class Measure(Readable):
    """What a number means: ``kind`` is ``"similarity"`` or ``"distance"``; ``invariant`` says which change of one side leaves it as it is."""

    name: str
    kind: str
    range: tuple[float, float]
    invariant: str
    same: float  # of a representation with itself


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("semi_matching", "similarity", (-1, 1), _ORDER, 1.0),
        Measure("matching", "similarity", (-1, 1), _ORDER, 1.0),
        Measure("soft_matching", "similarity", (-1, 1), _ORDER, 1.0),
        Measure("cca", "similarity", (0, 1), _ANY, 1.0),
        Measure("svcca", "similarity", (0, 1), _ROTATION, 1.0),
        Measure("pwcca", "similarity", (0, 1), "any invertible linear map of b", 1.0),
        Measure("cka", "similarity", (0, 1), _ROTATION, 1.0),
        Measure("procrustes", "distance", (0, 2**0.5), _ROTATION, 0.0),
        Measure("ridge_b_from_a", "similarity", (-np.inf, 1), "any invertible linear map of a", 1.0),
        Measure("ridge_a_from_b", "similarity", (-np.inf, 1), "any invertible linear map of b", 1.0),
    )
}
# Those whose value on few samples is mostly the number of units: each needs a matrix of units from the samples.
_FITTED = ("cca", "svcca", "pwcca", "cka", "procrustes", "ridge_b_from_a", "ridge_a_from_b")
_RIDGE = 1e-6  # of the mean variance


def similarity(
    name: str,
    a: Float[Tensor, "units_a units_a"],
    b: Float[Tensor, "units_b units_b"],
    ab: Float[Tensor, "units_a units_b"],
    *,
    variance: float = 0.99,
) -> float:
    """One measure from the covariances within and between two sets of units (:data:`MEASURES` says what each means).

    cca: the mean canonical correlation. svcca: the same between the principal directions that hold ``variance`` of each side. pwcca: the canonical
    correlations weighed by how much of a each direction carries. cka: ‖C_ab‖² / (‖C_aa‖ ‖C_bb‖). procrustes: √(2 - 2‖C_ab‖_* / √(tr C_aa tr C_bb)).
    ridge: the mean R² of a linear map, on the samples of the moments (:func:`ridge` judges on others). matching and semi_matching: mean correlations.
    soft_matching: the best transport of uniform weights between the units (Khosla and Williams 2024).

    >>> eye = torch.eye(2).double()
    >>> similarity("cca", eye, eye, 0.5 * eye), round(similarity("procrustes", eye, eye, eye), 6)
    (0.5, 0.0)
    """
    checks.one_of("name", name, MEASURES)
    if name in ("semi_matching", "matching", "soft_matching"):
        scale = torch.outer(a.diagonal(), b.diagonal()).sqrt()
        scores = torch.where(scale > 0, ab / scale.clamp_min(1e-300), torch.zeros_like(ab))
        return {"semi_matching": lambda s: semi_matching(s).mean, "matching": lambda s: matching(s).mean, "soft_matching": soft_matching}[name](scores)  # fmt: skip
    if name == "cka":
        return _ratio(float(ab.square().sum()), float(a.norm() * b.norm()))
    if name == "procrustes":
        nuclear = float(torch.linalg.svdvals(ab).sum())
        return max(2 - 2 * _ratio(nuclear, float((a.trace() * b.trace()).sqrt())), 0.0) ** 0.5
    if name.startswith("ridge"):
        source, target, cross = (a, b, ab) if name == "ridge_b_from_a" else (b, a, ab.T)
        return _explained(source, target, cross, source, target, cross)
    if name == "svcca":
        p, q = (_principal(m, variance) for m in (a, b))
        a, b, ab = p.T @ a @ p, q.T @ b @ q, p.T @ ab @ q
    if name == "pwcca":
        return _projection_weighted(a, b, ab)
    cosines = principal_cosines(a, b, ab)
    return float(cosines.sum()) / min(_rank(a), _rank(b)) if len(cosines) else 0.0


def ridge(fit: Sequence[Tensor], judge: Sequence[Tensor]) -> float:
    """The mean R² over b's units of the linear map from a fitted on some moments (C_aa, C_bb, C_ab) and judged on others.

    >>> eye = torch.eye(2).double()
    >>> round(ridge((eye, eye, eye), (eye, eye, eye)), 5)
    1.0
    """
    (a, b, ab), (a2, b2, ab2) = fit, judge
    return _explained(a, b, ab, a2, b2, ab2)


def soft_matching(scores: Float[Tensor, "units_a units_b"]) -> float:
    """max Σ P_ij c_ij over P >= 0 with rows that sum to 1/units_a and columns that sum to 1/units_b; at equal widths the mean of the matching.

    >>> round(soft_matching(torch.tensor([[1.0, 0.5]]).double()), 3)
    0.75
    """
    rows, columns = scores.shape
    if max(rows, columns) % min(rows, columns) == 0:
        # A unit of the narrower side is as many units of the same score: an assignment.
        wide = scores.repeat_interleave(max(1, columns // rows), 0).repeat_interleave(
            max(1, rows // columns), 1
        )
        return matching(wide).mean
    cost = 1 - scores.detach().cpu().double().numpy()
    weights = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    try:
        from ot import emd2  # pyright: ignore[reportMissingImports]
    except ImportError:
        require(
            max(rows, columns) <= 512,
            f"soft_matching: {rows} and {columns} units, expected at most 512 unless POT is installed (pip install POT) or one is a multiple of the other",
        )
        return 1 - _transport(cost, *weights)
    return 1 - float(emd2(*weights, cost))


def _transport(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    from scipy.optimize import linprog
    from scipy.sparse import eye, kron, vstack

    n, m = cost.shape
    # The last column's sum follows from the others.
    sums = vstack([kron(eye(n), np.ones((1, m))), kron(np.ones((1, n)), eye(m - 1, m))])
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([a, b[:-1]]), method="highs")
    return float(found.fun)


def refused(name: str, samples: int, units: int) -> str:
    """Why a measure says little on so few samples, or ``""``."""
    if name in _FITTED and samples < 2 * units:
        return f"{samples} samples for {units} units, expected at least {2 * units}: on fewer, independent networks look alike"
    return ""


class KernelSums(Stream):
    """What debiased CKA between all layers of all networks needs of independent samples, in one pass; joins by ``a + b``.

    The layers' features stand side by side; memory is (sum of widths)², whatever the number of samples.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> sums = KernelSums([3, 3])
    >>> sums.update([x, 2 * x])
    >>> round(float(sums.cka()[0, 1]), 6)
    1.0
    """

    _saved = ("sizes", "covariance", "shift", "norms", "products", "weighted")

    def __init__(self, sizes: Sequence[int] = (), shift: Tensor | None = None) -> None:
        self.sizes = list(sizes)
        self.covariance = Covariance(correction=0)
        layers = len(self.sizes)
        zero = torch.zeros(layers, sum(self.sizes), dtype=torch.float64)
        # Of k_i = |x_i - shift|² for each layer: Σ k, Σ k kᵀ, Σ k (x - shift)ᵀ.
        self.shift = shift
        self.norms, self.products, self.weighted = (
            zero.new_zeros(layers),
            zero.new_zeros(layers, layers),
            zero,
        )

    @property
    def count(self) -> int:
        return self.covariance.count

    def update(self, layers: Sequence[Float[Tensor, "samples features"]]) -> None:
        """Take in a batch: every layer's features of the same samples."""
        require(
            [part.shape[1] for part in layers] == self.sizes,
            f"layers: got {[part.shape[1] for part in layers]} features, expected {self.sizes} as before",
        )
        device = layers[0].device
        wide = torch.cat([working(part).to(device) for part in layers], 1)
        self.covariance.update(wide)
        wide = wide.double().cpu()
        if self.shift is None:
            # Any point near the data will do: what is lost in rounding is the distance to the mean.
            self.shift = wide.mean(0)
        u = wide - self.shift
        k = torch.stack([part.square().sum(1) for part in u.split(self.sizes, 1)], 1)
        self.norms += k.sum(0)
        self.products += k.T @ k
        self.weighted += k.T @ u

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "covariance": self.covariance.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.sizes = list(state["sizes"])
        self.covariance = Covariance.from_state_dict(state["covariance"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` described."""
        self._load(state)

    def __add__(self, other: KernelSums) -> KernelSums:
        self._same(other)
        require(self.sizes == other.sizes, f"+: {self.sizes} and {other.sizes} features do not match")
        if not self.count or not other.count:
            return KernelSums.from_state_dict((self if self.count else other).state_dict())
        joined = KernelSums(self.sizes, self.shift)
        joined.covariance = self.covariance + other.covariance
        for name, mine, theirs in zip(
            ("norms", "products", "weighted"), self.around(self.shift), other.around(self.shift)
        ):
            setattr(joined, name, mine + theirs)
        return joined

    def around(self, centre: Any, of: Second | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums with another shift, from the moments of the same samples."""
        assert self.shift is not None
        of = Second.of([self.covariance]) if of is None else of
        return _shifted((self.norms, self.products, self.weighted), of, self.shift, centre, self.sizes)

    def hsic(self) -> Float[Tensor, "layers layers"]:
        """Song's unbiased estimate for every pair of layers, with the linear kernel."""
        self._some(4)
        return kernel_blocks([self])[0]

    def cka(self) -> Float[Tensor, "layers layers"]:
        """HSIC_ab / √(HSIC_aa HSIC_bb); 0 beside a layer that holds nothing beyond chance."""
        return normalised_hsic(self.hsic())


def kernel_blocks(blocks: Sequence[KernelSums]) -> tuple[Tensor, list[Tensor]]:
    """Song's estimate for every pair of layers over all blocks of samples, and without each block in turn (none where too few are left)."""
    used = [block for block in blocks if block.count]
    require(
        sum(block.count for block in used) >= 4, "KernelSums: fewer than 4 samples seen, expected at least 4"
    )
    sizes, shift = used[0].sizes, used[0].shift
    assert shift is not None
    seconds = [Second.of([block.covariance]) for block in used]
    sums = [block.around(shift, second) for block, second in zip(used, seconds)]
    whole = Second.of(seconds)
    total = tuple(torch.stack(parts).sum(0) for parts in zip(*sums))
    found = _hsic(total, whole, shift, sizes)
    left = []
    if len(used) > 1 and whole.count - max(block.count for block in used) >= 4:
        for second, part in zip(seconds, sums):
            rest = tuple(all_ - own for all_, own in zip(total, part))
            left.append(_hsic(rest, whole.without(second), shift, sizes))
    return found, left


def _hsic(sums: Sequence[Tensor], of: Second, shift: Tensor, sizes: list[int]) -> Tensor:
    n = of.count
    norms, products, _ = _shifted(sums, of, shift, of.mean.cpu(), sizes)
    scatter = of.scatter.cpu().square()
    rows = torch.stack([part.sum(0) for part in scatter.split(sizes)])
    squares = torch.stack([part.sum(1) for part in rows.split(sizes, 1)], 1)
    found = squares - products * (1 + 2 / (n - 2)) + torch.outer(norms, norms) / ((n - 1) * (n - 2))
    return found / (n * (n - 3))


def _shifted(
    sums: Sequence[Tensor], of: Second, shift: Tensor, centre: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ k, Σ k kᵀ and Σ k (x - shift)ᵀ, k_i = |x_i - shift|² of each layer, with ``centre`` for the shift."""
    norms, products, weighted = sums
    if torch.equal(centre, shift):
        return norms, products, weighted
    n, move = of.count, centre - shift
    total = n * (of.mean.cpu() - shift)  # Σ u, u = x - shift
    # k' = k - 2 m·u + |m|² and u' = u - m, layer by layer; Σ u uᵀ m is needed only along each layer's own m.
    spread = torch.block_diag(*[part[None] for part in move.split(sizes)])
    across = spread @ of.scatter.cpu() + torch.outer(spread @ total, total) / n
    length = torch.stack([part.square().sum() for part in move.split(sizes)])
    along = weighted @ spread.T  # Σ k_a (m_b·u_b)
    lone = norms - 2 * spread @ total  # Σ (k - 2 m·u)
    square = products - 2 * along - 2 * along.T + 4 * across @ spread.T
    square = square + torch.outer(lone, length) + torch.outer(length, lone) + n * torch.outer(length, length)
    moved = lone + n * length
    ku = weighted - 2 * across + torch.outer(length, total)
    return moved, square, ku - torch.outer(moved, move)


class BatchKernels(Stream):
    """Debiased HSIC averaged over batches (Nguyen, Raghu, Kornblith 2021), for features too wide for :class:`KernelSums`: flattened maps.

    Each layer's kernel of a batch is made once and all pairs are one product; it is unbiased as well, and noisier the smaller the batches.

    >>> maps = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> kernels = BatchKernels(2)
    >>> kernels.update([maps, 2 * maps])
    >>> round(float(kernels.cka()[0, 1]), 6)
    1.0
    """

    _saved = ("layers", "count", "total")

    def __init__(self, layers: int = 0) -> None:
        self.layers = layers
        self.count = 0
        self.total = torch.zeros(layers, layers, dtype=torch.float64)

    def update(self, layers: Sequence[Float[Tensor, "samples *features"]]) -> None:
        """Take in a batch of at least four samples."""
        require(len(layers) == self.layers, f"layers: got {len(layers)}, expected {self.layers} as before")
        n = len(layers[0])
        require(n >= 4, f"layers: got a batch of {n} samples, expected at least 4; drop the last batch")
        kernels = []
        for part in layers:
            x = working(part).flatten(1)
            x = x - x.mean(0)
            kernels.append((x @ x.T).fill_diagonal_(0.0))
        k = torch.stack(kernels).double()
        rows = k.sum(2)
        total = rows.sum(1)
        flat = k.flatten(1)
        found = flat @ flat.T + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
        self.total += (found / (n * (n - 3))).cpu()
        self.count += 1

    def __add__(self, other: BatchKernels) -> BatchKernels:
        self._same(other)
        joined = BatchKernels(self.layers)
        joined.count, joined.total = self.count + other.count, self.total + other.total
        return joined

    def cka(self) -> Float[Tensor, "layers layers"]:
        """As :meth:`KernelSums.cka`."""
        self._some()
        return normalised_hsic(self.total / self.count)


def cka(
    x: Float[Tensor, "samples features_x"], y: Float[Tensor, "samples features_y"], *, debiased: bool = True
) -> float:
    """Linear CKA between two sets of features of the same independent samples.

    Args:
        debiased: with Song's unbiased HSIC; without, independent features look alike wherever there are few samples for their number.

    Raises:
        InputError: other lengths, or fewer than 4 samples.

    >>> x = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    >>> y = torch.randn(100, 512, generator=torch.Generator().manual_seed(1))
    >>> round(cka(x, y, debiased=False), 2), abs(cka(x, y)) < 0.03
    (0.83, True)
    """
    for what, value in (("x", x), ("y", y)):
        checks.tensor(what, value, shape=("samples", "features"), floating=True)
    require(len(x) == len(y), f"y: got {checks.show(y)}, expected {len(x)} samples, as many as x has")
    require(len(x) >= 4, f"x: got {len(x)} samples, expected at least 4")
    if debiased:
        sums = KernelSums([x.shape[1], y.shape[1]])
        sums.update([x, y])
        return float(sums.cka()[0, 1])
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return _ratio(float((x.T @ y).square().sum()), float((x.T @ x).norm() * (y.T @ y).norm()))


def normalised_hsic(hsic: Float[Tensor, "layers layers"]) -> Float[Tensor, "layers layers"]:
    own = hsic.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(own, own)
    return torch.where(scale > 0, hsic / scale.clamp_min(1e-300), torch.zeros_like(hsic))


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else 0.0


def _rank(matrix: Tensor) -> int:
    values = torch.linalg.eigvalsh(matrix)
    return max(int((values > values[-1].clamp_min(0) * len(values) * 1e-12).sum()), 1)


def _principal(matrix: Tensor, variance: float) -> Tensor:
    checks.number("variance", variance, low=0, high=1, open_low=True)
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum().clamp_min(1e-300)
    return vectors[:, : int((share < variance - 1e-12).sum()) + 1]


def _projection_weighted(a: Tensor, b: Tensor, ab: Tensor) -> float:
    """Morcos, Raghu, Bengio (2018): Σ α_i ρ_i / Σ α_i, α_i = Σ_j |⟨h_i, x_j⟩| of the canonical directions h_i of a."""
    values, vectors = torch.linalg.eigh(a)
    kept = values > values[-1].clamp_min(0) * len(values) * 1e-12
    root = (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T
    values_b, vectors_b = torch.linalg.eigh(b)
    kept_b = values_b > values_b[-1].clamp_min(0) * len(values_b) * 1e-12
    root_b = (vectors_b[:, kept_b] * values_b[kept_b].rsqrt()) @ vectors_b[:, kept_b].T
    left, cosines, _ = torch.linalg.svd(root @ ab @ root_b, full_matrices=False)
    weights = ((root @ left).T @ a).abs().sum(1)
    used = cosines > 1e-12
    return _ratio(float((weights * cosines.clamp_max(1))[used].sum()), float(weights[used].sum()))


def _explained(a: Tensor, b: Tensor, ab: Tensor, a2: Tensor, b2: Tensor, ab2: Tensor) -> float:
    weights = least_squares(a, ab, _RIDGE * float(a.diagonal().mean()))
    rest = b2.diagonal() - 2 * (weights * ab2).sum(0) + (weights * (a2 @ weights)).sum(0)
    living = b2.diagonal() > 0
    return float((1 - rest[living] / b2.diagonal()[living]).mean()) if bool(living.any()) else 0.0
