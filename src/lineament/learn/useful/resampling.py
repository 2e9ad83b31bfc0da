"""Better accuracy on the same distribution: find the examples that are learned late, show them twice, start again (USEFUL).

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768. Gradient descent learns fast features first and may never need the
others; a second copy of the examples that lack the fast feature evens this out, for any optimizer. The training itself is yours: a
function that trains on the rows it is given and yields each epoch's training error; :func:`trainer` makes one of the training loop.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.data import Sampler

from lineament.core import checks
from lineament.core.models import class_logits
from lineament.core.results import Readable
from lineament.learn.useful.early_outputs import batches, outputs_of, unusable
from lineament.learn.useful.separating import separating_epoch, window_of
from lineament.learn.useful.slow_examples import Selection, refuse_empty, select_slow
from lineament.train.callbacks import ExampleWeights, Rows
from lineament.train.loop import epochs as walk

# fit(model, rows, epochs): trains on these rows of the data, yields the training error after each epoch.
Fitting = Callable[..., Iterable[float]]


class UpsamplingSampler(Sampler[int]):
    """The enlarged data set in a fresh order each epoch, for any ``torch.utils.data.DataLoader``.

    Only indices are repeated, never data. Across processes the epoch's order is the same everywhere and each takes every
    ``replicas``-th entry, padded from the front, so that all of them have as many (``DistributedSampler`` would cut the data set
    before it is enlarged).

    Args:
        rows: a :class:`Selection`, or the indices themselves, some of them repeated.
        factor, balance: as for :meth:`Selection.indices`; refused with indices.
        shuffle: a fresh order for each epoch, or the order of the indices.
        seed: with the epoch's number it decides the order.
        rank, replicas: this process and how many there are.

    >>> sampler = UpsamplingSampler(torch.tensor([0, 1, 1, 2]), shuffle=False)
    >>> list(sampler), len(sampler)
    ([0, 1, 1, 2], 4)
    """

    def __init__(
        self,
        rows: Selection | Int[Tensor, "upsampled"],
        *,
        factor: int | None = None,
        balance: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
    ) -> None:
        if isinstance(rows, Selection):
            rows = rows.indices(2 if factor is None else factor, balance=balance or "none", seed=seed)
        else:
            checks.require(
                factor is None and balance is None,
                "factor, balance: they say how a Selection is enlarged, and rows are indices already; repeat those, or pass the Selection",
            )
        self.rows = checks.tensor("rows", rows, shape=("upsampled",), floating=False).long().cpu()
        checks.require(bool((self.rows >= 0).all()), "rows: got negative indices")
        checks.number("replicas", replicas, low=1, integer=True)
        checks.number("rank", rank, low=0, high=replicas - 1, integer=True)
        checks.seed("seed", seed)
        self.shuffle, self.seed, self.rank, self.replicas = shuffle, seed, rank, replicas
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.replicas)

    def __iter__(self) -> Iterator[int]:
        order = self.rows
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = order[torch.randperm(len(order), generator=generator)]
        self.epoch += 1
        missing = len(self) * self.replicas - len(order)
        order = torch.cat([order, order.repeat(math.ceil(missing / len(order)))[:missing]])
        yield from order[self.rank :: self.replicas].tolist()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next; each pass moves on by one by itself."""
        self.epoch = checks.number("epoch", epoch, low=0, integer=True)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.set_epoch(state["epoch"])


@dataclass(frozen=True)
class Early(Readable):
    """The first two stages: after how many epochs the examples were separated, the errors until then, and the slow examples."""

    selection: Selection
    epoch: int
    errors: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "errors": list(self.errors), "selection": self.selection.to_dict()}

    def plot(self, ax: Any = None) -> Any:
        """The early training error, and where the examples were separated."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(range(1, len(self.errors) + 1), self.errors, "o-")
        ax.axvline(self.epoch, color="C7", linewidth=0.8)
        ax.set(xlabel="epoch", ylabel="training error")
        return ax


@dataclass(frozen=True)
class Useful(Readable):
    """A whole run: its early part, the rows that were trained on, the training error after each epoch."""

    early: Early
    rows: Int[Tensor, "upsampled"]
    errors: tuple[float, ...]

    @property
    def cost(self) -> float:
        """Steps of the early and the final training over those of a plain training of as many epochs."""
        samples = len(self.early.selection.mask)
        return len(self.rows) / samples + len(self.early.errors) / max(len(self.errors), 1)

    def to_dict(self) -> dict[str, Any]:
        return {"early": self.early.to_dict(), "rows": self.rows.tolist(), "errors": list(self.errors)}

    def plot(self, ax: Any = None) -> Any:
        """The training errors of the early and the final training."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for label, errors in (("early, original data", self.early.errors), ("final, upsampled", self.errors)):
            ax.plot(range(1, len(errors) + 1), errors, label=label)
        ax.set(xlabel="epoch", ylabel="training error")
        ax.legend()
        return ax


