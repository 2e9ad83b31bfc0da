"""Push a representation along a feature's direction: which outputs change, and how far must it be pushed?

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847): a direction flips its own feature, and a hard feature flips at a smaller step, since less variance is spent on it. Steps
are in units of the difference of the class means; ``size`` says how long that is beside the representation's spread, which grows with training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.models import answered, device_of, dtype_of, frozen
from lineament.core.results import Readable
from lineament.core.sites.activations import capture, patch
from lineament.measure.bias.consequences import _binary, least_squares
from lineament.measure.collapse.profile import pooled


@dataclass(frozen=True)
class Flips(Readable):
    """``flipped[name]`` is the share of samples whose answer changed at each step; ``size`` the direction's length over the representation's root mean square deviation."""

    steps: tuple[float, ...]
    flipped: Mapping[str, Float[Tensor, " steps"]]
    size: float

    def to_dict(self) -> dict[str, Any]:
        return results.plain(self)

    def plot(self, ax: Any = None) -> Any:
        """Share of answers that flip, by step."""
        ax = results.axes(ax)
        for name, values in self.flipped.items():
            ax.plot(self.steps, values, label=name)
        ax.set(xlabel="step along the difference of the means", ylabel="answers that flip")
        ax.legend()
        return ax


def feature_direction(
    representation: Float[Tensor, "samples units"], feature: Tensor
) -> Float[Tensor, " units"]:
    """mean(φ | f = 1) - mean(φ | f = 0).

    >>> feature_direction(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])).tolist()
    [2.0, 0.0]
    """
    f = _binary("feature", feature, len(representation)).bool().to(representation.device)
    return representation[f].mean(0) - representation[~f].mean(0)


def linear_readout(
    representation: Float[Tensor, "samples units"], feature: Tensor
) -> Float[Tensor, " weights"]:
    """Least squares of 2f - 1 on the representation, the intercept first, of least norm.

    >>> linear_readout(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0, 1])).round(decimals=6).tolist()
    [0.0, 1.0]
    """
    f = _binary("feature", feature, len(representation)).to(representation.device)
    return least_squares(representation, 2.0 * f.to(representation.dtype) - 1)


def flips(
    representation: Float[Tensor, "samples units"],
    feature: Tensor,
    readouts: Mapping[str, Float[Tensor, " weights"]],
    steps: Sequence[float],
) -> Flips:
    """Add s times the feature's direction where f = 0, subtract it where f = 1, and count the read-outs that change their sign.

    >>> x = torch.tensor([[-1.0], [1.0]]).double(); f = torch.tensor([0, 1])
    >>> flips(x, f, {"f": linear_readout(x, f)}, [0.0, 0.4, 0.6]).flipped["f"].tolist()
    [0.0, 0.0, 1.0]
    """
    direction = feature_direction(representation, feature)
    sign = 1.0 - 2.0 * _binary("feature", feature, len(representation)).to(representation)
    found = {name: [] for name in readouts}
    for s in steps:
        moved = representation + float(s) * sign[:, None] * direction
        for name, w in readouts.items():
            before, after = (w[0] + x @ w[1:] > 0 for x in (representation, moved))
            found[name].append(float((before != after).double().mean()))
    spread = float((representation - representation.mean(0)).square().sum(1).mean().sqrt())
    size = float(direction.norm()) / spread if spread > 0 else float("nan")
    return Flips(
        tuple(map(float, steps)), {n: torch.tensor(v, dtype=torch.float64) for n, v in found.items()}, size
    )


def intervene(
    model: nn.Module,
    inputs: Tensor,
    feature: Tensor,
    site: str,
    *,
    steps: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    batch_size: int = 512,
) -> Flips:
    """The same inside a network: the site's output is pushed, the forward pass goes on, and each output's sign (or the class) is compared.

    Args:
        feature: 0 or 1 a sample; its direction is measured on these samples.
        site: where; a map (sample, unit, height, width) or tokens (sample, token, unit) are pushed at every position, by the direction of their means.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)); _ = [nn.init.ones_(p) for p in net.parameters()]
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> intervene(net, x, torch.tensor([0, 1]), "0", steps=[0.0, 1.0]).flipped["output 0"].tolist()
    [0.0, 1.0]
    """
    device, dtype = device_of(model), dtype_of(model)
    x = checks.tensor("inputs", inputs).to(device)
    x = x.to(dtype) if x.is_floating_point() else x
    with frozen(model), torch.no_grad():
        held = []
        for part in x.split(batch_size):
            with capture(model, [site], stop_early=True) as acts:
                model(part)
            held.append(pooled(acts[site]))
        phi = torch.cat(held)
        direction = feature_direction(phi, feature)
        sign = 1.0 - 2.0 * _binary("feature", feature, len(x)).to(phi)

        def outputs(step: float) -> Tensor:
            parts = []
            for at in torch.arange(len(x), device=device).split(batch_size):
                shift = step * sign[at, None] * direction
                with patch(model, {site: lambda old, shift=shift: old + _everywhere(shift, old)}):
                    parts.append(answered(model, x[at], "inputs"))
            return torch.cat(parts)

        before = outputs(0.0)
        found: dict[str, list[float]] = {f"output {k}": [] for k in range(before.shape[1])}
        for s in steps:
            changed = (outputs(float(s)) > 0) != (before > 0)
            for k, share in enumerate(changed.double().mean(0).tolist()):
                found[f"output {k}"].append(share)
    spread = float((phi - phi.mean(0)).square().sum(1).mean().sqrt())
    return Flips(
        tuple(map(float, steps)), {n: torch.tensor(v, dtype=torch.float64) for n, v in found.items()},
        float(direction.norm()) / spread if spread > 0 else float("nan"),
    )  # fmt: skip


def _everywhere(shift: Float[Tensor, "samples units"], old: Tensor) -> Tensor:
    """One vector a sample at every position of a map, or at every token."""
    return shift[:, None] if old.ndim == 3 else shift[(..., *[None] * (old.ndim - 2))]
