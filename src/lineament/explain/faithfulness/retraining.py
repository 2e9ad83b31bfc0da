"""Does keeping what an attribution calls important beat keeping what it calls unimportant, when a fresh model learns from it?

DiffROAR: Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781. PredPower(A) is the best accuracy a model class reaches on inputs of which only the
coordinates chosen by A are left; DiffROAR(k) = PredPower(top k) - PredPower(bottom k). ROAR (accuracy lost when the top is removed) and KAR
(accuracy with the top kept) fall out of the same trainings. Masks leak: which coordinates are left tells what the first model
thought, so that no single accuracy here is that of the kept *values*; the difference of both ends cancels a part of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked, progress
from lineament.core.engines import side_by_side, workers
from lineament.core.models import answered, frozen
from lineament.core.results import Readable, axes, plain
from lineament.explain.faithfulness.unmasking import Group, Unmasked, fill_value, rank

FRACTIONS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
_AT_ONCE = 1000


@dataclass(frozen=True)
class DiffROAR(Readable):
    """Test accuracies of models trained on either end, (levels, runs), for each kept fraction; every run has a seed.

    ``unmasked`` is the accuracy with nothing replaced, ``chance`` that of always answering the most frequent class, ``zero_share`` the share
    of scores that are exactly zero, on training and on test inputs, ``tests`` the number of test inputs.
    """

    fractions: tuple[float, ...]
    keep_top: Float[Tensor, "levels runs"]
    keep_bottom: Float[Tensor, "levels runs"]
    seeds: tuple[int, ...] = ()
    unmasked: float = math.nan
    chance: float = math.nan
    zero_share: tuple[float, float] = (math.nan, math.nan)
    setting: str = ""
    tests: int = 0

    @property
    def mean(self) -> Float[Tensor, "levels"]:
        """DiffROAR: the mean of keep-top minus keep-bottom over all pairs of runs."""
        return self._pairs().mean(1)

    @property
    def std(self) -> Float[Tensor, "levels"]:
        """The standard deviation over all pairs of runs, with the number of pairs below the root."""
        return self._pairs().std(1, correction=0)

    def interval(self, level: float = 0.95) -> Float[Tensor, "levels 2"]:
        """Student's confidence interval over seeds: both ends of one seed are a pair. Infinite for a single run.

        It covers how training and initialisation vary, not the choice of the test inputs (:attr:`test_error`) nor of the model that was explained.
        """
        from scipy.stats import t

        checks.number("level", level, low=0, high=1, open_low=True, open_high=True)
        pairs = self.keep_top - self.keep_bottom
        runs = pairs.shape[1]
        if runs < 2:
            half = torch.full_like(self.mean, math.inf)
        else:
            half = float(t.ppf(0.5 + level / 2, runs - 1)) * pairs.std(1) / math.sqrt(runs)
        return torch.stack([self.mean - half, self.mean + half], 1)

    @property
    def test_error(self) -> Float[Tensor, "levels"]:
        """The standard error that the finite number of test inputs alone brings to one run's difference (an upper bound: the inputs are shared)."""
        top, bottom = self.keep_top.mean(1), self.keep_bottom.mean(1)
        if self.tests == 0:
            return torch.full_like(top, math.nan)
        return ((top * (1 - top) + bottom * (1 - bottom)) / self.tests).sqrt()

    @property
    def roar(self) -> Float[Tensor, "levels"]:
        """The accuracy lost when the top is removed and only this share of the bottom kept (Hooker et al. 2019)."""
        return self.unmasked - self.keep_bottom.mean(1)

    @property
    def kar(self) -> Float[Tensor, "levels"]:
        """The accuracy when only the top is kept (Hooker et al. 2019)."""
        return self.keep_top.mean(1)

    def at(self, fraction: float) -> float:
        """DiffROAR at one of the kept fractions."""
        checks.require(
            fraction in self.fractions,
            f"fraction: got {checks.show(fraction)}, which was not measured; there are: {', '.join(map(str, self.fractions))}",
        )
        return float(self.mean[self.fractions.index(fraction)])

    def to_dict(self) -> dict[str, Any]:
        derived = ("mean", "std", "roar", "kar", "test_error")
        found = {name: getattr(self, name) for name in derived}
        return plain({**vars(self), **found, "interval": self.interval()})

    def plot(self, ax: Any = None, label: str = "DiffROAR", color: str = "C0") -> Any:
        """DiffROAR against the kept fraction, with one standard deviation over pairs of runs."""
        ax = axes(ax)
        at = [100 * f for f in self.fractions]
        ax.errorbar(
            at, self.mean.tolist(), self.std.tolist(), marker="o", capsize=2, color=color, label=label
        )
        ax.axhline(0, color="C7", linewidth=0.8)
        ax.set(xlabel="coordinates kept, %", ylabel="accuracy, top kept - bottom kept")
        ax.legend()
        return ax

    def _pairs(self) -> Tensor:
        return (self.keep_top[:, :, None] - self.keep_bottom[:, None, :]).flatten(1)


