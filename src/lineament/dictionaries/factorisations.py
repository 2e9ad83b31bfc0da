"""Dictionaries by matrix factorisation, X ≈ Z D: NMF (Z, D >= 0), semi-NMF (Z >= 0), convex NMF (D is a convex combination of rows of X), PCA.

Lee and Seung (2001) for the multiplicative updates, Cichocki and Phan (2009) for HALS, Ding, Li and Jordan (2010) for semi- and convex NMF, Boutsidis and
Gallopoulos (2008) for the start by singular vectors. With as many atoms as numbers in a row, plain NMF has the trivial answer D = I: more atoms
mean something only from classes of their own (:func:`nmf_per_class`) or with sparse codes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.batching import auto_batch, progress
from lineament.core.checks import number, one_of, require, show
from lineament.core.codes import Codes
from lineament.dictionaries.autoencoders import checked_rows
from lineament.dictionaries.nnls import nnls, sweep
from lineament.dictionaries.saving import Saved
from lineament.dictionaries.topk.step import decoded

ORDERS = ("codes, dictionary", "dictionary, codes")
SOLVERS = ("hals", "multiplicative", "minibatch")
INITS = ("nndsvda", "random")
_ROWS = 4096
_SETTLING = 4
_PASSES = 300  # of HALS over the atoms at most, where rows are coded


class Factorisation(Saved):
    """Atoms and a mean that are found once; codes are computed for each row."""

    basis: Tensor
    mean: Tensor
    signed = False

    def __init__(self, d: int, width: int, *, site: str | None = None, **settings: Any):
        number("d", d, low=1, integer=True)
        number("width", width, low=1, integer=True)
        super().__init__(site=site, d=d, width=width, **settings)
        self.register_buffer("basis", torch.zeros(width, d))
        self.register_buffer("mean", torch.zeros(d))

    @property
    def atoms(self) -> Tensor:
        """(width, d)."""
        return self.basis

    def coded(self, rows: Tensor, start: Tensor | None = None) -> Tensor:
        """(n, d) -> (n, width); ``start``: codes that are close."""
        settings = self.settings
        penalties = {name: settings.get(name, 0.0) for name in ("ridge", "sparsity")}
        return nnls(rows, self.basis, steps=_PASSES, start=start, **penalties)

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width), dense; no gradient passes."""
        rows = checked_rows(x, self.basis.shape[1]).detach().to(self.basis)
        return self.coded(rows - self.mean).reshape(*x.shape[:-1], len(self.basis))

    def codes(self, x: Tensor) -> Codes:
        """(..., d) -> the same, sparse, computed in chunks of rows."""
        rows = checked_rows(x, self.basis.shape[1]).detach().to(self.basis)
        parts = list(
            auto_batch(
                lambda start, stop: Codes.of_dense(self.coded(rows[start:stop] - self.mean)),
                len(rows), most=_ROWS, memory=(Factorisation.codes, self.basis.shape),
            )
        )  # fmt: skip
        found = Codes.joined(parts) if parts else Codes.of_dense(rows.new_zeros(0, len(self.basis)))
        active = found.indices.shape[-1]
        lead = x.shape[:-1]
        return Codes(found.indices.reshape(*lead, active), found.values.reshape(*lead, active), found.width)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Codes or dense codes (..., width) -> (..., d)."""
        width = codes.width if isinstance(codes, Codes) else codes.shape[-1] if codes.ndim else 0
        require(
            width == len(self.basis),
            f"codes: got {show(codes)} of {width} features, expected {len(self.basis)}",
        )
        if isinstance(codes, Tensor):
            return codes.to(self.basis) @ self.basis + self.mean
        lead, active = codes.indices.shape[:-1], codes.indices.shape[-1]
        rows = codes.indices.reshape(lead.numel(), active), codes.values.reshape(lead.numel(), active)
        return (decoded(rows[0], rows[1].to(self.basis), self.basis) + self.mean).reshape(
            *lead, len(self.mean)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x."""
        return self.decode(self.codes(x))


