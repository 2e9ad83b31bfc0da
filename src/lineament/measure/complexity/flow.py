"""In which branch of each residual block is a feature: in what the block passes on, or in what it adds?

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 5): simple features travel in the residual branch from early on, complex ones are built
up in both. The two addends of every sum are found by their values, from the sites of one forward, so that no block has to be rewritten:
the residual branch is ``block:in``, its ``downsample`` or shortcut; the main one the block's last layer or normalisation. It
works for blocks that end in a ReLU or not, and for the two sums of a transformer block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.models import called, device_of, dtype_of, frozen
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.measure.complexity.features import Features, Reading, first_batch, in_one_order
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Residuals
from lineament.train.batches import moved

FORMS = ("usual", "squared_gram", "debiased")


def cka_from_moments(
    covariance: Float[Tensor, "width width"],
    cross: Float[Tensor, "width features"],
    variance: Float[Tensor, " features"],
    *,
    form: str = "usual",
) -> Float[Tensor, " features"]:
    """Linear CKA of activations with each feature from their moments S = Cov(a), s = Cov(a, z), Var(z), all over the same divisor.

    ``"usual"``: ‖s‖² / (‖S‖ Var z). ``"squared_gram"``: sᵀ S s / (‖S²‖ Var z), which is ‖K L‖² / (‖K K‖ ‖L L‖) of the Gram matrices. NaN
    where the activations or the feature do not vary.

    >>> cka_from_moments(torch.eye(2).double(), torch.tensor([[1.0], [0.0]]).double(), torch.ones(1).double()).item()
    0.7071067811865475
    """
    checks.one_of("form", form, FORMS[:2])
    if form == "usual":
        shared, size = cross.square().sum(0), torch.linalg.matrix_norm(covariance)
    else:
        shared = (cross * (covariance @ cross)).sum(0)
        size = torch.linalg.matrix_norm(covariance @ covariance)
    whole = size * variance
    return torch.where(whole > 0, shared / whole, torch.nan)


def feature_cka(
    activations: Float[Tensor, "samples width"],
    z: Float[Tensor, "samples features"],
    *,
    form: str = "usual",
) -> Float[Tensor, " features"]:
    """Linear CKA (Kornblith et al. 2019) of activations with each of many features: ‖Aᵀz‖² / (‖AᵀA‖ ‖z‖²), columns centred.

    Args:
        form: ``"usual"``; ``"squared_gram"``, ‖K L‖² / (‖K K‖ ‖L L‖) of the centred Gram matrices, as some texts print it;
            ``"debiased"``, by the unbiased estimator of HSIC (Song et al. 2012), which is about 0 for independent features also with
            fewer samples than activations, where the usual form is too high.

    Raises:
        InputError: shapes that do not match, NaN, fewer than 2 samples (4 for ``"debiased"``).

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(feature_cka(x[:, :1], x[:, :1]).item(), 6), round(feature_cka(x[:, :1], x[:, :1], form="debiased").item(), 6)
    (1.0, 1.0)
    """
    checks.one_of("form", form, FORMS)
    moments = ReadoutMoments()
    moments.update({"": activations}, z)
    if form == "debiased":
        debiased = DebiasedCKA(moments)
        debiased.update({"": activations}, z)
        return debiased.compute()[""]
    return _cka(moments, "", form)


def _cka(moments: ReadoutMoments, site: str, form: str) -> Tensor:
    require(moments.count >= 2, f"samples: got {moments.count}, expected at least 2")
    variance = (moments.cross.squares_y / moments.count).masked_fill(moments.constant, 0.0)
    covariance = moments.activations[site].covariance
    return cka_from_moments(covariance, moments.cross_covariance()[site], variance, form=form)


class DebiasedCKA:
    """CKA by the unbiased estimator of HSIC, from a second look at the samples whose means are known.

    With centred rows the sums of the Gram matrices' rows vanish, so that HSIC needs Σ ‖a‖² and z², their squares and products
    beside the moments.
    """

    def __init__(self, moments: ReadoutMoments) -> None:
        require(
            moments.count >= 4,
            f"samples: got {moments.count}, expected at least 4 for the debiased form",
        )
        self.moments = moments
        k = len(moments.cross.mean_y)
        sites = list(moments.activations)
        zero = torch.zeros(k, dtype=torch.float64, device=moments.cross.mean_y.device)
        self.a, self.aa = dict.fromkeys(sites, zero[:1].sum()), dict.fromkeys(sites, zero[:1].sum())
        self.az = dict.fromkeys(sites, zero)
        self.z, self.zz = zero, zero

    def update(self, activations: Any, z: Float[Tensor, "batch features"]) -> None:
        """Take in the same samples again."""
        squares = (z.double() - self.moments.cross.mean_y).square()
        self.z, self.zz = self.z + squares.sum(0), self.zz + squares.square().sum(0)
        for site, stream in self.moments.activations.items():
            norms = (activations[site].double() - stream.mean).square().sum(1)
            self.a[site] = self.a[site] + norms.sum()
            self.aa[site] = self.aa[site] + norms.square().sum()
            self.az[site] = self.az[site] + norms @ squares

    def compute(self) -> dict[str, Float[Tensor, " features"]]:
        """{site: CKA with each feature}; NaN where the unbiased HSIC of the site or of the feature with itself is not above 0."""
        n = self.moments.count

        def hsic(product: Tensor, diagonal: Tensor, sums: Tensor) -> Tensor:
            return product - diagonal + sums / ((n - 1) * (n - 2)) - 2 * diagonal / (n - 2)

        constant = self.moments.constant
        own_z = hsic(self.z.square(), self.zz, self.z.square())
        found = {}
        for site, cross in self.moments.cross_covariance().items():
            scatter = self.moments.activations[site].scatter
            both = hsic((cross * n).square().sum(0), self.az[site], self.a[site] * self.z)
            own = hsic(scatter.square().sum(), self.aa[site], self.a[site].square())
            whole = own * own_z
            known = (own > 0) & (own_z > 0) & ~constant
            found[site] = torch.where(known, both / whole.clamp(min=1e-300).sqrt(), torch.nan)
        return found


@dataclass(frozen=True)
class Branches(Readable):
    """Where a sum of two branches is formed: the place of the sum, of what passes on, and of what is added."""

    sum: str
    residual: str
    main: str


@dataclass(frozen=True)
class Flow(Readable):
    """How much of each feature is in each branch of each residual block, in depth order.

    Attributes:
        branches: where the branches pass.
        residual_cka, main_cka: linear CKA with each feature, over the training samples.
        residual_information, main_information: V-information, unclipped, over the held-out samples.
        errors: standard error of ``residual_information`` and ``main_information`` (2 x blocks x features).
        form: of CKA.
        samples: of the training and of the held-out split.
    """

    branches: tuple[Branches, ...]
    residual_cka: Float[Tensor, "blocks features"]
    main_cka: Float[Tensor, "blocks features"]
    residual_information: Float[Tensor, "blocks features"]
    main_information: Float[Tensor, "blocks features"]
    errors: Float[Tensor, "branch blocks features"]
    form: str
    samples: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None, chosen: Tensor | None = None) -> Any:
        """Mean CKA of both branches from block to block, over all features or those ``chosen``."""
        ax = results.axes(ax)
        at = torch.arange(self.main_cka.shape[1]) if chosen is None else chosen.cpu()
        places = torch.arange(len(self.branches))
        for shift, name, values in ((-0.2, "residual", self.residual_cka), (0.2, "main", self.main_cka)):
            ax.bar(places + shift, values.cpu()[:, at].nanmean(1), 0.4, label=f"{name} branch")
        ax.set_xticks(
            places, [b.sum or "output" for b in self.branches], rotation=30, ha="right", parse_math=False
        )
        ax.set_ylabel("CKA with the features")
        ax.legend()
        return ax


def residual_branches(model: nn.Module, inputs: Any) -> tuple[Branches, ...]:
    """Every sum of two branches in a model, found by the values of one forward.

    A sum is what a block returns, or what one of its parts is given, and equals residual + main, before or after a ReLU. Of the
    two, what entered the block (or was summed last) is the residual branch, or what a shortcut or ``downsample`` made of it.

    Raises:
        InputError: no such sum.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(3, 3)
    ...     def forward(self, x):
    ...         return torch.relu(x + self.fc(x))
    >>> [(b.sum, b.residual, b.main) for b in residual_branches(nn.Sequential(Block(), Block()), torch.randn(2, 3))]
    [('0', '0:in', '0.fc'), ('1', '1:in', '1.fc')]
    """
    if isinstance(inputs, Tensor):
        checks.tensor("inputs", inputs)
    given = moved(inputs, device_of(model), dtype_of(model))
    with frozen(model), torch.no_grad(), capture(model, ["**", "**:in"]) as acts:
        called(model, given)
    reached = set(acts.reached())
    named = [name for name, _ in model.named_modules() if name]
    once = {s: acts[s] for name in named for s in (f"{name}:in", name) if s in reached and len(acts.calls(s)) == 1}  # fmt: skip
    there = {site: _Seen(x) for site, x in once.items() if x.is_floating_point() and x.ndim >= 2}
    blocks = [name for name, module in model.named_modules() if name and any(True for _ in module.children())]
    found: dict[str, Branches] = {}
    # The innermost blocks first, so that a sum is named by the block that forms it.
    for block in sorted(blocks, key=lambda name: -name.count(".")):
        inside = [site for site in there if site.startswith(f"{block}.")]
        for target in [*(site for site in inside if site.endswith(":in")), block]:
            if target not in there or any(there[target].same(there[other]) for other in found):
                continue
            entry = [f"{block}:in"] if f"{block}:in" in there else []
            pair = _addends(there, target, [*entry, *(site for site in inside if site != target)])
            if pair is not None:
                found[target] = Branches(target, *_ordered(there, pair, [*entry, *found]))
    require(
        bool(found),
        "model: no residual sum found (a block whose output, or the input of one of whose parts, is the sum of two of its activations)",
    )

    def ends(site: str) -> int:
        inner = f"{site}."
        return max(
            at for at, name in enumerate(named) if f"{name}:in" == site or f"{name}.".startswith(inner)
        )

    return tuple(found[site] for site in sorted(found, key=ends))


class _Seen:
    """A tensor and a few of its entries, by which most are told apart."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        at = torch.randint(value.numel(), (48,), generator=torch.Generator().manual_seed(0)).to(value.device)
        self.some = value.reshape(-1)[at].double()

    def same(self, other: _Seen) -> bool:
        return self.value.shape == other.value.shape and torch.equal(self.value, other.value)


