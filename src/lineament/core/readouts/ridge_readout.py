"""Ridge read-outs for thousands of targets and many penalties from one decomposition of the features.

With the centred features X = U S Vᵀ every penalty is a rescaling, w(λ) = V diag(s/(s²+λ)) Uᵀ Y, and so is the
leave-one-out error: the residual of sample i in the fit without it is r_i / (1 - h_i), h_i = 1/n + Σ_j u_ij² s_j²/(s_j²+λ)
(Allen 1974). The decomposition is that of the smaller Gram matrix, or of X itself where the smallest penalty is too small for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.results import Readable

_ROWS = 4096


@dataclass(frozen=True)
class Ridge(Readable):
    """A ridge read-out: ``predict(x) = x @ weight.T + bias``.

    Attributes:
        weight: (targets x features), bias: (targets,).
        penalties: every penalty that was tried.
        errors: mean squared leave-one-out error (penalties x targets).
        chosen: index of each target's penalty.
    """

    weight: Float[Tensor, "targets features"]
    bias: Float[Tensor, " targets"]
    penalties: Float[Tensor, " penalties"]
    errors: Float[Tensor, "penalties targets"]
    chosen: Int[Tensor, " targets"]

    @property
    def penalty(self) -> Float[Tensor, " targets"]:
        """The penalty of each target."""
        return self.penalties[self.chosen]

    def predict(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch targets"]:
        """The read-out of new features."""
        return x @ self.weight.T + self.bias

    def to_dict(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Leave-one-out error against penalty: the median over targets and the middle half of them."""
        import matplotlib.pyplot as plt

        ax = ax if ax is not None else plt.subplots()[1]
        errors = self.errors.double().cpu()
        low, middle, high = (errors.quantile(q, dim=1) for q in (0.25, 0.5, 0.75))
        ax.loglog(self.penalties.cpu(), middle, "o-")
        ax.fill_between(self.penalties.cpu(), low, high, alpha=0.25)
        ax.set(xlabel="penalty", ylabel="leave-one-out squared error")
        return ax


def ridge(
    x: Float[Tensor, "samples features"],
    y: Float[Tensor, "samples *targets"],
    penalties: float | Sequence[float] | Float[Tensor, " penalties"] = (
        0.01,
        0.1,
        1.0,
        10.0,
        100.0,
        1e3,
        1e4,
    ),
    *,
    choose: str = "target",
    intercept: bool = True,
    method: str = "auto",
) -> Ridge:
    """The ridge read-outs min_w Σ_i (y_i - w·x_i - b)² + λ‖w‖² of many targets, each with its best λ by leave-one-out.

    Args:
        x: features; y: targets, (samples, targets) or (samples,) for one.
        penalties: λ, one or many, ≥ 0 (0 gives the least-squares fit of minimum norm).
        choose: ``"target"`` takes the best λ for each target, ``"shared"`` one for all (lowest mean error).
        intercept: fit b, which is not penalised.
        method: ``"eigh"`` (eigenvectors of the smaller of XᵀX and XXᵀ, in float64), ``"svd"`` (of X, in its dtype), or ``"auto"``:
            eigh unless the smallest penalty is within its rounding.

    Returns:
        :class:`Ridge`, in x's dtype.

    Raises:
        InputError: shapes that do not match, NaN, negative penalties, fewer than two samples.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> fit = ridge(x, 2 * x + 1, penalties=5.0)
    >>> round(fit.weight.item(), 6), round(fit.bias.item(), 6), round(fit.errors.item(), 6)
    (1.0, 2.5, 4.319445)
    """
    x = checks.tensor("x", x, shape=("samples", "features"), floating=True).detach()
    y = checks.tensor("y", y, floating=True).detach()
    y = (y[:, None] if y.ndim == 1 else y).to(x.device)
    checks.tensor("y", y, shape=(len(x), "targets"))
    require(len(x) >= 2, f"x: got {len(x)} sample, expected at least 2")
    grid = torch.as_tensor(penalties, dtype=torch.float64, device=x.device).flatten()
    checks.tensor("penalties", grid)
    require(bool((grid >= 0).all()), f"penalties: got {grid.min():g}, expected penalties of at least 0")
    checks.one_of("choose", choose, ["target", "shared"])
    checks.one_of("method", method, ["auto", "eigh", "svd"])
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y = y.to(work.dtype)

    zero_x, zero_y = work.new_zeros(work.shape[1]), work.new_zeros(y.shape[1])
    mean_x, mean_y = (work.mean(0), y.mean(0)) if intercept else (zero_x, zero_y)
    centred, wanted = work - mean_x, y - mean_y
    left, scales, right = _decompose(centred, float(grid.min()), method)
    code = left.T @ wanted

    errors = torch.empty(len(grid), y.shape[1], dtype=work.dtype, device=x.device)
    for index, penalty in enumerate(grid.tolist()):
        shrink = _ratio(scales.square(), penalty).to(work.dtype)
        errors[index] = _leave_one_out(left, code * shrink[:, None], wanted, shrink, intercept)
    if choose == "target":
        chosen = errors.argmin(0)
    else:
        chosen = errors.mean(1).argmin().expand(y.shape[1]).clone()
    # One rescaling a target: column t of the code by s / (s² + λ_t).
    squared = scales.square()[:, None] + grid[chosen]
    gain = torch.where(squared > 0, scales[:, None] / squared.clamp(min=1e-300), torch.zeros_like(squared))
    weight = (right @ (code * gain.to(work.dtype))).T
    bias = mean_y - weight @ mean_x
    back = x.dtype
    return Ridge(weight.to(back).contiguous(), bias.to(back), grid.to(back), errors.to(back), chosen)