class NMF(Factorisation):
    """Non-negative atoms and codes; :func:`nmf` finds the atoms.

    >>> net = NMF(2, 1); _ = net.basis.copy_(torch.tensor([[3.0, 4.0]]))
    >>> net.encode(torch.tensor([6.0, 8.0])).round(decimals=4).tolist()
    [2.0]
    """


class SemiNMF(Factorisation):
    """Atoms of any sign, non-negative codes; :func:`semi_nmf` finds the atoms.

    >>> SemiNMF(2, 1).atoms.shape
    torch.Size([1, 2])
    """


class ConvexNMF(Factorisation):
    """Atoms that are weighted means of rows that occur, non-negative codes; :func:`convex_nmf` finds them.

    >>> ConvexNMF(2, 1).atoms.shape
    torch.Size([1, 2])
    """


class PCA(Factorisation):
    """Principal components: orthonormal atoms, codes of either sign; :func:`pca` finds them.

    >>> PCA(2, 1).atoms.shape
    torch.Size([1, 2])
    """

    def coded(self, rows: Tensor, start: Tensor | None = None) -> Tensor:
        return rows @ self.basis.T


def multiplicative_step(
    x: Float[Tensor, "samples width"],
    codes: Float[Tensor, "samples atoms"],
    atoms: Float[Tensor, "atoms width"],
    *,
    eps: float = 1e-10,
    order: str = "codes, dictionary",
) -> tuple[Float[Tensor, "samples atoms"], Float[Tensor, "atoms width"]]:
    """Z <- Z ∘ (X Dᵀ) / (Z D Dᵀ + ε) and D <- D ∘ (Zᵀ X) / (Zᵀ Z D + ε), in this order or the other.

    >>> one = torch.ones(1, 1)
    >>> [value.item() for value in multiplicative_step(4 * one, one, one)]
    [4.0, 1.0]
    """
    one_of("order", order, ORDERS)
    for part in order.split(", "):
        if part == "codes":
            codes = codes * (x @ atoms.T) / (codes @ (atoms @ atoms.T) + eps)
        else:
            atoms = atoms * (codes.T @ x) / ((codes.T @ codes) @ atoms + eps)
    return codes, atoms


def hals_step(
    x: Float[Tensor, "samples width"],
    codes: Float[Tensor, "samples atoms"],
    atoms: Float[Tensor, "atoms width"],
    *,
    sparsity: float = 0.0,
) -> tuple[Float[Tensor, "samples atoms"], Float[Tensor, "atoms width"]]:
    """One pass of HALS over all codes, then over all atoms.

    >>> one = torch.ones(1, 1)
    >>> [value.item() for value in hals_step(4 * one, one, one)]
    [4.0, 1.0]
    """
    z = codes.T.contiguous()
    sweep(z, atoms @ x.T - sparsity, atoms @ atoms.T)
    return z.T, sweep(atoms.clone(), z @ x, z @ z.T)


def start(
    x: Float[Tensor, "samples width"], width: int, init: str, generator: torch.Generator
) -> tuple[Float[Tensor, "samples atoms"], Float[Tensor, "atoms width"]]:
    """Codes and atoms to begin with: from the leading singular vectors, zeros filled with the mean, or at random.

    >>> codes, atoms = start(torch.ones(4, 3), 1, "nndsvda", torch.Generator())
    >>> bool(torch.allclose(codes @ atoms, torch.ones(4, 3)))
    True
    """
    mean = x.mean()
    if init == "random":
        scale = (mean / width).sqrt()
        draw = [
            torch.rand(shape, generator=generator).to(x) for shape in ((len(x), width), (width, x.shape[1]))
        ]
        return draw[0] * scale * 2, draw[1] * scale * 2
    count = min(width, *x.shape)
    wide = x.double()
    # The singular vectors from the smaller of the two products.
    tall = len(x) >= x.shape[1]
    values, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    scales = values.flip(0)[:count].clamp(min=1e-30).sqrt()
    found = vectors.flip(1)[:, :count].T
    other = ((wide @ found.T if tall else wide.T @ found.T) / scales).T
    left, right = (other, found) if tall else (found, other)
    # Of each pair of singular vectors, the half (both positive parts, or both negative) with the larger product.
    parts = [(left.clamp(min=0), right.clamp(min=0)), ((-left).clamp(min=0), (-right).clamp(min=0))]
    norms = [u.norm(dim=1) * v.norm(dim=1) for u, v in parts]
    first = (norms[0] >= norms[1])[:, None]
    u, v = (torch.where(first, a, b) for a, b in zip(*parts))
    size = (scales * torch.maximum(*norms)).sqrt()[:, None]
    codes = (u / u.norm(dim=1, keepdim=True).clamp(min=1e-30) * size).T.to(x)
    atoms = (v / v.norm(dim=1, keepdim=True).clamp(min=1e-30) * size).to(x)
    codes, atoms = (torch.where(part > 0, part, mean) for part in (codes, atoms))
    if count < width:
        more = start(x, width - count, "random", generator)
        codes, atoms = torch.cat([codes, more[0]], 1), torch.cat([atoms, more[1]])
    return codes, atoms