def _addends(there: dict[str, _Seen], target: str, before: list[str]) -> tuple[str, str] | None:
    """The sites of two tensors that add up to what is at a site, or would before a ReLU."""
    total = there[target].value
    fitting = [site for site in before if there[site].value.shape == total.shape]
    if len(fitting) < 2:
        return None
    some = torch.stack([there[site].some for site in fitting])
    largest = max(float(total.abs().max()), float(some.abs().max()))
    tolerance = 4 * torch.finfo(total.dtype).eps * max(largest, 1e-30)
    best: tuple[float, tuple[str, str]] | None = None
    for first, site in enumerate(fitting):
        sums = some[first] + some[first + 1 :]
        wanted = there[target].some
        near = ((sums - wanted).abs().amax(1) <= tolerance) | ((sums.relu() - wanted).abs().amax(1) <= tolerance)  # fmt: skip
        for second in near.nonzero().flatten().tolist():
            other = fitting[first + 1 + second]
            one, two = there[site].value, there[other].value
            added = one + two
            # A branch that is 0 tells nothing.
            if torch.equal(added, one) or torch.equal(added, two):
                continue
            error = min(float((form - total).abs().max()) for form in (added, added.relu()))
            if error <= tolerance and (best is None or error < best[0]):
                best = error, (site, other)
    return None if best is None else best[1]


