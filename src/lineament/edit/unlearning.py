"""A network that no longer knows a class, from forwards on samples of that class alone.

Kashyap et al., "ModHiFi", NeurIPS 2025, arXiv 2511.19566, ModHiFi-U: of each chosen layer the (output, input) pairs of the highest saliency on the class are set
to zero, or negated where layer norms and a residual stream follow. It is fast, and usually mutes a class more than it erases it:
:func:`lineament.edit.forgotten` tells the two apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.checks import number, one_of, require, show
from lineament.core.models import called, decided, frozen, logits, weight_of
from lineament.core.norms import batchnorms
from lineament.core.results import Readable
from lineament.core.surgery.groups import plain_network
from lineament.edit.layers import Inputs, fidelity, layers_of, ready, saliency
from lineament.edit.patches import matrix, unmatrixed

CRITERIA = ("saliency", "fidelity", "energy", "magnitude", "random")
EDITS = ("zero", "negate")
_FIRST = 0.001  # the smallest share that is tried


@dataclass(frozen=True, repr=False)
class Tried(Readable):
    """What one share costs: how often the class is still answered on its samples, and the others are right (``None`` without samples of them).

    >>> Tried(0.1, 0.05, 0.97).to_dict()
    {'share': 0.1, 'forget': 0.05, 'retain': 0.97}
    """

    share: float
    forget: float
    retain: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers."""
        return dict(vars(self))