def _rows(x: Tensor, width: int, *, signed: bool = False, free: bool = True, classes: str = "") -> Tensor:
    x = checks.tensor("x", x, shape=("samples", "width"), floating=True).detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    number("width", width, low=1, integer=True)
    require(
        signed or bool((x >= 0).all()),
        f"x: holds values below 0 (least {float(x.min()):.3g}), expected none; take a site behind a ReLU, semi_nmf, or pca",
    )
    require(
        not free or width < x.shape[1],
        f"width: got {width} atoms for rows of {x.shape[1]} numbers, where the identity is an exact and meaningless answer; pass fewer atoms{classes}",
    )
    return x


def nmf(
    x: Float[Tensor, "samples width"],
    width: int,
    *,
    solver: str = "hals",
    init: str = "nndsvda",
    sparsity: float = 0.0,
    iterations: int = 600,
    tolerance: float = 1e-5,
    batch_size: int = 1024,
    site: str | None = None,
    seed: int = 0,
) -> NMF:
    """Non-negative matrix factorisation, argmin_{Z, D >= 0} ½‖X - Z D‖² + s Σ Z.

    Args:
        x: activations, >= 0; width: the number of atoms.
        solver: ``"hals"``, ``"multiplicative"``, or ``"minibatch"`` (HALS whose sums over batches are forgotten slowly; for many samples).
        init: ``"nndsvda"`` (singular vectors) or ``"random"``.
        sparsity: s, with which there may be more atoms than numbers in a row; atoms then have norm 1.
        iterations: passes at most; tolerance: ends when the error falls by less than this times itself in ten passes.
        batch_size: of ``"minibatch"``. site: where x passed, for :attr:`NMF.site`. seed: of random starts and batches.

    Returns:
        An :class:`NMF`, whose codes of any row are exact. Its ``info`` is of the codes that HALS ends with: where it was stopped early their
        ``relative_error`` is a little above that of exact codes, and they have fewer ``mean_active``.

    Raises:
        InputError: values below 0, NaN, as many atoms as numbers in a row without sparsity.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]]) @ torch.tensor([[1.0, 2.0, 0.5]])
    >>> found = nmf(x, 1)
    >>> bool(torch.allclose(found.decode(found.encode(x)), x, atol=1e-4)), found.info["relative_error"] < 1e-4
    (True, True)
    """
    one_of("solver", solver, SOLVERS)
    one_of("init", init, INITS)
    number("iterations", iterations, low=1, integer=True)
    x = _rows(x, width, free=sparsity == 0, classes=", sparsity= above 0, or nmf_per_class")
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    codes, atoms = start(x, width, init, generator)
    near = None
    if solver == "minibatch":
        atoms = _minibatch(x, atoms, sparsity, iterations, tolerance, batch_size, generator)
    else:
        last, total = torch.inf, x.norm()
        for step in progress(range(iterations), "NMF"):
            if sparsity:
                atoms = atoms / atoms.norm(dim=1, keepdim=True).clamp(min=1e-30)
            if solver == "hals":
                codes, atoms = hals_step(x, codes, atoms, sparsity=sparsity)
            else:
                codes, atoms = multiplicative_step(x, codes, atoms)
            if step % 10 == 9:
                error = float((x - codes @ atoms).norm() / total.clamp(min=1e-30))
                if last - error <= tolerance * error:
                    break
                last = error
        near = codes
    return _made(NMF, x, atoms, site, near=near, solved=solver == "hals", sparsity=sparsity)