def _ordered(there: dict[str, _Seen], pair: tuple[str, str], streams: list[str]) -> tuple[str, str]:
    """The residual branch first: what entered the block or was summed before, else what fewer modules made from it."""

    def far(site: str) -> tuple[bool, int]:
        passed = 0
        while not any(there[site].same(there[stream]) for stream in streams):
            source = f"{site.removesuffix(':in')}:in"
            if source == site or source not in there:
                return True, passed
            passed += 1
            made = (s for s in there if not s.endswith(":in") and there[s].same(there[source]) and s != site)
            site = next((stream for stream in streams if there[stream].same(there[source])), None) or next(made, source)  # fmt: skip
        return False, passed

    first, second = sorted(pair, key=far)
    return first, second


def flow(
    model: nn.Module,
    data: Any,
    features: Features,
    *,
    branches: Iterable[Branches] | None = None,
    form: str = "usual",
    ridge: float = 1e-3,
    pool: int | str = 1,
    rows: str | None = None,
    heldout: Any = 0.2,
    seed: int = 0,
) -> Flow:
    """CKA and V-information of both branches of every residual block with each feature.

    Args:
        model, data, features, ridge, pool, rows, heldout, seed: as for :func:`~lineament.measure.complexity.layers.complexity`.
        branches: those of :func:`residual_branches` by default.
        form: of CKA, see :func:`cka`; ``"debiased"`` walks the training samples a second time.

    Raises:
        InputError: no residual sum in the model, and what :func:`complexity` raises.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(3, 3)
    ...     def forward(self, x):
    ...         return torch.relu(x + self.fc(x))
    >>> _ = torch.manual_seed(0)
    >>> net, x = nn.Sequential(Block(), Block(), nn.Linear(3, 2)), torch.randn(40, 3)
    >>> flow(net, (x, torch.zeros(40)), "1").residual_cka.shape
    torch.Size([2, 3])
    """
    checks.one_of("form", form, FORMS)
    data = in_one_order(data)
    if branches is None:
        inputs = first_batch(data)[0]
        branches = residual_branches(model, inputs[:4] if isinstance(inputs, Tensor) else inputs)
    sums = tuple(branches)
    places = list(dict.fromkeys(site for b in sums for site in (b.residual, b.main)))
    reading = Reading(model, data, features, sites=places, pool=pool, rows=rows, heldout=heldout, seed=seed)
    moments = ReadoutMoments()
    for look in reading.walk("train", "flow"):
        moments.update(look.activations, look.z)
    residuals = Residuals(moments.readouts(ridge))
    for look in reading.walk("heldout", "flow"):
        residuals.update(look.activations, look.z, look.samples)
    information = residuals.compute()[0]
    if form == "debiased":
        debiased = DebiasedCKA(moments)
        for look in reading.walk("train", "flow"):
            debiased.update(look.activations, look.z)
        similarity = debiased.compute()
    else:
        similarity = {site: _cka(moments, site, form) for site in places}

    def rows_of(values: Any, branch: str) -> Tensor:
        return torch.stack([values[getattr(b, branch)] for b in sums])

    known = dict(zip(information.sites, information.information))
    errors = dict(zip(information.sites, information.information_errors))
    return Flow(
        branches=sums,
        residual_cka=rows_of(similarity, "residual"),
        main_cka=rows_of(similarity, "main"),
        residual_information=rows_of(known, "residual"),
        main_information=rows_of(known, "main"),
        errors=torch.stack([rows_of(errors, "residual"), rows_of(errors, "main")]),
        form=form,
        samples=information.samples,
    )
