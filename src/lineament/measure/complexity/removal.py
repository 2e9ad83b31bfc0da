"""Which features suffice for a network's decisions, what is lost without one, and what a dictionary loses (Fel et al., NeurIPS 2024, arXiv 2407.06076, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.checks import require
from lineament.core.codes import Dictionary
from lineament.core.models import called, frozen, logits
from lineament.core.results import Readable
from lineament.core.sites.activations import patch
from lineament.measure.complexity.features import batches, in_one_order
from lineament.measure.complexity.importance import CELLS, Splice, effects_of


def keeping_top(
    codes: Float[Tensor, "samples features"],
    atoms: Float[Tensor, "features width"],
    weight: Float[Tensor, "classes width"],
    bias: Float[Tensor, " classes"] | None = None,
    *,
    order: Int[Tensor, " features"],
    targets: Int[Tensor, " samples"] | None = None,
) -> Float[Tensor, " kept"]:
    """The share of samples that are decided as with all features when only the first m of ``order`` are kept, m = 0 to k.

    With ``targets`` the share that is decided correctly instead.

    >>> codes = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> keeping_top(codes, torch.eye(2), torch.eye(2), order=torch.tensor([0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    effects, bias = effects_of(codes, atoms, weight, bias)
    k, classes = effects.shape
    order = checks.labels("order", order, count=k, classes=k).to(codes.device)
    right = torch.zeros(k + 1, dtype=torch.float64, device=codes.device)
    for part in codes.detach().split(max(1, CELLS // (k + 1))):
        z = part.to(effects.dtype)
        whole = (z @ effects + bias).argmax(1)
        wanted = whole if targets is None else targets.to(z.device)[: len(z)]
        targets = None if targets is None else targets[len(z) :]
        running = bias.expand(len(z), classes)
        right[0] += (running.argmax(1) == wanted).sum()
        for kept, feature in enumerate(order.tolist(), 1):
            running = running + z[:, feature, None] * effects[feature]
            # All features: the decision itself, whatever the order of the additions rounds to.
            decided = whole if kept == k else running.argmax(1)
            right[kept] += (decided == wanted).sum()
    return right / len(codes)


@dataclass(frozen=True)
class Support(Readable):
    """How far the most important features alone carry the decisions.

    Attributes:
        kept: numbers of features kept; agreement: the share of samples decided as with all features; accuracy: that of the targets, relative to
            all features, where the data have class labels.
        features: how many there are; samples: how many.
    """

    kept: tuple[int, ...]
    agreement: Float[Tensor, " kept"]
    accuracy: Float[Tensor, " kept"] | None
    features: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Agreement against the share of features kept."""
        ax = results.axes(ax)
        ax.plot([m / self.features for m in self.kept], self.agreement.cpu(), "o-", label="agreement")
        if self.accuracy is not None:
            ax.plot(
                [m / self.features for m in self.kept], self.accuracy.cpu(), "s--", label="relative accuracy"
            )
        ax.set(xlabel="share of features kept, the most important first", ylabel="share of samples")
        ax.legend()
        return ax


def support_features(
    model: nn.Module,
    data: Any,
    dictionary: Dictionary,
    order: Int[Tensor, " features"],
    *,
    kept: Sequence[int] | None = None,
) -> Support:
    """Decisions of the model when only the first m features of ``order`` are kept, the others set to 0.

    Args:
        order: features, the most important first, such as :attr:`Importance.order`.
        kept: values of m; by default about a dozen from 0 to all, in equal ratios.

    Raises:
        InputError: an order that is not one of all features, m beyond their number.

    >>> from types import SimpleNamespace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> units = SimpleNamespace(site="2:in", atoms=torch.eye(2), encode=lambda x: x, decode=lambda z: z)
    >>> support_features(net, (torch.randn(10, 2), torch.zeros(10)), units, torch.arange(2)).agreement[-1].item()
    1.0
    """
    k = len(dictionary.atoms)
    order = checks.labels("order", order, count=k, classes=k)
    require(
        len(order.unique()) == k, f"order: names {len(order.unique())} of {k} features, expected each once"
    )
    if kept is None:
        kept = sorted({0, k, *(round(k ** (i / 10)) for i in range(11))})
    counts = [
        checks.number("kept", m, low=0, high=k, integer=True) for m in checks.listed("kept", kept, "numbers")
    ]
    splice = Splice(model, dictionary)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(k)
    same, right, whole_right, total, labelled = [0] * len(counts), [0] * len(counts), 0, 0, True
    with frozen(model), torch.no_grad():
        for inputs, targets, _ in progress(batches(in_one_order(data)), "support features"):
            given = splice.given(inputs)
            like, z, _ = splice.look(given)
            whole = splice.answer(given, z, like).argmax(-1)
            labelled = labelled and isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == whole.shape  # fmt: skip
            targets = targets.to(whole.device) if labelled else None
            total += whole.numel()
            if targets is not None:
                whole_right += int((whole == targets).sum())
            for at, m in enumerate(counts):
                decided = splice.answer(given, z * (rank < m).to(z), like).argmax(-1)
                same[at] += int((decided == whole).sum())
                right[at] += 0 if targets is None else int((decided == targets).sum())
    agreement = torch.tensor(same, dtype=torch.float64) / total
    accuracy = torch.tensor(right, dtype=torch.float64) / whole_right if labelled and whole_right else None
    return Support(tuple(counts), agreement, accuracy, k, total)


@dataclass(frozen=True)
class DictionaryQuality(Readable):
    """What a dictionary keeps of the activations and of the model's decisions.

    Attributes:
        relative_error: ‖X - X̂‖ / ‖X‖ over all activations.
        accuracy: of the model; accuracy_kept: with the reconstruction, relative to it (``None`` without class labels).
        agreement: share of samples decided as by the model itself.
        active: features other than 0, a position; dead: features that were 0 everywhere.
        features, samples: how many.
    """

    relative_error: float
    accuracy: float | None
    accuracy_kept: float | None
    agreement: float
    active: float
    dead: int
    features: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def plot(self, ax: Any = None) -> Any:
        """The relative error and the decisions kept."""
        ax = results.axes(ax)
        ax.bar(["relative error", "agreement"], [self.relative_error, self.agreement])
        ax.set_ylim(0, 1)
        return ax


def dictionary_quality(model: nn.Module, data: Any, dictionary: Dictionary) -> DictionaryQuality:
    """Relative error of a dictionary, and the decisions that survive when its reconstruction takes the activations' place.

    >>> from types import SimpleNamespace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> units = SimpleNamespace(site="2:in", atoms=torch.eye(2), encode=lambda x: x, decode=lambda z: z)
    >>> dictionary_quality(net, (torch.randn(10, 2), torch.zeros(10)), units).relative_error
    0.0
    """
    splice = Splice(model, dictionary)
    left = size = active = 0.0
    same = right = kept = total = rows = 0
    labelled = True
    seen = torch.zeros(len(dictionary.atoms), dtype=torch.bool, device=dictionary.atoms.device)
    with frozen(model), torch.no_grad():
        for inputs, targets, _ in progress(batches(in_one_order(data)), "dictionary quality"):
            given = splice.given(inputs)
            like, z, answer = splice.look(given)
            x = splice.rows(like).double()
            left += float((x - splice.dictionary.decode(z).double()).square().sum())
            size += float(x.square().sum())
            seen |= (z != 0).flatten(0, -2).any(0)
            active += float((z != 0).sum())
            rows += z.shape[0] * z.shape[1]
            own, other = answer.argmax(-1), splice.answer(given, z, like).argmax(-1)
            same += int((own == other).sum())
            total += own.numel()
            labelled = labelled and isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == own.shape  # fmt: skip
            if labelled:
                right += int((own == targets.to(own.device)).sum())
                kept += int((other == targets.to(own.device)).sum())
    require(total > 0, "data: got no samples, expected some")
    return DictionaryQuality(
        relative_error=(left / size) ** 0.5 if size else 0.0,
        accuracy=right / total if labelled else None,
        accuracy_kept=kept / right if labelled and right else None,
        agreement=same / total,
        active=active / rows,
        dead=int((~seen).sum()),
        features=len(seen),
        samples=total,
    )


@dataclass(frozen=True)
class RemovalCosts(Readable):
    """What removing single features does to the model's accuracy.

    Attributes:
        features: which; lost: the accuracy lost by removing each from the activations; errors: its standard error over the samples.
        accuracy: of the model itself; samples: how many.
    """

    features: Int[Tensor, " removed"]
    lost: Float[Tensor, " removed"]
    errors: Float[Tensor, " removed"]
    accuracy: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Accuracy lost, a bar a feature."""
        ax = results.axes(ax)
        ax.bar(range(len(self.features)), self.lost.cpu(), yerr=self.errors.cpu())
        ax.set_xticks(range(len(self.features)), [str(i) for i in self.features.tolist()])
        ax.set(xlabel="feature removed", ylabel="accuracy lost")
        return ax


def removal_costs(
    model: nn.Module, data: Any, dictionary: Dictionary, features: Int[Tensor, " removed"] | None = None
) -> RemovalCosts:
    """The accuracy that is lost when one feature is taken out of the activations, x - z_i d_i; what the dictionary does not see stays.

    Args:
        data: with class labels. features: which; all by default.

    Raises:
        InputError: targets that are no class labels, a feature that does not exist.

    >>> from types import SimpleNamespace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> units = SimpleNamespace(site="2:in", atoms=torch.eye(2), encode=lambda x: x, decode=lambda z: z)
    >>> removal_costs(net, (torch.randn(10, 2), torch.zeros(10, dtype=torch.long)), units).lost.shape
    torch.Size([2])
    """
    atoms = dictionary.atoms.detach()
    k = len(atoms)
    chosen = torch.arange(k) if features is None else features
    if len(chosen):
        chosen = checks.labels("features", chosen, classes=k)
    splice = Splice(model, dictionary)
    right, total = 0, 0
    lost, squares = (
        torch.zeros(len(chosen), dtype=torch.float64),
        torch.zeros(len(chosen), dtype=torch.float64),
    )
    with frozen(model), torch.no_grad():
        for inputs, targets, _ in progress(batches(in_one_order(data)), "removing features"):
            require(isinstance(targets, Tensor), "data: have no targets, expected class labels")
            given = splice.given(inputs)
            like, z, answer = splice.look(given)
            labels = checks.labels("targets", targets, count=len(answer), classes=answer.shape[-1]).to(
                answer.device
            )
            own = answer.argmax(1) == labels
            right, total = right + int(own.sum()), total + len(own)
            for at, feature in enumerate(chosen.tolist()):
                part = z[..., feature, None] * atoms[feature]
                if splice.head is not None:
                    other = answer - part[:, 0].to(answer.dtype) @ splice.head[0].T.to(answer.dtype)
                else:
                    with patch(model, {splice.site: like - splice.placed(part, like)}):
                        other = logits(called(model, given))
                change = own.double() - (other.argmax(1) == labels).double()
                lost[at] += change.sum().cpu()
                squares[at] += change.square().sum().cpu()
    require(total > 0, "data: got no samples, expected some")
    mean = lost / total
    errors = ((squares / total - mean.square()).clamp(min=0) / max(total - 1, 1)).sqrt()
    return RemovalCosts(chosen, mean, errors, right / total, total)