def _made(
    kind: Any,
    x: Tensor,
    atoms: Tensor,
    site: str | None,
    *,
    mean: Tensor | None = None,
    near: Tensor | None = None,
    solved: bool = False,
    **settings: Any,
) -> Any:
    """The dictionary with atoms of norm 1 (dead ones of 0), and what it leaves of x; ``near``: codes of x in the atoms as given that are close, and where they
    are ``solved`` by HALS passes, a few more settle them in the last atoms: the exact codes of every row can take as long as all passes did.
    """
    settings = {name: value for name, value in settings.items() if value}
    found = kind(x.shape[1], len(atoms), site=site, **settings).to(x)
    norms = atoms.norm(dim=1, keepdim=True)
    found.basis.copy_(torch.where(norms > 0, atoms / norms.clamp(min=1e-30), 0))
    if mean is not None:
        found.mean.copy_(mean)
    left = seen = 0.0
    for at, part in zip(range(0, len(x), _ROWS), x.split(_ROWS)):
        close = None if near is None else near[at : at + _ROWS] * norms.T
        if solved and close is not None:
            z, gram = close.T.contiguous(), found.basis @ found.basis.T
            slopes = found.basis @ part.T - settings.get("sparsity", 0.0)
            for _ in range(_SETTLING):
                sweep(z, slopes, gram)
            codes = z.T
        else:
            codes = found.coded(part - found.mean, close)
        left += float((part - codes @ found.basis - found.mean).double().square().sum())
        seen = seen + (codes != 0).sum(0)
    total = float(x.double().square().sum())
    found.info = {
        "samples": len(x),
        "relative_error": (left / total) ** 0.5 if total else 0.0,
        "dead": int((torch.as_tensor(seen) == 0).sum()),
        "mean_active": float(torch.as_tensor(seen).sum()) / len(x),
    }
    return found


