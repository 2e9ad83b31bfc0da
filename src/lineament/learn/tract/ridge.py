"""TrAct's gradient of one weight over the batches of a training: exact, from a random part of the rows, or from gathered ones.

Petersen, Borgelt, Ermon, arXiv 2410.23970, section 3. The exact form uses the batch's own Xᵀ X / N, in n or in N dimensions, whichever is
less. The stochastic form estimates it from some rows, keeps it for some steps and averages it over time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lineament.core.checks import InputError, NotFiniteError, require
from lineament.learn.tract.rows import (
    Use,
    divide,
    divide_wide,
    factorise,
    finite,
    full_precision,
    mean_square,
    second_moment,
    wide,
)


class RidgeGradient:
    """Makes Gᵀ X (Xᵀ X / N + λ I)⁻¹ of Gᵀ X and X; the arguments are those of :func:`lineament.learn.tract.layer.tract`.

    Attributes:
        lam: λ.
        count: how many gradients have been made.
        gathered: the sum of Xᵀ X and N since the last :meth:`of_gathered`, or ``None``.
    """

    def __init__(
        self,
        name: str,
        *,
        lam: float,
        samples: int | None,
        every: int,
        momentum: float,
        group: Any,
        nonfinite: str,
        seed: int,
    ):
        self.lam, self.count = lam, 0
        self.gathered: tuple[Tensor, int] | None = None
        self._name = name
        self._samples, self._every, self._momentum = samples, every, momentum
        self._group, self._nonfinite = group, nonfinite
        self._generator = torch.Generator().manual_seed(seed)
        self._passes = 0
        self._mean: tuple[Tensor, float] | None = None  # the running sum and the weights in it
        self._kept: tuple[float, Tensor] | None = None  # λ and the factor
        self._measured = False

    def of_batch(self, gradient: Tensor, x: Tensor, use: Use) -> Tensor:
        """The TrAct gradient of one batch, from the ordinary gradient and the input."""
        exact = self._samples is None and self._every == 1 and not self._momentum and self._group is None

        def make() -> Tensor:
            if exact and self.lam > 0 and wide(use, x):
                self._measure(lambda: mean_square(use, x))
                return divide_wide(gradient, use, x, self.lam)
            return self._divided(gradient, self._factor(x, use))

        return self._guarded(gradient, make)

    def gather(self, x: Tensor, use: Use, *, anew: bool) -> None:
        """Add a micro-batch's rows; ``anew`` forgets those before, whose gradient is no longer there."""
        with torch.no_grad(), full_precision(x.device):
            total, rows = second_moment(use, x)
            if self.gathered is not None and not anew:
                total, rows = total.add_(self.gathered[0]), rows + self.gathered[1]
            self.gathered = total, rows

    def of_gathered(self, gradient: Tensor) -> Tensor:
        """The TrAct gradient of the micro-batches since the last call, from their summed ordinary gradient."""
        require(self.gathered is not None, "of_gathered: nothing was gathered")
        assert self.gathered is not None
        (total, rows), self.gathered = self.gathered, None
        return self._guarded(gradient, lambda: self._divided(gradient, self._factorised(total, rows)))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {
            "passes": self._passes,
            "mean": self._mean,
            "kept": self._kept,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        missing = sorted({"passes", "mean", "kept", "generator"} - set(state))
        require(not missing, f"state: lacks {missing}, expected what state_dict() gave")
        self._passes, self._mean, self._kept = int(state["passes"]), state["mean"], state["kept"]
        self._generator.set_state(state["generator"])

    def _guarded(self, gradient: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The gradient that ``make`` makes, or what the user wants where values are not finite."""
        try:
            with torch.no_grad(), full_precision(gradient.device):
                # The moments come first: with several processes all of them must take part in the sum.
                made = make()
            values = gradient._values() if gradient.is_sparse else gradient
            if self._nonfinite != "pass" and not bool(torch.isfinite(values).all()):
                raise NotFiniteError("the gradient of its weight holds NaN or infinite values")
        except NotFiniteError as error:
            if self._nonfinite == "skip":
                return torch.zeros_like(gradient)
            if self._nonfinite == "pass":
                return gradient * float("nan")
            raise InputError(
                f"layer {self._name!r}: {error}; choose nonfinite='skip' to leave such batches out, or 'pass' to hand them on "
                "(torch.amp.GradScaler looks for them)"
            ) from error
        except InputError as error:
            raise InputError(f"layer {self._name!r}: {error}") from error
        self.count += 1
        return made

    def _divided(self, gradient: Tensor, factor: Tensor | None) -> Tensor:
        return torch.zeros_like(gradient) if factor is None else divide(gradient, factor)

    def _factor(self, x: Tensor, use: Use) -> Tensor | None:
        """The factor for this backward pass; ``None`` where there is no row at all."""
        due = self._passes % self._every == 0
        self._passes += 1
        if not due and self._kept is not None and self._kept[0] == self.lam:
            return self._kept[1]
        factor = self._factorised(
            *second_moment(use, x, samples=self._samples, generator=self._generator), averaged=True
        )
        if self._every > 1 and factor is not None:
            self._kept = self.lam, factor
        return factor

    def _factorised(self, total: Tensor, rows: int, averaged: bool = False) -> Tensor | None:
        """The factor of Xᵀ X / N + λ I over all processes of the group, or of its running mean; ``None`` for N = 0."""
        if self._group is not None:
            everything = torch.cat([total.flatten().double(), total.new_full((1,), rows, dtype=torch.double)])
            dist.all_reduce(everything, group=self._group)
            total, rows = everything[:-1].view_as(total).to(total.dtype), int(everything[-1])
        if rows == 0:
            return None
        moment = total / rows
        if not finite(moment):
            raise NotFiniteError("its input holds NaN or infinite values")
        if moment.ndim > 1:
            self._measure(lambda: float(moment.diagonal(dim1=-2, dim2=-1).mean()))
        if averaged and self._momentum:
            fresh = 1 - self._momentum
            past, weight = self._mean or (torch.zeros_like(moment), 0.0)
            self._mean = past * self._momentum + moment * fresh, weight * self._momentum + fresh
            moment = self._mean[0] / self._mean[1]
        return factorise(moment, self.lam)

    def _measure(self, mean_square: Callable[[], float]) -> None:
        """Warn, once, of inputs that are far from standardised."""
        if self._measured:
            return
        size = mean_square()
        # What is not finite is reported elsewhere, and measured at the next batch.
        self._measured = math.isfinite(size)
        if self._measured and not 0.01 <= size <= 100:
            warnings.warn(
                f"layer {self._name!r}: the mean square of its inputs is {size:.3g}; lam = {self.lam:g} is meant for "
                "standardised inputs, near 1",
                UserWarning,
                stacklevel=3,
            )
