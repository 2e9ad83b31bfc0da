"""A network that no longer knows a class, from forwards on samples of that class alone.

Kashyap et al., "ModHiFi", NeurIPS 2025, arXiv 2511.19566, ModHiFi-U: of each chosen layer the (output, input) pairs of the highest saliency on the class are set
to zero, or negated where layer norms and a residual stream follow. It is fast, and usually mutes a class more than it erases it:
:func:`lineament.edit.forgotten` tells the two apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.checks import number, one_of, require, show
from lineament.core.models import logits, weight_of
from lineament.core.norms import batchnorms
from lineament.core.results import Readable
from lineament.core.surgery.groups import plain_network
from lineament.edit.layers import Inputs, fidelity, layers_of, saliency
from lineament.edit.patches import matrix, unmatrixed

CRITERIA = ("saliency", "fidelity", "energy", "magnitude", "random")
EDITS = ("zero", "negate")


@dataclass(frozen=True, repr=False)
class Unlearned(Readable):
    """A network of the same shapes with some weights zeroed or negated.

    ``pairs``: {layer: [outputs, inputs] booleans, which pairs were changed}.
    """

    model: nn.Module
    pairs: dict[str, Tensor]
    edit: str
    criterion: str
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: how many pairs of each layer were changed."""
        counts = {name: [int(p.sum()), p.numel()] for name, p in self.pairs.items()}
        return {"pairs": counts, "edit": self.edit, "criterion": self.criterion, "share": self.share}


def unlearn(
    model: nn.Module,
    forget: Any,
    *,
    share: float = 0.05,
    sites: str | Iterable[str] | None = None,
    edit: str | None = None,
    criterion: str = "saliency",
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Change the pairs that give most to the answers on one class.

    Args:
        model: any module; it stays as it was.
        forget: samples of the class alone, as for :func:`lineament.edit.fidelity`; a pair of inputs and labels is checked to hold one class.
        share: of the (output, input) pairs of each layer.
        sites: layers; by default the later half, without the last, the head.
        edit: ``"zero"`` or ``"negate"``; by default zero where there is batch norm, else negate.
        criterion: ``"saliency"``, or to compare with ``"fidelity"``, ``"energy"``, ``"magnitude"`` and ``"random"``.

    Raises:
        InputError: several classes or no samples, an unknown layer or choice.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = unlearn(net, torch.randn(20, 4), share=0.25)
    >>> {name: int(pairs.sum()) for name, pairs in found.pairs.items()}, found.edit
    ({'2': 16}, 'negate')
    """
    number("share", share, low=0, high=1, open_low=True, open_high=True)
    one_of("criterion", criterion, CRITERIA)
    if edit is not None:
        one_of("edit", edit, EDITS)
    model = plain_network(model)
    if isinstance(forget, tuple) and len(forget) == 2:
        classes = torch.as_tensor(forget[1]).unique()
        require(
            len(classes) == 1,
            f"forget: got labels {classes.tolist()[:6]}, expected samples of one class; select them first",
        )
    if sites is None:
        names = list(layers_of(model))
        sites = names[len(names) // 2 : -1] or names[:1]
    how = edit or ("zero" if batchnorms(model) else "negate")
    layers = layers_of(model, sites)
    if criterion == "saliency":
        scores = saliency(model, forget, sites=sites, batch_size=batch_size)
    elif criterion in ("fidelity", "energy"):
        found = fidelity(model, forget, sites=sites, batch_size=batch_size)
        scores = {name: getattr(each.scores, criterion) for name, each in found.items()}
    else:
        generator = torch.Generator().manual_seed(checks.seed("seed", seed))
        squares = {name: matrix(layer).double().square().sum(2) for name, layer in layers.items()}
        drawn = {name: torch.rand(s.shape, generator=generator) for name, s in squares.items()}
        scores = squares if criterion == "magnitude" else drawn
    new, pairs = copy.deepcopy(model), {}
    with torch.no_grad():
        for name, values in scores.items():
            count = max(1, round(share * values.numel()))
            chosen = torch.zeros(values.numel(), dtype=torch.bool)
            chosen[values.flatten().topk(count).indices.cpu()] = True
            pairs[name] = chosen.view(values.shape)
            layer = new.get_submodule(name)
            full = matrix(layer).clone()
            factor = torch.where(pairs[name].to(full.device), 0.0 if how == "zero" else -1.0, 1.0)
            full *= factor[..., None].to(full)
            weight = weight_of(layer)
            weight.copy_(unmatrixed(layer, full))
    return Unlearned(new, pairs, how, criterion, share)


def mute(model: nn.Module, label: int, example: Any) -> nn.Module:
    """The baseline at no cost: the same network whose last layer never answers one class. What it knows of the class stays.

    Args:
        example: inputs, which show that the last linear layer gives the answers.

    Raises:
        InputError: a class that the head has not, or no linear head.

    >>> net = mute(nn.Linear(2, 3), 1, torch.ones(1, 2))
    >>> int(net(torch.ones(5, 2)).argmax(1).eq(1).sum())
    0
    """
    new = copy.deepcopy(plain_network(model))
    heads = [m for m in new.modules() if isinstance(m, nn.Linear)]
    require(bool(heads), "model: it has no linear head whose class can be muted")
    head = heads[-1]
    number("label", label, low=0, high=head.out_features - 1, integer=True)
    with torch.no_grad():
        head.weight[label] = 0
        bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias.detach().clone()
        bias[label] = -1e4  # finite, so that losses and half precision stay so
        head.bias = nn.Parameter(bias)
        answer = logits(new.eval()(Inputs(example).first(new)))
    require(
        bool((answer[..., label] == -1e4).all()),
        f"model: its answers {show(answer)} are not those of its last linear layer",
    )
    return new.train(model.training)