def _minibatch(
    x: Tensor, atoms: Tensor, sparsity: float, iterations: int, tolerance: float, batch_size: int, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Atoms from running sums Zᵀ Z and Zᵀ X, each batch coded from 0 with a few passes (Mairal et al. 2010)."""
    k, d = atoms.shape
    zz, zx = x.new_zeros(k, k), x.new_zeros(k, d)
    batches = max(1, -(-len(x) // batch_size))
    keep = 1 - 1 / batches
    for _ in progress(range(max(1, iterations // 10)), "minibatch NMF"):
        before = atoms
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            part = x[rows]
            z = x.new_zeros(k, len(part))
            gram, products = atoms @ atoms.T, atoms @ part.T - sparsity
            for _ in range(10):
                sweep(z, products, gram)
            zz, zx = keep * zz + z @ z.T, keep * zx + z @ part
            for _ in range(2):
                atoms = sweep(atoms.clone(), zx, zz)
            if sparsity:
                atoms = atoms / atoms.norm(dim=1, keepdim=True).clamp(min=1e-30)
        if float((atoms - before).norm()) <= tolerance * float(before.norm()):
            break
    return atoms


def nmf_per_class(
    x: Float[Tensor, "samples width"],
    labels: Int[Tensor, " samples"],
    per_class: int = 10,
    *,
    site: str | None = None,
    **options: Any,
) -> NMF:
    """One NMF for the samples of each class, their atoms one below the other: how a dictionary can have more atoms than a row has numbers.

    Codes in more atoms than numbers are not unique; a small ridge (1e-6 of the mean squared norm) makes them so.

    Args:
        labels: the class of each row. per_class: atoms of each. options: of :func:`nmf`.

    Raises:
        InputError: a class with fewer samples than atoms.

    >>> nmf_per_class(torch.rand(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2, 2).atoms.shape
    torch.Size([4, 3])
    """
    x = _rows(x, per_class)
    labels = checks.labels("labels", labels, count=len(x))
    parts = []
    for label in labels.unique().tolist():
        own = x[labels == label]
        require(
            len(own) >= per_class, f"per_class: got {per_class}, but class {label} has {len(own)} samples"
        )
        parts.append(nmf(own, per_class, **options).atoms)
    atoms = torch.cat(parts)
    ridge = 1e-6 * float(x.square().sum(1).mean()) if len(atoms) >= x.shape[1] else 0.0
    return _made(NMF, x, atoms, site, ridge=ridge)


def semi_nmf(
    x: Float[Tensor, "samples width"],
    width: int,
    *,
    iterations: int = 200,
    tolerance: float = 1e-5,
    site: str | None = None,
    seed: int = 0,
) -> SemiNMF:
    """Semi-NMF: non-negative codes, atoms of any sign, by HALS on the codes and least squares on the atoms, from k-means.

    Args: as for :func:`nmf`; x may hold values of any sign.

    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> semi_nmf(x, 2).info["relative_error"] < semi_nmf(x, 1).info["relative_error"] < 1
    True
    """
    x = _rows(x, width, signed=True, free=False)
    codes, _ = _by_clusters(x, width, seed)
    last, total = torch.inf, x.norm().clamp(min=1e-30)
    atoms = x.new_zeros(width, x.shape[1])
    for _ in progress(range(iterations), "semi-NMF"):
        atoms = torch.linalg.lstsq(codes.double().T @ codes.double() + 1e-10 * torch.eye(width).to(x.device), (codes.T @ x).double()).solution.to(x)  # fmt: skip
        z = codes.T.contiguous()
        codes = sweep(z, atoms @ x.T, atoms @ atoms.T).T
        error = float((x - codes @ atoms).norm() / total)
        if last - error <= tolerance * error:
            break
        last = error
    return _made(SemiNMF, x, atoms, site, near=codes)


def convex_nmf(
    x: Float[Tensor, "samples width"],
    width: int,
    *,
    iterations: int = 200,
    tolerance: float = 1e-5,
    site: str | None = None,
    seed: int = 0,
) -> ConvexNMF:
    """Convex NMF: each atom is a non-negative combination of rows of x, by the multiplicative updates of Ding et al., from k-means.

    Args: as for :func:`nmf`; x may hold values of any sign. Memory and time grow with the square of the samples: take a few thousand.

    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> convex_nmf(x, 2).atoms.shape
    torch.Size([2, 4])
    """
    x = _rows(x, width, signed=True, free=False)
    codes, members = _by_clusters(x, width, seed)
    weights = members / members.sum(0).clamp(min=1)
    gram = x @ x.T
    up, down = gram.clamp(min=0), (-gram).clamp(min=0)
    last, total = torch.inf, x.norm().clamp(min=1e-30)
    for _ in progress(range(iterations), "convex NMF"):
        inner = codes @ (weights.T @ down), codes @ (weights.T @ up)
        top, bottom = up @ weights + inner[0] @ weights, down @ weights + inner[1] @ weights
        codes = codes * (top / (bottom + 1e-10)).sqrt()
        square = codes.T @ codes
        top = up @ codes + down @ weights @ square
        bottom = down @ codes + up @ weights @ square
        weights = weights * (top / (bottom + 1e-10)).sqrt()
        error = float((x - codes @ (weights.T @ x)).norm() / total)
        if last - error <= tolerance * error:
            break
        last = error
    return _made(ConvexNMF, x, weights.T @ x, site, near=codes)


def _by_clusters(x: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes to begin with and the indicators of k-means' clusters (Ding et al.: the indicators plus 0.2)."""
    from sklearn.cluster import KMeans

    require(len(x) >= width, f"width: got {width} atoms for {len(x)} samples, expected at most as many")
    labels = KMeans(width, random_state=seed % 2**32).fit_predict(x.double().cpu().numpy())
    members = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), width).to(x)
    return members + 0.2, members


def pca(x: Float[Tensor, "samples width"], width: int, *, site: str | None = None) -> PCA:
    """The leading principal components of x.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> pca(x, 1).atoms.abs().tolist()
    [[1.0, 0.0]]
    """
    x = _rows(x, width, signed=True, free=False)
    number("width", width, low=1, high=min(x.shape), integer=True)
    mean = x.double().mean(0)
    centred = x.double() - mean
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    return _made(PCA, x, vectors.T.to(x), site, mean=mean.to(x))
