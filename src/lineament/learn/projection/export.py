"""The part of a network that is worth keeping, as a network of its own.

Xue et al., ICLR 2024, arXiv 2403.11391: what stands before a head that is thrown away generalises better than what the head gives.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn

from lineament.core.checks import require
from lineament.core.models import unwrapped
from lineament.core.sites.activations import capture
from lineament.core.sites.naming import sites
from lineament.learn.projection.pooling import pooled


class UpTo(nn.Module):
    """A network that answers with what passes at a site of another, maps averaged over positions, and computes no further.

    >>> UpTo(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), "0")(Tensor([[0.0] * 4])).shape
    torch.Size([1, 8])
    """

    def __init__(self, model: nn.Module, site: str):
        super().__init__()
        self.model, self.site = model, site

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        with capture(self.model, self.site, gradients=True, stop_early=True) as acts:
            self.model(*inputs, **named)
        return pooled(acts[self.site])


def export(model: nn.Module, *, layer: str) -> nn.Module:
    """A copy of the network that ends at a layer and gives features [n, width]; the model is left as it is.

    Of an ``nn.Sequential`` whose own member the layer is, it is the shorter ``nn.Sequential``, without what is not needed, and with that layer's output as it is; of any
    other network :class:`UpTo`, whose maps are averaged over positions and which keeps all weights.

    Args:
        layer: a site, as :func:`lineament.learn.layers_worth` names them.

    Raises:
        InputError: an unknown site, or a glob of several.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> export(net, layer="1")
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): ReLU()
    )
    """
    named = sites(model, layer)
    require(len(named) == 1, f"layer: {layer!r} names {len(named)} sites, expected one")
    inner = unwrapped(model)
    name, _, side = named[0].partition(":")
    members = dict(inner.named_children()) if type(inner) is nn.Sequential else {}
    if name in members and side in ("", "out", "in"):
        kept = list(members)[: list(members).index(name) + (side != "in")]
        return copy.deepcopy(nn.Sequential(OrderedDict((each, members[each]) for each in kept)))
    return UpTo(copy.deepcopy(inner), named[0])
