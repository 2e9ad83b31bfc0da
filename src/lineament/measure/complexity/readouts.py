"""Linear read-outs of features from a network's sites: what they are fitted from, gathered in one pass, and the ridge solution of all features at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.statistics.accumulation import working
from lineament.core.statistics.moments import Covariance, CrossCovariance, update_together

Activations = Mapping[str, Tensor]


class ReadoutMoments:
    """What linear read-outs of features from several sites are fitted from, in one pass; joins by ``a + b``.

    >>> moments = ReadoutMoments()
    >>> moments.update({"layer": torch.tensor([[0.0], [1.0], [2.0]])}, torch.tensor([[1.0], [3.0], [5.0]]))
    >>> round(moments.readouts(ridge=0.0).weights["layer"].item(), 6)
    2.0
    """

    def __init__(self) -> None:
        self.activations: dict[str, Covariance] = {}
        self.cross = CrossCovariance(correction=0)
        self.resolution = 0.0

    @property
    def count(self) -> int:
        """Rows seen."""
        return self.cross.count

    def update(self, activations: Activations, z: Float[Tensor, "batch features"]) -> None:
        """Take in a batch: row i of every site and of the features belongs to the same sample."""
        widths = {site: len(stream.mean) for site, stream in self.activations.items()}
        rows = {
            site: finite_rows(f"site {site!r}", value, widths.get(site), len(z))
            for site, value in activations.items()
        }
        require(bool(rows), "activations: got none, expected at least one site")
        z = finite_rows("features", z, len(self.cross.mean_y) if self.count else None, len(z))
        if not self.activations:
            self.activations = {site: Covariance(correction=0) for site in rows}
        require(
            list(rows) == list(self.activations),
            f"activations: got the sites {list(rows)}, expected {list(self.activations)} as before",
        )
        self.resolution = max(self.resolution, *(torch.finfo(value.dtype).eps for value in rows.values()))
        update_together(list(self.activations.values()), self.cross, list(rows.values()), z)

    def __add__(self, other: ReadoutMoments) -> ReadoutMoments:
        if not self.count or not other.count:
            return self if self.count else other
        require(
            list(self.activations) == list(other.activations),
            f"+: sites {list(self.activations)} and {list(other.activations)} do not match",
        )
        joined = ReadoutMoments()
        joined.activations = {
            site: stream + other.activations[site] for site, stream in self.activations.items()
        }
        joined.cross = self.cross + other.cross
        joined.resolution = max(self.resolution, other.resolution)
        return joined

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def state_dict(self) -> dict[str, Any]:
        """Everything that was gathered, as nested tensors and numbers."""
        streams = {site: stream.state_dict() for site, stream in self.activations.items()}
        return {"activations": streams, "cross": self.cross.state_dict(), "resolution": self.resolution}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ReadoutMoments:
        """The moments that :meth:`state_dict` described."""
        moments = cls()
        streams = state["activations"].items()
        moments.activations = {site: Covariance.from_state_dict(stream) for site, stream in streams}
        moments.cross = CrossCovariance.from_state_dict(state["cross"])
        moments.resolution = state["resolution"]
        return moments

    @property
    def constant(self) -> Bool[Tensor, " features"]:
        """Features whose variance is 0, or within the rounding of their mean."""
        return _constant(self.cross.squares_y / max(self.count, 1), self.cross.mean_y, self.resolution)

    def cross_covariance(self) -> dict[str, Float[Tensor, "width features"]]:
        """Cov(activation, feature) at each site, divisor n."""
        widths = [len(stream.mean) for stream in self.activations.values()]
        return dict(zip(self.activations, self.cross.covariance.split(widths)))

    def readouts(self, ridge: float | Sequence[float] = 1e-3, *, scale: bool = True) -> Readouts:
        """The ridge read-outs min_w E[(z - w·x - c)²] + λ‖w‖² of every feature from every site.

        One Cholesky factor a site serves all features; several penalties come from one eigendecomposition a site. Without penalty
        directions in which the activations do not vary are left out (the solution of minimum norm).

        Args:
            ridge: λ, one or several; features are not scaled, so that λ is relative to the variances of the activations.
            scale: divide each activation by its standard deviation first, so that λ is relative to 1.

        Raises:
            InputError: a penalty below 0, or none where a site has as many activations as there are samples.
        """
        require(self.count >= 2, f"samples: got {self.count} to fit the read-outs on, expected at least 2")
        penalties = [checks.number("ridge", value, low=0) for value in _listed(ridge)]
        weights = {}
        for (site, stream), cross in zip(self.activations.items(), self.cross_covariance().values()):
            require(
                min(penalties) > 0 or len(stream.mean) < self.count,
                f"ridge: got 0 with {self.count} samples and {len(stream.mean)} activations at site {site!r}, where any feature "
                "could be read without error; pass a ridge above 0 (1e-3 is usual), more samples, or a smaller pool",
            )
            weights[site] = solve(
                stream.covariance, stream.mean, cross, penalties, scale=scale, resolution=self.resolution
            )
        means = {site: stream.mean for site, stream in self.activations.items()}
        variance = (self.cross.squares_y / self.count).masked_fill(self.constant, torch.nan)
        return Readouts(tuple(penalties), weights, means, self.cross.mean_y, variance, self.count)


def finite_rows(what: str, x: Any, width: int | None, count: int) -> Tensor:
    """``x`` as finite rows in single or double precision; which rows are not finite is told."""
    shape = (count, "features" if width is None else width)
    x = checks.tensor(what, x, shape=shape, finite=False)
    require(not x.is_complex(), f"{what}: got {checks.show(x)}, expected real numbers")
    x = working(x)
    if bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()):
        return x
    bad = (~torch.isfinite(x)).any(1).nonzero().flatten().tolist()
    named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    raise checks.NotFiniteError(
        f"{what}: NaN or infinite values in {len(bad)} of {len(x)} rows ({named}), expected finite values only"
    )


def _constant(variance: Tensor, mean: Tensor, resolution: float) -> Tensor:
    return variance <= (4 * resolution * mean.abs()).square()


def _listed(value: float | Sequence[float]) -> list[float]:
    return [value] if isinstance(value, (int, float)) else checks.listed("ridge", value, "penalties")


def solve(
    covariance: Float[Tensor, "width width"],
    mean: Float[Tensor, " width"],
    cross: Float[Tensor, "width features"],
    penalties: Sequence[float],
    *,
    scale: bool = True,
    resolution: float = 2**-52,
) -> Float[Tensor, "penalties width features"]:
    """Ridge weights (S + λI)⁻¹ C of many targets and penalties from the moments of the inputs.

    >>> solve(torch.eye(1).double() * 4, torch.zeros(1).double(), torch.full((1, 1), 2.0).double(), [0.0, 1.0]).flatten().tolist()
    [0.5, 0.25]
    """
    variance = covariance.diagonal()
    still = _constant(variance, mean, resolution)
    scaled = scale or max(penalties) == 0
    unit = torch.where(still, 1.0, variance.sqrt()) if scaled else torch.ones_like(variance)
    moving = (~still).to(covariance.dtype)
    s = covariance * moving[:, None] * moving / unit[:, None] / unit
    c = cross * moving[:, None] / unit[:, None]
    if len(penalties) == 1 and penalties[0] > 0:
        factor, failed = torch.linalg.cholesky_ex(s + penalties[0] * torch.eye(len(s)).to(s))
        if not bool(failed):
            return (torch.cholesky_solve(c, factor) / unit[:, None])[None]
    values, vectors = torch.linalg.eigh(s)
    values = values.clamp(min=0)
    kept = values > len(s) * resolution * values[-1:]
    code = vectors.T @ c
    gains = [
        torch.where(kept | (penalty > 0), 1 / (values + penalty).clamp(min=1e-300), 0)
        for penalty in penalties
    ]
    return torch.stack([vectors @ (gain[:, None] * code) / unit[:, None] for gain in gains])


@dataclass(frozen=True)
class Readouts:
    """Linear read-outs of features from sites, one for each penalty: z = mean_z + (x - mean) @ weight.

    Attributes:
        penalties: one or several.
        weights: {site: (penalties x width x features)}; means: {site: (width,)}.
        mean: of the features; variance: of the features over the samples that the read-outs were fitted on, NaN where constant.
        samples: how many rows they were fitted on.
    """

    penalties: tuple[float, ...]
    weights: dict[str, Float[Tensor, "penalties width features"]]
    means: dict[str, Float[Tensor, " width"]]
    mean: Float[Tensor, " features"]
    variance: Float[Tensor, " features"]
    samples: int
