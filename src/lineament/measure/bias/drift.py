"""How far does each layer move as training goes on, and is it the units or the space that moves?

A layer that keeps its features may still turn them, so that three answers stand beside each other, all from the joint moments of the checkpoints' units in
one pass over the data: the share of variance that the units themselves moved by, the distance that is left after the best rotation (Procrustes), and the
similarity that no rotation or common scale changes (CKA). Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847) follow representations through training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import results
from lineament.core.checks import require
from lineament.core.models import holding
from lineament.core.results import Readable
from lineament.measure.alignment.profile import alignments
from lineament.measure.alignment.site import SiteAlignment
from lineament.measure.complexity.checkpoints import by_name, weights_of


@dataclass(frozen=True)
class Drift(Readable):
    """Each checkpoint of a training beside the last one, and beside the next, at each site.

    Attributes:
        names: of the checkpoints, in the order of training; sites: what was read.
        moved: E‖a_t - a_last‖² / E‖a_last‖², both about their means: 0 where no unit changed its answers, 2 for unrelated units of equal variance.
        procrustes: what is left after the best rotation of either, between 0 and √2.
        cka: to the last checkpoint, between 0 and 1; cka_error: its error, from leaving out blocks of images.
        cka_next: of each checkpoint to the one after it.

    NaN stands for what the samples are too few for; the notes say why.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    moved: Float[Tensor, "checkpoints sites"]
    procrustes: Float[Tensor, "checkpoints sites"]
    cka: Float[Tensor, "checkpoints sites"]
    cka_error: Float[Tensor, "checkpoints sites"]
    cka_next: Float[Tensor, "steps sites"]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return results.plain(self)

    def plot(self, ax: Any = None) -> Any:
        """The similarity of each checkpoint to the last one, a line a site."""
        ax = results.axes(ax)
        for at, site in enumerate(self.sites):
            ax.errorbar(
                range(len(self.names)), self.cka[:, at].numpy(), self.cka_error[:, at].numpy(), label=site
            )
        ax.set_xticks(range(len(self.names)), self.names, rotation=30, ha="right", parse_math=False)
        ax.set_ylabel("CKA to the last checkpoint")
        ax.legend()
        return ax


def drift(
    model: nn.Module, checkpoints: Sequence[Any] | Mapping[str, Any], data: Any, **options: Any
) -> Drift:
    """How far each site is from where training ended, at each checkpoint; the model is left as it was.

    Args:
        model: the network that the checkpoints are of.
        checkpoints: two or more in the order of training: state dicts, networks, or files; a mapping gives them names. All are held at once.
        data: what :func:`~lineament.measure.alignment.profile.alignment` takes.
        options: sites, positions, blocks and seed, as there.

    Raises:
        InputError: fewer than two checkpoints, or one that does not fit the network.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> turned = {**net.state_dict(), "0.weight": net.state_dict()["0.weight"].flip(0)}
    >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> found = drift(net, {"before": turned, "after": net.state_dict()}, x, sites="0")
    >>> bool(found.moved[0, 0] > 0.1), round(float(found.procrustes[0, 0]), 5), round(float(found.cka[0, 0]), 5)
    (True, 0.0, 1.0)
    """
    states = {name: weights_of(model, state, name) for name, state in by_name(checkpoints).items()}
    require(len(states) >= 2, f"checkpoints: got {len(states)}, expected at least two of one training")
    nets = []
    for state in states.values():
        with holding(model, state):
            nets.append(copy.deepcopy(model))
    pairs = alignments(nets, data, nulls=(), **options).pairs
    last = len(nets) - 1
    notes: dict[str, None] = {}

    def rows(n: int, m: int) -> list[list[float]]:
        return [_between(site, notes) for site in pairs[n, m].sites.values()]

    sites = tuple(pairs[0, last].sites)
    same = [[0.0, 0.0, 1.0, 0.0]] * len(sites)
    to_last = torch.tensor([*[rows(n, last) for n in range(last)], same], dtype=torch.float64)
    to_next = torch.tensor([rows(n, n + 1) for n in range(last)], dtype=torch.float64)
    moved, procrustes, cka, error = to_last.unbind(-1)
    return Drift(tuple(states), sites, moved, procrustes, cka, error, to_next[..., 2], tuple(notes))


def _between(site: SiteAlignment, notes: dict[str, None]) -> list[float]:
    """The share moved, the Procrustes distance, and CKA with its error, of one site at two checkpoints."""
    a, b, ab = site.covariances
    moved = float((a.trace() + b.trace() - 2 * ab.trace()) / b.trace()) if float(b.trace()) else float("nan")
    found = [max(moved, 0.0)]
    for row in site.similarities(["procrustes", "cka"]):
        if row.refused:
            notes[f"{site.site_a}, {row.name}: {row.refused}"] = None
        values = (row.value, row.error)[: 1 if row.name == "procrustes" else 2]
        found += [float("nan") if value is None else value for value in values]
    return found
