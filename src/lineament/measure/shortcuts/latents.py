"""Shortcut bias on data whose latents are known: probe a network on a grid of latents, against the best rule.

Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228). The grid is uniform while the data are Gaussian, so that its corners are extrapolation;
``density="gaussian"`` weighs each cell by the data's density instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import chunked
from lineament.core.models import answered, device_of, dtype_of, frozen
from lineament.core.results import Readable
from lineament.data.samples import Samples
from lineament.data.two_latents import TwoLatents
from lineament.measure.shortcuts.reliance import Reliance, decisions, reliance

DENSITIES = ("uniform", "gaussian")


@dataclass(frozen=True)
class LatentBias(Readable):
    """What a network decides by, on a grid of latents, beside the best rule.

    Attributes:
        bias: the network's reliance less the best rule's: above 0, it prefers the shortcut more than is right.
        model, best: :class:`~lineament.measure.shortcuts.reliance.Reliance` of either.
        rule: how the best rule was found.
        latents: z of each cell of the grid, z_s in the outer loop; ``decided`` and ``best_decided``: ±1 there, of the network and of the best rule.
    """

    bias: float
    model: Reliance
    best: Reliance
    rule: str
    latents: Float[Tensor, "cell 2"]
    decided: Float[Tensor, "cell"]
    best_decided: Float[Tensor, "cell"]

    @property
    def absolute(self) -> float:
        """The bias of the absolute form, which asks how much each latent is used, whichever way round."""
        return self.model.absolute - self.best.absolute

    def to_dict(self) -> dict[str, Any]:
        return {
            "bias": self.bias,
            "absolute": self.absolute,
            "model": self.model.to_dict(),
            "best": self.best.to_dict(),
            "rule": self.rule,
        }

    def plot(self, ax: Any = None) -> Any:
        """The network's decisions over the latents, with the best rule's border."""
        ax = results.axes(ax)
        points = round(len(self.latents) ** 0.5)
        z = self.latents.view(points, points, 2)
        shown = self.decided.view(points, points).T.numpy()
        ends = [float(z[..., i].min() if end == 0 else z[..., i].max()) for i in (0, 1) for end in (0, 1)]
        ax.imshow(shown, origin="lower", extent=tuple(ends), cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        ax.contour(z[:, 0, 0], z[0, :, 1], self.best_decided.view(points, points).T, levels=[0], colors="k")
        ax.set(xlabel="shortcut", ylabel="core", title=f"bias {self.bias:+.2f}; black: the best rule")
        return ax


def latent_bias(
    model: nn.Module,
    world: TwoLatents,
    *,
    reference: Samples | None = None,
    points: int = 30,
    reach: float = 3.0,
    density: str = "uniform",
    batch_size: int = 1024,
) -> LatentBias:
    """How much more a network decides by the shortcut than the best rule does, on a grid of latents.

    Args:
        model: takes ``world.embed(z)`` and gives one score (its sign decides) or two logits.
        world: the latents and their embedding.
        reference: samples of ``world`` to which the best rule is fitted, by linear discriminant analysis of the inputs as in the paper; the closed
            form Σ⁻¹ μ by default.
        points: in each direction.
        reach: the grid's half width, in means.
        density: ``"uniform"`` as in the paper, or ``"gaussian"``, which weighs cells by the density of the data.

    >>> from lineament.data import two_latents
    >>> world = two_latents(dims=2, amplification=(1.0, 1.0), orthogonal=True)
    >>> net = nn.Linear(2, 1, bias=False); net.weight.data = world.embed.directions[:1].float()
    >>> found = latent_bias(net, world)
    >>> found.model.value, round(found.best.value, 3), round(found.bias, 3)
    (1.0, -0.689, 1.689)
    """
    checks.one_of("density", density, DENSITIES)
    z = world.grid(points, reach=reach)
    inputs = world.embed(z)
    device, dtype = device_of(model), dtype_of(model)
    with frozen(model), torch.no_grad():
        scores = chunked(
            lambda x: answered(model, x.to(device, dtype), "inputs").double().cpu(),
            inputs,
            batch_size=batch_size,
        )
    weights = None
    if density == "gaussian":
        inverse = torch.linalg.inv(world.covariance)
        near = [((z - s * world.means) @ inverse * (z - s * world.means)).sum(1) for s in (-1, 1)]
        weights = (-near[0] / 2).exp() + (-near[1] / 2).exp()
    if reference is None:
        best, rule = z @ world.optimal_weights, "closed form"
    else:
        rule = f"linear discriminant analysis of {len(reference)} samples"
        fitted = LinearDiscriminantAnalysis(solver="lsqr")
        fitted.fit(reference.inputs.flatten(1).double().numpy(), reference.targets.numpy())
        best = torch.from_numpy(fitted.decision_function(inputs.flatten(1).double().numpy()))
    ours, theirs = (reliance(s, z, weights=weights) for s in (scores, best))
    return LatentBias(ours.value - theirs.value, ours, theirs, rule, z, decisions(scores), decisions(best))
