"""What a feature does for the decision, which features suffice for it, and what a dictionary loses.

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 4): the importance of a feature is Γ_i = E |(∂y/∂z_i) z_i|, y a logit. Where a linear head reads the
dictionary's site, ∂y_c/∂z_i = (D Wᵀ)_ic, and Σ_i z_i (D Wᵀ)_ic + b_c = y_c exactly; any other network takes one vector-Jacobian product a class.
Without the absolute value the mean tells features that speak for the class from those that speak against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.checks import require
from lineament.core.codes import Dictionary
from lineament.core.models import called, device_of, dtype_of, frozen, logits, moved, opened
from lineament.core.results import Readable
from lineament.core.sites.activations import capture, patch
from lineament.core.sites.depth import channel_axis, tokens_of
from lineament.measure.complexity.features import batches, encoded, in_one_order, positions, site_of
from lineament.measure.complexity.vinformation import finite_rows

Classes = str | int | Tensor
_CELLS = 2**24


@dataclass(frozen=True)
class Importance(Readable):
    """Importance of features for a logit.

    Attributes:
        values: E |(∂y/∂z_i) z_i|; errors: its standard error over the samples.
        signed: the mean without the absolute value; below 0 the feature inhibits.
        classes: whose logit: ``"predicted"``, ``"mean"`` (over all classes), ``"given"``, or a class.
        samples: how many.
    """

    values: Float[Tensor, " features"]
    errors: Float[Tensor, " features"]
    signed: Float[Tensor, " features"]
    classes: str
    samples: int

    @property
    def order(self) -> Int[Tensor, " features"]:
        """Features, the most important first."""
        return self.values.argsort(descending=True, stable=True)

    @property
    def inhibiting(self) -> Bool[Tensor, " features"]:
        """Features that on average lower the logit."""
        return self.signed < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None, most: int = 30) -> Any:
        """The most important features with their standard errors, those that inhibit in another colour."""
        ax = results.axes(ax)
        top = self.order[:most].cpu()
        colours = ["C3" if bad else "C0" for bad in self.inhibiting.cpu()[top].tolist()]
        ax.bar(range(len(top)), self.values.cpu()[top], yerr=self.errors.cpu()[top], color=colours)
        ax.set_xticks(range(len(top)), [str(i) for i in top.tolist()], rotation=90)
        ax.set(xlabel="feature", ylabel="importance (red: inhibits)")
        return ax


class _Sums:
    """Sums of contributions, sample by sample."""

    def __init__(self) -> None:
        self.count, self.total, self.squares, self.signed = 0, 0.0, 0.0, 0.0

    def add(self, absolute: Tensor, signed: Tensor) -> None:
        wide = absolute.double()
        self.count += len(wide)
        self.total = self.total + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)
        self.signed = self.signed + signed.double().sum(0)

    def result(self, classes: Classes) -> Importance:
        n = self.count
        mean: Any = self.total / n
        spread = (self.squares / n - mean.square()).clamp(min=0) / max(n - 1, 1)
        errors = spread.sqrt() if n > 1 else mean * torch.nan
        name = "given" if isinstance(classes, Tensor) else str(classes)
        return Importance(mean, errors, self.signed / n, name, n)  # pyright: ignore[reportArgumentType]


def _checked(classes: Classes) -> Classes:
    known = isinstance(classes, Tensor) or (isinstance(classes, int) and not isinstance(classes, bool))
    return classes if known else checks.one_of("classes", classes, ("predicted", "given", "mean"))


def linear_importance(
    codes: Float[Tensor, "samples features"],
    atoms: Float[Tensor, "features width"],
    weight: Float[Tensor, "classes width"],
    bias: Float[Tensor, " classes"] | None = None,
    *,
    classes: str | int | Int[Tensor, " samples"] = "predicted",
) -> Importance:
    """Importance of features that a linear head reads, in closed form: Γ_i = E |z_i (D Wᵀ)_{i c}|.

    Args:
        codes: values of the features; atoms: their directions.
        weight, bias: the head's.
        classes: ``"predicted"`` (of the reconstruction), ``"mean"`` over classes of the absolute contributions (signed: of the contributions), one
            class, or one for each sample.

    Raises:
        InputError: shapes that do not match, a class that the head lacks.

    >>> found = linear_importance(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1.0, -1.0], [-9.0, 0.0]]))
    >>> found.values.tolist(), found.signed.tolist()
    ([1.0, 2.0], [1.0, -2.0])
    """
    _checked(classes)
    effects, bias = _effects(codes, atoms, weight, bias)
    sums = _Sums()
    for part, rows in _parts(codes, weight):
        chosen = classes
        if isinstance(classes, str) and classes == "predicted":
            chosen = (part.to(effects.dtype) @ effects + bias).argmax(1)
        elif isinstance(classes, Tensor):
            chosen = checks.labels("classes", classes, count=len(codes), classes=len(weight))[rows]
        _add(sums, part.to(effects.dtype), effects, chosen)
    return sums.result(classes)


def _effects(codes: Tensor, atoms: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(features, classes): what a unit of each feature adds to each logit; and the bias."""
    checks.tensor("codes", codes, shape=("samples", "features"))
    checks.tensor("atoms", atoms, shape=(codes.shape[1], "width"))
    checks.tensor("weight", weight, shape=("classes", atoms.shape[1]))
    common = torch.promote_types(atoms.dtype, weight.dtype)
    effects = (atoms.to(common) @ weight.to(common).T).detach()
    if bias is None:
        return effects, effects.new_zeros(len(weight))
    return effects, checks.tensor("bias", bias, shape=(len(weight),)).detach().to(effects)