@torch.inference_mode(False)
def diffroar(
    attribute_fn: Any,
    train_fn: Any,
    data: Sequence[Tensor],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    group: Group = "coordinate",
    fill: Any = "mean",
    magnitude: bool = True,
    ties: str = "stable",
    jobs: int = 1,
    chance_ok: bool = False,
) -> DiffROAR:
    """DiffROAR, ROAR and KAR of any attribution, with any training.

    For each kept fraction k and each seed one model is trained on training inputs whose top k is kept and one on those whose
    bottom k is; both are tested on test inputs kept in the same way. Attributions see inputs only, never labels.

    Args:
        attribute_fn: ``attribute_fn(inputs) -> scores`` of the inputs' shape or one map (batch, 1, height, width); or a Captum attribution
            object, which is asked for the class that its model predicts.
        train_fn: ``train_fn(inputs, targets, seed) -> model``, a callable ``inputs -> logits``, freshly initialised from the seed.
            If it has a method ``stacked(views, targets, seeds) -> models``, as :class:`lineament.train.stacked.Training` has, all
            trainings (of a worker) are given to it at once; ``views[i][rows]`` are rows of the i-th training's inputs.
        data: (training inputs, training targets, test inputs, test targets), class labels from 0.
        fractions: the kept shares k in [0, 1]; 1 keeps everything (DiffROAR is 0 exactly), 0 nothing (both ends learn the
            most frequent class).
        seeds: one run each; the same for both ends.
        group: ``"coordinate"``, ``"pixel"`` or a block's size, see :func:`lineament.explain.faithfulness.unmasking.rank`, as ``magnitude`` and ``ties``.
        fill: what stands for a replaced coordinate: the training inputs' ``"mean"`` (per channel), ``"zero"``, a number or a tensor.
        jobs: trainings side by side, see :mod:`lineament.core.engines`; -1 for all cores.
        chance_ok: go on when a model trained on everything is no better than chance (a control with shuffled labels).

    Returns:
        A :class:`DiffROAR`.

    Raises:
        InputError: data, scores, fractions, seeds or labels that cannot be used; a ``train_fn`` whose model is at chance on unmasked data.

    >>> x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
    >>> def train(inputs, targets, seed):
    ...     c = inputs - inputs.mean(0)
    ...     w = torch.linalg.solve(c.T @ c + torch.eye(4), c.T @ (targets[:, None] - 0.5))
    ...     return lambda z: torch.cat([-z @ w, z @ w], 1)
    >>> found = diffroar(lambda z: torch.eye(4)[0].expand(len(z), 4), train, (x[:300], y[:300], x[300:], y[300:]), fractions=[1, 0.25])
    >>> found.mean[0].item(), found.mean[1].item() > 0.4
    (0.0, True)
    """
    x, y, x_test, y_test = _checked(data)
    kept = [
        float(checks.number("fractions", f, low=0, high=1))
        for f in checks.listed("fractions", fractions, "kept shares in [0, 1], such as [1.0, 0.1]")
    ]
    checks.require(len(set(kept)) == len(kept), f"fractions: got {kept}, expected each once")
    seeds = checks.listed("seeds", seeds, "seeds, such as range(3)")
    runs = [checks.number("seeds", s, low=0, integer=True) for s in seeds]
    checks.require(len(set(runs)) == len(runs), f"seeds: got {runs}, expected different ones")
    checks.number("jobs", jobs, integer=True)
    checks.require(jobs != 0, "jobs: got 0, expected a number of processes, or -1 for all cores")
    _refuse_other_signature(train_fn)
    value = fill_value(fill, x)

    orders = []
    for part in (x, x_test):
        given = scores_of_inputs(attribute_fn, part)
        checks.require(
            hasattr(given, "shape") and len(given.shape) >= 2 and len(given) == len(part),
            f"attribute_fn: it returned {checks.show(given)} for {len(part)} inputs of shape {tuple(x.shape[1:])}, expected one score for each coordinate "
            "or pixel of each",
        )
        scores = torch.as_tensor(given)
        orders.append(
            rank(scores, group=group, shape=x.shape[1:], magnitude=magnitude, ties=ties).to(part.device)
        )
    chance = float(torch.bincount(y_test).max()) / len(y_test)
    # The first training sees everything: it shows whether train_fn trains, before any other is paid for.
    first = _right(train_fn(x, y, runs[0]), x_test, y_test)
    if not chance_ok:
        _refuse_untrained(first, chance, len(y_test))
    plan = [
        (level, end, seed)
        for level, k in enumerate(kept)
        for end in ("top", "bottom")
        for seed in runs
        # Where everything is kept both ends are one training, and the first seed's is done.
        if not (k == 1 and (end == "bottom" or seed == runs[0]))
    ]
    views = [
        [Unmasked(part, order, kept[level], end, value) for part, order in zip((x, x_test), orders)]
        for level, end, _ in plan
    ]
    measured = _trained(train_fn, views, y, y_test, [seed for *_, seed in plan], jobs)
    table = dict(zip(plan, measured))
    for level, k in enumerate(kept):
        if k == 1:
            table[level, "top", runs[0]] = first
            table.update({(level, "bottom", s): table[level, "top", s] for s in runs})
    top, bottom = (
        torch.tensor(
            [[table[level, end, s] for s in runs] for level in range(len(kept))], dtype=torch.float64
        )
        for end in ("top", "bottom")
    )
    whole = float(top[kept.index(1.0)].mean()) if 1.0 in kept else first
    setting = f"group {group}, fill {fill if not isinstance(fill, Tensor) else 'a tensor'}, ties {ties}"
    zeros = (orders[0].zero_share, orders[1].zero_share)
    return DiffROAR(tuple(kept), top, bottom, tuple(runs), whole, chance, zeros, setting, len(y_test))