def _ratio(squares: Tensor, penalty: float) -> Tensor:
    """s²/(s²+λ), with 0/0 = 0."""
    return torch.where(
        squares > 0, squares / (squares + penalty).clamp(min=1e-300), torch.zeros_like(squares)
    )


def _decompose(x: Tensor, smallest: float, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, s (float64), V of x, by the smaller Gram matrix in float64 or by the singular value decomposition."""
    samples, features = x.shape
    eps = torch.finfo(x.dtype).eps
    if method == "auto":
        # Gram's eigenvalues are known to 2e-16 of the largest: a penalty has to stand above what that leaves.
        scale = float(torch.linalg.matrix_norm(x).double().square())
        method = "eigh" if smallest > 1e-9 * scale / min(samples, features) else "svd"
    if method == "svd":
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        keep = s > eps * max(samples, features) * (s[0] if len(s) else 0)
        return u[:, keep], s[keep].double(), vh[keep].T
    tall = samples >= features
    gram = torch.zeros(min(x.shape), min(x.shape), dtype=torch.float64, device=x.device)
    if tall:
        for part in x.split(_ROWS):
            wide = part.double()
            gram.addmm_(wide.T, wide)
    else:
        for part in x.split(_ROWS, dim=1):
            wide = part.double()
            gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)
    keep = values > 1e-15 * max(samples, features) * values[-1].clamp(min=0)
    scales = values[keep].sqrt()
    basis = vectors[:, keep]
    other = (basis / scales).to(x.dtype)
    if tall:
        return x @ other, scales, basis.to(x.dtype)
    return basis.to(x.dtype), scales, x.T @ other


def _leave_one_out(left: Tensor, code: Tensor, wanted: Tensor, shrink: Tensor, intercept: bool) -> Tensor:
    """The mean over samples of (r_i / (1 - h_i))², a target; samples in chunks, so that memory has a ceiling."""
    total = torch.zeros(wanted.shape[1], dtype=torch.float64, device=wanted.device)
    fixed = 1 / len(wanted) if intercept else 0.0
    for u, y in zip(left.split(_ROWS), wanted.split(_ROWS)):
        kept = 1 - fixed - u.square() @ shrink
        # A sample that alone determines a direction fits itself exactly whatever it is: 0/0, no error to speak of.
        kept = kept.clamp(min=torch.finfo(u.dtype).eps)
        residual = torch.addmm(y, u, code, alpha=-1)
        residual /= kept[:, None]
        total += residual.square_().sum(0).double()
    return (total / len(wanted)).to(wanted.dtype)