def _parts(codes: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    step = max(1, _CELLS // max(1, codes.shape[1] * 2 + len(weight)))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        yield codes[rows].detach(), rows


def _add(sums: _Sums, z: Tensor, effects: Tensor, chosen: Classes) -> None:
    if isinstance(chosen, str):
        sums.add(z.abs() * effects.abs().mean(1), z * effects.mean(1))
        return
    if isinstance(chosen, int):
        checks.number("classes", chosen, low=0, high=effects.shape[1] - 1, integer=True)
        contribution = z * effects[:, chosen]
    else:
        contribution = z * effects[:, chosen.to(z.device)].T
    sums.add(contribution.abs(), contribution)


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
    effects, bias = _effects(codes, atoms, weight, bias)
    k, classes = effects.shape
    order = checks.labels("order", order, count=k, classes=k).to(codes.device)
    right = torch.zeros(k + 1, dtype=torch.float64, device=codes.device)
    for part in codes.detach().split(max(1, _CELLS // (k + 1))):
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


class Splice:
    """A dictionary in its model: activations at its site, their codes, and the model's logits with the reconstruction in their place."""

    def __init__(self, model: nn.Module, dictionary: Dictionary) -> None:
        self.model, self.dictionary = model, dictionary
        require(
            hasattr(dictionary, "encode") and hasattr(dictionary, "decode"),
            f"dictionary: got {checks.show(dictionary)}, expected one with encode and decode",
        )
        self.site = str(site_of(model, dictionary))
        self.head: tuple[Tensor, Tensor | None] | None = None

    def given(self, inputs: Any) -> Any:
        return moved(inputs, device_of(self.model)) if not isinstance(inputs, Tensor) or not inputs.is_floating_point() else inputs.to(device_of(self.model), dtype_of(self.model))  # fmt: skip

    def look(self, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Activations as they pass, their codes (samples, positions, features), and the logits."""
        with torch.no_grad(), capture(self.model, self.site) as acts:
            answer = logits(called(self.model, inputs))
        x = self.rows(acts[self.site])
        finite_rows(f"site {self.site!r}", x.flatten(1), None, len(x))
        self.head = self._head(acts[self.site], answer)
        return acts[self.site], encoded(self.dictionary, x), answer

    def rows(self, passed: Tensor) -> Tensor:
        """(samples, positions, width) of what passes at the site."""
        return positions(self.site, tokens_of(self.model, self.site, passed))

    def placed(self, x: Tensor, like: Tensor) -> Tensor:
        """(samples, positions, width) in the form in which it passes at the site."""
        x = x.to(like.dtype)
        if like.ndim == 2:
            return x[:, 0]
        sequence = channel_axis(self.model, self.site, like) == 2
        return x if sequence else x.transpose(1, 2).reshape(like.shape)

    def answer(self, inputs: Any, codes: Tensor, like: Tensor, asked: list[Tensor] | None = None) -> Tensor:
        """The logits with the reconstruction from these codes; ``asked`` receives the reconstruction, as a leaf that asks for gradients."""
        x = self.dictionary.decode(codes).detach()
        if asked is not None:
            x.requires_grad_()
            asked.append(x)
        if self.head is not None:
            return F.linear(self.placed(x, like), *self.head)
        with patch(self.model, {self.site: self.placed(x, like)}):
            return logits(called(self.model, inputs))

    def _head(self, like: Tensor, answer: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the linear layer that reads the site, where it gives the logits and nothing comes after it."""
        name, _, side = self.site.rpartition(":")
        module = dict(self.model.named_modules()).get(name)
        if side != "in" or not isinstance(module, nn.Linear) or like.ndim != 2:
            return None
        head = opened(module.weight.detach()), None if module.bias is None else module.bias.detach()
        made = F.linear(like, *head)
        alike = made.shape == answer.shape and torch.allclose(made, answer, rtol=1e-3, atol=1e-4)
        return head if alike else None


def importance(
    model: nn.Module,
    data: Any,
    dictionary: Dictionary,
    *,
    classes: str | int = "predicted",
) -> Importance:
    """Importance of a dictionary's features for the model's logits.

    Where the site is the input of the final linear layer, in closed form with no second forward; else by gradients at the reconstruction, summed
    over positions.

    Args:
        classes: ``"predicted"`` (of the reconstruction), ``"given"`` (the targets), ``"mean"`` over all classes, or a class.

    Raises:
        InputError: a dictionary without a site or of another width, targets that are no classes.

    >>> from types import SimpleNamespace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> units = SimpleNamespace(site="2:in", atoms=torch.eye(2), encode=lambda x: x, decode=lambda z: z)
    >>> importance(net, (torch.randn(10, 2), torch.zeros(10)), units).samples
    10
    """
    _checked(classes)
    splice, sums = Splice(model, dictionary), _Sums()
    atoms = dictionary.atoms.detach()
    with frozen(model):
        for inputs, targets, _ in progress(batches(in_one_order(data)), "importance"):
            given = splice.given(inputs)
            like, z, _ = splice.look(given)
            asked: list[Tensor] = []
            with torch.enable_grad():
                answer = splice.answer(given, z, like, asked)
            require(answer.ndim == 2, f"model: it answers {checks.show(answer)}, expected (samples, classes)")
            count = answer.shape[1]

            def contribution(of: Tensor, asked: list[Tensor] = asked, z: Tensor = z) -> Tensor:
                slope = torch.autograd.grad(of.sum(), asked, retain_graph=True)[0]
                return (z * (slope.to(atoms.dtype) @ atoms.T)).sum(1)

            if classes == "mean":
                parts = [contribution(answer[:, c]) for c in range(count)]
                sums.add(sum(p.abs() for p in parts) / count, sum(parts) / count)  # pyright: ignore[reportArgumentType]
                continue
            if classes == "predicted":
                chosen = answer.argmax(1)
            elif classes == "given":
                require(isinstance(targets, Tensor), "classes='given': the data have no targets")
                chosen = checks.labels("targets", targets, count=len(answer), classes=count).to(answer.device)
            else:
                checks.number("classes", classes, low=0, high=count - 1, integer=True)
                chosen = torch.full((len(answer),), int(classes), device=answer.device)
            part = contribution(answer.gather(1, chosen[:, None]))
            sums.add(part.abs(), part)
    require(sums.count > 0, "data: got no samples, expected some")
    return sums.result(classes)


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