def scores_of_inputs(attribute_fn: Any, inputs: Tensor) -> Tensor:
    """What an attribution says of some inputs: of a function, or of a Captum object for the class its model predicts.

    >>> scores_of_inputs(torch.abs, torch.tensor([[-1.0]])).tolist()
    [[1.0]]
    """
    if callable(getattr(attribute_fn, "attribute", None)):
        model = attribute_fn.forward_func

        def explain(part: Tensor) -> Tensor:
            with torch.no_grad():
                target = answered(model, part, "inputs").argmax(1)
            return attribute_fn.attribute(part, target=target).detach()

        with frozen(model) if isinstance(model, nn.Module) else nullcontext():
            return chunked(explain, inputs)
    checks.require(
        callable(attribute_fn),
        f"attribute_fn: got {checks.show(attribute_fn)}, expected a function inputs -> scores or a Captum attribution object",
    )
    return attribute_fn(inputs)


def accuracy(model: Callable[[Tensor], Any], inputs: Any, targets: Int[Tensor, "batch"]) -> float:
    """The share of inputs (a tensor, or a view with rows made when asked for) that a model answers rightly.

    >>> accuracy(lambda x: x, torch.eye(3), torch.tensor([0, 1, 1]))
    0.6666666666666666
    """
    right = 0
    with torch.no_grad():
        for rows in torch.arange(len(targets)).split(_AT_ONCE):
            z = answered(model, inputs[rows], "inputs")
            checks.require(
                z.ndim == 2 and z.shape[1] > 1,
                f"model: its logits are {checks.show(z)} for {len(rows)} inputs, expected shape (batch, classes) with at least two classes",
            )
            checks.labels("targets", targets[rows], count=len(z), classes=z.shape[1])
            right += int((z.argmax(1).cpu() == targets[rows].cpu()).sum())
    return right / len(targets)


