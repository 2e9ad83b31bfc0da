"""What a feature does for the decision.

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 4): the importance of a feature is Γ_i = E |(∂y/∂z_i) z_i|, y a logit. Where a linear head reads the
dictionary's site, ∂y_c/∂z_i = (D Wᵀ)_ic, and Σ_i z_i (D Wᵀ)_ic + b_c = y_c exactly; any other network takes one vector-Jacobian product a class.
Without the absolute value the mean tells features that speak for the class from those that speak against it.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from lineament.measure.complexity.readouts import finite_rows

Classes = str | int | Tensor
CELLS = 2**24


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
    effects, bias = effects_of(codes, atoms, weight, bias)
    sums = _Sums()
    for part, rows in _parts(codes, weight):
        chosen = classes
        if isinstance(classes, str) and classes == "predicted":
            chosen = (part.to(effects.dtype) @ effects + bias).argmax(1)
        elif isinstance(classes, Tensor):
            chosen = checks.labels("classes", classes, count=len(codes), classes=len(weight))[rows]
        _add(sums, part.to(effects.dtype), effects, chosen)
    return sums.result(classes)


def effects_of(codes: Tensor, atoms: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
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
    step = max(1, CELLS // max(1, codes.shape[1] * 2 + len(weight)))
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