@dataclass(frozen=True, repr=False)
class Unlearned(Readable):
    """A network of the same shapes with some weights zeroed or negated.

    Attributes:
        pairs: {layer: [outputs, inputs] booleans, which pairs were changed}.
        share: of the pairs of each layer. before: the network as it was, at share 0, ``None`` where the share was given.
        tried: what the shares that were tried do, by size. target: how often the class may be answered; reached: whether it is so at ``share``; both
            ``None`` where the share was given.
    """

    model: nn.Module
    pairs: dict[str, Tensor]
    edit: str
    criterion: str
    share: float
    before: Tried | None = None
    tried: tuple[Tried, ...] = ()
    target: float | None = None
    reached: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: how many pairs of each layer were changed."""
        counts = {name: [int(p.sum()), p.numel()] for name, p in self.pairs.items()}
        found = {"pairs": counts, "edit": self.edit, "criterion": self.criterion, "share": self.share}
        if self.before is None:
            return found
        tried = [each.to_dict() for each in (self.before, *self.tried)]
        return {**found, "tried": tried, "target": self.target, "reached": self.reached}


def unlearn(
    model: nn.Module,
    forget: Any,
    *,
    share: float | None = None,
    retain: Any = None,
    target: float | None = None,
    sites: str | Iterable[str] | None = None,
    edit: str | None = None,
    criterion: str = "saliency",
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Change the pairs that give most to the answers on one class.

    Args:
        model: any module; it stays as it was.
        forget: samples of the class alone, as for :func:`lineament.edit.fidelity`; a pair of inputs and labels is checked to hold one class. Without
            labels it is the class that the network answers most often there.
        share: of the (output, input) pairs of each layer. By default the smallest that reaches ``target`` on ``forget``, to a tenth of itself; where none
            does, the one at which the class is answered least.
        retain: inputs and labels of the other classes, on which the price of each share that is tried is measured; nothing is chosen by it.
        target: how often the class may still be answered; by default a tenth, or by chance where there are fewer than ten classes.
        sites: layers; by default the later half, without the last, the head.
        edit: ``"zero"`` or ``"negate"``; by default zero where there is batch norm, else negate.
        criterion: ``"saliency"``, or to compare with ``"fidelity"``, ``"energy"``, ``"magnitude"`` and ``"random"``.

    Raises:
        InputError: several classes or no samples, an unknown layer or choice, answers that are no classes where a share is to be found.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = unlearn(net, torch.randn(20, 4), share=0.25)
    >>> {name: int(pairs.sum()) for name, pairs in found.pairs.items()}, found.edit
    ({'2': 16}, 'negate')
    """
    if share is not None:
        number("share", share, low=0, high=1, open_low=True, open_high=True)
        require(
            target is None, "target: got a share as well; pass the share, or the target that is to be reached"
        )
    if target is not None:
        number("target", target, low=0, high=1)
    one_of("criterion", criterion, CRITERIA)
    if edit is not None:
        one_of("edit", edit, EDITS)
    model = plain_network(model)
    label = None
    if isinstance(forget, tuple) and len(forget) == 2:
        classes = torch.as_tensor(forget[1]).unique()
        require(
            len(classes) == 1,
            f"forget: got labels {classes.tolist()[:6]}, expected samples of one class; select them first",
        )
        label = int(classes)
    if sites is None:
        names = list(layers_of(model))
        sites = names[len(names) // 2 : -1] or names[:1]
    how = edit or ("zero" if batchnorms(model) else "negate")
    data = Inputs(forget, batch_size)
    scores = _scores(model, data.batches, sites, criterion, batch_size, seed)
    if share is not None:
        return Unlearned(*_changed(model, scores, share, how), how, criterion, share)
    others = None if retain is None else Inputs(retain, batch_size)
    if others is not None:
        require(
            all(isinstance(b, (tuple, list)) and len(b) == 2 for b in others.batches),
            "retain: it has no labels; expected inputs and labels of the classes that are to stay",
        )
    answers = torch.cat([decided(scores) for scores in _answers(model, data)])
    label = int(answers.mode().values) if label is None else label

    def tried(at: float) -> Tried:
        new = _changed(model, scores, at, how)[0] if at else model
        named = torch.cat([decided(scores) for scores in _answers(new, data)])
        if others is None:
            return Tried(at, float((named == label).double().mean()), None)
        right = [
            decided(s) == torch.as_tensor(b[1]).cpu() for s, b in zip(_answers(new, others), others.batches)
        ]
        return Tried(at, float((named == label).double().mean()), float(torch.cat(right).double().mean()))

    width = next(iter(_answers(model, data))).shape[-1]
    wanted = max(0.1, 1 / max(width, 2)) if target is None else target
    before, steps = tried(0.0), _search(tried, wanted)
    reached = [each for each in steps if each.forget <= wanted]
    best = min(reached, key=lambda e: e.share) if reached else min(steps, key=lambda e: (e.forget, e.share))
    new, pairs = _changed(model, scores, best.share, how)
    return Unlearned(new, pairs, how, criterion, best.share, before, tuple(steps), wanted, bool(reached))


def _search(tried: Callable[[float], Tried], wanted: float) -> list[Tried]:
    """The shares that were tried, by size: twice as much each time until one reaches what is wanted, then between the last two to a tenth."""
    found, share = [], _FIRST
    while share < 1:
        found.append(tried(share))
        if found[-1].forget <= wanted:
            break
        share *= 2
    if found[-1].forget <= wanted and len(found) > 1:
        low, high = found[-2].share, found[-1].share
        while high > 1.1 * low:
            middle = tried((low * high) ** 0.5)
            low, high = (low, middle.share) if middle.forget <= wanted else (middle.share, high)
            found.append(middle)
    return sorted(found, key=lambda each: each.share)


def _scores(
    model: nn.Module, data: Any, sites: str | Iterable[str], criterion: str, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Of each pair, [outputs, inputs] by layer."""
    if criterion == "saliency":
        return saliency(model, data, sites=sites, batch_size=batch_size)
    if criterion in ("fidelity", "energy"):
        found = fidelity(model, data, sites=sites, batch_size=batch_size)
        return {name: getattr(each.scores, criterion) for name, each in found.items()}
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    squares = {
        name: matrix(layer).double().square().sum(2) for name, layer in layers_of(model, sites).items()
    }
    drawn = {name: torch.rand(s.shape, generator=generator) for name, s in squares.items()}
    return squares if criterion == "magnitude" else drawn


def _changed(
    model: nn.Module, scores: dict[str, Tensor], share: float, how: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with a share of each layer's pairs zeroed or negated, and which they are."""
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
    return new, pairs


def _answers(model: nn.Module, data: Inputs) -> Iterator[Tensor]:
    """Scores of the classes, batch by batch."""
    for batch in data:
        with frozen(model), torch.no_grad():
            scores = logits(called(model, ready(batch, model))).cpu()
        require(
            scores.ndim == 2,
            f"share: the model's answers {show(scores)} are no classes of samples, so that none can be found; pass a share",
        )
        yield scores


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