def _right(model: Any, inputs: Any, targets: Tensor) -> float:
    checks.require(
        callable(model), f"train_fn: it returned {checks.show(model)}, expected a model inputs -> logits"
    )
    if isinstance(model, nn.Module):
        with frozen(model):
            return accuracy(model, inputs, targets)
    return accuracy(model, inputs, targets)


def _trained(
    train_fn: Any, views: list[Any], y: Tensor, y_test: Tensor, seeds: list[int], jobs: int
) -> list[float]:
    if not views:
        return []
    # Every worker gets as many trainings: one after the other, or together where train_fn can.
    share = min(workers(jobs), len(views))
    calls = [(train_fn, views[k::share], y, y_test, seeds[k::share]) for k in range(share)]
    done = side_by_side(_several, calls, jobs=jobs)
    found = [0.0] * len(views)
    for k, part in enumerate(done):
        found[k::share] = part
    return found


def _several(train_fn: Any, views: list[Any], y: Tensor, y_test: Tensor, seeds: list[int]) -> list[float]:
    if callable(getattr(train_fn, "stacked", None)):
        models = train_fn.stacked([train for train, _ in views], y, seeds)
        return [_right(model, test, y_test) for model, (_, test) in zip(models, views)]
    work = progress(zip(views, seeds), "retraining", total=len(views))
    return [_right(train_fn(train.whole(), y, seed), test, y_test) for (train, test), seed in work]


def _refuse_other_signature(train_fn: Any) -> None:
    checks.require(
        callable(train_fn),
        f"train_fn: got {checks.show(train_fn)}, expected a function train_fn(inputs, targets, seed) -> model",
    )
    try:
        signature = inspect.signature(train_fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, 0)
    except TypeError as error:
        raise checks.InputError(
            f"train_fn: it is called as train_fn(inputs, targets, seed) and takes {signature} ({error})"
        ) from error


def _refuse_untrained(found: float, chance: float, count: int) -> None:
    # Two standard errors above the most frequent class: an untrained model gets there once in forty.
    bar = chance + 2 * math.sqrt(chance * (1 - chance) / count)
    checks.require(
        found > bar,
        f"train_fn: trained on everything, its model is right for {100 * found:.1f} % of the test inputs, and always answering the most "
        f"frequent class for {100 * chance:.1f} %, so that it looks untrained and no level could tell anything; check that train_fn "
        "trains and returns the trained model, or pass chance_ok=True for a control with labels that mean nothing",
    )


def _checked(data: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.require(
        isinstance(data, (tuple, list)) and len(data) == 4,
        f"data: got {f'{len(data)} parts' if isinstance(data, (tuple, list)) else checks.show(data)}, expected four: (training inputs, training "
        "targets, test inputs, test targets)",
    )
    x, y, x_test, y_test = data
    for name, value in (("training inputs", x), ("test inputs", x_test)):
        checks.tensor(f"data: {name}", value, floating=True)
        checks.require(
            value.ndim >= 2, f"data: {name}: got {checks.show(value)}, expected shape (batch, ...)"
        )
    checks.require(
        x.shape[1:] == x_test.shape[1:],
        f"data: training inputs of shape {tuple(x.shape[1:])} and test inputs of shape {tuple(x_test.shape[1:])}, expected the same",
    )
    y = checks.labels("data: training targets", y, count=len(x))
    classes = int(y.max()) + 1
    checks.require(classes > 1, "data: all training targets are class 0, expected at least two classes")
    return x, y, x_test, checks.labels("data: test targets", y_test, count=len(x_test), classes=classes)