def trainer(data: Any, *, callbacks: Sequence[Any] = (), **options: Any) -> Fitting:
    """The training loop as :func:`useful` and :func:`find_slow` want it: ``fit(model, rows, epochs)`` yields the training errors.

    Args:
        data, callbacks, options: as for :func:`lineament.train.loop.fit`.

    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> fit = trainer((x, torch.tensor([0, 1])), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1.0))
    >>> list(fit(nn.Linear(1, 2), torch.arange(2), 5))[-1]
    0.0
    """

    def fit(model: nn.Module, rows: Tensor, epochs: int, *, weights: Tensor | None = None) -> Iterator[float]:
        weigh = [] if weights is None else [ExampleWeights(weights)]
        for done in walk(model, data, epochs=epochs, callbacks=[Rows(rows), *weigh, *callbacks], **options):
            assert done.accuracy is not None
            yield 1 - done.accuracy

    return fit


def find_slow(
    model: nn.Module,
    fit: Fitting,
    data: Any,
    *,
    epochs: int,
    separating: int | str = "auto",
    by: str = "clusters",
    output: str = "softmax",
    site: str | None = None,
    exclude: Bool[Tensor, "samples"] | None = None,
    allow_empty: bool = False,
    window: tuple[float, float] = (0.02, 0.15),
    smooth: int = 3,
    seed: int = 0,
) -> Early:
    """Stages 1 and 2: train for a few epochs, select the slow examples; the model is then back at its initial weights.

    Args:
        model: at its initialisation.
        fit: ``fit(model, rows, epochs)`` trains on these rows and yields the training error after each epoch; it is not walked to its
            end, so that schedules may be those of the whole training. For a final training with SAM it is still plain SGD.
        data: the un-augmented training data in the order of its indices, in any form that :func:`~lineament.train.loop.fit` takes.
        epochs: E, the epochs of the whole training.
        separating: t; ``"auto"`` trains to the end of ``window`` (and as far as the smoothing looks ahead), applies
            :func:`~lineament.learn.useful.separating.separating_epoch` to the errors and takes the weights of that epoch, copies of which are kept on the way.
        by, exclude, allow_empty, seed: as for :func:`select_slow`.
        output: ``"softmax"``, ``"logits"``, or ``"features"`` of ``site`` (the head's input, ``"head:in"``).
        window, smooth: as for :func:`~lineament.learn.useful.separating.separating_epoch`.

    Raises:
        InputError: before any training, wrong arguments and labels that leave a class empty, samples whose inputs are NaN; a loader that
            shuffles; a ``fit`` that ends too early or yields no errors.

    >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    >>> fit = trainer((x, y), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    >>> early = find_slow(nn.Linear(4, 2), fit, (x, y), epochs=40, separating=3)
    >>> early.epoch, len(early.errors), 0 < early.selection.fraction < 1
    (3, 3, True)
    """
    checks.number("epochs", epochs, low=1, integer=True)
    checks.one_of("output", output, ("softmax", "logits", "features"))
    checks.require(
        (output == "features") == (site is not None), "site: give it with output='features', and only then"
    )
    if isinstance(separating, str):
        checks.one_of("separating", separating, ("auto",))
        low, high = window_of(epochs, window)
        checks.require(
            high + 1 <= epochs,
            f"epochs: got {epochs}, too few to see where the error's fall slows down; give separating=t",
        )
        last = min(high + 1 + smooth // 2, epochs)
    else:
        low = high = last = checks.number("separating", separating, low=1, high=epochs, integer=True)
    known = _checked(model, data, allow_empty)
    initial = copy.deepcopy(model.state_dict())
    try:
        kept: dict[int, Any] = {}
        errors: list[float] = []
        run = fit(model, torch.arange(len(known)), epochs)
        for epoch, error in enumerate(run, 1):
            errors.append(checks.number("fit: the training error", float(error), low=0))
            if low <= epoch <= high:
                kept[epoch] = None if low == high else copy.deepcopy(model.state_dict())
            if epoch == last:
                break
        if isinstance(run, Iterator) and hasattr(run, "close"):
            run.close()  # pyright: ignore[reportAttributeAccessIssue]
        checks.require(
            len(errors) == last, f"fit: ended after {len(errors)} epochs, expected at least {last}"
        )
        chosen = high
        if low != high:
            chosen = 1 + separating_epoch(errors, epochs=epochs, window=window, smooth=smooth)
            model.load_state_dict(kept[chosen])
        scores, labels, features = outputs_of(model, data, site=site, recalibrate=chosen < 3)
    finally:
        model.load_state_dict(initial)
    _refuse_other_order(known, labels)
    rows = features if features is not None else output
    selection = select_slow(
        scores, labels, by=by, output=rows, exclude=exclude, allow_empty=allow_empty, seed=seed
    )
    return Early(selection, chosen, tuple(errors))


def _checked(model: nn.Module, data: Any, allow_empty: bool) -> Tensor:
    """The labels in the data's order; those that do not fit the model's outputs are refused before any training."""
    first = next(batches(data), None)
    if first is None:
        raise checks.InputError("data: it is empty; expected (inputs, labels), or batches of them")
    scores, _, _ = outputs_of(model, [first])
    labels = torch.cat([y.cpu() for _, y in batches(data)])
    classes = (class_logits(scores) if bool(labels.any()) else scores).shape[1]
    refuse_empty(checks.labels("labels", labels, classes=classes), classes, allow_empty)
    _refuse_other_order(first[1], labels[: len(first[1])])
    refuse_unusable("data", unusable(model, data), len(labels))
    return labels


def refuse_unusable(what: str, samples: list[int], count: int) -> None:
    """Name the samples that make the outputs NaN."""
    checks.require(
        not samples,
        f"{what}: {len(samples)} of {count} samples hold NaN or infinite inputs, of which USEFUL cannot tell how late they are learned; leave out "
        f"{'sample' if len(samples) == 1 else 'samples'} {', '.join(map(str, samples[:5]))}{', ...' if len(samples) > 5 else ''} (counted from 0)",
    )


def _refuse_other_order(once: Tensor, again: Tensor) -> None:
    """Two walks that give other labels are in no order of indices: what is selected would be examples at random."""
    checks.require(
        torch.equal(once.cpu(), again.cpu()),
        "data: it gives other labels at each walk, expected the training data in the order of its indices; make it with shuffle=False "
        "(and without a random sampler)",
    )


def useful(
    model: nn.Module,
    fit: Fitting,
    data: Any,
    *,
    epochs: int,
    factor: int = 2,
    balance: str = "none",
    weigh: bool = False,
    early_fit: Fitting | None = None,
    restart: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Useful:
    """USEFUL: train a little, select the examples learned late, start again with ``factor`` copies of them; trains ``model``.

    Args:
        model, fit, data, epochs: as for :func:`find_slow`. The final training is ``fit(model, rows, epochs)`` with repeated rows, by a
            fresh optimizer and schedule.
        factor, balance: as for :meth:`Selection.indices`. An epoch has 1 + (factor - 1)|S|/n times the steps.
        weigh: multiply the slow examples' loss instead: ``fit(model, rows, epochs, weights=...)``.
        early_fit: another training for the first stage: plain SGD where ``fit`` uses SAM.
        restart: called with the model before the final training, to draw new weights; by default it starts from the same ones,
            so that runs with and without upsampling are paired.
        options: as for :func:`find_slow`.

    Source: Nguyen et al. (2024).

    >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    >>> fit = trainer((x, y), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    >>> done = useful(nn.Linear(4, 2), fit, (x, y), epochs=20, separating=2)
    >>> len(done.rows) == 60 + int(done.early.selection.mask.sum()), len(done.errors)
    (True, 20)
    """
    checks.number("factor", factor, low=1, integer=True)
    early = find_slow(model, early_fit or fit, data, epochs=epochs, seed=seed, **options)
    if restart is not None:
        restart(model)
    if weigh:
        rows = torch.arange(len(early.selection.mask))
        errors = list(fit(model, rows, epochs, weights=early.selection.weights(factor)))
    else:
        rows = early.selection.indices(factor, balance=balance, seed=seed)
        errors = list(fit(model, rows, epochs))
    return Useful(early, rows, tuple(float(e) for e in errors))
